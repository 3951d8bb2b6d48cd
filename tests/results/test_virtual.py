"""The report's figures of virtual time, by flights whose every number is known."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from starlette.testclient import TestClient

from fedfuse.results import curves, virtual, watch
from fedfuse.results.curves import Series
from fedfuse.results.measures import gather
from fedfuse.results.run_data import SCHEDULE, load
from fedfuse.results.status import line
from tests.results.synthetic import write_run

S = 10**9


def flight(round: int, client: int, since: int, start: float, end: float, outcome: str = "arrived", *, moved: int = 10):
    """A row of `schedule.parquet`: half a second down and half a second up about the computing."""
    start, end = round_ns(start), round_ns(end)
    return (
        round, client, "train", outcome, 0, since, start, start + S // 2, end - S // 2, end, 1.0, moved, moved,
        (client + 1) * (end - start - S), None,
    )  # fmt: skip


def round_ns(seconds: float) -> int:
    return int(seconds * S)


def timed(path: Path, rows: list, moments: list[float], seed: int = 0, strategy: str = "fedavg") -> Series:
    run = write_run(path, strategy, seed, rounds=len(moments), clients=3)
    pl.DataFrame(rows, schema=list(SCHEDULE), orient="row").write_parquet(run / "schedule.parquet")
    when = dict(enumerate(moments, 1))
    metrics = pl.read_parquet(run / "metrics.parquet")
    metrics.with_columns(virtual_s=pl.col("round").replace_strict(when, return_dtype=pl.Float64)).write_parquet(
        run / "metrics.parquet"
    )
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"virtual_s": moments[-1]}))
    return Series(0, strategy, (gather(load(run)),))


ROWS = [
    flight(1, 0, 1, 0, 4),
    flight(1, 1, 1, 0, 2),
    flight(2, 1, 2, 4, 6),
    flight(2, 2, 1, 0, 8, moved=50),
    flight(2, 0, 2, 4, 8, "late", moved=20),
]


def test_the_table_counts_idle_waste_and_age(tmp_path: Path) -> None:
    found = virtual.table([timed(tmp_path / "a", ROWS, [4.0, 8.0])])
    assert found is not None
    label, n, seconds, versions, idle, lost, moved, age = found.rows[0]
    assert (n.text, seconds.text, versions.text) == ("1", "8.00", "2.0")
    assert idle.text == f"{100 * (1 - (4 + 2 + 2 + 8 + 4) / 24):.1f}"  # three clients for eight seconds
    assert lost.text == f"{100 * 4 / 20:.1f}"
    assert moved.text == f"{100 * 40 / (20 + 20 + 20 + 100 + 40):.1f}"
    assert age.text == "0.25"  # of four that were fused, one was a version old
    assert label.text == "fedavg"


def test_what_nobody_knows_is_a_dash_and_no_warning(tmp_path: Path) -> None:
    silent = [flight(1, client, 1, 0, 2, moved=0) for client in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = virtual.table([timed(tmp_path / "a", silent, [2.0])])
    assert found is not None
    assert found.rows[0][6].text == "–"
    assert virtual.table([Series(0, "fedavg", (gather(load(write_run(tmp_path / "plain"))),))]) is None


def test_figures_are_there_where_they_say_something(tmp_path: Path) -> None:
    one = timed(tmp_path / "a", ROWS, [4.0, 8.0])
    for drawn in (virtual.staleness([one], "a"), virtual.fairness([one], "b"), virtual.timeline(one, "c")):
        assert drawn is not None
        assert drawn.startswith("<svg")
    fair = virtual.fairness([one], "d")
    assert "clients by speed, slowest first" in fair
    assert "tenths" not in fair  # three clients
    fresh = timed(tmp_path / "b", [row for row in ROWS if row[0] == row[5]], [4.0, 8.0])
    assert virtual.staleness([fresh], "e") is None
    plain = Series(0, "fedavg", (gather(load(write_run(tmp_path / "plain"))),))
    assert virtual.timeline(plain, "f") is virtual.fairness([plain], "g") is None
    assert curves.by_virtual_time([plain], "accuracy/global", "h") is None


@pytest.mark.parametrize("draw", [curves.by_round, curves.by_bytes, curves.by_virtual_time])
def test_seeds_that_were_scored_at_rounds_of_their_own_are_read_off_between_them(tmp_path: Path, draw) -> None:
    """`evaluate.seconds`: no round but the last may be common to all seeds, and the curve is there all the same."""
    parts = [timed(tmp_path / str(seed), ROWS, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], seed) for seed in (0, 1)]
    runs = []
    for part, kept in zip(parts, ([0, 2, 5], [1, 4, 5]), strict=True):
        (one,) = part.finished
        rounds, values = one.curves["accuracy/global"]
        one.curves["accuracy/global"] = (rounds[kept], values[kept])
        runs.append(one)
    drawn = draw([Series(0, "fedavg", tuple(runs))], "accuracy/global", "x")
    paths = re.findall(r'class="series series-0"[^>]*>\s*<path d="([^"]*)"', drawn)
    assert max(len(re.findall("[ML]", path)) for path in paths if "z" not in path) >= 4


def test_a_run_until_a_virtual_moment_is_counted_by_it(tmp_path: Path) -> None:
    """`until.seconds` alone: nobody is shown a million rounds."""
    path = write_run(tmp_path / "late", rounds=1_000_000, done=3, config={"until": {"seconds": 60.0}})
    state = path / "checkpoint" / "round.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"virtual_s": 4.5}))
    run = load(path)
    assert run.stand == "3, 4.5 of 60 virtual s"
    shown = line(run, "late")
    assert (shown["done"], shown["most"], shown["stand"], shown["virtual"]) == (4.5, 60.0, "3", "4.5 of 60")
    client = TestClient(watch.application([tmp_path]), base_url="http://127.0.0.1")
    for place in ("/live", "/body"):
        assert "000000" not in client.get(place).text.partition("Configuration")[0]
    both = load(write_run(tmp_path / "both", rounds=9, done=3, config={"until": {"seconds": 60.0}}))
    assert both.stand == "3 of 9"


def test_reading_off_keeps_what_is_known_and_leaves_the_ends_unknown() -> None:
    nan = np.nan
    values, places = np.array([[nan, 1.0, nan, 3.0, nan], [5.0, nan, nan, nan, 9.0]]), np.zeros((2, 5))
    curves._fill(np.array([1, 2, 3, 4, 8]), values, places)
    assert np.array_equal(values, [[nan, 1, 2, 3, nan], [5, 5 + 4 / 7, 5 + 8 / 7, 5 + 12 / 7, 9]], equal_nan=True)
