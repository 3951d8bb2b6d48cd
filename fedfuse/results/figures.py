"""Bars and maps of a report: clients, time, label counts, similarity; evidence in, SVG out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedfuse.errors import printable
from fedfuse.results import svg
from fedfuse.results.curves import Series

NAME = 22  # letters that fit beside a bar
LETTERS = 34  # that fit below a map


def client_spread(series: Sequence[Series], prefix: str) -> str | None:
    """Draw each series' clients: range, 10–90 %, quartiles, median of personal accuracy, all seeds pooled.

    The lowest tenth is taken within a seed, as in the table: of pooled clients it would be those of the worst seed.
    """
    pooled = []
    for one in series:
        seeds = [np.array([*run.clients.values()], dtype=float) for run in one.finished or one.unfinished]
        seeds = [100 * found for values in seeds if len(found := values[np.isfinite(values)])]
        if seeds:
            worst = float(np.mean([np.sort(values)[: math.ceil(len(values) / 10)].mean() for values in seeds]))
            pooled.append((one, np.concatenate(seeds), worst))
    if not pooled:
        return None
    with svg.figure(height=max(1.4, 0.7 + 0.26 * len(pooled))) as drawn:
        axes = drawn.add_subplot()
        for y, (one, values, worst) in enumerate(pooled):
            q = np.percentile(values, [0, 10, 25, 50, 75, 90, 100])
            gid = f"series-{one.index}.clients"
            axes.hlines(y, q[0], q[6], color=one.colour, lw=1, gid=gid)
            axes.barh(y, q[5] - q[1], left=q[1], height=0.3, color=one.colour, alpha=0.35, gid=gid + "1")
            axes.barh(y, q[4] - q[2], left=q[2], height=0.56, color=one.colour, alpha=0.6, gid=gid + "2")
            axes.vlines(q[3], y - 0.36, y + 0.36, color=svg.INK, lw=1.6)
            axes.plot([worst], [y], "|", ms=8, mew=1.4, color=one.colour, gid=gid + "3")
        axes.set_yticks(range(len(pooled)), [_name(one) for one, *_ in pooled])
        axes.set_ylim(len(pooled) - 0.4, -0.6)
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("accuracy on the client's own test examples (%)")
        return svg.to_svg(drawn, prefix)


def time_breakdown(series: Sequence[Series], prefix: str) -> tuple[str | None, list[str]]:
    """Draw where the time went, as stacked bars, mean over runs; also return the phases in colour order."""
    rows = [(one, one.finished or one.unfinished) for one in series]
    rows = [(one, runs) for one, runs in rows if any(run.phases for run in runs)]
    totals: dict[str, float] = {}
    for _, runs in rows:
        for run in runs:
            for name, seconds in run.phases.items():
                totals[name] = totals.get(name, 0.0) + seconds
    names = sorted(totals, key=lambda name: -totals[name])
    if not rows:
        return None, []
    most = len(names) if len(names) <= svg.PHASES else svg.PHASES - 1
    rest = names[most:]
    shown = sorted(names[:most], key=lambda name: (name == "other", name))  # a phase has one tone in all of a page
    with svg.figure(height=max(1.4, 0.7 + 0.26 * len(rows))) as drawn:
        axes = drawn.add_subplot()
        for y, (_, runs) in enumerate(rows):
            left = 0.0
            for k, group in enumerate([*([name] for name in shown), *([rest] if rest else [])]):
                mean = sum(run.phases.get(name, 0.0) for run in runs for name in group) / len(runs)
                axes.barh(y, mean, left=left, height=0.6, color=svg.phase_colour(k), edgecolor=svg.PAPER, lw=0.6)
                left += mean
        axes.set_yticks(range(len(rows)), [_name(one) for one, _ in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("seconds per run")
        return svg.to_svg(drawn, prefix), [*shown, *(["the rest"] if rest else [])]


def _name(one: Series) -> str:
    """What stands beside a bar; in brackets where no run is finished, so that its round is another one's."""
    return printable(one.label, NAME) if one.finished else f"({printable(one.label, NAME - 2)})"


def label_map(clients: Sequence[int], labels: Sequence[Any], counts: np.ndarray, prefix: str) -> str:
    """Draw training examples of each label (columns) at each client (rows); of one label, as of texts, bars."""
    height = min(4.2, max(1.6, 0.9 + 0.13 * len(clients)))
    with svg.figure(height=height) as drawn:
        axes = drawn.add_subplot()
        if len(labels) == 1:
            axes.barh(range(len(clients)), counts[:, 0], color=svg.phase_colour(1))
            axes.set_ylim(len(clients) - 0.4, -0.6)
            _few_ticks(axes.yaxis, [str(client) for client in clients])
            axes.set_xlabel("training examples")
            axes.set_ylabel("client")
            return svg.to_svg(drawn, prefix)
        image = axes.imshow(
            np.where(counts > 0, counts, np.nan), aspect="auto", cmap="viridis", vmin=0, interpolation="none"
        )
        axes.grid(False)
        _few_ticks(axes.yaxis, [str(client) for client in clients])
        _few_ticks(axes.xaxis, [printable(str(label), 12) for label in labels])
        axes.set_xlabel("label")
        axes.set_ylabel("client")
        _scale(drawn, image, axes, "training examples")
        return svg.to_svg(drawn, prefix)


def similarity_maps(matrices: Sequence[tuple[int, np.ndarray]], prefix: str) -> str:
    """Draw logged client-similarity matrices side by side, on one scale."""
    columns = 2 if len(matrices) > 1 else 1
    rows = math.ceil(len(matrices) / columns)
    finite = np.concatenate([matrix[np.isfinite(matrix)] for _, matrix in matrices])
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    with svg.figure(height=0.4 + 1.55 * rows) as drawn:
        grid = drawn.subplots(rows, columns, squeeze=False)
        image = None
        for axes, (number, matrix) in zip(grid.flat, matrices, strict=False):
            image = axes.imshow(matrix, cmap="viridis", vmin=low, vmax=high, interpolation="none")
            axes.set_title(f"round {number}", fontsize=8)
            axes.grid(False)
            _few_ticks(axes.xaxis, [str(i) for i in range(len(matrix))], 5)
            _few_ticks(axes.yaxis, [str(i) for i in range(len(matrix))], 5)
        for axes in list(grid.flat)[len(matrices) :]:
            axes.remove()
        if image is not None:
            _scale(drawn, image, list(grid.flat)[: len(matrices)], "similarity")
        return svg.to_svg(drawn, prefix)


def _scale(drawn: Any, image: Any, axes: Any, label: str) -> None:
    bar = drawn.colorbar(image, ax=axes, shrink=0.9, aspect=30)
    bar.set_label(label)
    bar.outline.set_visible(False)
    bar.ax.grid(False)
    bar.solids.set_edgecolor("face")


def _few_ticks(axis: Any, names: Sequence[str], most: int = 11) -> None:
    """Label at most `most` evenly spaced places, along x fewer where names are long."""
    longest = max(map(len, names), default=1)
    if axis.axis_name == "x":
        most = max(2, min(most, LETTERS // (longest + 1)))
    step = max(1, math.ceil(len(names) / most))
    if step > 2:  # 0, 100, 200, … are read more easily than 0, 91, 182, …
        power = 10 ** int(math.log10(step))
        step = next(k * power for k in (1, 2, 5, 10) if k * power >= step)
    axis.set_ticks(range(0, len(names), step), names[::step])
    axis.set_tick_params(length=0)
