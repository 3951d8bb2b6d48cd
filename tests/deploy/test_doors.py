"""Who reaches what of a server: strangers nothing, operators what their certificate says, results only their own."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gzip
import hashlib
import io
import json
import os
import socket
import stat
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from fedfuse.compat.flower_fleet import public_key_to_bytes
from fedfuse.compat.superlink_doors import patient
from fedfuse.config.compose import compose
from fedfuse.config.message import as_json
from fedfuse.deploy.certs import node_keys, secret, write_certificates
from fedfuse.deploy.commands import main as command
from fedfuse.deploy.doors import LARGEST, ORDER, PATH, WAITING, Door, Operators, answered
from fedfuse.deploy.link import Link, Lost, plain
from fedfuse.deploy.orders import Outcome, carry_out, deployed, pack, unpack
from fedfuse.deploy.passphrase import ENCRYPTED, PASSPHRASE, opened
from fedfuse.deploy.processes import free_port
from fedfuse.deploy.registration import read_request, write_request
from fedfuse.deploy.submit import Order, fetched, order_of, submit
from fedfuse.errors import UserError, WorldError
from fedfuse.network.audit import Audit
from fedfuse.network.exchange import Patience
from fedfuse.network.roster import Place, Roster, fingerprint
from fedfuse.runs.directory import RunDirectory
from tests.deploy.network import tiny


class Inner:
    """Flower's application: notes what reaches it, and reads the body; its nodes are in Flower's own database."""

    def __init__(self) -> None:
        from flwr.server.superlink.linkstate import LinkStateFactory
        from flwr.supercore.object_store import ObjectStoreFactory
        from flwr.superlink.federation import NoOpFederationManager

        self.paths: list[str] = []
        known = LinkStateFactory(":flwr-in-memory:", NoOpFederationManager(), ObjectStoreFactory())
        self.state = SimpleNamespace(linkstate_factory=known)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.paths.append(scope["path"])
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"inner"})


def ask(
    door: Any, path: str, method: str = "POST", body: bytes = b"", who: Any = None, length: int | None = None
) -> Any:
    said: dict[str, Any] = {"body": b""}
    pieces = [body[i : i + 2**20] for i in range(0, len(body), 2**20)] or [b""]

    async def receive() -> Any:
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    async def send(message: Any) -> None:
        said["status"] = message.get("status", said.get("status"))
        said["body"] += message.get("body", b"")

    headers = [] if length is None else [(b"content-length", str(length).encode())]
    scope = {"type": "http", "path": path, "method": method, "headers": headers, "state": {"peer": who or {}}}
    asyncio.run(door(scope, receive, send))
    return said["status"], said["body"]


def certificate(name: str, *roles: str) -> dict[str, Any]:
    return {"subject": ((("commonName", name),), *((("organizationalUnitName", role),) for role in roles))}


@pytest.fixture
def door(tmp_path: Path) -> Operators:
    return Operators(Inner(), tmp_path, Audit(tmp_path / "audit.jsonl"))


FLEET = ("/v1/fleet/pull-messages", "/v1/fleet/push-object", "/health")
CONTROL = ("/v1/control/list-runs", "/v1/control/start-run", "/v1/control/register-node", "/v1/control/stream-logs")
REST = ("/docs", "/openapi.json", "/v1/runtime/acquire-task", "/v1/runtime/responses", "/", "/v1/fleet/../control/x")


def test_sites_reach_their_own_part_alone() -> None:
    inner = Inner()
    site = Door(inner, ("/v1/fleet/", "/health"))
    assert {ask(site, path)[0] for path in FLEET} == {200}
    assert {ask(site, path)[0] for path in (*CONTROL, *REST, "/fedfuse/results/x.json")} == {404}
    assert inner.paths == list(FLEET)


@pytest.mark.parametrize(("path", "query"), [("/" + "x" * 60_000, b""), ("/health", b"y" * 60_000)])
def test_what_the_log_has_of_a_strangers_request_is_short(path: str, query: bytes) -> None:
    """The attack: a line of 64 KiB for every request of anybody's."""
    from uvicorn.protocols.utils import get_path_with_query_string

    inner, said = Inner(), []
    scope: Any = {"type": "http", "path": path, "method": "GET", "headers": [], "state": {}, "query_string": query}

    async def send(message: Any) -> None:
        said.append(message.get("status"))

    asyncio.run(Door(inner, ("/v1/fleet/", "/health"))(scope, None, send))  # type: ignore[arg-type]
    assert (said[0], inner.paths) == (404, [])
    assert len(get_path_with_query_string(scope)) <= PATH  # uvicorn's access log, of the same scope


def test_a_stranger_reaches_nothing_of_the_operators(door: Operators) -> None:
    for who in ({}, certificate("stranger"), certificate("stranger", "admin", "Submit")):
        for path in (*CONTROL, *FLEET, *REST, "/fedfuse/orders/x", "/fedfuse/roster"):
            assert ask(door, path, who=who)[0] in (403, 404), path
        assert ask(door, "/fedfuse/results/x.json", "GET", who=who)[0] == 403
    assert door.app.paths == []


