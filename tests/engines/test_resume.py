"""`kill -9` of the driver in mid-round, then `resume`: the same digest as undisturbed; and nothing is left behind."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.engines.processes import MARK, gone, shared_blocks

WORDS = [
    "strategy=knfu", "data=digits", "data.limit=400", "data.test_limit=60", "clients=9", "rounds=4", "model=mlp_small",
    "transfer.size=40", "runtime.workers=2", "train.epochs=3",
]  # fmt: skip


def fedfuse(words: list[str], mark: str) -> subprocess.Popen:
    environment = {**os.environ, MARK: mark, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fedfuse.cli", *words]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finished(words: list[str], mark: str) -> tuple[int, str]:
    process = fedfuse(words, mark)
    text, _ = process.communicate(timeout=400)
    return process.returncode, text


def digest_of(run: Path) -> str:
    return json.loads((run / "summary.json").read_text())["digest"]


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> str:
    where = tmp_path_factory.mktemp("plain") / "run"
    code, text = finished(["run", *WORDS, "runtime=inline", f"out={where}"], uuid.uuid4().hex)
    assert code == 0, text
    return digest_of(where)


def left(mark: str, before: set[str]) -> tuple[list[str], set[str]]:
    """Processes with a mark that outlive their driver by more than 90 seconds, and shared memory that stays."""
    processes, until = gone(mark, pause=1), time.monotonic() + 10
    while (blocks := shared_blocks() - before) and time.monotonic() < until:  # a neighbour's, about to be removed
        time.sleep(1)
    return processes, blocks


@pytest.fixture(scope="session")
def looks() -> Iterator[Callable[[str, set[str]], None]]:
    """Look for what killed drivers left: Ray's agents notice after a minute, in which the next tests run."""
    with ThreadPoolExecutor() as pool:
        found: list[Future[tuple[list[str], set[str]]]] = []
        yield lambda mark, before: found.append(pool.submit(left, mark, before))
        assert [look.result() for look in found] == [([], set())] * len(found), "outlives a killed driver"


def round_of(run: Path) -> int:
    try:
        return int(json.loads((run / "checkpoint" / "round.json").read_text())["round"])
    except (OSError, ValueError):
        return -1


def kill_in_round(process: subprocess.Popen, run: Path, round: int, delay: float) -> None:
    end = time.monotonic() + 300
    while round_of(run) < round and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)


@pytest.mark.parametrize("runtime", [pytest.param("inline", marks=pytest.mark.deploy), "ray"])
def test_killed_driver_resumes_to_the_same_bits(runtime: str, expected: str, looks, tmp_path: Path) -> None:
    where, draw = tmp_path / "run", random.Random(runtime)
    mark = uuid.uuid4().hex
    before = shared_blocks()
    kill_in_round(fedfuse(["run", *WORDS, f"runtime={runtime}", f"out={where}"], mark), where, 1, draw.uniform(0, 0.3))
    if (where / "summary.json").exists():
        pytest.skip("the run was over before it could be killed")
    kill_in_round(fedfuse(["resume", str(where)], mark), where, 2, draw.uniform(0, 0.3))
    undisturbed = uuid.uuid4().hex
    code, text = finished(["resume", str(where)], undisturbed)
    assert code == 0, text
    assert digest_of(where) == expected
    assert not gone(undisturbed)
    looks(mark, before)


FAILS = """\
from torch import nn


class Fails(nn.Linear):
    def forward(self, x):
        if self.training and len(x) > 1:
            raise RuntimeError("deep inside")
        return super().forward(x.flatten(1))


def build(shape, classes):
    return Fails(64, classes)
"""


def test_nothing_is_left_after_a_failure_whose_traceback_reaches_the_screen(tmp_path: Path, monkeypatch) -> None:
    """It happens to a client in a Ray actor, in another process; the traceback was asked for."""
    (tmp_path / "failing.py").write_text(FAILS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    before, mark = shared_blocks(), uuid.uuid4().hex
    words = [*WORDS, "strategy=fedavg", "model=custom", "model.build=failing:build", "rounds=1", "runtime=ray"]
    words = [word for word in words if word not in ("strategy=knfu", "model=mlp_small")]
    code, text = finished(["run", "--traceback", *words, "runtime.retries=0", f"out={tmp_path / 'bad'}"], mark)
    assert code == 1, text
    assert "in forward" in text
    assert "failing.py" in text
    assert not gone(mark)
    assert not shared_blocks() - before


@pytest.mark.parametrize(
    ("runtime", "which", "code", "said"),
    [
        ("ray", signal.SIGINT, 130, "interrupted"),
        ("ray", signal.SIGTERM, 143, "ended by SIGTERM"),
        ("inline", signal.SIGTERM, 143, "ended by SIGTERM"),
    ],
)
def test_nothing_is_left_after_ctrl_c_and_sigterm(runtime, which, code, said, tmp_path: Path) -> None:
    before, mark, where = shared_blocks(), uuid.uuid4().hex, tmp_path / "run"
    process = fedfuse(["run", *WORDS, "rounds=400", f"runtime={runtime}", f"out={where}"], mark)
    end = time.monotonic() + 300
    while round_of(where) < 1 and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    os.killpg(process.pid, which)  # a terminal sends it to everyone in the foreground, a batch system to all of a job
    text, _ = process.communicate(timeout=120)
    assert process.returncode == code, text
    assert f"fedfuse: {said}: fedfuse resume {where} goes on" in text
    assert not gone(mark)
    assert not shared_blocks() - before
    assert not Path(f"/tmp/fedfuse-ray-{process.pid}").exists()
