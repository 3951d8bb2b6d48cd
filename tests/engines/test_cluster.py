"""A real cluster of two Ray nodes, the second with a private file system: state travels; a lost node costs nothing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import pytest

from tests.engines.processes import MARK, below, gone, marked
from tests.federations import play

WIDE = ("clients=10", "data.limit=480", "rounds=3")

DRIVER = """
import sys, threading, time, os, signal
from pathlib import Path
import ray
from tests.federations import federation
address, where, second, words = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
ray.init(address=address, log_to_driver=False, logging_level="ERROR")
with federation("knfu", *words, f"runtime.address={address}", grid="ray", path=where) as (built, directory):
    ray.get([built.grid.prepare(m) or m.ready for m in built.grid.crew])
    seen = [ray.get(m.ready) for m in built.grid.crew]
    assert sorted(seen) == [False, True], seen  # one worker a node, and the second does not see our directory
    def lose():
        while built.done < 1:
            time.sleep(0.01)
        os.killpg(second, signal.SIGKILL)
    threading.Thread(target=lose, daemon=True).start()
    built.run()
    assert not built.strategy.inbox.ever_left_out, built.strategy.inbox.left_out
    print("digest", built.digest)
"""


def can_unshare() -> bool:
    tool = shutil.which("unshare")
    return bool(tool) and subprocess.run([tool, "-m", "true"], capture_output=True).returncode == 0


@pytest.fixture
def cluster(tmp_path):
    """Head and second node; the second has an empty file system of its own where the first keeps its runs."""
    if not can_unshare():
        pytest.skip("needs the right to make a mount namespace (unshare -m)")
    mark = uuid.uuid4().hex
    private = tmp_path / "private"
    private.mkdir()
    root = Path(tempfile.mkdtemp(prefix="ffc", dir="/tmp"))  # Ray's sockets need a short path
    environment = {
        **os.environ, MARK: mark, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "PYTHONPATH": str(Path(__file__).parents[2]),
    }  # fmt: skip
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus=1", "--disable-usage-stats", "--block"]
    port = 20000 + os.getpid() % 10000
    head = subprocess.Popen(
        [*ray, "--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={root}"],
        env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    address = f"127.0.0.1:{port}"
    command = " ".join([*ray, f"--address={address}"])
    time.sleep(5)
    second = subprocess.Popen(
        ["unshare", "-m", "sh", "-c", f"mount -t tmpfs none {private}; {command}"],
        env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield address, private, second, environment
    finally:
        for node in (second, head):
            for pid in [*below(node.pid), node.pid]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            node.wait(30)
        left = gone(mark)
        shutil.rmtree(root, ignore_errors=True)
        assert not left, left


def ready(address: str, environment: dict[str, str], seconds: float = 90) -> None:
    ask = "import ray,sys; ray.init(address=sys.argv[1], logging_level='ERROR'); sys.exit(len(ray.nodes()) != 2)"
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if subprocess.run([sys.executable, "-c", ask, address], env=environment, capture_output=True).returncode == 0:
            return
        time.sleep(1)
    pytest.fail("the cluster did not come up")


@pytest.mark.deploy
def test_two_nodes_and_one_that_is_lost(cluster) -> None:
    """Round 1 runs on both nodes, then the second is killed and its directory gone: the digest of one machine."""
    address, private, second, environment = cluster
    ready(address, environment)
    words = [str(second.pid), *WIDE]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, address, str(private / "run"), *words],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.split()[-1] == play("knfu", *WIDE).digest
    assert marked(environment[MARK])  # the head lives on
