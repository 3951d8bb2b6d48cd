"""Draws that depend on what they are for and on nothing else: no stream is shared, so no order of asking matters."""

from __future__ import annotations

import math
from statistics import NormalDist

from fedfuse.seeding import seed_of

SECOND = 1_000_000_000  # nanoseconds
_NORMAL = NormalDist()


def uniform(seed: int, *purpose: object) -> float:
    """A number in (0, 1] for one purpose."""
    return (seed_of(seed, "clock", *purpose) + 0.5) / 2.0**63


def normal(seed: int, *purpose: object) -> float:
    """A standard normal number for one purpose."""
    return _NORMAL.inv_cdf(min(uniform(seed, *purpose), 1 - 2.0**-53))  # the largest of its floats is 1


def lognormal(median: float, sigma: float, seed: int, *purpose: object) -> float:
    """A log-normal number; its median itself where σ is 0."""
    return median * math.exp(sigma * normal(seed, *purpose)) if sigma else median


def exponential(mean: float, seed: int, *purpose: object) -> float:
    """An exponential number."""
    return -mean * math.log(uniform(seed, *purpose))


def nanoseconds(seconds: float) -> int:
    """Seconds in whole nanoseconds."""
    return round(seconds * SECOND)
