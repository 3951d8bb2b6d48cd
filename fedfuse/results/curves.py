"""Curves of a report: a metric over rounds and over bytes; evidence in, SVG out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fedfuse.results import svg
from fedfuse.results.measures import Measures
from fedfuse.results.wording import worded

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Series:
    """What is drawn in one colour: a strategy in one setting.

    Parameters
    ----------
    index
        Number of its colour, the same in every figure of the page.
    label
        Its name.
    finished, unfinished
        Measures per run.
    """

    index: int
    label: str
    finished: tuple[Measures, ...]
    unfinished: tuple[Measures, ...] = ()

    @property
    def colour(self) -> str:
        """Stand-in for the page's colour of this series."""
        return svg.series_colour(self.index)

    @property
    def everything(self) -> tuple[Measures, ...]:
        """Measures of all runs."""
        return self.finished + self.unfinished


def by_round(series: Sequence[Series], metric: str, prefix: str) -> str | None:
    """Draw `metric` over rounds: mean over seeds, the band from the lowest to the highest seed."""
    return _curves(series, metric, prefix, lambda one, rounds: rounds.astype(float), "round")


def by_virtual_time(series: Sequence[Series], metric: str, prefix: str) -> str | None:
    """Draw `metric` over virtual time; None where none was kept.

    Seeds are evaluated at moments of their own: each is read off between its evaluations, where all have some.
    """
    found = {
        one.index: [curve for run in one.finished if (curve := _in_time(run, metric)) is not None] for one in series
    }
    if not any(found.values()):
        return None
    scale = 100 if metric.startswith("accuracy") else 1
    with svg.figure() as drawn:
        axes = drawn.add_subplot()
        for one in series:
            curves = found[one.index]
            if not curves:
                continue
            start, end = max(when[0] for when, _ in curves), min(when[-1] for when, _ in curves)
            moments = np.unique(np.concatenate([when for when, _ in curves]))
            moments = moments[(moments >= start) & (moments <= end)]
            if not len(moments):
                continue
            _draw(axes, one, moments, scale * np.array([np.interp(moments, when, value) for when, value in curves]))
        axes.set_xlabel("virtual seconds")
        axes.set_ylabel(f"{worded(metric)}{' (%)' if scale == 100 else ''}")
        return svg.to_svg(drawn, prefix)


def _draw(axes: Axes, one: Series, x: np.ndarray, values: np.ndarray) -> None:
    """A series' mean over seeds (rows), and the band from the lowest to the highest."""
    if len(values) > 1:
        low, high, gid = values.min(axis=0), values.max(axis=0), f"series-{one.index}.band"
        axes.fill_between(x, low, high, color=one.colour, alpha=0.15, lw=0, gid=gid)
    look: Any = {"marker": "o" if len(x) == 1 else None, "ms": 4, "color": one.colour}
    axes.plot(x, values.mean(axis=0), linestyle=svg.series_dash(one.index), gid=f"series-{one.index}.mean", **look)


