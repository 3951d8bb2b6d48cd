"""Guards: what is replaced inside Flower's processes is there and is called where we think; without it nothing runs."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from fedfuse.compat import flower_processes
from fedfuse.compat.flower_processes import OBJECTS, PULLS, Rests, look_again_soon
from fedfuse.deploy.executor import PRELOAD
from fedfuse.errors import WorldError


@pytest.mark.parametrize("kind", ["client", "server"])
def test_a_bundle_passes_our_check_before_it_is_unpacked(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(flower_processes.TASKS[kind])
    install = module.install_from_fab
    monkeypatch.setattr(module, "install_from_fab", install)  # put back after the test
    assert "install_from_fab(" in inspect.getsource(module)  # by this module's own name, at the time of the call
    flower_processes.guard(kind, lambda real: lambda *args: ("checked", real, args))
    assert module.install_from_fab(b"bundle") == ("checked", install, (b"bundle",))
    monkeypatch.delattr(module, "install_from_fab")
    with pytest.raises(WorldError, match="no task is run"):
        flower_processes.guard(kind, lambda real: real)


def test_our_executor_is_the_one_that_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(flower_processes.EXECUTORS)
    monkeypatch.setattr(module, "get_executor", module.get_executor)
    monkeypatch.setattr(module, flower_processes.INVOKER, getattr(module, flower_processes.INVOKER))
    started: list[object] = []
    monkeypatch.setattr("flwr.supercore.cli.flower_superexec", lambda: started.append(module.get_executor("any")))
    monkeypatch.setattr("sys.argv", ["x"])
    executor = object()
    flower_processes.serve(executor)
    assert started == [executor]
    assert "get_executor(" in inspect.getsource(module.run_superexec)
    monkeypatch.delattr(module, "get_executor")
    with pytest.raises(WorldError, match="our executor"):
        flower_processes.serve(executor)


@pytest.mark.parametrize(("status", "ends"), [(500, False), (503, False), (404, True), (400, True)])
def test_an_executor_asks_on_where_its_server_has_failed_once(
    status: int, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen on a full disk: one failure ended the executor, and the server took orders that nobody carried out."""
    module = importlib.import_module(flower_processes.EXECUTORS)
    for name in (flower_processes.CHOICE, flower_processes.INVOKER):
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr("flwr.supercore.cli.flower_superexec", lambda: None)
    monkeypatch.setattr("sys.argv", ["x"])
    assert f"{flower_processes.INVOKER}()" in inspect.getsource(module.run_superexec)
    flower_processes.serve(object())
    said = httpx.HTTPStatusError("", request=httpx.Request("POST", "http://x"), response=httpx.Response(status))
    assert getattr(module, flower_processes.INVOKER)().should_giveup(said) == ends


