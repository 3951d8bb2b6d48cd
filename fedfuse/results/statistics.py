"""Means, intervals and paired tests over seeds. SciPy computes; this file decides what may be said."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import combinations
from typing import Literal

LEVEL = 0.95
RESAMPLES = 9_999
MOST_TESTS = 1 << 14  # that are remembered

Method = Literal["t", "bootstrap"]


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and its 95 % interval.

    Parameters
    ----------
    mean
        Mean of the finite values; NaN where there is none.
    low, high
        Ends of the interval, in the unit of the values; None with fewer than two values.
    n
        Number of values it rests on.
    """

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def half_width(self) -> float | None:
        """Half the interval's length, or None with fewer than two values."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    def within(self, least: float, most: float) -> Interval:
        """The interval where values cannot lie outside of [least, most]: no figure says 104 %."""
        if self.low is None or self.high is None:
            return self
        return replace(self, low=min(max(self.low, least), most), high=min(max(self.high, least), most))


@dataclass(frozen=True)
class Paired:
    """Comparison of two strategies on the seeds they share.

    Parameters
    ----------
    difference
        Mean of first minus second over shared seeds, with its t interval.
    n
        Number of shared seeds.
    unpaired
        Seeds that only one of the two has; they are not used.
    t_p, signed_rank_p
        Two-sided p-values of the paired t-test and Wilcoxon's signed-rank test; NaN where not defined.
    note
        What a reader has to know about this comparison; empty where there is nothing.
    t_holm, signed_rank_holm
        The p-values adjusted by Holm's rule over all pairs of strategies; NaN where `paired` alone made the comparison.
    """

    difference: Interval
    n: int
    unpaired: tuple[Hashable, ...]
    t_p: float
    signed_rank_p: float
    note: str = ""
    t_holm: float = math.nan
    signed_rank_holm: float = math.nan


def mean_interval(values: Sequence[float], method: Method = "t") -> Interval:
    """Return mean and interval over seeds; values that are not finite are left out and not counted in n.

    Parameters
    ----------
    values
        One per seed.
    method
        `t`: Student's interval, n - 1 degrees of freedom. `bootstrap`: percentiles of 9,999 resampled means
        (`scipy.stats.bootstrap`, seeded). The bootstrap is too narrow with few seeds: with three it can never
        reach beyond the smallest and largest value.
    """
    import numpy as np

    finite = np.array([value for value in values if math.isfinite(value)], dtype=np.float64)
    n = len(finite)
    mean = float(finite.mean()) if n else math.nan
    if n < 2:
        return Interval(mean, None, None, n)
    if np.ptp(finite) == 0:  # both methods are degenerate there, and both mean this
        return Interval(float(finite[0]), float(finite[0]), float(finite[0]), n)
    if method == "t":
        half = float(_quantile((1 + LEVEL) / 2, n - 1) * finite.std(ddof=1) / math.sqrt(n))
        return Interval(mean, mean - half, mean + half, n)
    if method != "bootstrap":
        raise ValueError(f"method {method!r}: allowed are 't', 'bootstrap'")
    from scipy import stats

    found = stats.bootstrap(
        (finite,),
        np.mean,
        confidence_level=LEVEL,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high), n)


def paired(first: Mapping[Hashable, float], second: Mapping[Hashable, float]) -> Paired:
    """Compare two strategies seed by seed.

    Parameters
    ----------
    first, second
        Value by seed. Only seeds with a finite value in both are used.
    """
    usable = [{seed for seed, value in side.items() if math.isfinite(value)} for side in (first, second)]
    shared = sorted(usable[0] & usable[1], key=repr)
    unpaired = tuple(sorted((set(first) | set(second)) - set(shared), key=repr))
    differences = [first[seed] - second[seed] for seed in shared]
    interval = mean_interval(differences)
    n = len(shared)
    if n == 0:
        return Paired(interval, n, unpaired, math.nan, math.nan, "no seed in common")
    if not any(differences):
        return Paired(interval, n, unpaired, math.nan, math.nan, "identical in every seed: difference 0")
    if n == 1:
        return Paired(interval, n, unpaired, math.nan, math.nan, "one seed: no test")
    left, right = (tuple(side[seed] for seed in shared) for side in (first, second))
    spread = max(differences) - min(differences)
    if spread <= 1e-12 * max(map(abs, differences)):  # no variance: t is infinite and means nothing
        rank = _signed_rank(left, right)
        return Paired(interval, n, unpaired, math.nan, rank, "the same difference in every seed: no t-test")
    return Paired(interval, n, unpaired, _paired_t(left, right), _signed_rank(left, right))


# SciPy takes milliseconds for a pair, forty strategies have 780, and a page asks for them in sentences and in tables.
@lru_cache(MOST_TESTS)
def _signed_rank(left: tuple[float, ...], right: tuple[float, ...]) -> float:
    from scipy import stats

    return float(stats.wilcoxon(left, right).pvalue)


@lru_cache(MOST_TESTS)
def _paired_t(left: tuple[float, ...], right: tuple[float, ...]) -> float:
    from scipy import stats

    return float(stats.ttest_rel(left, right).pvalue)


@cache
def _quantile(probability: float, freedom: int) -> float:
    """Of Student's t."""
    from scipy import stats

    return float(stats.t.ppf(probability, freedom))


