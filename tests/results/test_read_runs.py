"""Reading run directories: good ones, unfinished ones, and everything that is not one."""

from __future__ import annotations

import fcntl
import json

import polars as pl
import pytest
import yaml
from synthetic import write_run

from fedfuse.cli import main
from fedfuse.errors import UserError
from fedfuse.results.run_data import find, load


def test_finished(tmp_path):
    run = load(write_run(tmp_path / "a", "knfu", 3, rounds=4, clients=5))
    assert (run.status, run.strategy, run.seed, run.rounds_done, run.rounds) == ("finished", "knfu", 3, 4, 4)
    assert run.metrics.filter(scope="client", split="personal", metric="accuracy").collect().height == 20
    assert run.final["accuracy/global"] == run.summary["final"]["accuracy/global"]
    assert set(run.partition.collect()["client"]) == set(range(5))
    assert run.environment["cores"] == 2


def test_interrupted_reads_committed_rounds_only(tmp_path):
    path = write_run(tmp_path / "a", rounds=9, done=3)
    extra = path / "checkpoint" / "rows" / "metrics-000004.parquet"
    pl.read_parquet(path / "checkpoint/rows/metrics-000003.parquet").with_columns(round=4).write_parquet(extra)
    extra.with_name("metrics-².parquet").write_text("a digit, but no number: not a round's")
    run = load(path)
    assert (run.status, run.summary, run.rounds_done, run.rounds) == ("interrupted", None, 3, 9)
    assert run.metrics.select(pl.col("round").max()).collect().item() == 3
    assert "accuracy/global" in run.final


def test_running_while_the_lock_is_held(tmp_path):
    path = write_run(tmp_path / "a", rounds=9, done=3)
    with open(path / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert load(path).status == "running"
    assert load(path).status == "interrupted"


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"why": ""}', "{}"])
def test_what_says_nothing_of_a_failure_is_none(tmp_path, text):
    path = write_run(tmp_path / "a", rounds=9, done=3)
    (path / "stopped.json").write_text(text)
    assert (load(path).status, load(path).failure) == ("interrupted", "")


def test_a_strangers_words_of_a_failure_are_one_printable_line(tmp_path):
    path = write_run(tmp_path / "a", rounds=9, done=3)
    (path / "stopped.json").write_text(json.dumps({"why": "no\x1b[31m\nclient\u202e" + "x" * 9999}))
    run = load(path)
    assert run.status == "stopped"
    assert run.failure.startswith("no [31m client x")
    assert len(run.failure) == 500
    (path / "stopped.json").unlink()
    (path / "stopped.json").symlink_to(path / "config.yaml")
    assert load(path).failure == ""


