"""A thousand connections that say nothing: whoever has most loses his own, and the others are let in."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedfuse.compat.superlink_doors import patient, protocol_of
from fedfuse.deploy import callers
from fedfuse.deploy.callers import Callers, descriptors, listeners
from fedfuse.deploy.certs import write_certificates
from fedfuse.deploy.doors import READY, answered
from fedfuse.deploy.processes import Process, free_port, surroundings
from fedfuse.errors import UserError

MANY = 64


@contextlib.contextmanager
def listening(folder: Path | None, loop: str = "asyncio") -> Iterator[tuple[int, Callers]]:
    """A server of uvicorn's that takes in `MANY` callers at most, with TLS where there is a folder for its key."""
    import uvicorn

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await answered(send, 200, "here")

    more: dict[str, Any] = {}
    if folder is not None:
        write_certificates(folder, [], [])
        more = {"ssl_keyfile": folder / "server.key", "ssl_certfile": folder / "server.pem"}
    config = uvicorn.Config(app, log_level="critical", lifespan="off", http=patient(60.0), loop=loop, **more)
    server, taken = uvicorn.Server(config), Callers(MANY)
    (listener,) = listeners("127.0.0.1", 0)
    done = threading.Event()

    async def serving() -> None:
        served = asyncio.create_task(server.serve([]))
        while not server.started:
            await asyncio.sleep(0.02)
        taking = asyncio.create_task(taken.take(listener, protocol_of(server), config.ssl))
        done.set()
        await served
        taking.cancel()

    def run() -> None:
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(serving())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert done.wait(20)
    yield listener.getsockname()[1], taken
    server.should_exit = True
    thread.join(10)
    listener.close()
    assert not thread.is_alive()


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("tls", [False, True])
def test_who_holds_most_connections_loses_them_and_the_others_are_let_in(loop: str, tls: bool, tmp_path: Path) -> None:
    """The attack: 1024 connections that said nothing took all descriptors; sites, operators and the run were out."""
    pytest.importorskip(loop)
    with listening(tmp_path if tls else None, loop) as (port, taken), contextlib.ExitStack() as held:
        context = ssl.create_default_context(cafile=str(tmp_path / "ca.crt")) if tls else None

        def asked(source: str) -> bytes:
            with socket.create_connection(("127.0.0.1", port), 20, (source, 0)) as plain:
                caller = context.wrap_socket(plain, server_hostname="127.0.0.1") if context is not None else plain
                caller.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                return caller.recv(1000)

        honest = held.enter_context(socket.create_connection(("127.0.0.1", port), 20, ("127.0.0.3", 0)))
        mallory = []
        for _ in range(5 * MANY):
            mallory.append(held.enter_context(socket.create_connection(("127.0.0.1", port), 20, ("127.0.0.2", 0))))
        until = time.monotonic() + 20
        while sum(map(gone, mallory)) < 4 * MANY and time.monotonic() < until:
            time.sleep(0.05)
        assert sum(map(gone, mallory)) >= 4 * MANY
        assert not gone(honest)
        assert taken._count <= MANY
        for source in ("127.0.0.4", "127.0.0.2"):
            assert asked(source).startswith(b"HTTP/1.1 200")


def gone(caller: socket.socket) -> bool:
    """Whether the other side has ended a connection on which it says nothing."""
    caller.setblocking(False)
    try:
        return caller.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def test_a_handshake_that_does_not_end_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callers, "HANDSHAKE", 0.3)
    with (
        listening(tmp_path) as (port, _),
        socket.create_connection(("127.0.0.1", port), 20) as held,
    ):
        began = time.monotonic()
        with contextlib.suppress(ConnectionResetError):
            assert held.recv(10) == b""
        assert time.monotonic() - began < 10


def test_addresses_of_one_household_are_one() -> None:
    taken = Callers(8)
    pairs = [socket.socketpair() for _ in range(10)]
    try:
        for i, (one, _) in enumerate(pairs):
            taken._note(one, f"2001:db8::{i + 1:x}" if i else "192.0.2.1")
        assert set(taken._open) == {"192.0.2.1", "2001:db8::/64"}
        assert taken._count == 8
        assert [other.recv(1, socket.MSG_DONTWAIT) for _, other in pairs[1:3]] == [b"", b""]  # the oldest
        for one, _ in pairs[:9]:
            one.close()
        taken._note(pairs[9][0], "192.0.2.2")  # one too many, as far as is known
        assert set(taken._open) == {"2001:db8::/64", "192.0.2.2"}
    finally:
        for one, other in pairs:
            one.close()
            other.close()


def test_a_server_takes_the_descriptors_that_it_may_have() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
        assert descriptors() == resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= min(hard, 2**16)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_port_that_is_taken_is_told_in_a_line() -> None:
    (first,) = listeners("127.0.0.1", 0)
    port = first.getsockname()[1]
    with first, pytest.raises(UserError, match=rf"^port {port} cannot be listened at on 127.0.0.1 \(Address already"):
        listeners("127.0.0.1", port)


ENDLESS = """
import asyncio, sys
from pathlib import Path
from fedfuse.deploy.doors import Door, answered, serve

async def app(scope, receive, send):
    if scope["type"] == "http" and scope["path"].endswith("endless"):
        print("asked", flush=True)
        await asyncio.sleep(600)
    elif scope["type"] == "http":
        await answered(send, 200, "here")

settings = {"host": "127.0.0.1", "port": int(sys.argv[1]), "log_level": "critical", "lifespan": "off"}
post = Path(sys.argv[2])
serve(app, settings, control=("127.0.0.1", 0), near=int(sys.argv[3]), ca=None, post=post, sites=lambda *about: app)
"""


def test_a_server_that_is_ended_takes_in_nobody_and_waits_for_no_stream(tmp_path: Path) -> None:
    """A server whose executor had ended was told to end, and waited for nodes that called again and again."""
    port = free_port()
    words = [sys.executable, "-c", ENDLESS, str(port), str(tmp_path), str(free_port())]
    server = Process("server", words, surroundings(tmp_path), tmp_path / "log")
    try:
        assert server.wait_for(READY, 100), server.text()
        with socket.create_connection(("127.0.0.1", port), 20) as stream:
            stream.sendall(b"GET /endless HTTP/1.1\r\nHost: x\r\n\r\n")
            assert server.wait_for("asked", 20)
            os.kill(server.child.pid, signal.SIGTERM)
            until = time.monotonic() + 60
            while server.alive and time.monotonic() < until:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as node:
                    node.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                    node.recv(1000)
                time.sleep(0.05)
        assert not server.alive
    finally:
        server.stop()