def test_a_heart_beats_on_where_its_server_has_failed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen on a full disk: one failure, and the node was offline for ever though it lived."""
    sender: Any = importlib.import_module(flower_processes.HEARTBEAT).HeartbeatSender
    monkeypatch.setattr(sender, "_heartbeat", sender._heartbeat)
    for beats_on in (False, True):
        answers, beaten = [500, 404], threading.Event()

        def beat(answers: list[int] = answers, beaten: threading.Event = beaten) -> bool:
            status = answers.pop(0)
            beaten.set() if status == 404 else None
            raise httpx.HTTPStatusError("", request=httpx.Request("POST", "http://x"), response=httpx.Response(status))

        if beats_on:
            flower_processes.beat_on()
        heart = sender(beat)
        monkeypatch.setattr(heart._retry_invoker, "wait_function", lambda seconds: None)
        with pytest.raises(httpx.HTTPStatusError):
            heart._run()
        assert beaten.is_set() == beats_on


def test_a_node_waits_by_its_modules_own_time_and_asks_by_its_own_invoker() -> None:
    node, connection = (importlib.import_module(m) for m in (flower_processes.NODE, flower_processes.CONNECTION))
    assert "time.sleep(3)" in inspect.getsource(node)
    assert f"{flower_processes.INVOKER}()" in inspect.getsource(connection)


def test_without_the_names_a_node_keeps_flowers_habits(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    node, connection = (importlib.import_module(m) for m in (flower_processes.NODE, flower_processes.CONNECTION))
    monkeypatch.delattr(node, "time")
    monkeypatch.delattr(connection, flower_processes.INVOKER)
    flower_processes.be_patient(0.5, lambda error: True)
    assert "--poll 0.5 is not heeded" in capsys.readouterr().out


def test_what_is_only_imported_is_there() -> None:
    assert flower_processes.task_type("client") != flower_processes.task_type("server")
    assert (
        flower_processes.launched("no").reason == "no" if hasattr(flower_processes.launched("no"), "reason") else True
    )
    assert callable(flower_processes.superlink())
    assert callable(flower_processes.supernode())
    for module, name in (
        ("flwr.supercore.exit", "add_exit_handler"),
        ("flwr.supercore.app_utils", "start_parent_process_monitor"),
        ("flwr.supernode.cli.flwr_clientapp", "flwr_clientapp"),
        ("flwr.superlink.cli.flwr_serverapp", "flwr_serverapp"),
    ):
        assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("kind", ["client", "server"])
def test_a_task_is_forked_from_a_process_that_has_imported_all_of_it(kind: str) -> None:
    """What is imported in a task is imported for every message: three in four of its seconds, before it was looked."""
    told = f"""
import importlib, sys
for name in {PRELOAD[kind]}: importlib.import_module(name)
before = set(sys.modules)
importlib.import_module("{flower_processes.ENTRIES[kind]}")
importlib.import_module("{flower_processes.TASKS[kind]}")
print(len(set(sys.modules) - before))
"""
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "0"


def test_parts_of_a_message_that_are_not_there_yet_are_asked_for_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    objects = importlib.import_module(OBJECTS)
    for name in PULLS:
        pull = getattr(objects, name)
        monkeypatch.setattr(pull, "__kwdefaults__", dict(pull.__kwdefaults__))
    waits: list[float] = []

    class Event(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout or 0.0)
            return False

    monkeypatch.setattr(objects, "threading", SimpleNamespace(Event=Event, Lock=threading.Lock))
    left = {"a": 700}  # looks until it is there: more than Flower's 500

    def pull_object(key: str) -> bytes:
        left[key] -= 1
        if left[key] >= 0:
            raise objects.ObjectUnavailableError(key)
        return b"it"

    look_again_soon()
    assert objects.pull_objects(["a"], pull_object) == {"a": b"it"}
    assert waits[0] < 0.03
    assert max(waits) < 1.3
    inside = objects.pull_and_inflate_object_from_tree.__kwdefaults__  # it names them all when it calls the other
    assert inside["initial_backoff"] < 0.03


def test_a_node_looks_again_soon_after_it_was_busy_and_less_and_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    rests = Rests(1.0, slept.append)
    for _ in range(30):
        rests.sleep(3)  # nobody asks for anything
    assert slept[-1] == 1.0
    slept.clear()
    for _ in range(30):
        rests.sleep(0.5)  # its task works
    assert slept[0] < 0.05
    assert slept[-1] == 0.5
    assert slept == sorted(slept)
    slept.clear()
    rests.sleep(3)  # it has answered: the next message may come at once
    rests.sleep(3)
    assert slept[0] < slept[1] < 0.2
    for _ in range(30):
        rests.sleep(3)
    assert slept[-1] == 1.0
    rests.sleep(0.5)
    assert slept[-1] < 0.05  # a new task
    rare = Rests(60.0, slept.append)
    for _ in range(30):
        rare.sleep(3)
    assert slept[-1] == 60  # longer than Flower's own wait, where somebody wants that
