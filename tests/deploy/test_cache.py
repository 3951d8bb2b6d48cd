"""What a server asks for does not fill a site's disk: the quota of runs is asked first, and the cache is bounded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from PIL import Image

from fedfuse.compat.flower_identity import claim_identity
from fedfuse.config.compose import compose
from fedfuse.config.message import as_json
from fedfuse.core.shares import REFUSED
from fedfuse.data.cache import LAST, few, store_arrays, stored_arrays
from fedfuse.network.policy import Policy
from fedfuse.network.site import Site
from fedfuse.network.site_config import SiteConfig


def hello(run: int, size: int, classes: tuple[str, ...] = ("a", "b")) -> Message:
    words = [f"data.extra.size={size}", "clients=2", "rounds=1", "model=mlp_small", "strategy=fedavg"]
    task = json.dumps({"classes": classes, "mean": None, "std": None, "transfer": 0})
    claim_identity()
    config = as_json(compose(["data=images", *words]))
    setting = ConfigRecord({"config": config, "run": f"{run:032x}", "attempt": 1, "task": task})
    return Message(RecordDict({"setting": setting}), 100, "query.hello")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SiteConfig:
    monkeypatch.setenv("FEDFUSE_CACHE", str(tmp_path / "cache"))
    for name in "ab":
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "data" / name / "0.png")
    return SiteConfig(0, tmp_path / "site", None, str(tmp_path / "data"), Policy(max_runs=1))


def arrays(path: Path) -> list[int]:
    return [len(np.load(found)[0, 0]) for found in path.rglob("train_inputs.npy")]


def test_a_site_keeps_one_data_set_of_its_folder(site: SiteConfig, tmp_path: Path) -> None:
    """The attack: the same images in ever other sizes, by runs that are refused, of which no folder is counted."""
    for size in (20, 21, 22):
        assert Site(site).handle(hello(size, size, ("c", "d"))).error.code == REFUSED
        assert arrays(tmp_path / "cache") == [size]
    assert not site.state.exists()
    stale = next((tmp_path / "cache").rglob("train_inputs.npy")).parent.with_name(".half")
    stale.mkdir()
    assert Site(site).handle(hello(1, 23)).has_content()
    assert arrays(tmp_path / "cache") == [23]
    assert not stale.exists()
    assert Site(site).handle(hello(2, 24)).error.code == REFUSED  # one run too many: nothing is read for it
    assert arrays(tmp_path / "cache") == [23]


def test_a_site_keeps_few_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDFUSE_CACHE", str(tmp_path))
    store_arrays("noise", "own", {"x": np.zeros(1)})
    with few(True):
        for i in range(LAST + 5):
            store_arrays("noise", str(i), {"x": np.zeros(1)})
        assert stored_arrays("noise", str(LAST + 4)) is not None
        assert stored_arrays("noise", "own") is None
    assert len(list((tmp_path / "site" / "noise").iterdir())) == LAST
    assert stored_arrays("noise", "own") is not None
