"""A run of other code is another run, whatever its name."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

import fedfuse
from fedfuse.config.compose import compose
from fedfuse.config.dotted import give
from fedfuse.errors import UserError
from fedfuse.results.difference import difference
from fedfuse.results.setting import differences, group
from fedfuse.runs.configuration import load_config
from fedfuse.runs.experiment import resume
from fedfuse.runs.own_code import go_on_with, hashes_of
from fedfuse.wire.client_store import ClientStore
from tests.federations import TINY

STRATEGY = '''"""Mine."""
from collections.abc import Mapping
from fedfuse import AveragingStrategy, FusionClient, Item, strategy


class MineClient(FusionClient):
    def receive(self, knowledge: Mapping[str, Item]) -> None:
        super().receive(knowledge)


@strategy("mine", client=MineClient)
class Mine(AveragingStrategy):
    """It averages: {comment}."""
    factor = {factor}  # {comment}
'''
MODEL = """import torch
def build(shape, classes):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, {width}), torch.nn.Linear({width}, classes))
"""


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes the strategy and the model anew and imports them, as another process would."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(factor: int = 1, comment: str = "one", width: int = 8) -> None:
        (tmp_path / "mine_strategy.py").write_text(STRATEGY.format(factor=factor, comment=comment))
        (tmp_path / "mine_model.py").write_text(MODEL.format(width=width))
        for name in ("mine_strategy", "mine_model"):
            sys.modules.pop(name, None)
            importlib.invalidate_caches()
            importlib.import_module(name)

    yield write
    fedfuse.config.registry.registered.pop("mine", None)


WORDS = {**dict(word.split("=", 1) for word in TINY), "strategy": "mine", "rounds": 1,
         "model": "custom", "model.build": "mine_model:build"}  # fmt: skip


def test_a_finished_run_is_not_taken_for_one_of_changed_code(written, tmp_path: Path) -> None:
    written()
    words = {**WORDS, "out": tmp_path / "c"}
    first = fedfuse.compare(words)[0]
    written(comment="another")  # nothing that runs is other
    assert fedfuse.compare(words)[0].digest == first.digest
    written(factor=2)
    with pytest.raises(UserError, match=r"was run by other code of the strategy \(sha256 .*overwrite=true"):
        fedfuse.compare(words)
    written(width=9)
    with pytest.raises(UserError, match="other code of the model"):
        fedfuse.compare(words)
    assert fedfuse.compare({**words, "overwrite": True})[0].digest != first.digest
    assert fedfuse.compare(words)[0].digest


def test_runs_of_other_code_are_told_apart(written, tmp_path: Path) -> None:
    written()
    one = fedfuse.run({**WORDS, "out": tmp_path / "a"})
    written(factor=2)
    two = fedfuse.run({**WORDS, "seed": 1, "out": tmp_path / "b"})
    labels = [one.label for one in group([one._kept, two._kept])[0]]
    assert len(labels) == 2
    assert all(label.startswith("mine code=") for label in labels)
    assert any(line.startswith("code of the strategy: ") for line in difference(one.dir, two.dir).environment)
    written(factor=2, width=9)
    three = fedfuse.run({**WORDS, "seed": 1, "out": tmp_path / "d"})
    assert any(line.startswith("model.code: ") for line in differences([two._kept, three._kept]))
    other = fedfuse.run({**WORDS, "strategy": "fedavg", "out": tmp_path / "e"})
    assert not any("code" in line for line in difference(three.dir, other.dir).environment if "strategy" in line)


def test_a_run_goes_on_by_changed_code_and_says_so(written, tmp_path: Path) -> None:
    written()
    run = fedfuse.run({**WORDS, "out": tmp_path / "a"})
    assert not any("code" in note for note in run.summary["notes"])
    written(comment="another")
    assert not any("code" in note for note in again(run.dir, 2)["notes"])
    written(factor=2)
    assert any("the code of the strategy changed while" in note for note in again(run.dir, 3)["notes"])
    assert any("the code of the strategy changed while" in note for note in again(run.dir, 4)["notes"])
    kept = json.loads((run.dir / "environment.json").read_text())["code"]["strategy"]
    assert kept.count("+") == 1


def test_what_evaluations_computed_ahead_is_not_taken_from_other_code(written, tmp_path: Path) -> None:
    written()
    run = fedfuse.run({**WORDS, "out": tmp_path / "a"})
    config, clients = load_config(run.dir), ClientStore(run.dir / "checkpoint/clients")
    for factor, left in ((1, True), (2, False), (2, True)):
        clients.stage(0, "key", {"kept": 1})
        written(factor=factor)
        go_on_with(run.dir, config, clients)
        assert (clients.staged(0, "key") is not None) == left
    (run.dir / "environment.json").write_text("{}")  # of a version that kept no hash
    go_on_with(run.dir, config, clients)
    assert clients.staged(0, "key") is None


def again(path: Path, rounds: int) -> dict:
    resume(path, allow_code=True, rounds=rounds, quiet=True)
    return json.loads((path / "summary.json").read_text())


def test_what_is_handed_over_is_looked_at_alone(written, tmp_path: Path) -> None:
    """A program's other lines are no part of the function that it hands over."""
    words = [f"{key}={value}" for key, value in WORDS.items() if not key.startswith("model") and key != "strategy"]
    plain = [hashes_of(compose([*words, f"strategy={name}"])) for name in ("fedavg", "fedavg", "fedprox")]
    assert plain[0].keys() == {"strategy"}
    assert plain[0] == plain[1] != plain[2]
    found = []
    for more in ("", "print"):
        written()
        with (tmp_path / "mine_model.py").open("a") as file:
            file.write(more)
        sys.modules.pop("mine_model")
        importlib.invalidate_caches()
        build = importlib.import_module("mine_model").build
        for path in (give(build), "mine_model:build"):
            found.append(
                hashes_of(compose([*words, "strategy=fedavg", "model=custom", f"model.build={path}"]))["model"]
            )
    assert found[0] == found[2]
    assert found[1] != found[3]
