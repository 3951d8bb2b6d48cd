"""Trackers: everything a run committed is there, per client, also after a kill or where the tracker was away."""

from __future__ import annotations

import csv
import json
import sqlite3
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

import fedfuse
from fedfuse.config.schema import TrackingConfig
from fedfuse.core import callbacks
from fedfuse.errors import UserError, WorldError
from fedfuse.results.run_data import load
from fedfuse.runs import tracking
from fedfuse.runs.experiment import resume, run
from tests.federations import TINY, scenario_of

BYTES = {"bytes/up", "bytes/down"}


def play(out: Path, *words: str, rounds: int = 3) -> Path:
    config, _ = scenario_of((*TINY, "strategy=fedmd", f"rounds={rounds}", *words))
    return run(replace(config, out=str(out)), quiet=True)


def killed_after(out: Path, round: int, monkeypatch, *words: str) -> Path:
    """A run that ends before it commits `round` + 1."""
    evaluate = callbacks.Evaluation.round

    def stop(self, running) -> None:
        if running.done == round + 1:
            raise KeyboardInterrupt
        evaluate(self, running)

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.Evaluation, "round", stop)
        with pytest.raises(KeyboardInterrupt):
            play(out, *words)
    return out


def expected(out: Path) -> Counter:
    """Every row of the run directory, but matrices, as (series, round, value)."""
    rows = load(out).metrics.collect().rows()
    return Counter((tracking.label(row), row[0], float(f"{row[-1]:.5g}")) for row in rows)


def rounded(series: str, step: int, value: float) -> tuple[str, int, float]:
    return series, step, float(f"{value:.5g}")


def read_csv(out: Path) -> Counter:
    with open(out / "metrics.csv", newline="") as file:
        rows = [(int(r["round"]), r["scope"], int(r["client"]), r["split"], r["metric"], float(r["value"]))
                for r in csv.DictReader(file)]  # fmt: skip
    return Counter(rounded(tracking.label(row), row[0], row[-1]) for row in rows if row[4] not in BYTES)


def test_csv_holds_every_row(tmp_path: Path) -> None:
    out = play(tmp_path / "run", "tracking=csv")
    assert read_csv(out) == expected(out)
    assert any(series.startswith("personal_accuracy/client_2") for series, _, _ in read_csv(out))
    with open(out / "metrics.csv", newline="") as file:
        moved = [float(r["value"]) for r in csv.DictReader(file) if r["metric"] == "bytes/up"]
    assert sum(moved) == (load(out).summary or {})["traffic"]["up_bytes"]


def test_tracking_changes_no_bit(tmp_path: Path) -> None:
    digests = {fedfuse.load(play(tmp_path / w, f"tracking={w}", rounds=1)).summary["digest"] for w in ("none", "csv")}
    assert len(digests) == 1


def test_csv_after_a_kill(tmp_path: Path, monkeypatch) -> None:
    out = killed_after(tmp_path / "run", 1, monkeypatch, "tracking=csv")
    with open(out / "metrics.csv", "a") as file:
        file.write("2,client,0,per")  # half a line, as a kill leaves it
    assert read_csv(resume(out, quiet=True)) == expected(out)


def test_a_tracker_that_is_away_stops_no_run(tmp_path: Path, monkeypatch, capsys) -> None:
    tell, away = tracking.Csv.tell, [1, 2]

    def sometimes(self, round, rows) -> None:
        if round in away:
            away.remove(round)
            raise ConnectionError("nobody answers")
        tell(self, round, rows)

    monkeypatch.setattr(tracking.Csv, "tell", sometimes)
    out = play(tmp_path / "run", "tracking=csv")
    assert capsys.readouterr().err.count("tracking=csv: nobody answers; the run goes on") == 1
    assert read_csv(out) == expected(out)


