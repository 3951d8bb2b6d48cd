"""Attacks on whole runs: above chance where a model learned by heart, at chance where it never saw the data."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from unittest import mock

import polars as pl
import pytest

from fedfuse.audits import membership
from fedfuse.audits.truth import Questions
from fedfuse.config.compose import compose
from fedfuse.runs.audit import audit
from fedfuse.runs.experiment import run

LEARNED_BY_HEART = (
    "data=digits", "data.limit=500", "data.test_limit=60", "partition=iid", "clients=4", "rounds=1", "model=mlp",
    "transfer.size=60", "train.epochs=40", "data.validation=0.25", "data.personal_test=0.25", "runtime=inline",
)  # fmt: skip
BY = {
    "fedmd": ("coop_lira", "distill_lira", "pli"),
    "dsfl": ("coop_lira",),
    "fedavg": ("fedmia", "fedmia_gradient"),
    "fed_sb": ("fedmia", "fedmia_gradient"),
}
WORDS = {"fed_sb": ("strategy.init=random_orthonormal", "strategy.rank=24", "train.lr=0.1")}


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            where = tmp_path_factory.mktemp("audits") / name
            made[name] = run(
                compose([*LEARNED_BY_HEART, f"strategy={name}", *WORDS.get(name, ()), f"out={where}"]), quiet=True
            )
        return made[name]

    return get


def figures(path: Path) -> pl.DataFrame:
    return pl.read_parquet(path / "audit.parquet").filter(client=-1)


@pytest.fixture(autouse=True)
def fewer_shadows(monkeypatch):
    monkeypatch.setattr(membership, "SHADOWS", 6)  # as good in the mean, and a third of the time


@pytest.mark.parametrize("name", BY)
def test_what_was_learned_by_heart_is_found_out(name: str, played) -> None:
    where = played(name)
    said = audit(where, BY[name])
    for attack in BY[name]:
        rows = figures(where).filter(audit=attack)
        if attack == "pli":
            told = rows.filter(metric="told").row(0, named=True)
            assert told["low"] > rows.filter(metric="told/chance")["value"].item()
        else:
            area = rows.filter(metric="auc").row(-1, named=True)
            assert area["low"] > 0.5, (attack, area)
            assert f"AUC {area['value']:.3f}" in said


def test_an_audit_made_again_gives_the_same_figures_and_keeps_the_others(played) -> None:
    where = played("dsfl")
    audit(where, ["coop_lira"])
    first = pl.read_parquet(where / "audit.parquet")
    audit(where, ["ldia"])
    audit(where, ["coop_lira"])
    both = pl.read_parquet(where / "audit.parquet")
    assert both.filter(audit="coop_lira").equals(first.filter(audit="coop_lira"))
    assert set(both["audit"]) == {"ldia", "coop_lira"}


@pytest.mark.parametrize("name", ["fedmd", "fedavg"])
def test_of_what_was_never_seen_nothing_is(name: str, played) -> None:
    """The same run, asked about examples of which no model saw any: every interval of the area holds one half."""
    where, attacks = played(name), [attack for attack in BY[name] if attack != "pli"]
    with mock.patch("fedfuse.runs.audit.Questions", partial(Questions, inside=("validation",), outside=("personal",))):
        audit(where, attacks)
    areas = figures(where).filter(metric="auc")
    assert set(areas["audit"]) == set(attacks)
    for row in areas.iter_rows(named=True):
        assert row["low"] < 0.5 < row["high"], row


def test_models_that_never_saw_anything_paint_nothing(tmp_path: Path) -> None:
    words = [*LEARNED_BY_HEART, "strategy=fedmd", "train.epochs=0", f"out={tmp_path / 'run'}"]
    where = run(compose(words), quiet=True)
    audit(where, ["pli"])
    told = figures(where).filter(metric="told").row(0, named=True)
    assert told["low"] < figures(where).filter(metric="told/chance")["value"].item() < told["high"]
