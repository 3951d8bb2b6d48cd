"""Guards: what is replaced inside Flower's processes is there and is called where we think; without it nothing runs."""

from __future__ import annotations

import importlib
import inspect

import pytest

from fedfuse.compat import flower_processes
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
