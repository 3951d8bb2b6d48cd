"""Flower's own simulator gives the bits of `runtime=inline`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedfuse.compose import compose
from fedfuse.experiment import run
from tests.federations import TINY


def digest(path: Path, *overrides: str) -> str:
    run(compose([*TINY, *overrides, f"out={path}"]), quiet=True)
    return json.loads((path / "summary.json").read_text())["digest"]


@pytest.mark.parametrize(
    "strategy",
    ["knfu", pytest.param("fedavg", marks=pytest.mark.deploy), pytest.param("fedmd", marks=pytest.mark.deploy)],
)
def test_simulator_equals_inline(strategy: str, tmp_path: Path) -> None:
    inline = digest(tmp_path / "inline", f"strategy={strategy}")
    assert inline
    assert digest(tmp_path / "flower", f"strategy={strategy}", "runtime=flower") == inline
