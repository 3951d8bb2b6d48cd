"""`deploy local`: server and nodes as real processes on this machine, started again when they die, all ended after."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fedfuse.deploy.certs import write_certificates
from fedfuse.deploy.doors import READY
from fedfuse.deploy.processes import Process, free_port, surroundings
from fedfuse.deploy.registration import register, write_request
from fedfuse.deploy.submit import Link, Order, submit
from fedfuse.errors import UserError, WorldError

RESTARTS = 5  # of any one process
MANY = 8  # nodes, whose start takes long enough to be told


class Federation:
    """A server and its nodes on this machine, over TLS with node authentication.

    Parameters
    ----------
    nodes : int
        Node i acts as partition i of so many.
    work : Path
        Gets certificates, logs, states and run directories.
    policy : Path, optional
        Site policy of every node.
    data : str, optional
        Folder below which orders' data may lie.
    """

    poll = "0.5"  # most seconds between a node's calls; soon after a message it calls more often

    def __init__(
        self,
        nodes: int,
        work: Path,
        policy: Path | None = None,
        data: str | None = None,
    ) -> None:
        if nodes < 1:
            raise UserError(f"--nodes {nodes}: at least 1")
        self.count, self.work, self.policy, self.data = nodes, work, policy, data
        self.say: Callable[[str], None] = print  # whom a run's lines are told
        self.port = free_port()
        self.control, certs = free_port(), work / "certs"
        self.link = Link(f"127.0.0.1:{self.control}", certs / "ca.crt", operator=certs / "operator-local.pem")
        self.door = f"127.0.0.1:{self.port}"  # where nodes call; a relay in between may take its place
        self.processes: list[Process] = []
        self._ending = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    # -- starting ------------------------------------------------------------------------------------------

    def words(self, *words: str) -> list[str]:
        """A `fedfuse deploy` command."""
        return [sys.executable, "-m", "fedfuse.deploy", *words]

    @property
    def _mine(self) -> list[str]:
        return ["--follow", str(os.getpid())]

    def process(self, name: str, *words: str) -> Process:
        """Start one `fedfuse deploy` process of ours."""
        logs = self.work / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        started = Process(name, self.words(*words), surroundings(self.work / name), logs / f"{name}.log")
        self.processes.append(started)
        return started

    def _start(self) -> None:
        names = [f"node-{i}" for i in range(self.count)]
        certs = self.work / "certs"
        write_certificates(certs, [], [], operators=["local"])
        server = self.process(
            "server", "server", "--certs", str(certs), "--host", "127.0.0.1", "--port", str(self.port),
            "--control-port", str(self.control), "--state-dir", str(self.work / "server"),
            "--runs", str(self.work / "runs"), *self._mine, *(["--data", self.data] if self.data else []),
        )  # fmt: skip
        if not server.wait_for(READY, 120):
            raise WorldError(f"the server did not start; see {server.log}")
        if self.count >= MANY:
            self.say(f"fedfuse: {self.count} nodes are started")
        for i, name in enumerate(names):
            register(self.link, write_request(self.work / name, name, {"client": i, "every": self.count})[-1], {})
        for i, name in enumerate(names):  # not before: a node that starts takes a core from the next registration
            self.node(name, str(self.work / name / f"{name}.key"), i)
        self._watcher.start()

    def node(self, name: str, key: str, partition: int) -> Process:
        """Start one node."""
        more = ["--policy", str(self.policy)] if self.policy else []
        return self.process(
            name, "node", "--server", self.door, "--ca", str(self.link.ca), "--key", key,
            "--partition", f"{partition}/{self.count}", "--state-dir", str(self.work / name),
            "--port", str(free_port()), "--poll", self.poll, *self._mine, *more,
        )  # fmt: skip

    # -- living --------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Start again what died."""
        while not self._ending.wait(0.5):
            for process in self.processes:
                if not process.alive and process.starts <= RESTARTS:
                    self.say(f"fedfuse: {process.name} ended (exit code {process.child.returncode}); started again")
                    process.stop()
                    process.start()

    @property
    def server(self) -> Process:
        """The server's process."""
        return self.processes[0]

    def play(self, order: Order, out: Path) -> dict[str, Any]:
        """Run an order to its end; if the server dies on the way, the run is resumed.

        Raises
        ------
        WorldError
            If it cannot be brought to its end.
        """
        resume = False
        for _ in range(RESTARTS + 1):
            before = self.server.starts
            try:
                summary = submit(self.link, order, out, resume, self.say)
            except WorldError:
                if self.server.alive and self.server.starts == before:
                    raise
                summary = None
            if summary is not None:
                return summary
            self.say("fedfuse: the server was lost; the run is resumed")
            resume = True
            self.await_server(before)
        raise WorldError("the server died again and again; see its log")

    def await_server(self, before: int) -> None:
        """Wait until the server has been started more than `before` times and listens.

        Raises
        ------
        WorldError
            If it does not within two minutes.
        """
        until = time.monotonic() + 120
        while time.monotonic() < until:
            starts = self.server.starts
            if starts > before and self.server.alive and self.server.text().count(READY) >= starts:
                return
            time.sleep(0.3)
        raise WorldError(f"the server did not start again; see {self.server.log}")

    def _stop(self) -> None:
        self._ending.set()
        if self._watcher.is_alive():
            self._watcher.join()
        for process in reversed(self.processes):
            process.stop()


def play_locally(order: Order, nodes: int, out: Path, work: Path | None, policy: Path | None) -> dict[str, Any]:
    """Run an order on a federation of this machine; returns its summary. Logs are kept in `work`, if it is given."""
    folder = work or Path(tempfile.mkdtemp(prefix="fedfuse-local-"))
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # asked to end: everything that was started ends too
    try:
        with Federation(nodes, folder, policy, order.config.data.root) as federation:
            return federation.play(order, out)
    except WorldError:
        logs = out / "logs"
        if (folder / "logs").is_dir() and work is None:
            shutil.copytree(folder / "logs", logs, dirs_exist_ok=True)
            print(f"fedfuse: logs of server and nodes: {logs}")
        raise
    finally:
        if work is None:
            shutil.rmtree(folder, ignore_errors=True)
