"""What an attack achieved, in rows with intervals: areas under ROC curves, true positives at few false ones, errors.

Intervals are 95 %. Those of an area and of a rate are over examples, given the trained models; those of a mean over
clients are Student's. Nobody's spread over seeds is in them: compare seeds for that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats
from sklearn.metrics import roc_curve
from torch import Tensor

LEVEL = 0.95
RATES = (0.01, 0.001, 0.0001)  # false positives at which true ones are told
POINTS = 200  # of a ROC curve that are kept
EVERYONE = -1  # client of a row that is about all


class Row(NamedTuple):
    """One figure; `at` is what it is a function of (false positive rate, class), low and high its interval."""

    audit: str
    adversary: str
    round: int
    client: int
    metric: str
    at: float | None
    value: float | None
    low: float | None = None
    high: float | None = None


def area(members: np.ndarray, others: np.ndarray, axis: int = -1) -> np.ndarray:
    """Area under the ROC curve: how often a member's score is above another's, ties half (Mann-Whitney)."""
    n, m = members.shape[axis], others.shape[axis]
    ranks = stats.rankdata(np.concatenate([members, others], axis), axis=axis)
    mine = np.take(ranks, np.arange(n), axis).sum(axis)
    found: np.ndarray = (mine - n * (n + 1) / 2) / (n * m)
    return found


def area_interval(members: np.ndarray, others: np.ndarray) -> tuple[float, float, float]:
    """The area and its bootstrap interval (`scipy.stats.bootstrap`, percentiles, seeded)."""
    value = float(area(members, others))
    found = stats.bootstrap(
        (members, others), area, n_resamples=999, batch=100, vectorized=True, confidence_level=LEVEL,
        method="percentile", rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return value, float(found.low), float(found.high)


def share_interval(count: int, of: int) -> tuple[float, float, float]:
    """A share of trials and its Clopper-Pearson interval."""
    found = stats.binomtest(count, of).proportion_ci(LEVEL, method="exact")
    return count / of, float(found.low), float(found.high)


def mean_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """A mean and Student's interval; none of fewer than two values."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None, None
    if max(values) - min(values) <= 1e-12 * abs(mean):  # equal but for rounding
        return mean, mean, mean
    found = stats.ttest_1samp(values, 0.0).confidence_interval(LEVEL)
    return mean, float(found.low), float(found.high)


def of_membership(
    audit: str, adversary: str, round: int, scores: Mapping[int, Tensor], truth: Mapping[int, Tensor]
) -> list[Row]:
    """Rows of an attack on membership: area by client, and of all clients' candidates together area, rates and curve.

    Parameters
    ----------
    scores : dict of int to Tensor
        By client, of its candidates in their order; larger: rather a member.
    truth : dict of int to Tensor
        Which of these are.
    """
    rows, inside, outside = [], [], []
    for client in sorted(scores):
        score, member = scores[client].cpu().numpy(), truth[client].cpu().numpy().astype(bool)
        inside.append(score[member])
        outside.append(score[~member])
        if len(inside[-1]) > 1 and len(outside[-1]) > 1:
            figures = area_interval(inside[-1], outside[-1])
            rows.append(Row(audit, adversary, round, client, "auc", None, *figures))
    if not scores:
        return rows
    members, others = np.concatenate(inside), np.concatenate(outside)
    if len(members) < 2 or len(others) < 2:
        return rows

    def everyone(metric: str, at: float | None, *figures: float | None) -> None:
        rows.append(Row(audit, adversary, round, EVERYONE, metric, at, *figures))

    everyone("auc", None, *area_interval(members, others))
    everyone("members", None, len(members))
    everyone("others", None, len(others))
    labels = np.concatenate([np.ones(len(members)), np.zeros(len(others))])
    false, true, _ = roc_curve(labels, np.concatenate([members, others]), drop_intermediate=False)
    for rate in RATES:
        if rate * len(others) < 1:  # the rate itself cannot be told from none
            everyone("tpr", rate, None)
            continue
        caught = int(np.rint(true[false <= rate].max() * len(members)))
        everyone("tpr", rate, *share_interval(caught, len(members)))
    for place in np.unique(np.geomspace(1, len(false), min(POINTS, len(false))).astype(int)) - 1:
        everyone("roc", float(false[place]), float(true[place]))
    return rows
