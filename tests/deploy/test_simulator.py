"""Flower's own simulator gives the bits of `runtime=inline`."""

from __future__ import annotations

import errno
import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.serverapp import ServerApp

from fedfuse.config.compose import compose
from fedfuse.core.loop import Federation
from fedfuse.errors import WorldError
from fedfuse.runs.directory import RunDirectory
from fedfuse.runs.experiment import resume, run
from tests.deploy.network import Network, seats, tiny
from tests.federations import TINY


def digest(path: Path, *overrides: str) -> str:
    run(compose([*TINY, *overrides, f"out={path}"]), quiet=True)
    return json.loads((path / "summary.json").read_text())["digest"]


@pytest.mark.deploy
@pytest.mark.parametrize("strategy", ["knfu", "fedavg", "fedmd"])
def test_simulator_equals_inline(strategy: str, tmp_path: Path) -> None:
    inline = digest(tmp_path / "inline", f"strategy={strategy}")
    assert inline
    assert digest(tmp_path / "flower", f"strategy={strategy}", "runtime=flower") == inline


@pytest.mark.deploy
def test_idle_workers_do_not_keep_the_cores_from_it(tmp_path: Path) -> None:
    ray = digest(tmp_path / "ray", "strategy=knfu", "runtime=ray", "runtime.workers=2")
    assert digest(tmp_path / "flower", "strategy=knfu", "runtime=flower") == ray


def test_a_broken_simulator_leaves_no_thread_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its server thread is no daemon: a test process would not end."""
    network, threads = Network(seats(tmp_path, 3)), list[threading.Thread]()
    network.before = lambda message: False  # as actors that wait for cores

    def broken(server: ServerApp, client: object, **_: object) -> None:
        threads.append(threading.Thread(target=server, args=(network, None)))
        threads[0].start()
        while not network.log:
            time.sleep(0.01)
        raise RuntimeError("Ray is gone")

    monkeypatch.setattr("flwr.simulation.run_simulation", broken)
    config = replace(tiny("fedavg"), out=str(tmp_path / "run"), runtime=replace(tiny("fedavg").runtime, name="flower"))
    with pytest.raises(WorldError, match="Flower's simulator: RuntimeError: Ray is gone"):
        run(config, quiet=True)
    threads[0].join(30)
    assert not threads[0].is_alive()


@pytest.mark.deploy
def test_a_broken_off_simulation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inline = digest(tmp_path / "inline", "strategy=knfu", "rounds=3")
    commit, where = RunDirectory.round, tmp_path / "flower"

    def full(self: RunDirectory, federation: Federation) -> None:
        if federation.done == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        commit(self, federation)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "round", full)
        with pytest.raises(WorldError, match="the run can be resumed"):
            digest(where, "strategy=knfu", "rounds=3", "runtime=flower")
    resume(where, quiet=True)
    assert json.loads((where / "summary.json").read_text())["digest"] == inline