@pytest.mark.parametrize(
    ("roles", "allowed"),
    [
        (("read",), {"list-runs", "list-nodes", "stream-logs", "GET results", "GET sites"}),
        (
            ("submit",),
            {
                "list-runs",
                "list-nodes",
                "stream-logs",
                "start-run",
                "stop-run",
                "POST orders",
                "GET results",
                "GET sites",
            },
        ),
        (
            ("register",),
            {"list-runs", "list-nodes", "stream-logs", "register-node", "unregister-node", "POST roster", "GET sites"},
        ),
    ],
)
def test_roles(roles: tuple[str, ...], allowed: set[str], door: Operators) -> None:
    who, got = certificate("ann", *roles), set()
    names = ("list-runs", "list-nodes", "stream-logs", "start-run", "stop-run", "register-node", "unregister-node")
    for name in (*names, "create-federation", "add-app", "begin-connector-oauth", "pull-artifacts"):
        if ask(door, f"/v1/control/{name}", who=who)[0] == 200:
            got.add(name)
    for method, path in (
        ("POST", "orders/x"),
        ("GET", "results/x"),
        ("POST", "roster"),
        ("GET", "orders/x"),
        ("GET", "sites"),
    ):
        if ask(door, f"/fedfuse/{path}", method, b"{}", who)[0] in (200, 404):
            got.add(f"{method} {path.split('/')[0]}")
    assert got == allowed


def test_a_revoked_operator_is_turned_away(door: Operators) -> None:
    who = certificate("ann", "read", "submit", "register")
    assert ask(door, "/v1/control/list-runs", who=who)[0] == 200
    (door.post / "revoked").write_text("bob\nann\n")
    status, said = ask(door, "/v1/control/list-runs", who=who)
    assert (status, b"was revoked" in said) == (403, True)


def test_requests_have_a_size(door: Operators) -> None:
    site = Door(Inner(), ("/v1/fleet/",))
    assert ask(site, FLEET[0], length=LARGEST + 1)[0] == 413
    assert ask(site, FLEET[0], body=bytes(LARGEST + 1))[0] == 413  # whatever it said, or did not say, of its length
    assert ask(site, FLEET[0], body=bytes(2**22))[0] == 200
    ann = certificate("ann", "submit")
    assert ask(door, "/fedfuse/orders/x", body=bytes(ORDER), who=ann)[0] == 200
    for size, said in ((ORDER + 1, None), (ORDER + 1, ORDER + 1), (60 * 2**20, None)):  # three of 60 MB were taken
        assert ask(door, "/fedfuse/orders/y", body=bytes(size), who=ann, length=said)[0] == 413
    assert [path.name for path in (door.post / "orders").iterdir()] == ["x"]


