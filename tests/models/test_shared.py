"""One copy of a frozen base per machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fedfuse.errors import WorldError
from fedfuse.models import shared_memory
from fedfuse.models.in_place import overlay, variable


@pytest.fixture
def small(monkeypatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("FEDFUSE_CACHE", str(tmp_path))
    monkeypatch.setattr(shared_memory, "LEAST", 1)
    return tmp_path / "bases"


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))


FROZEN = frozenset({"0.weight", "0.bias"})


def test_two_models_map_one_file_and_compute_the_same(small: Path) -> None:
    first, second = net(), net()
    want = net()(torch.ones(1, 8))
    assert shared_memory.share(first, FROZEN) == 4 * 72
    assert shared_memory.share(second, FROZEN) == 4 * 72
    assert len(list(small.iterdir())) == 1
    assert torch.equal(first(torch.ones(1, 8)), want)
    with torch.no_grad():
        second[0].weight.zero_()  # its own copy of the page
    assert torch.equal(first(torch.ones(1, 8)), want)


def test_a_damaged_file_is_refused(small: Path) -> None:
    shared_memory.share(net(), FROZEN)
    (path,) = small.iterdir()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(WorldError, match="is not the base it is named after"):
        shared_memory.share(net(), FROZEN)


def test_small_bases_stay_in_the_process(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("FEDFUSE_CACHE", str(tmp_path))
    assert shared_memory.share(net(), FROZEN) == 0
    assert not (tmp_path / "bases").exists()


def test_frozen_names_are_neither_kept_nor_loaded() -> None:
    model = net()
    model.frozen = FROZEN
    assert set(variable(model)) == {"1.weight", "1.bias"}
    overlay(model, {"1.weight": torch.zeros(2, 8), "1.bias": torch.zeros(2)})
    with pytest.raises(RuntimeError, match=r"1\.bias"):
        overlay(model, {"1.weight": torch.zeros(2, 8)})
    with pytest.raises(RuntimeError, match="unexpected"):
        overlay(model, {"2.weight": torch.zeros(2, 8)}, strict=False)
