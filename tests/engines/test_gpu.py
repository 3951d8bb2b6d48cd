"""Actors that share a GPU: the same bits twice, with one or two actors, and close to what the CPU computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fedfuse.config.compose import compose
from fedfuse.runs.experiment import run
from tests.federations import TINY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device on this machine"),
]


def summary(path: Path, *words: str) -> dict:
    run(compose([*TINY, *words, f"out={path}"]), quiet=True)
    return json.loads((path / "summary.json").read_text())


@pytest.mark.parametrize("strategy", ["fedavg", "knfu", "feddf"])
def test_actors_share_a_gpu(strategy: str, tmp_path: Path) -> None:
    words = (f"strategy={strategy}", "runtime=ray", "runtime.device=cuda", "rounds=3")
    two = summary(tmp_path / "two", *words, "runtime.workers=2", "runtime.gpu_fraction=0.5")
    one = summary(tmp_path / "one", *words, "runtime.workers=1", "runtime.gpu_fraction=1")
    cpu = summary(tmp_path / "cpu", f"strategy={strategy}", "runtime=inline", "runtime.device=cpu", "rounds=3")
    assert two["digest"] == one["digest"]
    assert two["traffic"] == cpu["traffic"]
    assert two["failures"] == cpu["failures"]
    assert abs(two["final"]["loss/train"] - cpu["final"]["loss/train"]) < 0.05


def test_mixed_precision_on_a_gpu(tmp_path: Path) -> None:
    words = ("strategy=fedavg", "model=cnn", "runtime=inline", "runtime.device=cuda", "train.precision=bf16")
    first, second = (summary(tmp_path / name, *words) for name in ("a", "b"))
    assert first["digest"] == second["digest"]
    assert first["final"]["loss/train"] < 3