def _in_time(run: Measures, metric: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Moments of a run's evaluations, and a metric there."""
    if not len(run.virtual_seconds) or metric not in run.curves:
        return None
    rounds, values = run.curves[metric]
    good = np.isfinite(values)
    when = run.virtual_seconds[np.searchsorted(run.rounds, rounds)]
    return (when[good], values[good]) if good.any() else None


def by_bytes(series: Sequence[Series], metric: str, prefix: str) -> str | None:
    """Draw `metric` over cumulative bytes, with the Pareto front of the last rounds.

    Notes
    -----
    A series that sends nothing has no place on a logarithmic axis: a dotted line marks its level.
    """

    def megabytes(one: Measures, rounds: np.ndarray) -> np.ndarray:
        return one.cumulative_bytes[np.clip(rounds, 0, len(one.cumulative_bytes) - 1)] / 1e6

    if not any(run.cumulative_bytes[-1] > 0 for one in series for run in one.everything if len(run.cumulative_bytes)):
        return None  # nobody sends: an axis of bytes would say nothing
    ends: list[tuple[float, float]] = []

    def finish(axes: Axes) -> None:
        for one in series:
            last = [(run.cumulative_bytes[-1] / 1e6, run.curves[metric][1][-1]) for run in _with(one, metric)]
            if not last:
                continue
            moved, level = np.mean(last, axis=0)
            if moved > 0:
                ends.append((moved, level))
                axes.plot([moved], [100 * level], "o", ms=4, color=one.colour, gid=f"series-{one.index}.end")
            else:
                axes.axhline(100 * level, color=one.colour, ls=":", lw=1.2, gid=f"series-{one.index}.level")
        front: list[tuple[float, float]] = []
        for moved, level in sorted(ends, key=lambda end: (end[0], -end[1])):
            if not front or level > front[-1][1]:
                front.append((moved, level))
        if ends:
            from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

            axes.set_xscale("log")
            low, high = axes.get_xlim()
            # over more decades 1, 2 and 5 of each would be written into one another, and over very many none at all
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,), numticks=7))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        if len(front) > 1:
            x, y = np.array(front).T
            axes.step(x, 100 * y, where="post", color=svg.MUTED, lw=1, ls=(0, (2, 2)), zorder=1)

    return _curves(series, metric, prefix, megabytes, "MB up and down until then (log)", finish)


def _fill(rounds: np.ndarray, *tables: np.ndarray) -> None:
    """Read each row off between its evaluations, in place; beyond its first and last it stays unknown."""
    for row in range(len(tables[0])):
        good = np.isfinite(tables[0][row])
        within = (rounds >= rounds[good].min()) & (rounds <= rounds[good].max()) if good.any() else good
        for table in tables:
            table[row, within] = np.interp(rounds[within], rounds[good], table[row, good])


def _with(one: Series, metric: str) -> list[Measures]:
    return [run for run in one.finished if metric in run.curves and len(run.cumulative_bytes)]


def _curves(
    series: Sequence[Series],
    metric: str,
    prefix: str,
    place: Callable[[Measures, np.ndarray], np.ndarray],
    xlabel: str,
    finish: Callable[[Axes], None] | None = None,
) -> str | None:
    """Draw one line per series; None where nobody has the metric."""
    if not any(
        np.isfinite(run.curves[metric][1]).any() for one in series for run in one.everything if metric in run.curves
    ):
        return None
    scale = 100 if metric.startswith("accuracy") else 1
    with svg.figure() as drawn:
        axes = drawn.add_subplot()
        for one in series:
            runs = [run for run in one.finished if metric in run.curves]
            rounds = sorted({int(r) for run in runs for r in run.curves[metric][0]})
            if rounds:
                grid = np.full((len(runs), len(rounds)), np.nan)
                x = np.full_like(grid, np.nan)
                for row, run in enumerate(runs):
                    columns = np.searchsorted(rounds, run.curves[metric][0])
                    grid[row, columns] = scale * run.curves[metric][1]
                    x[row, columns] = place(run, run.curves[metric][0])
                if all(len(run.virtual_seconds) for run in runs):  # scored at moments, so at rounds of their own
                    _fill(np.array(rounds), grid, x)
                seen = np.isfinite(grid).all(axis=0)  # a mean over changing seeds would jump
                grid, middle = grid[:, seen], x[:, seen].mean(axis=0)
                if middle.size and (xlabel == "round" or middle[-1] > 0):
                    _draw(axes, one, middle, grid)
            for run in one.unfinished:
                if metric in run.curves:
                    numbers, values = run.curves[metric]
                    gid = f"series-{one.index}.unfinished"
                    marker = "o" if len(numbers) == 1 else None
                    look: dict[str, Any] = {"lw": 0.8, "ls": "--", "marker": marker, "ms": 3}
                    axes.plot(place(run, numbers), scale * values, color=one.colour, gid=gid, **look)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(f"{worded(metric)}{' (%)' if scale == 100 else ''}")
        if xlabel == "round":
            from matplotlib.ticker import MaxNLocator

            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))  # of one round too
        if finish:
            finish(axes)
        return svg.to_svg(drawn, prefix)