def test_a_run_that_goes_on_has_not_failed(tmp_path):
    path = write_run(tmp_path / "a", rounds=9, done=3)
    (path / "stopped.json").write_text('{"why": "no client succeeded"}')
    with open(path / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert (load(path).status, load(path).failure) == ("running", "")


def test_null_metric_is_nan(tmp_path):
    path = write_run(tmp_path / "a")
    summary = json.loads((path / "summary.json").read_text())
    summary["final"]["accuracy/global"] = None
    (path / "summary.json").write_text(json.dumps(summary))
    assert load(path).final["accuracy/global"] != load(path).final["accuracy/global"]


def test_a_directory_may_have_brackets_in_its_name(tmp_path):
    run = load(write_run(tmp_path / "run[1]", rounds=4))
    assert run.metrics.select(pl.col("round").max()).collect().item() == 4
    assert load(write_run(tmp_path / "run[2]", rounds=9, done=3)).final


def _truncate(path, name):
    file = path / name
    file.write_bytes(file.read_bytes()[:-20])


def _said(path, **values):
    file = path / "summary.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


BROKEN = {
    "no summary.json": lambda path: (path / "summary.json").unlink(),
    "rounds_done is 1000000000000": lambda path: _said(path, rounds_done=10**12),
    "cannot be read": lambda path: (path / "summary.json").write_text("{"),
    "format 2": lambda path: (path / "summary.json").write_text('{"format": 2}'),
    "metrics.parquet: corrupt": lambda path: _truncate(path, "metrics.parquet"),
    "no traffic.parquet": lambda path: (path / "traffic.parquet").unlink(),
    "no column 'value'": lambda path: (
        pl.read_parquet(path / "metrics.parquet").drop("value").write_parquet(path / "metrics.parquet")
    ),
    "column 'seconds' is String": lambda path: (
        pl.read_parquet(path / "timing.parquet")
        .with_columns(pl.col("seconds").cast(pl.String))
        .write_parquet(path / "timing.parquet")
    ),
    "not a run directory (no config.yaml)": lambda path: (path / "config.yaml").unlink(),
    "names no strategy": lambda path: (path / "config.yaml").write_text("a: 1"),
    "seed is 'x'": lambda path: (path / "config.yaml").write_text("{strategy: a, seed: x}"),
    "could not": lambda path: (path / "config.yaml").write_text("strategy: !!python/object:os.system {}"),
    "more than 10000": lambda path: (path / "config.yaml").write_text(
        "strategy: a\na: &a [x,x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{b}: &{b} [{','.join(['*' + a] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    ),
}


def test_a_sweeps_directory_names_a_run_in_it(tmp_path, capsys):
    one = write_run(tmp_path / "sweep" / "fedavg" / "seed=0")
    for words in (["export"], ["diff", str(one)], ["audit", "--audit", "ldia"]):
        assert main([words[0], str(tmp_path / "sweep"), *words[1:]]) == 2
        assert capsys.readouterr().err.endswith(f"not a run directory (no config.yaml); a run in it: {one}\n")


@pytest.mark.parametrize("why", BROKEN)
def test_broken_directory_is_named_and_skipped(tmp_path, why):
    path = write_run(tmp_path / "broken")
    BROKEN[why](path)
    with pytest.raises(UserError, match="broken") as error:
        load(path)
    assert "\n" not in str(error.value)
    write_run(tmp_path / "good")
    runs, skipped = find([tmp_path])
    assert [run.dir.name for run in runs] == ["good"]
    assert len(skipped) == 1
    assert "broken" in skipped[0]
    if why not in ("no summary.json", "could not"):
        assert why in skipped[0]


def _column(path, name, **values):
    file = path / f"{name}.parquet"
    pl.read_parquet(file).with_columns(**values).write_parquet(file)


HOSTILE = {
    "a number above 1e+300": lambda path: _said(path, final={"accuracy/global": 10**400}),
    "notes of summary.json is not": lambda path: _said(path, notes=5),
    "seed is a number of 36000 bits": lambda path: (path / "config.yaml").write_text(
        f"strategy: fedavg\nseed: 0x{'f' * 9000}"
    ),
    "column 'value' is above": lambda path: _column(path, "metrics", value=pl.lit(1e308)),
    "column 'label' is List": lambda path: _column(path, "partition", label=pl.lit([1, 2])),
}


@pytest.mark.parametrize("why", HOSTILE)
def test_a_hostile_directory_costs_a_report_itself_alone(tmp_path, capsys, why):
    HOSTILE[why](write_run(tmp_path / "folder" / "broken"))
    write_run(tmp_path / "folder" / "good")
    assert main(["report", str(tmp_path / "folder")]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped: ")]
    assert "broken" in line
    assert why in line
    assert "1 run, 1 seed, 1 skipped" in (tmp_path / "folder" / "report.html").read_text()
    assert main(["report", str(tmp_path / "folder" / "broken")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert why in err
    assert len(err.splitlines()) == 1


def test_what_stands_beside_a_run_and_cannot_be_read_costs_nothing_else(tmp_path, capsys):
    path = write_run(tmp_path / "a")
    (path / "environment.json").write_text("[" * 100_000)
    (path / "samples").mkdir()
    (path / "samples" / "round-000001.jsonl").symlink_to(path / "config.yaml")
    (path / "samples" / "round-000002.jsonl").write_text('{"prompt": "1 + 1", "said": "2"}\n')
    (path / "samples" / "round-000003.jsonl").write_text("[" * 100_000)
    (path / "samples" / "round-last.jsonl").write_text('{"prompt": "none"}\n')
    assert load(path).environment == {}
    assert main(["report", str(path)]) == 0
    (path / "samples" / "round-000003.jsonl").unlink()
    assert main(["report", str(path)]) == 0
    page = (path / "report.html").read_text()
    assert "1 + 1" in page
    assert "none" not in page.partition("What models answered")[2].partition("</table>")[0]
    assert "skipped" not in capsys.readouterr().out


def test_find(tmp_path):
    write_run(tmp_path / "sweep" / "b")
    write_run(tmp_path / "sweep" / "deep" / "a")
    hydra = tmp_path / "sweep" / "b" / ".hydra"
    hydra.mkdir()
    (hydra / "config.yaml").write_text("strategy: x")
    (tmp_path / "empty").mkdir()
    runs, skipped = find([tmp_path / "sweep", tmp_path / "sweep" / "b", tmp_path / "empty", tmp_path / "gone"])
    assert [run.dir.name for run in runs] == ["b", "a"]
    assert skipped == [
        f"{tmp_path / 'empty'}: no run directory in it",
        f"{tmp_path / 'gone'}: no such directory",
    ]


def test_strategy_as_a_word(tmp_path):
    path = write_run(tmp_path / "a")
    (path / "config.yaml").write_text(yaml.safe_dump({"strategy": "fedavg"}))
    assert (load(path).strategy, load(path).seed) == ("fedavg", 0)
