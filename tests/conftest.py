"""One Ray session for all tests of a process, quiet environment, and no threads beside the one that computes."""

from __future__ import annotations

import os

os.environ.update(
    FLWR_TELEMETRY_ENABLED="0",
    RAY_USAGE_STATS_ENABLED="0",
    FLWR_DISABLE_UPDATE_CHECK="1",
    OMP_NUM_THREADS="1",
)

import pytest


@pytest.fixture(scope="session")
def ray_session():
    """Two idle workers that every test of this process shares."""
    from fedfuse.runtime.ray import connect, disconnect

    connect(2, None)
    yield
    disconnect()


PROCESSES = ("tests/deploy/test_processes", "tests/runtime/test_", "tests/deploy/test_simulator", "tests/test_sweep")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts processes goes first: it waits a lot, and at the end nobody would work meanwhile."""
    items.sort(key=lambda item: not item.nodeid.startswith(PROCESSES))
