"""Flower's long-running processes from the inside: SuperLink, SuperNode, executor and the processes of single tasks.

Internal names of Flower 1.41. Imported only: the commands' entry points, `TaskType`, `LaunchResult`,
`add_exit_handler`, `start_parent_process_monitor`. Replaced: `run_clientapp.install_from_fab` and
`run_serverapp.install_from_fab` (`guard`), two names of `run_superexec` (`serve`), the defaults of two functions of
`inflatable_utils` (`look_again_soon`), a name each of `start_client_internal` and `fleet_http_connection`
(`be_patient`), and `HeartbeatSender._heartbeat` (`beat_on`). Each function says what it buys and what happens without
the name. Guard: `tests/compat/test_processes.py`.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable
from typing import Any

from fedfuse.errors import WorldError

TASKS = {"client": "flwr.supernode.runtime.run_clientapp", "server": "flwr.superlink.runtime.run_serverapp"}
ENTRIES = {"client": "flwr.supernode.cli.flwr_clientapp", "server": "flwr.superlink.cli.flwr_serverapp"}
INSTALL = "install_from_fab"
EXECUTORS, CHOICE = "flwr.supercore.superexec.run_superexec", "get_executor"
NODE, CONNECTION, INVOKER = (
    "flwr.supernode.start_client_internal",
    "flwr.supernode.fleet_http_connection",
    "make_simple_http_retry_invoker",
)
HEARTBEAT = "flwr.supercore.heartbeat"
OBJECTS, PULLS = "flwr.supercore.inflatable.inflatable_utils", ("pull_objects", "pull_and_inflate_object_from_tree")
SOON = 0.02  # seconds of the first wait for what may be there in a moment


def _module_with(module: str, name: str, loss: str) -> Any:
    """A module that has a name of ours to replace; without it, what would be lost is said, and nothing goes on."""
    found = importlib.import_module(module)
    if not hasattr(found, name):
        raise WorldError(f"this Flower has no {module}.{name}: {loss}; flwr 1.41 has it")
    return found


def guard(kind: str, wrap: Callable[[Any], Any]) -> None:
    """Put our check between fetching a bundle and unpacking it, for tasks of a kind; Flower has no hook there.

    It buys that nobody who may send a bundle may run code here. Without the name no task is run at all.
    """
    module = _module_with(TASKS[kind], INSTALL, "bundles would be installed unlooked at, so no task is run")
    setattr(module, INSTALL, wrap(getattr(module, INSTALL)))


def run_task(kind: str, arguments: list[str]) -> None:
    """Be one task of Flower's in this process."""
    sys.argv = [f"flwr-{kind}app", *arguments]
    beat_on()
    entry: Callable[[], None] = getattr(importlib.import_module(ENTRIES[kind]), f"flwr_{kind}app")
    entry()


def serve(executor: Any) -> None:
    """Be Flower's executor process, with our executor in the place of the one it would choose.

    It buys a task in 0.28 s in place of 14.3 (forked from a process that has imported torch: docs/deployment.md),
    and the guard above. Without the name the process ends, and with it the server or node that started it. So it did
    where the server said once that it failed, as it does on a full disk: here it asks on.
    """
    from flwr.supercore.cli import flower_superexec

    module = _module_with(EXECUTORS, CHOICE, "our executor cannot take its place")
    setattr(module, CHOICE, lambda *_, **__: executor)
    _try_on(module, _failed)
    sys.argv[0] = "flower-superexec"
    flower_superexec()


def beat_on() -> None:
    """Have this process's heartbeats go on where the server says that it failed, of a node and of a task.

    In Flower one such answer ends them for good: the node lives on and is offline for ever, and a run's task is given
    up. Without the names that is so still.
    """
    module = importlib.import_module(HEARTBEAT)
    sender, failure = getattr(module, "HeartbeatSender", None), getattr(module, "HeartbeatFailure", None)
    usual: Any = getattr(sender, "_heartbeat", None)
    if usual is None or failure is None:
        return

    def beat(self: Any) -> None:
        try:
            usual(self)
        except Exception as error:
            if _failed(error):
                raise failure from error  # which is tried again
            raise

    sender._heartbeat = beat  # type: ignore[union-attr]


def _failed(error: BaseException) -> bool:
    """Whether a server said that it failed: its disk is full, say, or its database waited for too long."""
    import httpx  # not where processes are only started

    return isinstance(error, httpx.HTTPStatusError) and error.response.status_code == httpx.codes.INTERNAL_SERVER_ERROR


