"""Our executor in the place of Flower's SuperExec: runs FedFuse's thin app and nothing else.

Flower's own executor installs and runs whatever bundle the other side sends. This one takes a task only of the
kind it is here for, and its process compares the bundle's hash before anything of it is unpacked or imported.
Tasks are forked from a process that has imported torch and fedfuse once; each is still a process of its own.

Run as ``python -m fedfuse.deploy.executor client|server --runtime-api-address … --parent-pid …``.
"""

from __future__ import annotations

import importlib
import multiprocessing
import signal
import sys
from typing import Any

RUNS = {"client": "flwr.supernode.runtime.run_clientapp", "server": "flwr.superlink.runtime.run_serverapp"}
PRELOAD = {
    "client": ["fedfuse.apps", "fedfuse.deploy.warm", RUNS["client"]],
    "server": ["fedfuse.apps", "fedfuse.deploy.warm", "fedfuse.deploy.orders", RUNS["server"]],
}


def task(kind: str, arguments: list[str]) -> None:
    """Run one task in this process, behind the guard."""
    from fedfuse.deploy.bundle import guarded

    from fedfuse.network.sizes import UNKNOWN, limit_arrays, limit_memory

    _end_once()
    limit_memory()
    limit_arrays(UNKNOWN)
    sys.argv = [f"flwr-{kind}app", *arguments]
    # Flower 1.41 has no hook between fetching a bundle and unpacking it; this name is the whole of ours
    module = importlib.import_module(RUNS[kind])
    module.install_from_fab = guarded(module.install_from_fab)  # type: ignore[attr-defined]
    if kind == "client":
        from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

        flwr_clientapp()
    else:
        from flwr.superlink.cli.flwr_serverapp import flwr_serverapp

        flwr_serverapp()


class ThinExecutor:
    """Flower's executor interface: launches tasks of one kind as forked processes.

    Parameters
    ----------
    kind : {"client", "server"}
    """

    def __init__(self, kind: str) -> None:
        from flwr.supercore.constant import TaskType

        self.kind, self.type = kind, TaskType.CLIENT_APP if kind == "client" else TaskType.SERVER_APP
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD[kind])
        self._running: list[Any] = []
        warm = self._context.Process(target=_nothing, daemon=True)  # the imports happen now, not with the first task
        warm.start()
        self._running.append(warm)

    def get_eligible_capacity(self, supported_task_types: Any, **_: Any) -> tuple[set[Any], set[str]]:
        """Only our kind of task is asked for."""
        return {self.type} & set(supported_task_types), set()

    def wait_for_capacity(self, *_: Any, **__: Any) -> None:
        """There is no limit."""

    def launch(self, spec: Any) -> Any:
        """Start one task's process."""
        from flwr.supercore.superexec.executor import LaunchResult

        if spec.task_type != self.type:
            return LaunchResult.failed(f"a {spec.task_type} task; this executor runs {self.type} only")
        words = ["--runtime-api-address", spec.runtime_api_address, "--token", spec.token]
        if spec.insecure:
            words.append("--insecure")
        elif spec.root_certificates_path is not None:
            words += ["--root-certificates", spec.root_certificates_path]
        if spec.parent_pid is not None:
            words += ["--parent-pid", str(spec.parent_pid)]
        process = self._context.Process(target=task, args=(self.kind, words), daemon=True)
        process.start()
        self._running.append(process)
        return LaunchResult.accepted()

    def reconcile(self) -> None:
        """Forget tasks that have ended."""
        self._running = [process for process in self._running if process.is_alive()]

    def close(self) -> None:
        """End what is still running."""
        for process in self._running:
            process.terminate()


def _nothing() -> None:
    """A task that does nothing."""


def _end_once() -> None:
    """Ignore what comes after the first signal to end.

    Flower ends a process gracefully on the first signal and restores Python's handlers; its parent monitor then sends
    SIGINT (the parent of a killed server or node is gone), which surfaced as a KeyboardInterrupt in the midst of it.
    """
    from flwr.supercore.exit import add_exit_handler

    def deaf() -> None:
        for which in (signal.SIGINT, signal.SIGTERM):
            signal.signal(which, signal.SIG_IGN)

    add_exit_handler(deaf, run_before_force_exit=True)


def main() -> None:
    """Serve tasks until the parent process ends."""
    from flwr.supercore.cli import flower_superexec

    kind = sys.argv.pop(1)
    _end_once()
    executor = ThinExecutor(kind)
    module = importlib.import_module("flwr.supercore.superexec.run_superexec")
    module.get_executor = lambda *_, **__: executor  # type: ignore[attr-defined]
    sys.argv[0] = "flower-superexec"
    flower_superexec()


if __name__ == "__main__":
    main()