def test_a_tracker_that_stays_away_is_named(tmp_path: Path, monkeypatch) -> None:
    def never(self, round, rows) -> None:
        if round:
            raise ConnectionError("nobody answers")

    monkeypatch.setattr(tracking.Csv, "tell", never)
    with pytest.raises(WorldError, match=r"tracking=csv: nobody answers; .*run is complete, csv is not"):
        play(tmp_path / "run", "tracking=csv", rounds=1)
    assert load(tmp_path / "run").status == "finished"


@pytest.mark.parametrize(("name", "extra"), [("tensorboard", "tracking"), ("mlflow", "tracking"), ("wandb", "wandb")])
def test_what_is_not_installed_is_refused(name: str, extra: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=rf"tracking={name}: needs .* not installed; pip install 'fedfuse\[{extra}\]'"):
        play(tmp_path / "run", f"tracking={name}")
    assert not (tmp_path / "run").exists()


def test_an_address_that_is_none_is_told(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda package: True)
    with pytest.raises(UserError, match=r"tracking.uri=http://\[x: is no address"):
        play(tmp_path / "run", "tracking=mlflow", "tracking.uri='http://[x'")


def test_a_password_is_not_written_down(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda package: True)
    with pytest.raises(UserError, match="holds a password") as caught:
        tracking.check(TrackingConfig("mlflow", "https://ann:secret@mlflow.example"))
    assert "secret" not in str(caught.value)


def test_tensorboard(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (pip install 'fedfuse[tracking]')")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = killed_after(tmp_path / "run", 1, monkeypatch, "tracking=tensorboard")
    resume(out, quiet=True)
    read = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in read.Tags()["scalars"] if tag not in BYTES]
    assert Counter(rounded(tag, e.step, e.value) for tag in tags for e in read.Scalars(tag)) == expected(out)


def test_mlflow_in_sqlite(tmp_path: Path, monkeypatch) -> None:
    needs = [
        pytest.importorskip(n, reason=f"{n} is not installed (fedfuse[tracking])") for n in tracking.NEEDS["mlflow"]
    ]
    assert needs
    store = tmp_path / "mlflow.db"
    words = ["tracking=mlflow", f"tracking.uri=sqlite:///{store}"]
    out = killed_after(tmp_path / "run", 1, monkeypatch, *words)
    resume(out, quiet=True)
    with sqlite3.connect(store) as base:
        ran = base.execute("select run_uuid, status from runs").fetchall()
        rows = base.execute("select key, step, value from metrics").fetchall()
        params = dict(base.execute("select key, value from params").fetchall())
    assert [status for _, status in ran] == ["FINISHED"]
    assert Counter(rounded(*row) for row in rows if row[0] not in BYTES) == expected(out)
    assert (params["strategy.name"], params["rounds"]) == ("fedmd", "3")


def records(file: Path) -> list[bytes]:
    """What a `.wandb` file holds: seven bytes, then LevelDB's log of records, in blocks of 32 KiB."""
    content, found, part, at = file.read_bytes(), [], b"", 7
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        part += content[at + 7 : at + 7 + size]
        if kind in (1, 4):  # whole, or the last part
            found.append(part)
            part = b""
        at += 7 + size
    return found


def test_wandb_offline(tmp_path: Path, monkeypatch) -> None:
    """Its own file holds every row; nothing is sent."""
    pytest.importorskip("wandb", reason="wandb is not installed (pip install 'fedfuse[wandb]')")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.delenv("WANDB_MODE", raising=False)
    out = killed_after(tmp_path / "run", 1, monkeypatch, "tracking=wandb", "tracking.experiment=mine")
    resume(out, quiet=True)
    (file,) = (f for f in out.glob("wandb/offline-run-*/run-*.wandb"))
    rows: Counter = Counter()
    for one in map(wandb_internal_pb2.Record.FromString, records(file)):
        if one.HasField("run"):
            assert one.run.project == "mine"
        values = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in one.history.item}
        step = int(values.get("_step", one.history.step.num))
        shown = {key: value for key, value in values.items() if not key.startswith("_") and key not in BYTES}
        rows.update(rounded(key, step, float(value)) for key, value in shown.items())
    assert rows == expected(out)
