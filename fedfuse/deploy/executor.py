"""Our executor in the place of Flower's SuperExec: runs FedFuse's thin app and nothing else.

Flower's own executor installs and runs whatever bundle the other side sends. This one takes a task only of the
kind it is here for, and its process compares the bundle's hash before anything of it is unpacked or imported.
Tasks are forked from a process that has imported torch and fedfuse once; each is still a process of its own.

Run as ``python -m fedfuse.deploy.executor client|server --runtime-api-address … --parent-pid …``.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from fedfuse.compat import flower_processes
from fedfuse.compat.flower_processes import ENTRIES

PRELOAD = {
    "client": ["fedfuse.apps", "fedfuse.deploy.warm", ENTRIES["client"]],
    "server": ["fedfuse.apps", "fedfuse.deploy.warm", "fedfuse.deploy.orders", ENTRIES["server"]],
}


def task(kind: str, arguments: list[str]) -> None:
    """Run one task in this process, behind the guard."""
    from fedfuse.compat.flower_arrays import limit_arrays
    from fedfuse.compat.flower_log import in_one_line
    from fedfuse.deploy.bundle import guarded
    from fedfuse.network.sizes import UNKNOWN, limit_memory

    _end_once()
    in_one_line()
    limit_memory()
    limit_arrays(UNKNOWN)
    flower_processes.guard(kind, guarded)
    flower_processes.look_again_soon()
    flower_processes.run_task(kind, arguments)


class ThinExecutor:
    """Flower's executor interface: launches tasks of one kind as forked processes.

    Parameters
    ----------
    kind : {"client", "server"}
    """

    def __init__(self, kind: str) -> None:
        self.kind, self.type = kind, flower_processes.task_type(kind)
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
        if spec.task_type != self.type:
            return flower_processes.launched(f"a {spec.task_type} task; this executor runs {self.type} only")
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
        return flower_processes.launched()

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

    def deaf() -> None:
        for which in (signal.SIGINT, signal.SIGTERM):
            signal.signal(which, signal.SIG_IGN)

    flower_processes.at_exit(deaf)


def main() -> None:
    """Serve tasks until the parent process ends."""
    kind, parent = sys.argv.pop(1), int(sys.argv[sys.argv.index("--parent-pid") + 1])
    _end_once()
    executor = ThinExecutor(kind)
    threading.Thread(target=end_with, args=(parent, executor.close), daemon=True).start()
    flower_processes.serve(executor)


def end_with(parent: int, close: Callable[[], None], patience: float = 5.0) -> None:
    """End this process when its parent ends.

    Flower's own monitor asks once whether a process of that number exists, which is true of one that nobody has
    waited for (in a container whose first process does not), and raises one signal, which may be lost.
    """
    while os.getppid() == parent:
        time.sleep(0.5)
    time.sleep(patience)  # Flower's way, if it works, is the orderly one
    close()
    os._exit(1)


if __name__ == "__main__":
    main()
