"""What it takes to reach a target accuracy: rounds, seconds, bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedfuse.results.measures import Measures


@dataclass(frozen=True)
class Reached:
    """What it took to reach a target accuracy: means over the runs that did.

    Parameters
    ----------
    reached, n
        How many of how many runs did.
    rounds, seconds, megabytes
        Means over those; NaN where none did or nothing was measured. Megabytes are 10⁶ bytes, up and down.
    virtual
        Virtual seconds, in the same way.
    """

    reached: int
    n: int
    rounds: float
    seconds: float
    megabytes: float
    virtual: float = math.nan


def targets(evidence: Sequence[Measures], metric: str) -> list[float]:
    """Return 80, 90 and 95 % of the best run's last value, in whole per cent: targets nobody picked."""
    finals = [one.curves[metric][1][-1] for one in evidence if metric in one.curves]
    best = max((value for value in finals if math.isfinite(value)), default=math.nan)
    if not math.isfinite(100 * best):
        return []
    return sorted({math.floor(100 * share * best) / 100 for share in (0.8, 0.9, 0.95)} - {0.0})


def reach(evidence: Sequence[Measures], metric: str, target: float) -> Reached:
    """Rounds, seconds, bytes, virtual seconds until `metric` is first at or above `target` in an evaluated round."""
    costs = []
    for one in evidence:
        if metric not in one.curves:
            continue
        rounds, values = one.curves[metric]
        above = np.flatnonzero(values >= target)
        if len(above):
            number = rounds[above[0]]
            i = int(np.searchsorted(one.rounds, number))
            seconds = one.cumulative_seconds[i] if i < len(one.cumulative_seconds) else math.nan
            moved = one.cumulative_bytes[i] / 1e6 if i < len(one.cumulative_bytes) else math.nan
            virtual = one.virtual_seconds[i] if i < len(one.virtual_seconds) else math.nan
            costs.append((float(number), float(seconds), float(moved), float(virtual)))
    means = np.mean(costs, axis=0) if costs else [math.nan] * 4
    return Reached(len(costs), len(evidence), *map(float, means))
