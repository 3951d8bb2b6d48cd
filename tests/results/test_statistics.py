"""Statistics against SciPy and against cases done by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from fedfuse.results.statistics import (
    average_ranks,
    few_seeds_note,
    holm,
    mean_interval,
    paired,
    signed_rank_floor,
)


def test_t_interval_by_hand():
    found = mean_interval([1.0, 2.0, 3.0])
    # t(0.975, 2) = 4.302653, s = 1, so the half-width is 4.302653 / sqrt(3)
    assert found.mean == 2
    assert found.half_width == pytest.approx(4.302652729911275 / math.sqrt(3))
    assert found.n == 3


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # beside other work
@given(st.lists(st.floats(0, 1), min_size=2, max_size=8).filter(lambda v: np.ptp(v) > 1e-6))
def test_t_interval_is_scipys(values):
    found = mean_interval(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


def test_bootstrap_is_scipys_and_repeatable():
    values = [0.71, 0.74, 0.70, 0.79, 0.72]
    found = mean_interval(values, "bootstrap")
    again = stats.bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    assert (found.low, found.high) == (again.low, again.high)
    assert found == mean_interval(values, "bootstrap")


@pytest.mark.parametrize("method", ["t", "bootstrap"])
def test_degenerate_intervals(method):
    one = mean_interval([0.5], method)
    assert (one.mean, one.low, one.high, one.half_width, one.n) == (0.5, None, None, None, 1)
    same = mean_interval([0.5] * 3, method)
    assert (same.low, same.high, same.half_width, same.n) == (0.5, 0.5, 0.0, 3)
    gaps = mean_interval([0.4, math.nan, 0.6], method)
    assert (gaps.n, gaps.mean) == (2, 0.5)
    nothing = mean_interval([math.nan], method)
    assert math.isnan(nothing.mean)
    assert nothing.n == 0


def test_paired_is_scipys():
    first = dict(enumerate([0.81, 0.79, 0.84, 0.80, 0.83, 0.86]))
    second = dict(enumerate([0.78, 0.77, 0.80, 0.81, 0.78, 0.79]))
    found = paired(first, second)
    left, right = list(first.values()), list(second.values())
    assert found.t_p == pytest.approx(stats.ttest_rel(left, right).pvalue)
    assert found.signed_rank_p == pytest.approx(stats.wilcoxon(left, right).pvalue)
    assert found.difference.mean == pytest.approx(np.mean(np.subtract(left, right)))
    assert (found.n, found.unpaired, found.note) == (6, (), "")


def test_paired_on_the_shared_seeds_only():
    first = {0: 0.5, 1: 0.6, 2: 0.7, 7: 0.1}
    second = {2: 0.6, 1: 0.4, 0: 0.5, 9: 0.9, 3: math.nan}
    found = paired(first, second)
    assert found.n == 3
    assert set(found.unpaired) == {3, 7, 9}
    assert found.difference.mean == pytest.approx(0.1)
    assert found.t_p == pytest.approx(stats.ttest_rel([0.5, 0.6, 0.7], [0.5, 0.4, 0.6]).pvalue)


def test_identical_runs():
    found = paired({0: 0.5, 1: 0.6}, {0: 0.5, 1: 0.6})
    assert (found.difference.mean, found.difference.half_width, found.n) == (0, 0, 2)
    assert "identical" in found.note
    assert math.isnan(found.t_p)
    assert math.isnan(found.signed_rank_p)


def test_nothing_to_test():
    assert "no seed in common" in paired({0: 0.5}, {1: 0.5}).note
    one = paired({0: 0.5}, {0: 0.4})
    assert "one seed" in one.note
    assert one.difference.half_width is None
    constant = paired({0: 0.5, 1: 0.6, 2: 0.7}, {0: 0.4, 1: 0.5, 2: 0.6})
    assert math.isnan(constant.t_p)
    assert "same difference" in constant.note


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    kept = holm([0.01, math.nan, 0.5])
    assert kept[0] == pytest.approx(0.02)
    assert math.isnan(kept[1])
    assert kept[2] == 0.5
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_monotone_and_never_smaller(values):
    adjusted = holm(values)
    assert all(p <= q <= 1 for p, q in zip(values, adjusted, strict=True))
    order = np.argsort(values, kind="stable")
    assert np.all(np.diff(np.array(adjusted)[order]) >= 0)


def test_average_ranks():
    ranks, n = average_ranks({"a": {0: 0.9, 1: 0.8, 2: 0.1}, "b": {0: 0.7, 1: 0.8, 2: 0.9}, "c": {0: 0.1, 1: 0.1}})
    assert n == 2  # seed 2 is missing for c
    assert ranks == {"a": 1.25, "b": 1.75, "c": 3.0}
    assert average_ranks({"a": {0: 1.0}, "b": {1: 1.0}})[1] == 0


@pytest.mark.parametrize("n", [3, 4, 5, 6])
def test_signed_rank_floor_is_scipys(n):
    assert signed_rank_floor(n) == stats.wilcoxon(np.arange(1, n + 1), np.zeros(n)).pvalue
    assert (signed_rank_floor(n) < 0.05) == (n > 5) == (few_seeds_note(n) == "")
