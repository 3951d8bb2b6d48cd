import os
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Give every test a cache of its own: nothing is read from or left in the user's."""
    monkeypatch.setenv("FEDFUSE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def real_data(monkeypatch):
    """Point at the real data sets, or skip where they are absent."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(os.environ.get("FEDFUSE_DATA", beside))
    if not folder.is_dir():
        pytest.skip("no real data: set FEDFUSE_DATA")
    monkeypatch.setenv("FEDFUSE_DATA", str(folder))
    return folder
