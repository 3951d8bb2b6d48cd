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

from fedfuse.compose import compose
from fedfuse.deploy.certs import write_certificates
from fedfuse.deploy.processes import Process, free_port, surroundings
from fedfuse.deploy.submit import Link, order_of, submit
from fedfuse.experiment import run
from fedfuse.runtime.flower import Patience

pytestmark = pytest.mark.deploy
KEYS = ("strategy=knfu", "data=digits", "clients=2", "rounds=2", "seed=0", "model=mlp_small")
NETEM = ("delay", "50ms", "10ms", "loss", "1%")


def ip(*words: str) -> bool:
    return subprocess.run(["ip", *words], capture_output=True).returncode == 0


@pytest.fixture
def namespaces() -> Iterator[tuple[list[str], bool]]:
    """Two namespaces, fed0 at 10.77.0.2 and fed1 at 10.77.1.2, and whether netem is on."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None:
        pytest.skip("needs root, ip and tc")
    names = [f"ff{os.getpid()}n{i}" for i in range(2)]
    slow = True
    try:
        for i, name in enumerate(names):
            outer, inner = f"ff{os.getpid() % 100000}o{i}", f"ff{os.getpid() % 100000}i{i}"
            made = (
                ip("netns", "add", name)
                and ip("link", "add", outer, "type", "veth", "peer", "name", inner, "netns", name)
                and ip("addr", "add", f"10.77.{i}.1/30", "dev", outer)
                and ip("link", "set", outer, "up")
                and ip("-n", name, "addr", "add", f"10.77.{i}.2/30", "dev", inner)
                and ip("-n", name, "link", "set", inner, "up")
                and ip("-n", name, "link", "set", "lo", "up")
            )
            if not made:
                pytest.skip("this machine does not permit network namespaces")
            words = ["tc", "qdisc", "add", "dev", outer, "root", "netem", *NETEM]
            slow = subprocess.run(words, capture_output=True).returncode == 0 and slow
        yield names, slow
    finally:
        for name in names:
            ip("netns", "del", name)  # takes its end of the pair along


def test_nodes_in_namespaces_complete_a_run(namespaces: tuple[list[str], bool], tmp_path: Path) -> None:
    names, slow = namespaces
    run(compose([*KEYS, "runtime=inline", f"out={tmp_path / 'inline'}"]), quiet=True)
    wanted = json.loads((tmp_path / "inline" / "summary.json").read_text())["digest"]
    port, certs = free_port(), tmp_path / "certs"
    write_certificates(certs, ["10.77.0.1", "10.77.1.1"], ["node-0", "node-1"])
    deploy = [sys.executable, "-m", "fedfuse.deploy"]
    running: list[Process] = []
    try:
        words = ["server", "--certs", str(certs), "--host", "0.0.0.0", "--port", str(port), "--state-dir"]
        words += [str(tmp_path / "server"), "--runs", str(tmp_path / "runs")]
        running.append(Process("server", [*deploy, *words], surroundings(tmp_path / "s"), tmp_path / "server.log"))
        assert running[0].wait_for("Uvicorn running", 120), running[0].text()
        link = Link(f"127.0.0.1:{port}", certs / "ca.crt")
        for i, name in enumerate(names):
            link.flwr("supernode", "register", str(certs / f"node-{i}.pub"), "fedfuse")
            words = ["node", "--server", f"10.77.{i}.1:{port}", "--ca", str(certs / "ca.crt"), "--partition", f"{i}/2"]
            words += ["--key", str(certs / f"node-{i}.key"), "--state-dir", str(tmp_path / f"node-{i}")]
            whole = ["ip", "netns", "exec", name, *deploy, *words]
            running.append(Process(f"node-{i}", whole, surroundings(tmp_path / "n"), tmp_path / f"node-{i}.log"))
        summary = submit(link, order_of(compose(list(KEYS)), Patience()), tmp_path / "out")
        assert summary is not None
        assert summary["digest"] == wanted
        print("netem", NETEM if slow else "is not in this kernel", summary["seconds"])
    finally:
        for process in reversed(running):
            process.stop()
