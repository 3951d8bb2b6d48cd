"""The container files: well-formed, nothing published but the server, and every command really runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedfuse.deploy.commands import parser
from fedfuse.deploy.processes import Process, free_port, surroundings

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text().splitlines()
FEDFUSE = [sys.executable, "-m", "fedfuse.deploy"]  # what the image calls `fedfuse deploy`
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


def test_hadolint_finds_nothing() -> None:
    tool = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([tool, ROOT / "docker" / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("service", list(SERVICES))
def test_every_command_is_one_of_ours(service: str) -> None:
    args = parser().parse_args(words(service))
    assert args.command in ("certs", "server", "request", "register", "node", "run")


def test_no_container_holds_a_key_that_it_does_not_use() -> None:
    """The attack of the audit: one volume of all keys was mounted into every container."""
    holders: dict[str, set[str]] = {}
    for name, service in SERVICES.items():
        for volume in service.get("volumes", []):
            holders.setdefault(volume.split(":")[0], set()).add(name)
    assert holders["ca"] == {"certs"}
    assert holders["server-keys"] == {"certs", "server"}
    assert holders["operator-keys"] == {"certs", "register", "run"}
    for i in range(3):
        assert holders[f"node-{i}-keys"] == {f"request-{i}", f"node-{i}"}
    assert SERVICES["server"]["ports"] == ["8000:8000"]  # sites' port; operators come from inside


def test_dockerfile_is_pinned_and_not_root() -> None:
    lines = DOCKERFILE
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
    """All of them: services, health checks, the image's own entry point; only paths, addresses and ports are mapped."""
    port, control = free_port(), free_port()
    running: dict[str, Process] = {}
    ports = {service: free_port() for service in SERVICES}

    def mapped(service: str, given: list[str]) -> list[str]:
        here = {f"/{name}": tmp_path / name for name in ("ca", "public", "server", "operator", "runs")}
        own = service.replace("request", "node")  # a volume of the node's, which its request is made in
        here |= {"/state": tmp_path / service / "state", "/keys": tmp_path / own / "keys"}
        out = []
        for word in given:
            for inside, outside in here.items():
                word = re.sub(f"^{inside}", str(outside), word)
            word = re.sub("^(server|127.0.0.1):8000$", f"127.0.0.1:{port}", word).replace("9094", str(ports[service]))
            word = re.sub("^server:8001$", f"127.0.0.1:{control}", word)
            out.append(
                {"8000": str(port), "8001": str(control), "0.0.0.0": "127.0.0.1", "python": sys.executable}.get(
                    word, word
                )
            )
        return out

    def start(service: str) -> Process:
        (tmp_path / service).mkdir(exist_ok=True)
        local = mapped(service, words(service))
        if service.startswith("node"):
            local += ["--port", str(ports[service])]  # every container has a 9094 of its own
        if service == "run":
            local += [f"out={tmp_path / 'out'}"]
        running[service] = Process(
            service, [*FEDFUSE, *local], surroundings(tmp_path / service / "flwr"), tmp_path / f"{service}.log"
        )
        return running[service]

    def finished(service: str, seconds: float) -> None:
        start(service).child.wait(seconds)
        assert running[service].child.returncode == 0, running[service].text()

    def healthy(service: str, seconds: float = 120) -> None:
        kind, *check = SERVICES[service]["healthcheck"]["test"]
        assert kind == "CMD"
        check = mapped(service, check)
        if check[:2] == ["fedfuse", "deploy"]:
            check = [*FEDFUSE, *check[2:]]
        until = time.monotonic() + seconds
        while subprocess.run(check, capture_output=True, timeout=60).returncode:
            assert time.monotonic() < until, running[service].text()
            assert running[service].alive, running[service].text()
            time.sleep(1)

    try:
        entry = [line.split(maxsplit=1)[1] for line in DOCKERFILE if line.startswith(("ENTRYPOINT", "CMD"))]
        assert json.loads(entry[0]) == ["fedfuse", "deploy"]
        assert subprocess.run([*FEDFUSE, *json.loads(entry[1])], capture_output=True, timeout=60).returncode == 0
        finished("certs", 60)
        start("server")
        healthy("server")
        for service in ("request-0", "request-1", "request-2"):
            finished(service, 60)
        finished("register", 240)
        for service in ("node-0", "node-1", "node-2"):
            start(service)
        for service in ("node-0", "node-1", "node-2"):
            healthy(service)
        finished("run", 500)
        assert set(running) == set(SERVICES)
        assert (tmp_path / "out" / "summary.json").exists()
    finally:
        for process in reversed(running.values()):
            process.stop()
