"""Virtual time on the report page: what `schedule.parquet` shows, as figures and one table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fedfuse.config.files import checked
from fedfuse.errors import printable
from fedfuse.results import svg
from fedfuse.results.curves import Series
from fedfuse.results.figures import NAME
from fedfuse.results.measures import Measures
from fedfuse.results.run_data import RunRecord
from fedfuse.results.sections import Table, columns, number, word
from fedfuse.results.table import amount

if TYPE_CHECKING:
    import polars as pl

MOST_CLIENTS = 40  # on a timeline
DECILES = 10

TIMELINE = (
    "Clients of the middle round of the first seed, slowest above. Dark: computing; light: on the network; "
    "hatched: for nothing (late or lost); blank: not at work. The line is the moment of fusion."
)
STALE = "Share of the replies that were fused, by how many versions older their message was; all seeds."
FAIR = "Clients by their device's speed, slowest left. Bars: share of all replies fused; line: personal accuracy."
TABLE = (
    "Idle: share of the time of those invited at least once in which they were not at work. Wasted: of clients' time "
    "and bytes, what was late or lost. Staleness: mean over replies fused."
)


@dataclass(frozen=True)
class Kept:
    """One run's flights."""

    rows: pl.DataFrame
    seconds: float


def kept(run: RunRecord) -> Kept | None:
    """Read the flights of a finished run; None where no virtual time was kept."""
    import polars as pl

    path, seconds = run.dir / "schedule.parquet", (run.summary or {}).get("virtual_s")
    if not isinstance(seconds, int | float) or not path.exists():
        return None
    return Kept(pl.read_parquet(checked(path), glob=False), float(seconds))


def table(series: Sequence[Series]) -> Table | None:
    """Time, idle share, waste and staleness, a line a strategy."""
    lines = []
    for one in series:
        found = [k for run in one.finished if (k := kept(run.run)) is not None]
        if not found:
            continue
        each = [[v for v in column if not math.isnan(v)] for column in zip(*map(_numbers, found), strict=True)]
        mean = [sum(known) / len(known) if known else math.nan for known in each]
        lines.append(
            (
                word(one.label, one.index),
                number(len(found), str(len(found))),
                number(mean[0], amount(mean[0]) if mean[0] >= 10 else f"{mean[0]:.2f}"),
                number(mean[1]),
                *(number(v, f"{100 * v:.1f}") for v in mean[2:5]),
                number(mean[5], f"{mean[5]:.2f}"),
            )
        )
    if not lines:
        return None
    names = (":strategy", "n", "virtual s", "versions", "idle %", "time wasted %", "bytes wasted %", "staleness")
    return Table("Virtual time", columns(*names), tuple(lines), TABLE, "virtual")


def _numbers(one: Kept) -> list[float]:
    """Seconds, versions, idle share, share of time and of bytes for nothing, mean staleness."""
    import polars as pl

    rows = one.rows.with_columns(busy=(pl.col("end_ns") - pl.col("start_ns")) / 1e9)
    rows = rows.with_columns(moved=pl.col("down_bytes") + pl.col("up_bytes"))
    good = rows.filter(pl.col("outcome") == "arrived")
    busy, clients = float(rows["busy"].sum()), rows["client"].n_unique()
    whole, moved = clients * one.seconds, float(rows["moved"].sum())
    age = (good["round"] - good["since"]).mean() if good.height else math.nan
    return [
        one.seconds,
        float(rows["round"].max() or 0),  # type: ignore[arg-type]
        max(0.0, 1 - busy / whole) if whole else math.nan,
        1 - float(good["busy"].sum()) / busy if busy else math.nan,
        1 - float(good["moved"].sum()) / moved if moved else math.nan,
        float(age),  # type: ignore[arg-type]
    ]


def staleness(series: Sequence[Series], prefix: str) -> str | None:
    """Draw how old fused replies were; None where all were fresh."""
    counts: list[tuple[Series, np.ndarray]] = []
    for one in series:
        ages = [_ages(k.rows) for run in one.finished if (k := kept(run.run)) is not None]
        if ages:
            counts.append((one, np.bincount(np.concatenate(ages).astype(int))))
    if not counts or max(len(c) for _, c in counts) < 2:
        return None
    with svg.figure() as drawn:
        axes = drawn.add_subplot()
        for one, count in counts:
            share = 100 * count / max(count.sum(), 1)
            axes.plot(
                range(len(share)), share, marker="o", ms=3, color=one.colour, linestyle=svg.series_dash(one.index),
                gid=f"series-{one.index}.age",
            )  # fmt: skip
        axes.set_xlabel("versions between message and fusion")
        axes.set_ylabel("replies fused (%)")
        return svg.to_svg(drawn, prefix)


def _ages(rows: pl.DataFrame) -> np.ndarray:
    import polars as pl

    good = rows.filter(pl.col("outcome") == "arrived")
    return (good["round"] - good["since"]).to_numpy()


