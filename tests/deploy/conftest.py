from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "deploy: starts many real processes and takes minutes (make test-deploy)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # the long ones run only when asked for: -m deploy, and have time
    for item in items:
        if "deploy" in {mark.name for mark in item.iter_markers()} and "tests/deploy/" in item.nodeid:
            item.add_marker(pytest.mark.timeout(1200))
    if "deploy" not in (config.getoption("markexpr") or ""):
        skip = pytest.mark.skip(reason="long; run with -m deploy")
        for item in items:
            if "deploy" in {mark.name for mark in item.iter_markers()} and "tests/deploy/" in item.nodeid:
                item.add_marker(skip)
