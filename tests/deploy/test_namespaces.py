"""Nodes in network namespaces of their own, with delay and loss where the kernel has netem."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedfuse.config.compose import compose
from fedfuse.deploy.certs import write_certificates
from fedfuse.deploy.doors import READY
from fedfuse.deploy.processes import Process, free_port, surroundings
from fedfuse.deploy.registration import register
from fedfuse.deploy.submit import Link, order_of, submit
from fedfuse.network.exchange import Patience
from fedfuse.runs.experiment import run
from tests.deploy.wire import Wire

pytestmark = pytest.mark.deploy
KEYS = ("strategy=knfu", "data=digits", "clients=2", "rounds=2", "seed=0", "model=mlp_small")
DELAY, JITTER, LOSS = 0.05, 0.01, 0.01  # each way
NETEM = ("delay", "50ms", "10ms", "loss", "1%")


def ip(*words: str) -> bool:
    return subprocess.run(["ip", *words], capture_output=True).returncode == 0


@pytest.fixture
def namespaces() -> Iterator[tuple[list[str], list[Wire]]]:
    """Two namespaces, 10.77.0.2 and 10.77.1.2, behind a slow wire: netem's, or where there is none, ours."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None:
        pytest.skip("needs root, ip and tc")
    names = [f"ff{os.getpid()}n{i}" for i in range(2)]
    wires: list[Wire] = []
    try:
        for i, name in enumerate(names):
            outer, inner = f"ff{os.getpid() % 100000}o{i}", f"ff{os.getpid() % 100000}i{i}"
            if not (ip("netns", "add", name) and ip("-n", name, "link", "set", "lo", "up")):
                pytest.skip("this machine does not permit network namespaces")
            probe = ["ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "0ms"]
            if subprocess.run(probe, capture_output=True).returncode:
                wires.append(Wire(name, f"10.77.{i}.1", f"10.77.{i}.2", DELAY, JITTER, LOSS))
                continue
            assert ip("link", "add", outer, "type", "veth", "peer", "name", inner, "netns", name)
            assert ip("addr", "add", f"10.77.{i}.1/30", "dev", outer)
            assert ip("link", "set", outer, "up")
            assert ip("-n", name, "addr", "add", f"10.77.{i}.2/30", "dev", inner)
            assert ip("-n", name, "link", "set", inner, "up")
            for where in (["dev", outer], ["-n", name, "dev", inner]):
                netns, device = where[:-2], where[-2:]
                subprocess.run(["tc", *netns, "qdisc", "add", *device, "root", "netem", *NETEM], check=True)
        yield names, wires
    finally:
        for wire in wires:
            wire.close()
        for name in names:
            ip("netns", "del", name)  # takes its end of the pair along


def test_nodes_in_namespaces_complete_a_run(namespaces: tuple[list[str], list[Wire]], tmp_path: Path) -> None:
    names, wires = namespaces
    run(compose([*KEYS, "runtime=inline", f"out={tmp_path / 'inline'}"]), quiet=True)
    wanted = json.loads((tmp_path / "inline" / "summary.json").read_text())["digest"]
    port, certs = free_port(), tmp_path / "certs"
    control = free_port()
    write_certificates(certs, ["10.77.0.1", "10.77.1.1"], ["node-0", "node-1"], operators=["local"])
    deploy = [sys.executable, "-m", "fedfuse.deploy"]
    running: list[Process] = []
    try:
        words = ["server", "--certs", str(certs), "--host", "0.0.0.0", "--port", str(port), "--state-dir"]
        words += [str(tmp_path / "server"), "--runs", str(tmp_path / "runs"), "--control-port", str(control)]
        running.append(Process("server", [*deploy, *words], surroundings(tmp_path / "s"), tmp_path / "server.log"))
        assert running[0].wait_for(READY, 600), running[0].text()
        link = Link(f"127.0.0.1:{control}", certs / "ca.crt", operator=certs / "operator-local.pem")
        for i, name in enumerate(names):
            register(link, certs / f"node-{i}.pub", {"client": i, "every": 2})
            words = ["node", "--server", f"10.77.{i}.1:{port}", "--ca", str(certs / "ca.crt"), "--partition", f"{i}/2"]
            words += ["--key", str(certs / f"node-{i}.key"), "--state-dir", str(tmp_path / f"node-{i}")]
            whole = ["ip", "netns", "exec", name, *deploy, *words]
            running.append(Process(f"node-{i}", whole, surroundings(tmp_path / "n"), tmp_path / f"node-{i}.log"))
        summary = submit(link, order_of(compose(list(KEYS)), Patience()), tmp_path / "out")
        assert summary is not None
        assert summary["digest"] == wanted
        assert all(wire.lost for wire in wires)
        said = [f"{wire.lost} of {wire.carried} packets lost" for wire in wires]
        print("delay and loss by", f"our wire: {said}" if wires else f"netem {NETEM}", summary["seconds"])
    finally:
        for process in reversed(running):
            process.stop()
