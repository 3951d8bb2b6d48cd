"""How Ray starts: without what serves nobody here, and as it is where Ray's private names have changed."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import ray

from fedfuse.config.compose import compose
from fedfuse.core.loop import Federation
from fedfuse.engines import cluster
from fedfuse.errors import WorldError
from fedfuse.runs.directory import RunDirectory
from fedfuse.runs.experiment import run
from tests.federations import TINY

START = """
import os, signal, sys, time
import ray
from ray import _raylet
from tests.engines.processes import below
if "gone" in sys.argv:
    del _raylet.METRICS_AGENT_PORT_NAME
else:  # a runtime environment would need an agent
    os.environ["RAY_RUNTIME_ENV_HOOK"] = "no.such.hook"
from fedfuse.engines import cluster
cluster.connect(1)
one = ray.remote(lambda: 1)
print(ray.get(one.remote()))
commands = [open(f"/proc/{pid}/cmdline").read() for pid in below(os.getpid())]
print(any("agent.py" in c or "agent/main.py" in c or "Agent" in c[:30] for c in commands))
try:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
except SystemExit:  # as by Ctrl-C: what is to be done at the end is done
    cluster.disconnect()
end = time.monotonic() + 30
while below(os.getpid()) and time.monotonic() < end:
    time.sleep(0.1)
print(len(below(os.getpid())))
"""


@pytest.mark.parametrize(("names", "agents"), [("there", "False"), ("gone", "True")])
def test_a_start_leaves_out_what_serves_nobody(names: str, agents: str) -> None:
    here = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", START, names], capture_output=True, text=True, timeout=300, cwd=here)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["1", agents, "0"]
    assert "SIGTERM received" not in done.stderr  # Ray's stack of C++


def test_a_folder_of_somebody_else_is_not_entered(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as root:
        monkeypatch.setattr(tempfile, "tempdir", root)
        (Path(root) / f"fedfuse-ray-{os.getpid()}").mkdir()
        monkeypatch.setattr(os, "getuid", lambda: 4711)
        with pytest.raises(WorldError, match="belongs to somebody else"):
            cluster._directory()


def test_the_first_round_waits_for_no_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is told as a run's rounds is theirs alone: workers that have to start first are the start's."""
    found: list[tuple[int, float]] = []
    began = RunDirectory.start

    def start(self: RunDirectory, federation: Federation) -> None:
        ready = [member.ready for member in federation.grid.crew]
        found.append((len(ray.wait(ready, num_returns=len(ready), timeout=0)[0]), self.seconds["startup"]))
        began(self, federation)

    monkeypatch.setattr(RunDirectory, "start", start)
    run(
        compose([*TINY, "strategy=fedavg", "rounds=1", "runtime=ray", "runtime.workers=2", f"out={tmp_path / 'a'}"]),
        quiet=True,
    )
    assert found == [(2, 0.0)]
