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


LONG = ("tests/runtime/test_resume", "tests/deploy/test_processes", "tests/runtime/", "tests/deploy/test_simulator")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest go first: they start processes and wait a lot, and at the end nobody would work meanwhile."""
    items.sort(key=lambda item: next((i for i, name in enumerate(LONG) if item.nodeid.startswith(name)), len(LONG)))
