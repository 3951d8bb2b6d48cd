"""The container files: well-formed, nothing published but the server, and every command really runs."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedfuse.deploy.command import parser
from fedfuse.deploy.processes import Process, free_port, surroundings

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
KNOWN = {
    "build", "cap_drop", "command", "depends_on", "entrypoint", "healthcheck", "image", "init", "ports", "profiles",
    "read_only", "restart", "security_opt", "tmpfs", "volumes", "working_dir",
}  # fmt: skip


def words(service: str) -> list[str]:
    return [*SERVICES[service].get("entrypoint", [])[2:], *SERVICES[service]["command"]]


def test_compose_is_well_formed() -> None:
    volumes = set(COMPOSE["volumes"])
    for name, service in SERVICES.items():
        assert set(service) <= KNOWN, name
        assert {volume.split(":")[0] for volume in service.get("volumes", [])} <= volumes
        assert set(service.get("depends_on", {})) <= set(SERVICES)
        assert service["image"] == "fedfuse:0.1.0"
        assert service["cap_drop"] == ["ALL"]
        assert service["read_only"] is True
        assert all(isinstance(word, str) for word in words(name))
    assert [name for name, service in SERVICES.items() if "ports" in service] == ["server"]
    assert {"server", "node-0", "node-1", "node-2"} <= {n for n, s in SERVICES.items() if "healthcheck" in s}


@pytest.mark.parametrize("service", list(SERVICES))
def test_every_command_is_one_of_ours(service: str) -> None:
    args = parser().parse_args(words(service))
    assert args.command in ("certs", "server", "register", "node", "run")


def test_dockerfile_is_pinned_and_not_root() -> None:
    lines = (ROOT / "docker" / "Dockerfile").read_text().splitlines()
    starts = [line.split()[0] for line in lines if re.match(r"[A-Z]+ ", line)]
    assert set(starts) <= {"ARG", "FROM", "ENV", "RUN", "WORKDIR", "COPY", "USER", "VOLUME", "ENTRYPOINT", "CMD"}
    users = [line for line in lines if line.startswith("USER")]
    assert users
    assert "root" not in users[-1]
    assert re.search(r"ARG PYTHON=\d+\.\d+\.\d+-", "\n".join(lines))
    for line in lines:
        if line.startswith(("ENTRYPOINT", "CMD", "VOLUME")):
            json.loads(line.split(maxsplit=1)[1])
        if line.startswith("COPY") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), source


@pytest.mark.deploy
def test_the_commands_run_as_processes_of_this_machine(tmp_path: Path) -> None:
    port = free_port()
    running: dict[str, Process] = {}

    def start(service: str) -> Process:
        state = tmp_path / service
        state.mkdir()
        here = {"/certs": str(tmp_path / "certs"), "/state": str(state / "state"), "/runs": str(state / "runs")}
        local = []
        for word in words(service):
            for inside, outside in here.items():
                word = re.sub(f"^{inside}", outside, word)
            local.append(
                {"server:8000": f"127.0.0.1:{port}", "8000": str(port), "0.0.0.0": "127.0.0.1"}.get(word, word)
            )
        if service.startswith("node"):
            local += ["--port", str(free_port())]
        if service == "run":
            local += [f"out={tmp_path / 'out'}"]
        running[service] = Process(
            service,
            [sys.executable, "-m", "fedfuse.deploy", *local],
            surroundings(state / "flwr"),
            tmp_path / f"{service}.log",
        )
        return running[service]

    def finished(service: str, seconds: float) -> None:
        start(service).child.wait(seconds)
        assert running[service].child.returncode == 0, running[service].text()

    try:
        finished("certs", 60)
        assert start("server").wait_for("Uvicorn running", 120)
        finished("register", 120)
        for service in ("node-0", "node-1", "node-2"):
            start(service)
        finished("run", 500)
        assert (tmp_path / "out" / "summary.json").exists()
    finally:
        for process in reversed(running.values()):
            process.stop()
