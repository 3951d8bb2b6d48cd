"""What a server, a node and an executor accept as orders; what they refuse, by name."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from fedfuse.config.message import as_json, from_json
from fedfuse.deploy.bundle import bundle_hash, guarded, write_bundle
from fedfuse.deploy.orders import carry_out, pack, read_patience, unpack, write_patience
from fedfuse.errors import Refused, UserError
from fedfuse.network.exchange import Patience
from fedfuse.network.policy import Policy, read_policy
from tests.deploy.network import tiny


def changed(**changes: Any) -> str:
    values = json.loads(as_json(tiny("knfu")))
    for key, value in changes.items():
        node, *path = values, *key.split("__")
        for part in path[:-1]:
            node = node[part]
        node[path[-1]] = value
    return json.dumps(values)


def test_a_configuration_survives_the_wire() -> None:
    for name in ("fedavg", "fedmd", "knfu", "local"):
        text = as_json(tiny(name))
        assert as_json(from_json(text)) == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (changed(strategy__name="os.system"), "strategy=os.system: unknown"),
        (changed(strategy__name=["fedavg"]), "a name is needed"),
        (changed(strategy__kd_temperature=-1.0), "strategy.kd_temperature=-1.0"),
        (changed(strategy__beta="1"), "strategy.beta='1'"),
        (changed(strategy__nothing=1), "strategy.nothing: no such key"),
        (changed(rounds=0), "rounds=0"),
        (changed(rounds=True), "rounds=True"),
        (changed(train__lr=-0.1), "train.lr=-0.1"),
        (changed(train__epochs="many"), "train.epochs='many'"),
        (changed(nothing=1), "nothing: no such key"),
        (changed(data=None), "data: an object is needed"),
        ("[]", "an object with a strategy"),
        ("{", "not JSON"),
        ("x" * 70000, "characters"),
    ],
)
def test_an_order_out_of_range_is_refused_before_any_node_hears_of_it(
    text: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDFUSE_RUNS", str(tmp_path))
    with pytest.raises(UserError) as error:
        carry_out(None, {"config": text, "name": "a"})  # type: ignore[arg-type]
    assert reason in str(error.value)
    assert "fedfuse: refused: " in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "x" * 101, "a b"])
def test_a_run_directory_stays_below_runs(name: str) -> None:
    with pytest.raises(UserError, match="name="):
        carry_out(None, {"config": as_json(tiny("fedavg")), "name": name})  # type: ignore[arg-type]


def test_patience_is_checked() -> None:
    assert read_patience(write_patience(Patience(deadline=3.0, minimum=2))) == Patience(deadline=3.0, minimum=2)
    for text in ('{"deadline": -1}', '{"join": "x"}', '{"word": 1}', "[]", "{", '{"retries": 1e300}'):
        with pytest.raises(UserError, match="patience"):
            read_patience(text)


def test_only_the_thin_app_is_installed(tmp_path: Path) -> None:
    from flwr.cli.build import build_fab_from_disk

    installed: list[bytes] = []
    install = guarded(lambda bundle, **_: installed.append(bundle))
    ours = build_fab_from_disk(write_bundle(tmp_path / "fedfuse-thin"))
    install(ours, skip_prompt=True)
    assert installed == [ours]
    (tmp_path / "fedfuse-thin" / "extra.py").write_text("print('mine now')")
    for other in (build_fab_from_disk(tmp_path / "fedfuse-thin"), ours[:-1], b""):
        with pytest.raises(Refused, match=f"is not the thin app {bundle_hash()[:16]}"):
            install(other)
    assert installed == [ours]


def test_a_policy_file_is_read_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text('strategies = ["fedavg"]\nmax_rounds = 5\nrequire_dp = true\n')
    assert read_policy(path) == Policy(strategies=("fedavg",), max_rounds=5, require_dp=True)
    for text in (
        "nothing = 1",
        'strategies = "fedavg"',
        "max_rounds = -1",
        "require_dp = 1",
        "=",
        "min_examples = true",
    ):
        path.write_text(text)
        with pytest.raises(UserError, match="policy"):
            read_policy(path)
    with pytest.raises(UserError, match="absent"):
        read_policy(tmp_path / "absent")


def test_a_run_directory_travels_as_an_archive(tmp_path: Path) -> None:
    source = tmp_path / "run"
    (source / "final").mkdir(parents=True)
    (source / "checkpoint").mkdir()
    (source / "checkpoint" / "state").write_bytes(b"x")
    (source / "summary.json").write_text("{}")
    (source / "final" / "model").write_bytes(bytes(range(256)) * 100)
    pack(source, tmp_path / "run.tar.gz")
    unpack(tmp_path / "run.tar.gz", tmp_path / "back")
    found = sorted(str(p.relative_to(tmp_path / "back")) for p in (tmp_path / "back").rglob("*") if p.is_file())
    assert found == ["final/model", "summary.json"]
    assert (tmp_path / "back/final/model").read_bytes() == bytes(range(256)) * 100


def test_a_node_that_is_turned_away_is_told_that_its_key_may_be_in_use(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Flower says the same of a key that is not registered and of one that another node has."""
    from fedfuse.deploy.launch import _become

    def turned_away() -> None:
        raise SystemExit(305)

    monkeypatch.setattr("fedfuse.deploy.launch.in_one_line", lambda: None)
    monkeypatch.setattr("sys.argv", [])
    assert _become("flower-supernode", ["--superlink", "x:1"], turned_away) == 305
    said = capsys.readouterr().out
    assert "must be registered there and not revoked" in said
    assert "nor in use by another node" in said


def test_an_executor_ends_with_its_parent_though_nobody_waits_for_that() -> None:
    """As in a container whose first process waits for none: to Flower's monitor the parent is there for ever."""
    ours = """
import os, signal
from fedfuse.deploy.executor import end_with
signal.alarm(120)  # this test fails then
parent = os.getppid()  # before it may end
print("ready", flush=True)
end_with(parent, lambda: print("over", flush=True), 0)
"""
    words = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {ours!r}]); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        parent.stdin.close()
        assert parent.stdout.read() == "over\n"


def test_a_node_tries_on_when_a_connection_ends_within_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a killed server's does; Flower takes it for a wrong certificate and gives up."""
    from flwr.supernode import fleet_http_connection, start_client_internal

    from fedfuse.compat.flower_processes import be_patient
    from fedfuse.deploy.launch import broken_off

    for module, name in ((fleet_http_connection, "make_simple_http_retry_invoker"), (start_client_internal, "time")):
        monkeypatch.setattr(module, name, getattr(module, name))  # put back after the test
    be_patient(0.01, broken_off)
    give_up = fleet_http_connection.make_simple_http_retry_invoker().should_giveup
    assert give_up is not None
    assert not give_up(httpx.ConnectError("[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred in violation of protocol"))
    assert give_up(httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed"))
    started = time.monotonic()
    start_client_internal.time.sleep(3)
    assert time.monotonic() - started < 1