def test_orders_that_nobody_carries_out_have_a_number(door: Operators, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDFUSE_RUNS", str(door.post / "runs"))
    ann, bob = certificate("ann", "submit"), certificate("bob", "submit")
    for who, name in ((bob, "b"), *((ann, f"a{i}") for i in range(WAITING + 3))):
        assert ask(door, f"/fedfuse/orders/{name}", body=b"{}", who=who)[0] == 200
        if name == "a1":
            (door.post / "runs" / "a1").mkdir(parents=True)  # lost with its server, and about to be resumed
    lying = {path.name for path in (door.post / "orders").iterdir()}
    assert lying == {"b", *(f"a{i}" for i in range(3, WAITING + 3))}
    assert {path.name for path in (door.post / "owners").iterdir()} == lying | {"a1"}


@pytest.mark.parametrize("name", ["../roster.json", "a/b", "", ".x", "x" * 101])
def test_no_name_leaves_the_post(name: str, door: Operators) -> None:
    who = certificate("ann", "submit")
    assert ask(door, f"/fedfuse/orders/{name}", body=b"{}", who=who)[0] in (400, 403, 404)
    assert not [path for path in door.post.rglob("*") if path.is_file() and "audit" not in path.name]


# --- results: bound to the order --------------------------------------------------------------------------


class Post(Link):
    """A link straight to a folder, as the operators' door reads it."""

    def request(
        self, method: str, path: str, content: bytes = b"", into: Path | None = None, most: int = 0
    ) -> bytes | None:
        file = Path(self.address) / path
        if not file.exists():
            return None
        if into is not None:
            into.write_bytes(file.read_bytes())
        return file.read_bytes()


def finished(tmp_path: Path) -> Path:
    run = tmp_path / "runs" / "first"
    (run / "checkpoint").mkdir(parents=True)
    (run / "summary.json").write_text('{"digest": "abc"}')
    (run / "checkpoint" / "state").write_text("x")
    (run / "link").symlink_to("/etc/passwd")
    return run


def test_a_result_is_taken_only_for_its_own_order(tmp_path: Path) -> None:
    link = Post(str(tmp_path))
    assert fetched(link, "first", "n" * 32, tmp_path / "out") is None
    Outcome(tmp_path / "results", "first", "n" * 32).done(finished(tmp_path))
    assert fetched(link, "first", "m" * 32, tmp_path / "out") is None  # another order's nonce
    assert not (tmp_path / "out").exists()
    assert fetched(link, "first", "n" * 32, tmp_path / "out") == {"digest": "abc"}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["summary.json"]
    archive = tmp_path / "results" / "first.tar.gz"
    for i in (0, len(archive.read_bytes()) // 2, -1):
        content = bytearray(archive.read_bytes())
        content[i] ^= 1
        archive.write_bytes(content)
        with pytest.raises(WorldError, match="is not the run directory that the server told of"):
            fetched(link, "first", "n" * 32, tmp_path / "other")
        content[i] ^= 1
        archive.write_bytes(content)


class Foul(Post):
    """A server that takes any order, and whose log is for a terminal."""

    def leave(self, path: str, content: bytes) -> bytes:
        return b""

    @property
    def words(self) -> list[str]:
        return [sys.executable, "-c", r"print('\x1b[92mround\x1b[0m 1 \x1b[2J\u202e\a done')", "--"]


def test_nothing_of_a_servers_steers_an_operators_terminal(tmp_path: Path) -> None:
    said = list[str]()
    link = Foul(str(tmp_path), insecure=True)
    assert submit(link, Order(tiny("fedavg"), "x", Patience()), tmp_path / "out", say=said.append) is None
    assert said == ["round 1 \ufffd[2J\ufffd\ufffd done"]
    assert link.flwr("list") == "\ufffd[92mround\ufffd[0m 1 \ufffd[2J\ufffd\ufffd done\n"


class Silent(Foul):
    """A server that says one line and then none for long, to a command that does not hear that it shall end."""

    @property
    def words(self) -> list[str]:
        code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('here', flush=True); time.sleep(60)"
        return [sys.executable, "-c", code, "--"]


def test_an_operator_who_leaves_waits_for_no_further_line(tmp_path: Path) -> None:
    def leave(line: str) -> None:
        raise KeyboardInterrupt

    began, link = time.monotonic(), Silent(str(tmp_path), insecure=True)
    with pytest.raises(KeyboardInterrupt):
        submit(link, Order(tiny("fedavg"), "x", Patience()), tmp_path / "out", say=leave)
    assert time.monotonic() - began < 50  # it would have slept for 60


def test_an_orders_tracker_is_not_sent_the_password_of_the_servers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow sends MLFLOW_TRACKING_PASSWORD to whatever address it is told."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FEDFUSE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(
        "fedfuse.deploy.orders.serve", lambda *_, **__: SimpleNamespace(digest="none", digest_missing=[])
    )

    def order(name: str, uri: str | None) -> None:
        config = tiny("fedavg", "tracking=mlflow")
        config.tracking.uri = uri
        carry_out(None, {"config": as_json(config), "name": name})  # type: ignore[arg-type]

    order("a", "http://127.0.0.1:1")  # there is no password to tell
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    with pytest.raises(UserError, match=r"tracking.uri='http://127.0.0.1:1': this server has a tracker of its own"):
        order("b", "http://127.0.0.1:1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://tracker.example")
    order("c", "https://tracker.example")
    order("d", None)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    (tmp_path / ".mlflow").mkdir()  # holds credentials
    with pytest.raises(UserError, match="tracker of its own"):
        order("e", "http://127.0.0.1:1")


def test_an_outcome_says_why(tmp_path: Path) -> None:
    for how, kind in (("refused", UserError), ("failed", WorldError)):
        Outcome(tmp_path / "results", "x", "n").ended(how, kind("because\nfedfuse: \x1b[2J"))
        with pytest.raises(kind, match=r"\Abecause fedfuse: \[2J\Z"):
            fetched(Post(str(tmp_path)), "x", "n", tmp_path / "out")


def test_an_archive_writes_nothing_elsewhere(tmp_path: Path) -> None:
    for member in ("../evil", "/evil", "link"):
        with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as content:
            info = tarfile.TarInfo(member)
            if member == "link":
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            else:
                info.size = 1
            content.addfile(info, io.BytesIO(b"x"))
        with pytest.raises(UserError, match=r"not the archive of a run|would write outside"):
            unpack(tmp_path / "a.tar.gz", tmp_path / "in" / "out")
        assert [path.name for path in (tmp_path / "in").rglob("*")] == ["out"]
        assert not Path("/evil").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "mine")
    pack(finished(tmp_path), tmp_path / "good.tar.gz")
    with pytest.raises(UserError, match="is a link"):
        unpack(tmp_path / "good.tar.gz", tmp_path / "linked")
    assert list((tmp_path / "mine").iterdir()) == []


