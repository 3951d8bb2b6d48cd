"""Real processes on this machine: TLS, authenticated nodes, the bits of `fedfuse run`, refusals, kills."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from fedfuse.config.compose import compose
from fedfuse.deploy.certs import node_keys, write_certificates
from fedfuse.deploy.local import Federation
from fedfuse.deploy.processes import Process, flower, free_port, members, surroundings
from fedfuse.deploy.registration import register, write_request
from fedfuse.deploy.relay import Relay
from fedfuse.deploy.submit import Link, Order, order_of
from fedfuse.errors import UserError, WorldError
from fedfuse.network.exchange import Patience
from fedfuse.runs.experiment import run

NODES = 2  # of the federation that all tests share; each is three processes, of which one imports everything
KEYS = ("data=digits", f"clients={NODES}", "rounds=3", "seed=0", "model=mlp_small")
long = pytest.mark.deploy


def inline(path: Path, *keys: str) -> dict[str, Any]:
    run(compose([*keys, "runtime=inline", f"out={path}"]), quiet=True)
    return json.loads((path / "summary.json").read_text())


def order(*keys: str, **patience: Any) -> Order:
    return order_of(compose(list(keys)), Patience(**patience))


def touching(folder: Path) -> list[str]:
    """Command lines of living processes that name a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            except OSError:
                continue
            if str(folder).encode() in words:
                found.append(f"{entry.name} {words[:200]!r}")
    return found


@dataclass
class Wired:
    """A federation whose nodes call through a relay."""

    federation: Federation
    relay: Relay


@pytest.fixture(scope="module")
def wired(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wired]:
    work = tmp_path_factory.mktemp("federation")
    started = Federation(NODES, work)
    relay = Relay(started.port)
    started.door = relay.address
    with started:
        assert all(node.wait_for("SuperNode ID", 600) for node in started.processes[1:])
        yield Wired(started, relay)
    relay.close()
    until = time.monotonic() + 15
    while touching(work) and time.monotonic() < until:
        time.sleep(0.5)
    assert touching(work) == []  # superexec children included


@pytest.fixture
def federation(wired: Wired) -> Federation:
    return wired.federation


@pytest.mark.parametrize(
    "strategy", ["fed_sb", *(pytest.param(name, marks=long) for name in ("knfu", "fedavg", "fedmd"))]
)
def test_the_digest_is_that_of_a_simulation(strategy: str, federation: Federation, tmp_path: Path) -> None:
    keys = (*KEYS, f"strategy={strategy}", "data.limit=240", "data.test_limit=60", "rounds=2")
    wanted = inline(tmp_path / "inline", *keys)
    got = federation.play(order(*keys), tmp_path / "out")
    assert got["digest"] == wanted["digest"]
    assert got["traffic"] == wanted["traffic"]
    assert got["failures"] == {"replies": 0, "rejected": 0, "retried": 0}
    for name in ("metrics.parquet", "traffic.parquet", "config.yaml"):
        assert (tmp_path / "out" / name).exists()


@long
def test_the_wire_carries_what_is_reported_and_little_else(wired: Wired, tmp_path: Path) -> None:
    keys = ("strategy=fedavg", "data=digits", f"clients={NODES}", "rounds=2", "model=mlp_wide", "model.width=2")
    before, started = (wired.relay.up, wired.relay.down), time.monotonic()
    traffic = wired.federation.play(order(*keys), tmp_path / "out")["traffic"]
    seconds, messages = time.monotonic() - started, NODES * (1 + 2 * 2)
    for direction, wire in (("up", wired.relay.up - before[0]), ("down", wired.relay.down - before[1])):
        reported = traffic[f"{direction}_bytes"] + traffic[f"evaluate_{direction}_bytes"]
        assert reported > 5e6
        framing = 0.02 * reported + 30e3 * messages + 20e3 * seconds  # records and headers, requests, polls
        assert reported < wire < reported + framing


# --- refusals: each with a named reason, nothing changed --------------------------------------------------


def node(federation: Federation, path: Path, *words: str) -> Process:
    """A node that should not get in."""
    return Process(
        "stranger",
        federation.words(
            "node", "--partition", f"0/{NODES}", "--state-dir", str(path / "state"), "--port", str(free_port()), *words
        ),
        surroundings(path / "state"),
        path / "stranger.log",
    )


def online(federation: Federation) -> int:
    said = federation.link.flwr("supernode", "list", "fedfuse", "--format", "json")
    listed = json.loads(said[said.index("{") :])
    return sum(entry["status"] == "online" for entry in listed["nodes"])


