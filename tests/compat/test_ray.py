"""Guards: the names that a lean start of Ray replaces; and a start that says why it is not lean."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import subprocess
from pathlib import Path

import pytest

from fedfuse.compat import ray_start


def test_the_names_are_there_and_are_put_back() -> None:
    from ray._private import ray_constants, services, worker
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    raylet = importlib.import_module("ray._raylet")
    for names in ray_start.AGENTS.values():
        for name in names:
            assert isinstance(getattr(raylet, f"{name}_PORT_NAME"), str)
    assert callable(raylet.persist_port)
    assert {"no_monitor", "include_log_monitor"} <= set(inspect.signature(RayParams.__init__).parameters)
    source = inspect.getsource(services)
    assert all(flag.removeprefix("--") in source for flag in ray_start.AGENTS)
    assert "process = ConsolePopen(" in inspect.getsource(services.start_ray_process)
    assert issubclass(services.ConsolePopen, subprocess.Popen)
    assert "target=listen_error_messages" in inspect.getsource(worker)
    before = (services.start_ray_process, Node.start_api_server, RayParams.__init__, worker.listen_error_messages)
    with ray_start.lean_start():
        assert services.start_ray_process is not before[0]
        assert Node.start_api_server(None, include_dashboard=False, raise_on_failure=True) is None
        assert ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV is False
    after = (services.start_ray_process, Node.start_api_server, RayParams.__init__, worker.listen_error_messages)
    assert after == before


def test_options_that_ray_does_not_know_are_not_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import ray

    known = ray_start.private_options(tmp_path)
    assert known.keys() == {"_temp_dir", "_system_config"}
    assert known["_temp_dir"] == str(tmp_path)
    monkeypatch.setattr(ray, "init", lambda **options: options.pop("_temp_dir"))
    assert ray_start.private_options(tmp_path).keys() == {"_temp_dir"}


def test_a_start_that_falls_back_says_its_first_error(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    from fedfuse.engines import cluster

    starts: list[str] = []

    @contextlib.contextmanager
    def gone():
        starts.append("lean")
        raise AttributeError("ray._raylet has no METRICS_AGENT_PORT_NAME")
        yield

    monkeypatch.setattr(cluster, "lean_start", gone)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: None)
    monkeypatch.setattr(cluster.ray, "init", lambda **options: starts.append("plain"))
    monkeypatch.setattr(cluster.atexit, "register", lambda call: None)
    with caplog.at_level(logging.WARNING, "fedfuse"):
        cluster.connect(1)
    assert starts == ["lean", "lean", "plain"]
    assert "METRICS_AGENT_PORT_NAME" in caplog.text