class Bad(BaseHTTPRequestHandler):
    """A server that has turned against its operators."""

    answers: ClassVar[dict[str, Any]] = {}

    def log_message(self, *_: Any) -> None: ...

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.answers = {self.path.rpartition(".")[2]: self.answers[self.path.rpartition("/")[2]]}  # type: ignore[misc]
        self.do_GET()

    def do_GET(self) -> None:
        status, headers, content = self.answers[self.path.rpartition(".")[2]]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):
            for part in content:
                self.wfile.write(part)


@pytest.fixture
def bad() -> Iterator[Link]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Bad) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Link(f"127.0.0.1:{server.server_port}", insecure=True)
        server.shutdown()


def test_a_server_fills_neither_memory_nor_disk_of_an_operator(bad: Link, tmp_path: Path) -> None:
    """The attack: 1 MB of gzip on the wire, 1 GB in the operator's memory and /tmp."""
    said = {"nonce": "n", "name": "r", "outcome": "done", "sha256": "0", "bytes": 3 * 2**20}
    packing, large = {"content-encoding": "gzip"}, [bytes(2**20)] * 4
    zeros = [gzip.compress(bytes(2**24))] * 4
    for json_answer, archive, why in (
        ((200, {}, large), None, "more than 1048576 bytes"),
        ((403, {}, large), None, "more than 1048576 bytes"),
        ((200, packing, zeros), None, "is not JSON"),
        ((200, {}, [b"{"]), None, "is not JSON"),
        ((200, {}, [b"[" * 100_000]), None, "is not JSON"),
        ((200, {}, [b"[1]"]), None, "is no JSON object"),
        ((200, {}, [json.dumps({**said, "bytes": 2**60}).encode()]), None, f"has {2**60} bytes; there is room for"),
        ((200, {}, [json.dumps({**said, "bytes": "x"}).encode()]), None, "has x bytes; there is room for"),
        ((200, {}, [json.dumps(said).encode()]), (200, {}, large), "more than 3145728 bytes"),
        ((200, {}, [json.dumps(said).encode()]), (200, packing, zeros), "is not the run directory that the server"),
    ):
        Bad.answers = {"json": json_answer, "gz": archive}
        with pytest.raises(WorldError, match=why) as error:
            fetched(bad, "r", "n", tmp_path / "out")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_archive_that_no_directory_can_hold_is_told_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def archive(*members: tuple[str, bytes]) -> Path:
        with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as content:
            for name, text in members:
                info = tarfile.TarInfo(name)
                info.size = len(text)
                content.addfile(info, io.BytesIO(text))
        return tmp_path / "a.tar.gz"

    for members in (
        (("a", b"x"), ("a/b", b"x")),
        (("a/b", b"x"), ("a", b"x")),
        (("n" * 300, b"x"),),
        (("n" * 2**21, b""),),
    ):
        with pytest.raises(WorldError, match=r"\Aa\.tar\.gz: cannot be unpacked into [^\n]*\Z"):
            unpack(archive(*members), tmp_path / "out")
    for text in (b"", b"\x1f\x8b", archive(("a", bytes(2**20))).read_bytes()[:200]):
        (tmp_path / "a.tar.gz").write_bytes(text)
        with pytest.raises(WorldError, match="cannot be unpacked"):
            unpack(tmp_path / "a.tar.gz", tmp_path / "torn")
    monkeypatch.setattr("fedfuse.deploy.orders.FILES", 2)
    for members in ((("order.json", b"{}"),), (("x/../order.json", b"{}"),), tuple((str(i), b"") for i in range(3))):
        with pytest.raises(UserError, match="is not the archive of a run directory"):
            unpack(archive(*members), tmp_path / "other")
    room = SimpleNamespace(free=2**20)
    large = archive(("a", b"x" * 2**21))
    with monkeypatch.context() as small:
        small.setattr("shutil.disk_usage", lambda _: room)
        with pytest.raises(WorldError, match="has room for 1048576 bytes"):
            unpack(large, tmp_path / "full")
    unpack(archive(("a", b"x" * 2**21)), tmp_path / "other")
    assert (tmp_path / "other" / "a").stat().st_size == 2**21


def test_an_order_nobody_left_is_not_carried_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDFUSE_POST", str(tmp_path))
    (tmp_path / "orders").mkdir()
    (tmp_path / "orders" / "a").write_bytes(b"{}")
    for told in ({"name": "a", "order": "0" * 64}, {"name": "b", "order": hashlib.sha256(b"").hexdigest() + "x"}):
        with pytest.raises(UserError, match="no such order"):
            deployed(None, told)  # type: ignore[arg-type]


