"""Flower's long-running processes from the inside: SuperLink, SuperNode, executor and the processes of single tasks.

Internal names of Flower 1.41. Imported only: the commands' entry points, `TaskType`, `LaunchResult`,
`add_exit_handler`, `start_parent_process_monitor`. Replaced: `run_clientapp.install_from_fab` and
`run_serverapp.install_from_fab` (`guard`), `run_superexec.get_executor` (`serve`), and in `start_client_internal`
and `fleet_http_connection` two habits of the SuperNode (`be_patient`). Each function says what it buys and what
happens without the name. Guard: `tests/compat/test_processes.py`.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from fedfuse.errors import WorldError

TASKS = {"client": "flwr.supernode.runtime.run_clientapp", "server": "flwr.superlink.runtime.run_serverapp"}
INSTALL = "install_from_fab"
EXECUTORS, CHOICE = "flwr.supercore.superexec.run_superexec", "get_executor"
NODE, CONNECTION, INVOKER = (
    "flwr.supernode.start_client_internal",
    "flwr.supernode.fleet_http_connection",
    "make_simple_http_retry_invoker",
)


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
    if kind == "client":
        from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

        flwr_clientapp()
    else:
        from flwr.superlink.cli.flwr_serverapp import flwr_serverapp

        flwr_serverapp()


def serve(executor: Any) -> None:
    """Be Flower's executor process, with our executor in the place of the one it would choose.

    It buys a task in 0.28 s in place of 14.3 (forked from a process that has imported torch: docs/deployment.md),
    and the guard above. Without the name the process ends, and with it the server or node that started it.
    """
    from flwr.supercore.cli import flower_superexec

    module = _module_with(EXECUTORS, CHOICE, "our executor cannot take its place")
    setattr(module, CHOICE, lambda *_, **__: executor)
    sys.argv[0] = "flower-superexec"
    flower_superexec()


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


def be_patient(poll: float, broken_off: Callable[[BaseException], bool]) -> None:
    """Change two habits of Flower's SuperNode, in the only places that have them.

    It asks for work every 3 s, by its module's own `time`: here every `poll`. A message waits half of that on
    average, so a round of two phases (training, evaluation) waits 3 s less at `--poll 0.3` and 2 s less at the
    default of 1: of the 3.0 s that three clients on one machine need for a round (docs/deployment.md), most. And it
    takes a connection that ends within TLS, as a killed server's or one behind a relay does, for a wrong
    certificate, and gives up for good: here it tries on.

    Without the names the node asks every 3 s, says so, and ends where a connection breaks off, to be started again.
    """
    worker = importlib.import_module(NODE)
    connection = importlib.import_module(CONNECTION)
    if hasattr(worker, "time"):
        worker.time = SimpleNamespace(sleep=lambda wait: time.sleep(min(wait, poll)))  # type: ignore[attr-defined]
    else:
        print(
            f"fedfuse: this Flower's node has no wait of its own to shorten; --poll {poll:g} is not heeded", flush=True
        )
    make = getattr(connection, INVOKER, None)
    if make is None:
        return

    def invoker() -> Any:
        made = make()
        give_up = made.should_giveup
        made.should_giveup = lambda error: not broken_off(error) and give_up(error)
        return made

    setattr(connection, INVOKER, invoker)
