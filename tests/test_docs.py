"""The documentation's code is executed: what it shows is what works."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from fedfuse.config import registry
from tests.federations import play

ROOT = Path(__file__).parent.parent


@pytest.fixture(params=[("docs/strategy.md", "agree"), ("README.md", "median")])
def documented(request, tmp_path):
    """Register the strategy that a page shows, for one test."""
    page, name = request.param
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    (text,) = [block for block in blocks if "@strategy" in block]
    path = tmp_path / f"documented_{name}.py"
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    yield name
    registry._entries.pop(name)
    sys.modules.pop(path.stem)


def test_the_documented_strategy_keeps_the_contract(documented: str) -> None:
    first = play(documented)
    assert play(documented, reverse=True).digest == first.digest
    assert play(documented, grid="serial").digest == first.digest
    assert play(documented, "evaluate.every=2").totals["down_bytes"] == first.totals["down_bytes"]
    assert first.totals["up_bytes"] > 0
    assert "accuracy/personal" in first.federation.headline


def test_tests_that_the_pages_name_exist() -> None:
    files = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "docs/distillation.md").read_text(encoding="utf-8"))
    assert len(named) > 50
    assert [f"{file}::{name}" for file, name in named if f"def {name}(" not in files.get(file, "")] == []


def test_the_adapters_tables_are_what_their_command_prints(capsys) -> None:
    folder = ROOT / "experiments/adapters"
    spec = importlib.util.spec_from_file_location("adapters_study", folder / "study.py")
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    study.table()
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    stands = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(printed) > 40
    assert [line for line in printed if line not in stands] == []
