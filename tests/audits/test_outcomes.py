"""Figures of attacks in closed form: areas, rates, intervals, and what so few candidates cannot tell."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from fedfuse.audits.outcomes import area, area_interval, mean_interval, of_membership, share_interval


def test_the_area_is_scikit_learns_ties_and_all() -> None:
    draw = np.random.default_rng(0)
    members, others = draw.integers(2, 6, 40).astype(float), draw.integers(0, 5, 25).astype(float)
    labels = np.r_[np.ones(40), np.zeros(25)]
    assert area(members, others) == pytest.approx(roc_auc_score(labels, np.r_[members, others]))
    assert area(np.array([[2.0, 3.0], [0.0, 0.0]]), np.array([[1.0], [0.0]])).tolist() == [1.0, 0.5]
    value, low, high = area_interval(members, others)
    assert 0.5 < low < value < high < 1
    assert area_interval(others, others)[0] == 0.5


def test_shares_and_means_have_the_textbooks_intervals() -> None:
    assert share_interval(0, 10) == pytest.approx((0.0, 0.0, 1 - 0.025**0.1))  # Clopper-Pearson at none of ten
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2 - 4.302652729911275 / 3**0.5, 4.484137817))
    assert mean_interval([4.0]) == (4.0, None, None)
    assert mean_interval([4.0, 4.0]) == (4.0, 4.0, 4.0)


def test_rates_curve_and_areas_of_hand_made_scores() -> None:
    """Of 200 members 30 lie above all 200 others, 20 more above all but two (1 %); at 0.1 % nothing can be told."""
    others = torch.arange(200.0)
    members = torch.cat([torch.full((30,), 500.0), torch.full((20,), 197.5), torch.full((150,), -1.0)])
    scores, truth = torch.cat([others, members]), torch.arange(400) >= 200
    rows = of_membership("x", "y", 3, {0: scores[::2], 5: scores[1::2]}, {0: truth[::2], 5: truth[1::2]})
    found = {(row.client, row.metric, row.at): row for row in rows}
    assert found[-1, "tpr", 0.01].value == pytest.approx(50 / 200)
    assert found[-1, "tpr", 0.01].low == pytest.approx(share_interval(50, 200)[1])
    assert found[-1, "tpr", 0.001].value is None
    assert found[-1, "members", None].value == found[-1, "others", None].value == 200
    assert found[-1, "auc", None].value == pytest.approx((30 * 200 + 20 * 198) / 200**2)
    assert {client for client, metric, _ in found if metric == "auc"} == {-1, 0, 5}
    curve = [(row.at, row.value) for row in rows if row.metric == "roc"]
    assert curve == sorted(curve)
    assert curve[0] == (0.0, 0.0)
    assert curve[-1] == (1.0, 1.0)
    assert len(curve) <= 200
    assert {(row.audit, row.adversary, row.round) for row in rows} == {("x", "y", 3)}


def test_who_has_one_candidate_tells_nothing() -> None:
    assert of_membership("x", "y", 1, {0: torch.tensor([1.0, 0.0])}, {0: torch.tensor([True, False])}) == []
    assert of_membership("x", "y", 1, {}, {}) == []


def test_equal_but_for_rounding_has_no_width() -> None:
    assert mean_interval([0.1, 0.1 + 1e-16, 0.1]) == (pytest.approx(0.1), pytest.approx(0.1), pytest.approx(0.1))
