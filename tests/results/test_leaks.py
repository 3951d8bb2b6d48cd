"""The report's section on audits: what each found beside what seeing nothing gives, curves, and paintings."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import polars as pl

from fedfuse.results import leaks
from fedfuse.results.curves import Series
from fedfuse.results.leaks import COLUMNS
from fedfuse.results.measures import gather
from fedfuse.results.report import report
from fedfuse.results.run_data import load
from tests.results.synthetic import write_run

SCHEMA = {name: pl.String if name in ("audit", "adversary", "metric") else pl.Float64 for name in COLUMNS}
SCHEMA |= {"round": pl.Int64, "client": pl.Int64}


def audited(run: Path, area: float) -> Path:
    rows = [
        ("ldia", "server", 5, -1, "tv", None, 0.125, 0.1, 0.15),
        ("ldia", "server", 1, -1, "tv", None, 0.9, None, None),  # of an earlier round: not told
        ("ldia", "server", 5, -1, "tv/blind", None, 0.375, None, None),
        ("coop_lira", "asking server", 5, -1, "auc", None, area, area - 0.1, area + 0.1),
        ("coop_lira", "asking server", 5, 2, "auc", None, 0.99, None, None),  # of one client
        ("coop_lira", "asking server", 5, -1, "tpr", 0.01, 0.0625, 0.05, 0.08),
        ("coop_lira", "asking server", 5, -1, "tpr", 0.001, None, None, None),  # not to be told
        ("coop_lira", "asking server", 5, -1, "others", None, 500.0, None, None),
        *(("coop_lira", "asking server", 5, -1, "roc", x, x**0.5, None, None) for x in (0.0, 0.002, 0.1, 1.0)),
    ]
    pl.DataFrame(rows, schema=SCHEMA, orient="row").write_parquet(run / "audit.parquet")
    return run


def series(*runs: Path) -> list[Series]:
    return [Series(0, "fedmd", tuple(gather(load(run)) for run in runs), ())]


def cells(*runs: Path) -> list[list[str]]:
    found = leaks.table(series(*runs))
    assert found is not None
    return [[cell.text for cell in row] for row in found.rows]


def test_each_audit_stands_beside_what_seeing_nothing_gives(tmp_path: Path) -> None:
    """Of one seed its own interval, of several that over seeds; the last round, all clients, and no more."""
    first = audited(write_run(tmp_path / "a", "fedmd", 0), 0.75)
    assert cells(first) == [
        ["fedmd", "ldia", "error of the class prior (total variation)", "1", "0.125", "0.100", "0.150", "0.375"],
        ["fedmd", "coop_lira", "area under the ROC curve", "1", "0.750", "0.650", "0.850", "0.500"],
        ["fedmd", "coop_lira", "members found at 1 % false alarms", "1", "0.062", "0.050", "0.080", "0.010"],
    ]
    second = audited(write_run(tmp_path / "b", "fedmd", 1), 0.77)
    assert cells(first, second)[1][3:] == ["2", "0.760", "0.633", "0.887", "0.500"]  # 0.76 ± 12.706 · 0.01
    third = audited(write_run(tmp_path / "c", "fedmd", 1), 0.35)
    assert cells(first, third)[1][3:] == ["2", "0.550", "0.000", "1.000", "0.500"]  # no area is above 1


def test_the_page_says_who_sees_what_and_draws_the_curve(tmp_path: Path) -> None:
    audited(write_run(tmp_path / "a", "fedmd", 0), 0.75)
    report([tmp_path], tmp_path / "report")
    text = (tmp_path / "report" / "report.html").read_text(encoding="utf-8").replace("&#39;", "'")
    text = text[text.index("What the messages give away") :]
    said = "coop_lira: a curious server that chooses the public rows sees each client's soft labels of the examples in"
    assert said in text
    assert "ldia: a curious server sees each client's soft labels" in text
    assert "Membership" in text
    assert "fedmia" not in text


def test_curves_have_logarithmic_axes(tmp_path: Path) -> None:
    run = audited(write_run(tmp_path / "a", "fedmd", 0), 0.75)
    drawn = leaks.curves(series(run), "x")
    assert drawn is not None
    assert {"1 %", "10 %", "100 %", "coop_lira", "false alarms"} <= set(re.findall(r">([^<>]+)</", drawn))
    assert "$" not in drawn  # matplotlib's own ticks of powers of ten are formulas, which the page does not set


def test_paintings_are_drawn_and_what_is_none_is_not(tmp_path: Path) -> None:
    run = audited(write_run(tmp_path / "a", "fedmd", 0), 0.75)
    (one,) = series(run)
    assert leaks.paintings(one, "x") is None
    ramp = np.linspace(0, 1, 3 * 64, dtype=np.float16).reshape(3, 1, 8, 8)
    np.savez_compressed(run / "audit_pli.npz", **{"3/1": ramp, "0/1": ramp, "0/7": ramp})
    drawn = leaks.paintings(one, "x")
    assert drawn is not None
    assert drawn.count("<image") == 1
    assert "class, client 0" in drawn  # who holds most classes
    assert {"painted", "public", "its own"} <= set(re.findall(r">([^<>]+)</", drawn))
    for broken in ({"0/1": ramp[0]}, {"x": np.zeros((3, 1, 3000, 3000), np.float16)}, {}):
        np.savez_compressed(run / "audit_pli.npz", **broken)
        assert leaks.paintings(one, "x") is None
    (run / "audit_pli.npz").write_bytes(b"nothing of the kind")
    assert leaks.paintings(one, "x") is None


def test_without_audits_there_is_no_section(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", "fedmd", 0)
    assert leaks.table(series(run)) is leaks.curves(series(run), "x") is None
    pl.DataFrame({"audit": ["ldia"], "value": [0.1]}).write_parquet(run / "audit.parquet")  # of an earlier version
    assert leaks.table(series(run)) is None