def all_pairs(values: Mapping[str, Mapping[Hashable, float]]) -> dict[tuple[str, str], Paired]:
    """Compare every strategy with every other; the one family over which p-values are adjusted.

    Parameters
    ----------
    values
        Per strategy, value by seed.
    """
    found = {(a, b): paired(values[a], values[b]) for a, b in combinations(values, 2)}
    t, rank = (holm([getattr(one, name) for one in found.values()]) for name in ("t_p", "signed_rank_p"))
    return {
        names: replace(one, t_holm=t_p, signed_rank_holm=rank_p)
        for (names, one), t_p, rank_p in zip(found.items(), t, rank, strict=True)
    }


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number by Holm's step-down rule (1979); NaN stays NaN and is not counted.

    Returns
    -------
    list of float
        In the order given, each at most 1 and at least the p-value it came from.
    """
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    adjusted = [math.nan] * len(p_values)
    running = 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


def average_ranks(scores: Mapping[str, Mapping[Hashable, float]]) -> tuple[dict[str, float], int]:
    """Rank strategies within each seed (1 is the highest value, ties share a rank) and average over seeds.

    Parameters
    ----------
    scores
        Per strategy, value by seed. Only seeds with a finite value for every strategy count.

    Returns
    -------
    ranks
        Mean rank per strategy, NaN where no seed is shared by all.
    n
        Number of seeds they rest on.
    """
    from scipy import stats

    names = list(scores)
    complete = [{seed for seed, value in scores[name].items() if math.isfinite(value)} for name in names]
    shared = sorted(set.intersection(*complete), key=repr) if complete else []
    if not shared:
        return dict.fromkeys(names, math.nan), 0
    table = [[-scores[name][seed] for name in names] for seed in shared]
    ranks = stats.rankdata(table, axis=1).mean(axis=0)
    return dict(zip(names, map(float, ranks), strict=True)), len(shared)


def signed_rank_floor(n: int) -> float:
    """Return the smallest two-sided p-value that a signed-rank test of `n` pairs can give: 2 / 2ⁿ."""
    return min(1.0, 2.0 ** (1 - n)) if n > 0 else 1.0


def few_seeds_note(n: int) -> str:
    """Say what `n` seeds can show, for the foot of a table; empty where nothing needs saying."""
    if n == 1:
        return "One seed: no interval and no test; differences between strategies may be chance."
    if 2 <= n <= 5:
        return (
            f"{n} seeds: a two-sided signed-rank test cannot give p below {signed_rank_floor(n):g}; three to "
            "five seeds cannot reach p < 0.05 by it, however large the difference. The paired t-test can, if "
            "differences are normally distributed."
        )
    return ""
