"""What a run's soft labels say of its clients' classes, from the messages alone."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
import torch

from fedfuse.config.compose import compose
from fedfuse.core.leaks import Seen, errors, label_distributions
from fedfuse.errors import UserError, WorldError
from fedfuse.runs.audit import audit
from fedfuse.runs.experiment import run
from tests.halves import random_labels

SMALL = (
    "data=digits", "data.limit=400", "data.test_limit=60", "partition=dirichlet", "partition.alpha=0.1", "clients=4",
    "partition.min_size=5", "rounds=2", "model=mlp_small", "transfer.size=60", "train.batch_size=16", "runtime=inline",
)  # fmt: skip


def played(path: Path, *words: str) -> Path:
    return run(compose([*SMALL, *words, f"out={path}"]), quiet=True)


def test_the_estimate_is_the_mean_over_rows_and_rounds() -> None:
    """From messages alone, hand-made: distributions as they are, logits by softmax, rows weighed alike."""
    p, z = random_labels(6, 3), torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).double()
    out = label_distributions([Seen(2, 0, z), Seen(1, 0, p), Seen(1, 5, z)])
    torch.testing.assert_close(out[1, 0], p.mean(0))
    torch.testing.assert_close(out[2, 0], torch.cat([p, z.softmax(1)]).mean(0))
    torch.testing.assert_close(out[1, 5], z.softmax(1).mean(0))


def test_errors_in_closed_form() -> None:
    found = errors(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5]))
    assert found == pytest.approx({"kl": 0.6931471805599453, "tv": 0.5, "chebyshev": 0.5})


def test_skewed_clients_are_found_out(tmp_path: Path) -> None:
    """Trained to their own labels, they give themselves away: every client nearer than by a blind guess."""
    where = played(tmp_path / "run", "strategy=knfu", "train.epochs=10")
    said = audit(where, ["ldia"])
    assert said.splitlines()[-1].endswith("4 of 4 clients")
    rows = pl.read_parquet(where / "audit.parquet")
    last = rows.filter(pl.col("round") == 2)
    tv = {m: last.filter(pl.col("metric") == m)["value"].mean() for m in ("tv", "tv/blind")}
    assert tv["tv"] < tv["tv/blind"] / 2
    assert set(rows["adversary"]) == {"server"}
    estimates = last.filter(pl.col("metric").str.starts_with("estimate/")).group_by("client").agg(pl.col("value").sum())
    assert estimates["value"].to_list() == pytest.approx([1.0] * 4)


def test_clients_that_learned_nothing_say_nothing(tmp_path: Path) -> None:
    """All models are the initial one: one estimate for everybody, whatever they hold."""
    where = played(tmp_path / "run", "strategy=fedmd", "train.epochs=0", "rounds=1")
    audit(where, ["ldia"])
    rows = pl.read_parquet(where / "audit.parquet").filter(pl.col("metric").str.starts_with("estimate/"))
    assert rows.group_by("metric").agg(pl.col("value").n_unique())["value"].to_list() == [1] * 10


def test_what_cannot_be_audited_is_refused(tmp_path: Path) -> None:
    where = played(tmp_path / "run", "strategy=fedavg", "rounds=1")
    with pytest.raises(UserError, match="reads soft labels, and strategy=fedavg shares none"):
        audit(where, ["ldia"])
    with pytest.raises(UserError, match="did you mean 'ldia'"):
        audit(where, ["ldja"])
    with pytest.raises(UserError, match="not a run directory"):
        audit(tmp_path, ["ldia"])
    assert not (where / "audit.parquet").exists()


def test_a_replay_that_is_another_run_is_no_measurement(tmp_path: Path) -> None:
    where = played(tmp_path / "run", "strategy=fedmd", "rounds=1")
    summary = json.loads((where / "summary.json").read_text())
    (where / "summary.json").write_text(json.dumps({**summary, "digest": "0" * 64}))
    with pytest.raises(WorldError, match="another digest"):
        audit(where, ["ldia"])
    assert not (where / "audit.parquet").exists()
