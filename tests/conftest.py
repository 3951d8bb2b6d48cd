"""One Ray session for all tests of a process, quiet environment, and no threads beside the one that computes."""

from __future__ import annotations

import os
from unittest import mock

os.environ.update(
    FLWR_TELEMETRY_ENABLED="0",
    RAY_USAGE_STATS_ENABLED="0",
    FLWR_DISABLE_UPDATE_CHECK="1",
    OMP_NUM_THREADS="1",
    RAY_worker_niceness="0",  # of Ray that tests or Flower start: at Ray's 15, a busy neighbour stops its workers
)

import pytest

os.fsync = lambda file: None  # tests end processes, never a machine's power: a fifth of all their time was this wait


@pytest.fixture(scope="session", autouse=True)
def left_out():
    """What runs in a test's own process leave to those in processes of their own.

    They do not end the one Ray (that they do: engines/test_resume.py), nor draw the partition, which takes longer
    than a tiny run (that they do: test_cli.py; how it looks: data/test_picture.py).
    """
    with mock.patch("fedfuse.cli._end_ray"), mock.patch("fedfuse.data.picture.draw_partition"):
        yield


@pytest.fixture(scope="session")
def ray_session():
    """Two idle workers that every test of this process shares."""
    from fedfuse.engines.ray import connect, disconnect

    connect(2, None)
    yield
    disconnect()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many clients' trainings were made in each stack."""
    from fedfuse.core import abreast

    found: list[int] = []
    real = abreast.together

    def together(asked, replicas, forward):
        found.append(len(asked))
        return real(asked, replicas, forward)

    monkeypatch.setattr(abreast, "together", together)
    return found


LONG = (
    (
        "tests/engines/test_resume",
        "tests/engines/",
        "tests/test_cli",
        "tests/runs/test_sweep",
        "tests/results/test_watch",
    ),
    ("tests/deploy/test_processes", "tests/deploy/"),
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is long and was not asked for (`-m deploy`), and put the rest in order.

    The longest go first: they start processes and wait a lot, and at the end nobody would work meanwhile.

    Two pytest workers begin with a half of the list each: one has a group of long files first, one the other.
    """

    asked = "deploy" in (config.getoption("markexpr") or "")
    for item in items:
        if item.get_closest_marker("deploy") is not None:
            item.add_marker(pytest.mark.timeout(1200) if asked else pytest.mark.skip(reason="long; make test-deploy"))

    def order(item: pytest.Item) -> tuple[int, int]:
        for half, files in enumerate(LONG):
            for i, name in enumerate(files):
                if item.nodeid.startswith(name):
                    return half, i
        return len(LONG), 0

    first, second, rest = ([i for i in items if order(i)[0] == half] for half in (0, 1, 2))
    cut = max(0, len(items) // 2 - len(first))
    items[:] = [*sorted(first, key=order), *rest[:cut], *sorted(second, key=order), *rest[cut:]]