STRANGERS = {
    "other key": (["--ca", "{ca}", "--key", "{stranger}"], "No SuperNode found with the given public key"),
    "no key": (["--ca", "{ca}", "--no-key"], "All SuperNodes must be registered via the CLI"),
    "other CA": (["--ca", "{other}", "--key", "{key}"], "does not vouch for the server"),
    "no TLS": (["--insecure"], "speaks TLS only; --insecure is refused"),
}


def test_strangers_stay_outside(federation: Federation, tmp_path: Path) -> None:
    """All at once; each is told a reason that no other gives."""
    node_keys(tmp_path, "stranger")
    write_certificates(tmp_path / "other", [], [])
    names = {
        "ca": str(federation.link.ca),
        "stranger": str(tmp_path / "stranger.key"),
        "other": str(tmp_path / "other" / "ca.crt"),
        "key": str(federation.work / "node-0" / "node-0.key"),
    }
    heard, started = len(federation.server.text()), {}

    def told() -> str:
        return "".join(process.text() for process in started.values()) + federation.server.text()[heard:]

    try:
        for name, (words, _) in STRANGERS.items():
            (tmp_path / name).mkdir()
            reach = ["--server", federation.door, *(w.format(**names) for w in words)]
            started[name] = node(federation, tmp_path / name, *reach)
        until = time.monotonic() + 60
        while (unsaid := [r for _, r in STRANGERS.values() if r not in told()]) and time.monotonic() < until:
            time.sleep(0.2)
        assert not unsaid, told()[-3000:]
        for process in started.values():
            assert "SuperNode ID" not in process.text()
        assert online(federation) == NODES
    finally:
        for process in started.values():
            process.stop()


def test_strangers_get_nothing_from_either_port(federation: Federation, tmp_path: Path) -> None:
    """The attack of the audit: a peer listed runs, fetched a model, revoked a site and registered a stranger."""
    ca, asked = str(federation.link.ca), b""
    sites = ssl.create_default_context(cafile=ca)
    with httpx.Client(verify=sites) as client:
        for path in (
            "v1/control/list-runs",
            "v1/control/register-node",
            "v1/runtime/acquire-task",
            "docs",
            "openapi.json",
        ):
            assert client.post(f"https://{federation.door}/{path}", content=asked).status_code == 404, path
        assert client.get(f"https://{federation.door}/fedfuse/results/x.json").status_code == 404
    write_certificates(tmp_path / "other", [], [], operators=["mallory"])  # of another CA
    write_certificates(federation.work / "certs", [], [], operators=["reader=read"])
    other, mine = tmp_path / "other" / "operator-mallory.pem", federation.work / "certs" / "server.pem"
    for pem in (None, other, mine):  # none, a stranger's, and the server's own, which is not for clients
        context = ssl.create_default_context(cafile=ca)
        if pem is not None:
            context.load_cert_chain(pem, pem.with_suffix(".key"))
        with pytest.raises((httpx.HTTPError, ssl.SSLError)), httpx.Client(verify=context) as client:
            client.post(f"https://{federation.link.address}/v1/control/list-runs", content=asked)
    reader = replace(federation.link, operator=federation.work / "certs" / "operator-reader.pem")
    reader.flwr("supernode", "list", "fedfuse")
    with pytest.raises(UserError, match="reader may read; this needs submit"):
        reader.request("POST", "orders/x", b"{}")
    with pytest.raises(WorldError, match="reader may read; this needs submit"):
        reader.flwr("stop", "1", "fedfuse")


