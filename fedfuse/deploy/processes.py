"""Real processes on this machine: started in groups of their own, ended with everything they started."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedfuse.compat.quiet import QUIET
from fedfuse.errors import UserError

FOLDERS = "FEDFUSE_SERVER_DATA"  # environment: as JSON, below which folders of the server's an order's data may lie
ALLOW_CODE = "FEDFUSE_ALLOW_CODE"  # environment: "1" where the server may import what an order names
KEYED = "FEDFUSE_KEYED"  # environment: "1" where nodes prove a key, which the roster must know
POST = "FEDFUSE_POST"  # environment: where the server's orders, results and roster lie
QUOTA = 8192  # MB of a node's objects at the server, if the operator says nothing else
RUNS = "FEDFUSE_RUNS"  # environment: where the server keeps run directories
SURROUNDINGS = {  # of our processes, where the operator says nothing else
    **QUIET,
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.4",
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
    "NO_COLOR": "1",
}


def surroundings(home: Path, **more: str) -> dict[str, str]:
    """The environment of a process of ours: quiet Flower, a home of its own."""
    quiet = {name: os.environ.get(name, value) for name, value in SURROUNDINGS.items()}
    return {**os.environ, **quiet, "FLWR_HOME": str(home), **more}


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def flower(name: str) -> str:
    """Path of one of Flower's commands, beside this Python.

    Raises
    ------
    UserError
        If it is not installed.
    """
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise UserError(f"{name} is not installed beside {sys.executable}")
    return str(path)


class Process:
    """A process with a log file, in a session of its own.

    Parameters
    ----------
    name : str
    words : sequence of str
        The command.
    env : mapping
    log : Path
        Appended to.
    """

    def __init__(self, name: str, words: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        self.name, self.words, self.env, self.log = name, list(words), dict(env), log
        self.starts = 0
        self.start()

    def start(self) -> None:
        """Start it (again)."""
        self.starts += 1
        with open(self.log, "ab") as out:
            self.child = subprocess.Popen(
                self.words,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self.child.poll() is None

    def text(self) -> str:
        """Everything it has logged."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait_for(self, words: str, seconds: float) -> bool:
        """Wait until its log holds some words; False if it ends or time does."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if words in self.text():
                return True
            if not self.alive:
                return words in self.text()
            time.sleep(0.1)
        return False

    def stop(self, patience: float = 8.0) -> None:
        """End it and all it started: first asked, then killed."""
        self._signal(signal.SIGTERM)
        until = time.monotonic() + patience
        while time.monotonic() < until and (self.alive or members(self.child.pid)):
            time.sleep(0.1)
        self._signal(signal.SIGKILL)
        self.child.wait(60)

    def _signal(self, which: signal.Signals) -> None:
        # the session's members are looked up one by one: a group whose leader is gone may not be ours any more
        for pid in members(self.child.pid):
            try:
                os.kill(pid, which)
            except ProcessLookupError:
                continue


def members(session: int) -> list[int]:
    """Processes of a session, zombies left out."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                after = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except (OSError, IndexError):
                continue
            if int(after[3]) == session and after[0] != "Z":
                found.append(int(entry.name))
    return found