@pytest.mark.parametrize("content", [b"[]", b"3", b"{", b"[" * 200_000, b"\xff"], ids=lambda content: repr(content[:3]))
def test_an_order_that_is_none_is_told_in_a_line(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDFUSE_POST", str(tmp_path))
    (tmp_path / "orders").mkdir()
    (tmp_path / "orders" / "a").write_bytes(content)
    with pytest.raises(UserError, match=r"^a: the order is (not JSON \(.+\)|no JSON object)$"):
        deployed(None, {"name": "a", "order": hashlib.sha256(content).hexdigest()})  # type: ignore[arg-type]


def test_a_full_disk_at_the_end_is_told_in_a_line_and_loses_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Seen on a full disk: sixty lines of how the archive, the outcome and the log could not be written."""
    monkeypatch.setenv("FEDFUSE_POST", str(tmp_path / "post"))
    monkeypatch.setenv("FEDFUSE_RUNS", str(tmp_path / "runs"))
    order = order_of(compose(["strategy=fedavg", "data=digits"]), Patience())
    directory = RunDirectory(tmp_path / "runs" / order.name, order.config, 0.0)
    directory.create(False)
    (directory.path / "summary.json").write_text('{"digest": "abc"}')
    directory.close()

    def resumed(nonce: str) -> None:
        content = json.dumps({**order.values, "resume": True, "nonce": nonce}).encode()
        (tmp_path / "post" / "orders").mkdir(parents=True, exist_ok=True)
        (tmp_path / "post" / "orders" / order.name).write_bytes(content)
        deployed(None, {"name": order.name, "order": hashlib.sha256(content).hexdigest()})  # type: ignore[arg-type]

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path))

    with monkeypatch.context() as disk:
        disk.setattr("fedfuse.deploy.orders.replaced", full)
        disk.setattr("fedfuse.network.audit.replaced", full)
        why = "the server's disk: No space left on device; once there is room, the run can be resumed"
        with pytest.raises(WorldError, match=f"^{why}$"):
            resumed("1" * 32)
    assert f"fedfuse: failed: {why}" in capsys.readouterr().out.splitlines()
    resumed("2" * 32)
    assert fetched(Post(str(tmp_path / "post")), order.name, "2" * 32, tmp_path / "out") == {"digest": "abc"}


def test_who_resumes_a_run_that_has_ended_gets_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who had stopped watching, or had no room on the disk, was told that nothing was left to resume."""
    monkeypatch.setenv("FEDFUSE_POST", str(tmp_path / "post"))
    monkeypatch.setenv("FEDFUSE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr("fedfuse.deploy.orders.ENDING", 2)
    order = order_of(compose(["strategy=fedavg", "data=digits"]), Patience())
    directory = RunDirectory(tmp_path / "runs" / order.name, order.config, 0.0)
    directory.create(False)  # and holds it, as the run that goes on does

    def resumed(nonce: str, **other: Any) -> dict[str, Any] | None:
        content = json.dumps({**order.values, **other, "resume": True, "nonce": nonce}).encode()
        (tmp_path / "post" / "orders").mkdir(parents=True, exist_ok=True)
        (tmp_path / "post" / "orders" / order.name).write_bytes(content)
        deployed(None, {"name": order.name, "order": hashlib.sha256(content).hexdigest()})  # type: ignore[arg-type]
        return fetched(Post(str(tmp_path / "post")), order.name, nonce, tmp_path / "out")

    with pytest.raises(UserError, match=rf"\A{order.name}: still goes on here"):
        resumed("1" * 32)
    (directory.path / "summary.json").write_text('{"digest": "abc"}')
    monkeypatch.setattr("time.sleep", lambda _: directory.close())  # it ends while who resumes it waits for that
    assert resumed("2" * 32) == resumed("3" * 32) == {"digest": "abc"}
    assert (tmp_path / "out" / "config.yaml").exists()
    other = as_json(compose(["strategy=fedavg", "data=digits", "rounds=11"]))
    with pytest.raises(UserError, match="was started with another configuration"):
        resumed("4" * 32, config=other)
    assert "Traceback" not in capsys.readouterr().out


def test_an_operator_who_stops_watching_is_told_how_to_get_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedfuse.deploy.submit.submit", stopped)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt, match=rf"fedfuse deploy resume {out}\Z"):
        command(["run", "--insecure", "strategy=fedavg", "data=digits", f"out={out}"])


def test_an_order_that_was_not_taken_leaves_nothing(bad: Link, tmp_path: Path) -> None:
    order = order_of(compose(["strategy=fedavg", "data=digits"]), Patience())
    for answer, kind, why in (
        ((404, {}, [b"{}"]), UserError, "is no operators' port"),
        ((403, {}, [b'{"detail": "bob may read"}']), UserError, r"refuses: bob may read\Z"),
        ((507, {}, [b'{"detail": "its disk: full"}']), WorldError, r"failed: its disk: full\Z"),
        ((500, {}, [b"[" * 99_999]), WorldError, "failed: "),
    ):
        Bad.answers = {order.name: answer}
        with pytest.raises(kind, match=why):
            submit(bad, order, tmp_path / "runs" / "out")
    with pytest.raises(Lost):
        submit(Link(f"127.0.0.1:{free_port()}", insecure=True), order, tmp_path / "runs" / "out")
    assert not (tmp_path / "runs").exists()


def test_a_full_disk_of_the_servers_is_told_as_one(door: Operators, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    who = certificate("ann", "submit")
    (door.post / "orders").mkdir()
    monkeypatch.setattr(door, "_take", full)
    assert ask(door, "/fedfuse/orders/x", body=b"{}", who=who) == (
        507,
        b'{"detail": "its disk: No space left on device"}',
    )
    monkeypatch.setattr(door.audit, "add", full)
    for path in ("/fedfuse/orders/x", "/v1/control/start-run"):
        assert ask(door, path, body=b"{}", who=who)[0] == 507
    assert door.app.paths == []  # what cannot be noted is not done


@pytest.mark.parametrize(
    ("line", "left"),
    [
        ("\x1b[92mINFO \x1b[0m:      Start\n", "INFO :      Start"),
        ("╭─ Error ─────╮", ""),
        ("│ No way there. │", "No way there."),
        ("╰─────────────╯", ""),
        ("│ 7 │ online │", "│ 7 │ online │"),
        ("round   1/3  global", "round   1/3  global"),
    ],
)
def test_flowers_colours_and_boxes_are_left_out(line: str, left: str) -> None:
    assert plain(line) == left


def test_sites_are_shown_and_turned_out_by_their_names(
    tmp_path: Path, door: Operators, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody but Flower's database knows a node's id and key, nobody but the roster a key's name."""
    roster, flowers = Roster(tmp_path / "roster.json"), door.app.state.linkstate_factory.state()
    keys = []
    for name in ("north", "south", "twin", "twin2", "gone", "stranger"):
        node_keys(tmp_path, name)
        keys.append(public_key_to_bytes(load_ssh_public_key((tmp_path / f"{name}.pub").read_bytes())))
    ids = [flowers.create_node("ann", "ann", key, 30) for key in keys]
    for i, name in enumerate(("north", "7", "twin", "twin", "gone")):
        roster.add(fingerprint(keys[i]), Place(name, i, 9 if i == 1 else None))
    flowers.activate_node(ids[1], 30)
    flowers.delete_node("ann", ids[4])

    class Near(Link):
        said: ClassVar[list[tuple[str, ...]]] = []

        def request(self, method: str, path: str, *more: Any, **options: Any) -> bytes:
            status, body = ask(door, f"/fedfuse/{path}", method, who=certificate("ann", "register"))
            assert status == 200
            return bytes(body)

        def flwr(self, *words: str) -> str:
            self.said.append(words)
            return ""

    monkeypatch.setattr("fedfuse.deploy.link.Link", Near)
    assert command(["status", "--server", "x:1"]) == 0
    head, *lines = [line.split() for line in capsys.readouterr().out.splitlines() if line]
    assert head == ["site", "clients", "node", "status", "since"]
    shown = {line[-3]: (line[0], line[-2]) for line in lines}
    assert shown == {
        str(ids[0]): ("north", "registered"), str(ids[1]): ("7", "online"), str(ids[2]): ("twin", "registered"),
        str(ids[3]): ("twin", "registered"), str(ids[5]): ("–", "registered"),
    }  # fmt: skip
    assert next(line for line in lines if line[0] == "7")[1:3] == ["partition", "1/9"]
    Near.said.clear()
    assert command(["unregister", "--server", "x:1", "7", str(ids[0])]) == 0
    assert [words[2] for words in Near.said] == [str(ids[1]), str(ids[0])]
    for name, said in (
        ("twin", f"is the name of 2 sites; say which by its id: .*{ids[3]}"),
        ("gone", "is no site here"),
    ):
        with pytest.raises(UserError, match=f"^{name}: {said}"):
            command(["unregister", "--server", "x:1", name])


def test_a_name_is_its_first_operators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The attack: an order with the name of another's finished run and overwrite=true took its place."""
    monkeypatch.setenv("FEDFUSE_POST", str(tmp_path / "post"))
    monkeypatch.setenv("FEDFUSE_RUNS", str(tmp_path / "runs"))
    door = Operators(Inner(), tmp_path / "post", Audit(tmp_path / "post" / "audit.jsonl"))
    everything = json.dumps({"config": "{", "name": "first", "nonce": "n" * 32}).encode()
    told: dict[str, Any] = {"name": "first", "order": hashlib.sha256(everything).hexdigest()}

    def left(who: str, name: str = "first") -> tuple[int, bytes]:
        return ask(door, f"/fedfuse/orders/{name}", body=everything, who=certificate(who, "submit"))

    (tmp_path / "runs" / "older").mkdir(parents=True)  # from before names had owners, or the server's own user's
    assert left("sam", "older")[0] == 400
    assert left("ann") == (200, b'{"detail": "taken"}')
    for _ in range(2):
        status, said = left("sam")
        assert (status, b"name=first: is a run of ann's; choose another" in said) == (400, True)
        kept = tmp_path / "post" / "results" / "first.json"
        if not kept.exists():
            with pytest.raises(UserError, match="not JSON"):
                deployed(None, told)  # type: ignore[arg-type]
            before = kept.read_bytes()
    assert not (tmp_path / "post" / "orders" / "first").exists()
    with pytest.raises(UserError, match="no such order"):  # sam starts it once more: Flower shows its name and hash
        deployed(None, told)  # type: ignore[arg-type]
    assert kept.read_bytes() == before
    assert left("ann")[0] == 200  # to resume it
    kept.with_name("old.json").write_text("{}")  # of a server that kept no owners
    assert left("sam", "old")[0] == 400


def test_passwords_are_told_to_nobody_and_lie_in_files_of_ones_own(tmp_path: Path) -> None:
    from fedfuse.config.message import for_sites
    from fedfuse.deploy.bundle import PYPROJECT

    uri = "https://me:hunter2@mlflow.example"
    order = order_of(compose(["strategy=fedavg", "data=digits", "tracking=mlflow", f"tracking.uri={uri}"]), Patience())
    order.write(tmp_path / "out")
    kept = tmp_path / "out" / "order.json"
    assert "hunter2" in kept.read_text()
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    from fedfuse.runs.directory import RunDirectory

    directory = RunDirectory(tmp_path / "run", order.config, 0.0)
    directory.create(False)
    directory.close()
    assert stat.S_IMODE((tmp_path / "run" / "config.yaml").stat().st_mode) == 0o600
    assert "hunter2" not in as_json(for_sites(order.config))
    told = PYPROJECT.split("[tool.flwr.app.config]")[1]  # all that Flower tells nodes of an order
    assert [line.split(" =")[0] for line in told.strip().splitlines()] == ["name", "order"]


# --- identity ---------------------------------------------------------------------------------------------


def test_a_site_makes_its_own_key_and_a_request_that_nobody_can_change(tmp_path: Path) -> None:
    assert command(["request", str(tmp_path), "a", "--client-id", "2", "--examples", "10:99"]) == 0
    assert stat.S_IMODE((tmp_path / "a.key").stat().st_mode) == 0o600
    public, place = read_request(tmp_path / "a.request")
    assert place == asdict(Place("a", 2, None, 10, 99))
    assert fingerprint(public) == fingerprint((tmp_path / "a.pub").read_bytes())
    assert b"PRIVATE" not in (tmp_path / "a.request").read_bytes()
    whole = json.loads((tmp_path / "a.request").read_text())
    for old, new in (('"client": 2', '"client": 0'), ('"most": 99', '"most": 98')):
        assert old in whole["request"]
        (tmp_path / "b.request").write_text(json.dumps({**whole, "request": whole["request"].replace(old, new)}))
        with pytest.raises(UserError, match="was changed since it was signed"):
            read_request(tmp_path / "b.request")
    before = (tmp_path / "a.key").read_bytes()
    write_request(tmp_path, "a", {"client": 1})
    assert (tmp_path / "a.key").read_bytes() == before


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    node_keys(tmp_path, "a")
    secret(tmp_path / "a.key", "--key")
    for mode in (0o640, 0o604, 0o660):
        (tmp_path / "a.key").chmod(mode)
        with pytest.raises(UserError, match=rf"can be read by others \(mode {mode:o}\)"):
            secret(tmp_path / "a.key", "--key")


def test_a_key_under_a_passphrase_is_opened_in_memory_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)  # nobody to ask
    with pytest.raises(UserError, match="a passphrase is needed; set FEDFUSE_PASSPHRASE"):
        command(["request", str(tmp_path), "a", "--client-id", "2", "--passphrase"])
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv(PASSPHRASE, "correct horse")
    assert command(["request", str(tmp_path), "a", "--client-id", "2", "--passphrase"]) == 0
    key = tmp_path / "a.key"
    assert key.read_bytes().startswith(ENCRYPTED)
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert read_request(tmp_path / "a.request")[1]["client"] == 2
    for wrong in ("battery staple", "correct horse "):
        monkeypatch.setenv(PASSPHRASE, wrong)
        with pytest.raises(UserError, match=r"a\.key: no key that this passphrase, or none, opens"):
            opened(key, "--key")
    monkeypatch.setenv(PASSPHRASE, "correct horse")
    place = opened(key, "--key")
    assert PASSPHRASE not in os.environ  # no process that is started from now on is told
    assert place.parent == Path("/proc/self/fd")
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    public = load_ssh_private_key(place.expanduser().read_bytes(), None).public_key()  # as Flower reads it
    assert public == load_ssh_public_key((tmp_path / "a.pub").read_bytes())
    child = subprocess.run(["cat", str(place)], capture_output=True, check=False, close_fds=False)
    assert (child.returncode, child.stdout) == (1, b"")
    assert not any(b"OPENSSH PRIVATE" in path.read_bytes() for path in tmp_path.iterdir())
    os.close(int(place.name))


def test_a_passphrase_is_asked_for_twice_where_it_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = iter(["one", "two", "one", "one", "one"])
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("getpass.getpass", lambda words: next(said))
    with pytest.raises(UserError, match="the two passphrases differ"):
        write_request(tmp_path, "a", {"client": 0}, locked=True)
    write_request(tmp_path, "a", {"client": 0}, locked=True)  # a third time to sign with it
    assert next(said, None) is None


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        (Place("a", 1), Place("b", 1), True),
        (Place("a", 1), Place("b", 2), False),
        (Place("a", 4), Place("b", 1, 3), True),
        (Place("a", 5), Place("b", 1, 3), False),
        (Place("a", 1, 3), Place("b", 0, 2), True),  # 4
        (Place("a", 1, 4), Place("b", 0, 2), False),
    ],
)
def test_a_client_that_another_key_has_is_told(one: Place, other: Place, both: bool, tmp_path: Path) -> None:
    """A site asks for the place of another: the operator who registers it is told."""
    mine = [place.fault_of([client], []) is None for client in range(12) for place in (one, other)]
    assert any(a and b for a, b in zip(mine[::2], mine[1::2], strict=True)) is both
    assert one.overlaps(other) is other.overlaps(one) is both
    door = Operators(Inner(), tmp_path, Audit(tmp_path / "audit.jsonl"))
    boss = certificate("ann", "register")
    for key, place in (("0" * 64, one), ("0" * 64, one), ("1" * 64, other)):
        status, said = ask(door, "/fedfuse/roster", body=json.dumps({key: asdict(place)}).encode(), who=boss)
        assert (status, b"also the place of a, with another key" in said) == (200, both and place is other)


def test_the_roster_says_who_may_be_whom(tmp_path: Path) -> None:
    node_keys(tmp_path, "a")
    roster, key = Roster(tmp_path / "roster.json"), (tmp_path / "a.pub").read_bytes()
    assert roster.place(key) is None
    roster.add(fingerprint(key), Place("a", 1, 3, 10, 20))
    place = roster.place(key)
    assert place is not None
    assert place.fault_of([1, 4], [10, 20]) is None
    assert place.fault_of([1, 2], [10, 20]) == "says it acts as client 2; its key is registered as partition 1/3"
    assert place.fault_of([1], [2**40]) == f"says it has {2**40} examples; its key is registered with 10 to 20"
    assert roster.add(fingerprint(key), Place("a", 2)) == []
    assert roster.place(key) == Place("a", 2)
    assert roster.place(b"ssh-rsa nonsense") is None


def test_an_operators_certificate_says_its_roles(tmp_path: Path) -> None:
    import ssl

    from cryptography import x509

    write_certificates(tmp_path, [], [], operators=["ann", "bob=read"])
    found = x509.load_pem_x509_certificate((tmp_path / "operator-bob.pem").read_bytes())
    assert [a.value for a in found.subject] == ["bob", "read"]
    for name in ("ann", "bob"):
        assert stat.S_IMODE((tmp_path / f"operator-{name}.key").stat().st_mode) == 0o600
        context = ssl.create_default_context(cafile=str(tmp_path / "ca.crt"))
        context.load_cert_chain(tmp_path / f"operator-{name}.pem", tmp_path / f"operator-{name}.key")
    before = (tmp_path / "operator-bob.pem").read_bytes()
    write_certificates(tmp_path, [], [], operators=["bob", "bob=read"])
    with pytest.raises(UserError, match=r"--operator bob=submit: .* says read and is kept"):
        write_certificates(tmp_path, [], [], operators=["bob=submit"])
    assert (tmp_path / "operator-bob.pem").read_bytes() == before
    for told in ("x=root", "../x", "=read", "x=read,"):
        with pytest.raises(UserError, match="--operator"):
            write_certificates(tmp_path, [], [], operators=[told])


@pytest.mark.parametrize("said", [b"", b"POST / HTTP/1.1\r\nHost: x\r\nX: a"], ids=["nothing", "half a head"])
def test_a_connection_that_sends_no_request_is_closed(said: bytes) -> None:
    """The attack: whoever reaches the port held as many connections as the server could have, for ever."""
    with listening(patient(0.5)) as port, socket.create_connection(("127.0.0.1", port), 20) as held:
        held.sendall(said)
        began = time.monotonic()
        assert held.recv(10) == b""
        assert time.monotonic() - began < 10


def test_a_connection_that_asks_stays_open_and_a_head_has_an_end() -> None:
    with listening(patient(0.5)) as port:
        with socket.create_connection(("127.0.0.1", port), 20) as asking:
            for _ in range(4):
                asking.sendall(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
                answer = b""
                while part := b"" if answer.endswith(b"}") else asking.recv(1000):
                    answer += part
                assert answer.startswith(b"HTTP/1.1 200")
        with socket.create_connection(("127.0.0.1", port), 20) as endless:  # one of 60 MB was read, in 16 s
            endless.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX: ")
            with contextlib.suppress(OSError):
                endless.sendall(b"a" * 2**22)
            with contextlib.suppress(ConnectionResetError):
                assert endless.recv(1000)[:12] in (b"", b"HTTP/1.1 400")


@contextlib.contextmanager
def listening(protocol: Any) -> Iterator[int]:
    """A server of uvicorn's with a protocol of ours; it answers after longer than the protocol waits for a head."""
    import uvicorn

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.8)
        await answered(send, 200, "here")

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="off", http=protocol))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(10)