def test_the_server_answers_nobody_without_tls(federation: Federation) -> None:
    with socket.create_connection(("127.0.0.1", federation.port), 10) as plain:
        plain.sendall(b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: server\r\nContent-Length: 0\r\n\r\n")
        assert b"HTTP" not in plain.recv(1000)


@long
def test_a_revoked_node_is_turned_away_and_stays_outside(federation: Federation, tmp_path: Path) -> None:
    node_keys(tmp_path, "late")
    said = register(federation.link, tmp_path / "late.pub", {"client": 0, "every": NODES})
    which = said.partition("registered as node ")[2].partition(";")[0]
    reach = ["--server", federation.door, "--ca", str(federation.link.ca), "--key", str(tmp_path / "late.key")]
    started = node(federation, tmp_path, *reach)
    try:
        assert started.wait_for("SuperNode ID", 600), started.text()
        federation.link.flwr("supernode", "unregister", which, "fedfuse")
        assert started.wait_for("does not know this node's key any more: it was revoked", 600), started.text()
        started.stop()
        heard = len(started.text())
        started.start()
        assert started.wait_for("its key must be registered there and not revoked", 600), started.text()
        assert "SuperNode ID" not in started.text()[heard:]
    finally:
        started.stop()
    assert online(federation) == NODES


FOREIGN = """\
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "foreign"
version = "1.0.0"
description = ""
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "somebody"
[tool.flwr.app.components]
serverapp = "foreign.app:server"
clientapp = "foreign.app:client"
"""
CODE = """\
from pathlib import Path
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
Path(MARK).open("a").write("imported\\n")
server = ServerApp()
client = ClientApp()
@server.main()
def main(grid, context):
    import time
    while not list(grid.get_node_ids()):
        time.sleep(0.5)
    for reply in grid.send_and_receive([Message(RecordDict(), n, "query") for n in grid.get_node_ids()], timeout=90):
        print("REPLY", reply.error.reason if reply.has_error() else "content")
@client.query()
def query(message, context):
    Path(MARK).open("a").write("client ran\\n")
    return Message(RecordDict(), reply_to=message)
"""


def foreign_app(path: Path) -> Path:
    (path / "foreign" / "foreign").mkdir(parents=True)
    (path / "foreign" / "pyproject.toml").write_text(FOREIGN)
    (path / "foreign" / "foreign" / "__init__.py").write_text("")
    (path / "foreign" / "foreign" / "app.py").write_text(CODE.replace("MARK", repr(str(path / "mark"))))
    return path / "foreign"


def test_a_bundle_with_other_code_never_runs(federation: Federation, tmp_path: Path) -> None:
    with federation.link.home() as home:
        done = subprocess.run(
            [*federation.link.words, "run", str(foreign_app(tmp_path)), "fedfuse", "--stream"],
            env=surroundings(home), capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    assert "is not the thin app" in done.stdout, done.stderr
    assert not (tmp_path / "mark").exists()


@long
def test_a_node_refuses_it_even_from_a_server_that_runs_it(tmp_path: Path) -> None:
    """A plain SuperLink, which runs anything, with one of our nodes."""
    port, home = free_port(), tmp_path / "home"
    home.mkdir()
    link = Link(f"127.0.0.1:{port}", insecure=True)
    words = [flower("flower-superlink"), "--insecure", "--host", "127.0.0.1", "--port", str(port)]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # a SuperLink looks for its executor there
    server = Process("link", words, surroundings(home, PATH=path), tmp_path / "link.log")
    started = None
    try:
        assert server.wait_for("Uvicorn running", 600), server.text()
        started = Process(
            "node",
            [sys.executable, "-m", "fedfuse.deploy", "node", "--insecure", "--server", link.address, "--partition",
             "0/1", "--state-dir", str(tmp_path / "state"), "--port", str(free_port())],
            surroundings(home), tmp_path / "node.log",
        )  # fmt: skip
        assert started.wait_for("SuperNode ID", 600)
        with link.home() as client:
            done = subprocess.run(
                [flower("flwr"), "run", str(foreign_app(tmp_path)), "fedfuse", "--stream"],
                env=surroundings(client), capture_output=True, text=True, timeout=200,
            )  # fmt: skip
        assert "REPLY" in done.stdout, done.stderr
        assert "is not the thin app" in done.stdout
        assert "client ran" not in (tmp_path / "mark").read_text()
    finally:
        for process in (started, server):
            if process is not None:
                process.stop()


@long
def test_a_node_whose_key_has_a_passphrase_joins(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDFUSE_PASSPHRASE", "correct horse")
    register(federation.link, write_request(tmp_path, "locked", {"client": 0, "every": NODES}, locked=True)[-1], {})
    words = ("--ca", str(federation.link.ca), "--key", str(tmp_path / "locked.key"), "--server", federation.door)
    started = node(federation, tmp_path, *words)
    try:
        assert started.wait_for("SuperNode ID", 600), started.text()
        told = [pid for pid in members(started.child.pid) if b"correct horse" in environment(pid)]
        assert told == [started.child.pid]  # as it was started; its executor is not told
        assert "horse" not in started.text()
    finally:
        started.stop()


def environment(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


class Narrow(Federation):
    """A server that lets each node leave one megabyte."""

    def process(self, name: str, *words: str) -> Process:
        return super().process(name, *words, *(["--quota", "1"] if words[0] == "server" else []))


@long
def test_a_quota_ends_no_run_that_leaves_little_and_names_who_leaves_much(tmp_path: Path) -> None:
    keys = ("strategy=fedavg", "data=digits", "clients=1", "seed=0", "evaluate.every=6")
    narrow = (*keys, "model=mlp", "rounds=6")  # 207 kB a reply: more in all than fits at once
    with Narrow(1, tmp_path / "work") as started:
        wanted = inline(tmp_path / "inline", *narrow)
        assert started.play(order(*narrow), tmp_path / "out")["digest"] == wanted["digest"]
        assert "too many to take more" not in started.server.text()
        wide = (*keys, "model=mlp_wide", "model.width=2", "rounds=1")
        with pytest.raises(WorldError):
            started.play(order(*wide, deadline=25.0), tmp_path / "wide")
        assert "fedfuse: node-0: this node has" in started.server.text()


@long
def test_site_policy_is_named_in_the_log(tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text('strategies = ["fedavg"]\n')
    refusal = pytest.raises(WorldError, match="site policy: strategy=knfu; allowed: fedavg")
    with Federation(1, tmp_path / "work", policy) as started, refusal:
        started.play(order("strategy=knfu", "data=digits", "clients=1", "rounds=1"), tmp_path / "out")


# --- kills ------------------------------------------------------------------------------------------------


def killed(federation: Federation, out: Path, keys: tuple[str, ...], kill: Callable[[str], bool]) -> dict[str, Any]:
    """Play while `kill(line)` looks at the log; once it says True it is not called again."""
    done = threading.Event()

    def say(line: str) -> None:
        print(line)
        if not done.is_set() and kill(line):
            done.set()

    federation.say = say
    summary = federation.play(order(*keys), out)
    assert done.is_set()
    return summary


@long
@pytest.mark.parametrize("when", ["between", "within"])
def test_a_killed_node_comes_back(when: str, federation: Federation, tmp_path: Path) -> None:
    keys = (*KEYS, "strategy=knfu")
    wanted = inline(tmp_path / "inline", *keys)
    victim = federation.processes[2]

    def kill(line: str) -> bool:
        if not line.startswith("round   1/3"):
            return False
        if when == "within":  # wait until it has the next training message in hand
            seen, until = victim.text().count("Receiving: train"), time.monotonic() + 60
            while victim.text().count("Receiving: train") == seen and time.monotonic() < until:
                time.sleep(0.05)
        os.kill(victim.child.pid, signal.SIGKILL)
        return True

    got = killed(federation, tmp_path / "out", keys, kill)
    assert got["digest"] == wanted["digest"]
    assert got["cohort_complete"]
    assert victim.starts > 1


@long
@pytest.mark.parametrize("when", ["between", "within"])
def test_a_killed_server_comes_back(when: str, federation: Federation, tmp_path: Path) -> None:
    keys = (*KEYS, "strategy=knfu")
    wanted = inline(tmp_path / "inline", *keys)

    def kill(line: str) -> bool:
        if not line.startswith("round   1/3"):
            return False
        if when == "within":
            time.sleep(4)
        os.kill(federation.server.child.pid, signal.SIGKILL)
        return True

    got = killed(federation, tmp_path / "out", keys, kill)
    assert got["digest"] == wanted["digest"]
    assert got["cohort_complete"]


@long
def test_a_lost_server_is_resumed_by_command(federation: Federation, tmp_path: Path) -> None:
    keys = (*KEYS, "strategy=knfu")
    wanted = inline(tmp_path / "inline", *keys)
    link, out = federation.link, tmp_path / "out"
    reach = ["--server", link.address, "--ca", str(link.ca), "--operator", str(link.operator)]
    env, before = surroundings(tmp_path / "home"), federation.server.starts
    asked = Process("run", federation.words("run", *reach, *keys, f"out={out}"), env, tmp_path / "run.log")
    try:
        assert asked.wait_for("round   1/3", 600), asked.text()
        os.kill(federation.server.child.pid, signal.SIGKILL)
        asked.child.wait(120)
    finally:
        asked.stop()
    assert asked.child.returncode == 1, asked.text()
    assert f"go on with: fedfuse deploy resume {out}" in asked.text()
    federation.await_server(before)
    done = subprocess.run(
        federation.words("resume", *reach, str(out)), env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((out / "summary.json").read_text())["digest"] == wanted["digest"]