def timeline(one: Series, prefix: str) -> str | None:
    """Draw who worked, waited and was lost, about the fusion of one version."""
    import polars as pl

    found = next((k for run in one.finished if (k := kept(run.run)) is not None), None)
    if found is None or not found.rows.height:
        return None
    rounds = found.rows["round"].unique().sort().to_list()
    middle = rounds[len(rounds) // 2]
    part = found.rows.filter(pl.col("round") == middle)
    fused = part.filter(pl.col("outcome") == "arrived")["end_ns"].max() or part["end_ns"].max()
    part = part.with_columns(length=pl.col("end_ns") - pl.col("start_ns")).sort("length", descending=True)
    part = part.head(MOST_CLIENTS)
    origin = int(part["start_ns"].min())  # type: ignore[arg-type]
    with svg.figure(height=max(1.6, 0.8 + 0.09 * part.height)) as drawn:
        axes = drawn.add_subplot()
        for y, row in enumerate(part.iter_rows(named=True)):
            moments = [(row[name] - origin) / 1e9 for name in ("start_ns", "received_ns", "computed_ns", "end_ns")]
            hatch = None if row["outcome"] == "arrived" else "////"
            look: dict[str, Any] = {"color": one.colour, "height": 0.7, "hatch": hatch, "edgecolor": svg.PAPER, "lw": 0}
            axes.barh(y, moments[3] - moments[0], left=moments[0], alpha=0.3, **look)
            axes.barh(y, max(0.0, moments[2] - moments[1]), left=moments[1], alpha=0.8, **look)
        axes.axvline((int(fused) - origin) / 1e9, color=svg.INK, lw=1)  # type: ignore[call-overload,arg-type]
        axes.set_ylim(part.height - 0.4, -0.6)
        step = max(1, part.height // 10)
        axes.set_yticks(range(0, part.height, step), [str(c) for c in part["client"].to_list()[::step]])
        axes.grid(False, axis="y")
        axes.set_ylabel("client")
        axes.set_xlabel(f"virtual seconds, {printable(one.label, NAME)}, round {middle}")
        return svg.to_svg(drawn, prefix)


def fairness(series: Sequence[Series], prefix: str) -> str | None:
    """Draw participation and personal accuracy by tenths of device speed."""
    shown = [(one, *found) for one in series if (found := _by_speed(one.finished)) is not None]
    if not shown:
        return None
    with svg.figure(height=3.4) as drawn:
        above, below = drawn.subplots(2, 1, sharex=True)
        width = 0.8 / len(shown)
        for k, (one, share, accuracy) in enumerate(shown):
            x = np.arange(len(share)) - 0.4 + width * (k + 0.5)
            above.bar(x, 100 * share, width=width, color=one.colour, gid=f"series-{one.index}.share")
            below.plot(
                np.arange(len(accuracy)), 100 * accuracy, marker="o", ms=3, color=one.colour,
                linestyle=svg.series_dash(one.index), gid=f"series-{one.index}.fair",
            )  # fmt: skip
        above.set_ylabel("replies (%)")
        below.set_ylabel("personal (%)")
        tenths = len(shown[0][1]) == DECILES
        below.set_xlabel(f"{'tenths of clients' if tenths else 'clients'} by speed, slowest first")
        below.set_xticks(range(len(shown[0][1])), [str(i + 1) for i in range(len(shown[0][1]))])
        return svg.to_svg(drawn, prefix)


def _by_speed(runs: Sequence[Measures]) -> tuple[np.ndarray, np.ndarray] | None:
    """Shares of fused replies and mean accuracy by tenths of speed, over runs; a client's speed is FLOPs a second."""
    import polars as pl

    shares, scores = [], []
    for run in runs:
        found = kept(run.run)
        if found is None:
            continue
        rows = found.rows.with_columns(took=(pl.col("computed_ns") - pl.col("received_ns")) / 1e9)
        worked = rows.filter((pl.col("took") > 0) & (pl.col("flops") > 0)).group_by("client")
        speed = worked.agg((pl.col("flops").sum() / pl.col("took").sum()).alias("speed")).sort("speed", "client")
        order = speed["client"].to_list()
        if len(order) < 2:
            continue
        counts = dict(rows.filter(pl.col("outcome") == "arrived").group_by("client").len().iter_rows())
        tenths = np.array_split(np.array(order), min(DECILES, len(order)))
        total = sum(counts.values()) or 1
        shares.append([sum(counts.get(int(c), 0) for c in tenth) / total for tenth in tenths])
        known = [[run.clients[int(c)] for c in tenth if run.clients.get(int(c)) is not None] for tenth in tenths]
        scores.append([float(np.nanmean(values)) if values else math.nan for values in known])
    if not shares or len({len(row) for row in shares}) > 1:
        return None
    return np.mean(shares, axis=0), np.mean(scores, axis=0)
