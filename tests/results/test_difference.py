"""Two run directories that should be alike: what differs first, and in which words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from safetensors.numpy import save_file

from fedfuse.cli import main
from fedfuse.errors import UserError
from fedfuse.results.difference import difference
from tests.results.synthetic import write_run


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    one = write_run(tmp_path / "one", rounds=4, clients=3)
    shutil.copytree(one, tmp_path / "two")
    return one, tmp_path / "two"


def change(run: Path, kind: str, value: object, **where: object) -> None:
    """Put a value in place of that of the rows that a filter finds; None drops them."""
    path = run / f"{kind}.parquet"
    frame = pl.read_parquet(path)
    column = {"metrics": "value", "traffic": "bytes", "partition": "examples"}[kind]
    found = pl.all_horizontal([pl.col(name) == one for name, one in where.items()])
    assert frame.filter(found).height
    if value is None:
        frame.filter(~found).write_parquet(path)
        return
    here = pl.when(found).then(pl.lit(value)).otherwise(pl.col(column)).cast(frame.schema[column]).alias(column)
    frame.with_columns(here).write_parquet(path)


def digest(run: Path, value: str | None) -> None:
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"digest": value}))


def test_what_is_alike_is_said_to_be(pair, capsys) -> None:
    found = difference(*pair)
    assert found.alike
    assert found.lines() == ["digest: 0000000000000000", "alike in all that both have recorded"]
    assert main(["diff", *map(str, pair)]) == 0
    assert capsys.readouterr().out.splitlines() == found.lines()


def test_the_first_row_is_that_of_the_earliest_round_and_of_its_earliest_step(pair, capsys) -> None:
    one, two = pair
    change(two, "metrics", 0.25, round=4, client=0, split="personal", metric="accuracy")
    assert difference(one, two).first.startswith("round 4, personal, client 0, accuracy: ")
    change(two, "metrics", 0.5, round=3, client=2, split="personal", metric="accuracy")
    first = difference(one, two).first
    was = pl.read_parquet(one / "metrics.parquet").filter(round=3, client=2, split="personal", metric="accuracy")
    assert first == f"round 3, personal, client 2, accuracy: {was['value'].item()!r} against 0.5"
    change(two, "traffic", 7, round=3, client=1, direction="up", message="train")
    assert difference(one, two).first.startswith("round 3, train, client 1, record ")
    assert difference(one, two).first.endswith(" against 7")
    assert main(["diff", str(one), str(two)]) == 1
    assert "first difference: round 3, train, client 1" in capsys.readouterr().out


def test_a_row_that_only_one_has(pair) -> None:
    one, two = pair
    change(two, "traffic", None, round=2, client=1, direction="up", message="train")
    assert difference(one, two).first.endswith("up: only the first run has it")
    assert difference(two, one).first.endswith("up: only the second run has it")


def test_nan_is_like_nan(pair) -> None:
    for run in pair:
        change(run, "metrics", float("nan"), round=2, client=1, split="personal", metric="accuracy")
    assert difference(*pair).alike


def test_rounds_that_only_one_was_evaluated_at_make_no_difference(pair) -> None:
    one, two = pair
    rows = pl.read_parquet(two / "metrics.parquet")
    rows.filter((pl.col("split") == "train") | (pl.col("round") % 2 == 0)).write_parquet(two / "metrics.parquet")
    assert difference(one, two).alike
    change(two, "metrics", 0.5, round=4, client=2, split="personal", metric="accuracy")
    assert difference(one, two).first.startswith("round 4")


def test_keys_and_libraries_and_examples(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", environment={"versions": {"torch": "2.7"}, "cpu_flags": "sse avx"})
    two = write_run(
        tmp_path / "two",
        config={"train": {"lr": 0.1}, "runtime": {"workers": 2}, "note": "x" * 99},
        environment={"versions": {"torch": "2.8"}, "cpu_flags": "sse avx2", "threads": 2},
    )
    found = difference(one, two)
    assert found.settings == ["train.lr: 0.05 against 0.1", f"note: nothing against {'x' * 59}…"]
    assert found.places == ["runtime.workers: 1 against 2"]
    assert found.environment == [
        "cpu_flags: avx, avx2 in one only",
        "torch (version): 2.7 against 2.8",
        "threads: nothing against 2",
    ]
    assert found.alike  # the keys may differ and the results not
    change(two, "partition", 99, client=1, split="train", label=4)
    assert difference(one, two).partition.startswith("client 1, train, label 4: ")
    assert not difference(one, two).alike


def test_a_run_that_goes_on_is_compared_as_far_as_it_is(tmp_path: Path) -> None:
    whole, part = write_run(tmp_path / "whole", rounds=4), write_run(tmp_path / "part", rounds=4, done=2)
    rows = part / "checkpoint" / "rows"
    for kind in ("metrics", "traffic"):
        frame = pl.read_parquet(whole / f"{kind}.parquet")
        for round in (1, 2):
            frame.filter(round=round).write_parquet(rows / f"{kind}-{round:06d}.parquet")
    found = difference(whole, part)
    assert found.alike
    assert found.lines()[:2] == [
        "digest: 0000000000000000 against none yet",
        "rounds done: 4 against 2; compared as far as both have them",
    ]


def test_where_no_row_differs_the_models_may(pair) -> None:
    one, two = pair
    digest(two, "1" * 64)
    assert difference(one, two).lines()[-1].startswith("first difference: none in what is recorded")
    for run, value in ((one, 1.0), (two, 1.5)):
        (run / "final").mkdir()
        save_file({"a": np.zeros(2), "b": np.array([0.0, value])}, run / "final" / "server-model.safetensors")
        save_file({"a": np.zeros(2)}, run / "final" / "client-0.safetensors")
    save_file({"a": np.zeros(2)}, two / "final" / "client-1.safetensors")
    assert difference(one, two).models == [
        "client-1.safetensors: only one run has it",
        "server-model.safetensors: b, by 0.5 at most",
    ]
    save_file({"a": np.zeros(3)}, two / "final" / "client-0.safetensors")
    assert "client-0.safetensors: a, float64[2] against float64[3]" in difference(one, two).models
    assert not difference(one, two).alike


def test_what_is_no_run_is_one_line(pair, tmp_path: Path, capsys) -> None:
    for words in ([str(pair[0])], [str(pair[0]), str(tmp_path / "none")], [*map(str, pair), "three"]):
        assert main(["diff", *words]) == 2
        said = capsys.readouterr().err
        assert said.startswith("fedfuse: ")
        assert said.count("\n") == 1
    (pair[0] / "final").mkdir()
    (pair[1] / "final").mkdir()
    digest(pair[1], "1" * 64)
    for run in pair:
        (run / "final" / "server-model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="cannot be read"):
        difference(*pair)
