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
    registry.registered.pop(name)
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
    pages = "".join((ROOT / f"docs/{name}.md").read_text(encoding="utf-8") for name in ("distillation", "tokenisers"))
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", pages)
    assert len(named) > 60
    assert [f"{file}::{name}" for file, name in named if f"def {name}(" not in files.get(file, "")] == []


@pytest.mark.parametrize(("name", "least"), [("adapters", 41), ("tokenisers", 14)])
def test_a_study_s_tables_are_what_its_command_prints(name: str, least: int, capsys) -> None:
    folder = ROOT / "experiments" / name
    spec = importlib.util.spec_from_file_location(f"{name}_study", folder / "study.py")
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    study.table()
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    stands = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(printed) >= least
    assert [line for line in printed if line not in stands] == []


def test_the_notebook_runs(tmp_path, monkeypatch) -> None:
    """Its cells one after another, as a kernel would, at one round."""
    import json

    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "experiments/notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    space: dict = {}
    for cell in (cell for cell in cells if cell["cell_type"] == "code"):
        assert cell["outputs"] == []
        exec("".join(cell["source"]).replace("ROUNDS = 5", "ROUNDS = 1"), space)
    assert len(space["found"]) == 6
    assert space["mine"].summary["rounds_done"] == 1


def test_the_page_on_notebooks_does_what_it_shows(tmp_path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/notebooks.md").read_text(encoding="utf-8"), re.DOTALL)
    space: dict = {"OUT": tmp_path}
    exec(block, space)
    assert space["run"].summary["final"]["accuracy/global"] > 0.5
    assert space["found"].report.exists()


@pytest.mark.parametrize("page", ["own_models", "partitions"])
def test_what_the_pages_show_can_be_built(page: str) -> None:
    from fedfuse.runs.experiment import prepare_scenario

    blocks = re.findall(r"```python\n(.*?)```", (ROOT / f"docs/{page}.md").read_text(encoding="utf-8"), re.DOTALL)
    space: dict = {"__name__": page}
    for block in blocks:
        exec(block, space)
    if page == "own_models":
        import torch

        built = space["Parted"]((1, 8, 8), 10)
        assert built(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
        assert 0 < space["Cubed"]()(torch.eye(3), torch.ones(3, 3)).item() < 1
    else:
        from fedfuse.config.compose import compose
        from fedfuse.config.dotted import give

        config = compose(["data=custom", f"data.load={give(space['mine'])}", "partition=natural", "clients=null"])
        assert prepare_scenario(config).clients == 5


def test_the_site_has_every_page_and_its_links_lead_somewhere(tmp_path) -> None:
    import yaml

    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "docs/site.py")
    site = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(site)
    pages = {str(page.relative_to(tmp_path)) for page in site.pages(tmp_path)}
    listed = re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:")[1])
    assert set(listed) == pages
    for page in pages:
        text = (tmp_path / page).read_text(encoding="utf-8")
        for _, _, where, _ in site.LINK.findall(re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
            assert re.match(r"[a-z]+:", where) or (tmp_path / page).parent.joinpath(where).exists(), (page, where)
    reference = (tmp_path / "reference/strategies.md").read_text(encoding="utf-8")
    assert all(f"## `{name}`" in reference for name in registry.listed())
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] in (ROOT / "pyproject.toml").read_text()