def _try_on(module: Any, hopeful: Callable[[BaseException], bool]) -> None:
    """Have a module's connections try on after errors for which Flower's give up; without the name they give up."""
    make = getattr(module, INVOKER, None)
    if make is None:
        return

    def invoker() -> Any:
        made = make()
        give_up = made.should_giveup
        made.should_giveup = lambda error: not hopeful(error) and give_up(error)
        return made

    setattr(module, INVOKER, invoker)


def task_type(kind: str) -> Any:
    """Flower's word for tasks of a kind."""
    from flwr.supercore.constant import TaskType

    return TaskType.CLIENT_APP if kind == "client" else TaskType.SERVER_APP


def launched(refusal: str | None = None) -> Any:
    """What an executor says to Flower of a task: taken, or why not."""
    from flwr.supercore.superexec.executor import LaunchResult

    return LaunchResult.accepted() if refusal is None else LaunchResult.failed(refusal)


def at_exit(do: Callable[[], None]) -> None:
    """Have something done when Flower ends this process on a signal."""
    from flwr.supercore.exit import add_exit_handler

    add_exit_handler(do, run_before_force_exit=True)


def end_with(parent: int) -> None:
    """End this process when another one ends."""
    from flwr.supercore.app_utils import start_parent_process_monitor

    start_parent_process_monitor(parent)


def superlink() -> Callable[[], None]:
    """The entry point of `flower-superlink`."""
    from flwr.superlink.cli.flower_superlink import flower_superlink

    return flower_superlink


def supernode() -> Callable[[], None]:
    """The entry point of `flower-supernode`."""
    from flwr.supernode.cli.flower_supernode import flower_supernode

    return flower_supernode


def look_again_soon() -> None:
    """Have this process look again soon for parts of a message that are not there yet, and every second in the end.

    A task is begun while its message's parts are still on their way, and a reply is announced before its parts are
    sent. Flower waits 1 s before it looks again, then 2, up to 10: most of a short task's time, on either side.
    Without the names it does so still.
    """
    soon = {"initial_backoff": SOON, "backoff_cap": 1.0, "max_tries_per_object": None}  # the time ends it: two hours
    for name in PULLS:
        pull: Any = getattr(importlib.import_module(OBJECTS), name, None)
        known = getattr(pull, "__kwdefaults__", None) or {}
        if set(soon) <= set(known):
            pull.__kwdefaults__ = {**known, **soon}


class Rests:
    """The waits of a node: for a message as long as it was told, for its own task a moment that gets longer.

    Parameters
    ----------
    poll : float
        Seconds between calls to the server, when nothing has happened for a while.
    sleep : callable
    """

    LONG = 1.0  # Flower's node waits 3 s between its calls and 0.5 s for its task

    def __init__(self, poll: float, sleep: Callable[[float], None] = time.sleep) -> None:
        self.poll, self._sleep, self._calls, self._looks = poll, sleep, SOON, SOON

    def sleep(self, wait: float) -> None:
        """Wait, in the place of Flower's `time.sleep(wait)`."""
        if wait >= self.LONG:
            self._sleep(min(self.poll, self._calls))
            self._calls, self._looks = self._calls * 1.5, SOON
        else:
            self._sleep(min(wait, self._looks))
            self._calls, self._looks = 5 * SOON, self._looks * 1.5


def be_patient(poll: float, broken_off: Callable[[BaseException], bool]) -> None:
    """Change habits of Flower's SuperNode, in the only places that have them; its heartbeats go on too (`beat_on`).

    It looks again soon for parts of a message. It asks for work every 3 s and looks every 0.5 s whether its task has
    ended, by its module's own `time`: here soon after it was busy, then less and less often, down to every `poll` and
    every 0.5 s. And it takes a connection that ends within TLS, as a killed server's or one behind a relay does, for a
    wrong certificate, and gives up for good: here it tries on.

    Without the names the node asks every 3 s, says so, and ends where a connection breaks off, to be started again.
    """
    look_again_soon()
    worker = importlib.import_module(NODE)
    connection = importlib.import_module(CONNECTION)
    if hasattr(worker, "time"):
        worker.time = Rests(poll)  # type: ignore[attr-defined]
    else:
        print(
            f"fedfuse: this Flower's node has no wait of its own to shorten; --poll {poll:g} is not heeded", flush=True
        )
    _try_on(connection, broken_off)
    beat_on()
