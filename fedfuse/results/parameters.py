"""Figures over a swept key: accuracy after the last round for each value it took, one line per strategy."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedfuse.config.keys import said
from fedfuse.errors import printable
from fedfuse.results import svg
from fedfuse.results.setting import Group, flatten, swept
from fedfuse.results.statistics import Interval
from fedfuse.results.table import Row

MOST_TICKS = 8  # of numbers; more values are marked on an even scale
DODGE = 2.5  # points by which lines stand apart, so that their intervals can be told


@dataclass(frozen=True)
class Line:
    """One strategy over the values of a key.

    Parameters
    ----------
    index, label
        Its colour's number and its name.
    points
        Per value the key took, accuracies by metric.
    level
        Whether the key is none of this strategy's: then it has one point, which holds everywhere.
    """

    index: int
    label: str
    points: tuple[tuple[Any, Mapping[str, Interval]], ...]
    level: bool = False


@dataclass(frozen=True)
class Swept:
    """A key, what else was the same, and the lines over it."""

    key: str
    context: str
    values: tuple[Any, ...]
    lines: tuple[Line, ...]

    @property
    def title(self) -> str:
        """What stands above its figures."""
        return f"Accuracy over {self.key}" + (f", at {self.context}" if self.context else "")

    @property
    def titles(self) -> dict[str, str]:
        """Per metric that is drawn, the title of its figure."""
        return {f"accuracy/{which}": f"{which.capitalize()} accuracy" for which in ("global", "personal")}


def over_parameters(parts: Sequence[tuple[Group, int, Row]]) -> list[Swept]:
    """Find what can be drawn over a key: at least two values for one strategy, all else being equal.

    Parameters
    ----------
    parts : sequence
        Each group, the number of its colour, and its row of the table.
    """
    parts = [part for part in parts if part[0].runs]
    flats = [flatten(group.runs[0].config) for group, _, _ in parts]
    keys = swept(flats)
    shared = [key for key in keys if not key.startswith("strategy.")]
    found = []
    for key in keys:
        held = [other for other in shared if other != key and not _follows(other, key, flats)]
        if _said_by(key, keys, flats):
            continue
        contexts = dict.fromkeys(tuple(repr(flat.get(name)) for name in held) for flat in flats)
        for context in contexts:
            inside = [
                (part, flat)
                for part, flat in zip(parts, flats, strict=True)
                if tuple(repr(flat.get(name)) for name in held) == context
            ]
            lines = _lines(key, inside)
            values = {repr(value): value for line in lines if not line.level for value, _ in line.points}
            if max((len(line.points) for line in lines), default=0) < 2:
                continue
            named = [name for name in held if not _said_by(name, held, flats)]
            told = ", ".join(f"{name.removesuffix('.name')}={said(inside[0][1].get(name))}" for name in named)
            found.append(Swept(key.removesuffix(".name"), told, tuple(_ordered(values.values())), lines))
    return found


def _said_by(key: str, keys: Sequence[str], flats: Sequence[Mapping[str, Any]]) -> bool:
    """Whether another of `keys` says as much as this one, and goes first."""
    return any(_follows(key, other, flats) and _rank(other) < _rank(key) for other in keys if other != key)


def _rank(key: str) -> tuple[bool, str]:
    return not key.endswith(".name"), key


def _follows(name: str, key: str, flats: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a key's value is given by another's."""
    seen: dict[str, str] = {}
    return all(seen.setdefault(repr(flat.get(key)), repr(flat.get(name))) == repr(flat.get(name)) for flat in flats)


def _lines(key: str, inside: Sequence[tuple[tuple[Group, int, Row], Mapping[str, Any]]]) -> tuple[Line, ...]:
    """Gather points that differ in the key alone."""
    lines: dict[Hashable, list[tuple[Any, int, str, Mapping[str, Interval], bool]]] = {}
    for (group, index, row), flat in inside:
        own = sorted((k, repr(v)) for k, v in flat.items() if k.startswith("strategy.") and k != key)
        there = key in flat or not key.startswith("strategy.")
        label = " ".join(
            word for word in group.label.split(" ") if word.partition("=")[0] != key.removeprefix("strategy.")
        )
        lines.setdefault(tuple(own), []).append((flat.get(key), index, label, row.final, there))
    out = []
    for points in lines.values():
        _, index, label, _, there = points[0]
        by_value = {repr(value): value for value, *_ in points}
        finals = {repr(value): final for value, _, _, final, _ in points}
        ordered = [(value, finals[repr(value)]) for value in _ordered(by_value.values())]
        out.append(Line(index, label, tuple(ordered), level=not there))
    return tuple(out)


def _ordered(values: Any) -> list[Any]:
    """Numbers by size, else in the order they came."""
    values = list(values)
    return sorted(values) if all(map(_is_number, values)) else values


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def draw(one: Swept, metric: str, prefix: str) -> str | None:
    """Draw a metric over a key's values: means over seeds with their 95 % t intervals; None where nobody has it."""
    from matplotlib.transforms import ScaledTranslation

    if not any(math.isfinite(final[metric].mean) for line in one.lines for _, final in line.points):
        return None
    numbers = all(map(_is_number, one.values))
    place = {repr(value): float(value) if numbers else float(k) for k, value in enumerate(one.values)}
    with svg.figure() as drawn:
        axes = drawn.add_subplot()
        if numbers and one.values[0] > 0 and one.values[-1] / one.values[0] >= 8:
            axes.set_xscale("log")
        for k, line in enumerate(one.lines):
            gid = f"series-{line.index}.swept"
            shift = ScaledTranslation(DODGE * (k - (len(one.lines) - 1) / 2) / 72, 0, drawn.dpi_scale_trans)
            look: dict[str, Any] = {"color": svg.series_colour(line.index)}
            known = [(value, final[metric]) for value, final in line.points if math.isfinite(final[metric].mean)]
            if line.level:
                for _, interval in known:
                    axes.axhline(100 * interval.mean, ls=":", lw=1.2, gid=gid, **look)
                continue
            x = [place[repr(value)] for value, _ in known]
            y = [100 * interval.mean for _, interval in known]
            moved = axes.transData + shift
            dash = svg.series_dash(line.index)
            axes.plot(x, y, marker="o", ms=3.5, ls=dash, transform=moved, gid=gid, **look)
            for at, (_, interval) in zip(x, known, strict=True):
                if interval.low is not None and interval.high is not None:
                    ends = [100 * interval.low, 100 * interval.high]
                    axes.plot([at, at], ends, lw=1, transform=moved, gid=f"{gid}.interval", **look)
                    axes.update_datalim([(at, end) for end in ends])
            axes.update_datalim(list(zip(x, y, strict=True)))  # what is shifted moves no limit by itself
        axes.autoscale_view()
        if not numbers or len(one.values) <= MOST_TICKS:
            axes.set_xticks(list(place.values()), [printable(said(value), 14) for value in one.values])
            axes.minorticks_off()
        axes.set_xlabel(one.key)
        axes.set_ylabel(f"{metric.replace('/', ', ')} (%)")
        return svg.to_svg(drawn, prefix)
