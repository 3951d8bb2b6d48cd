"""Selective-FD in closed form: KuLSIF against NumPy, the mean over senders, the ambiguous dropped."""

import numpy as np
import pytest
import torch

from fedfuse.config import registry
from fedfuse.strategies.selectivefd import ensemble, kernel, kulsif, ratio
from fedfuse.wire.records import InvalidArrays, Scope
from tests.federations import federation, play, uploads
from tests.halves import client, random_labels, server, shares


def test_kulsif_minimises_its_objective():
    """Over all weights on all points, ½ mean_u r² − mean_x r + λ/2 ‖r‖² is least at KuLSIF's solution."""
    rng = np.random.default_rng(0)
    x, u, width = rng.normal(size=(6, 2)), rng.uniform(-3, 3, size=(8, 2)), 1.3
    lam, points = 8**-0.5, np.concatenate([u, x])
    distance = ((points[:, None] - points[None]) ** 2).sum(-1)
    K = np.exp(-distance / (2 * width**2))
    alpha = kulsif(torch.tensor(x), torch.tensor(u), width).numpy()
    weights = np.concatenate([alpha, np.full(6, 1 / (6 * lam))])
    gradient = K[:, :8] @ (K[:8] @ weights) / 8 - K[:, 8:].mean(1) + lam * K @ weights
    assert np.abs(gradient).max() < 1e-13
    got = ratio(torch.tensor(points), torch.tensor(x), torch.tensor(u), torch.tensor(alpha), width)
    np.testing.assert_allclose(got, K @ weights, rtol=1e-10, atol=1e-13)


def test_the_kernel_by_hand():
    a, b = torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(kernel(a, b, 5.0), [[np.exp(-0.5), 1.0]], rtol=1e-6)


def test_the_ratio_knows_what_is_ours():
    draw = torch.Generator().manual_seed(0)
    mine = torch.randn(40, 2, generator=draw, dtype=torch.float64) * 0.3 + 1
    uniform = torch.rand(250, 2, generator=draw, dtype=torch.float64) * 8 - 4
    alpha = kulsif(mine, uniform, 0.5)
    inside, outside = ratio(torch.tensor([[1.0, 1.0], [-3.0, -3.0]]).double(), mine, uniform, alpha, 0.5).tolist()
    assert inside > 5 > 0.5 > abs(outside)


def test_the_mean_is_over_senders_and_the_last_does_not_win():
    rows = [torch.tensor([0, 2]), torch.tensor([2, 3]), torch.tensor([], dtype=torch.int32)]
    soft = [torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([[0.2, 0.8], [0.5, 0.5]]), torch.empty(0, 2)]
    left, mean = ensemble(rows, soft, 5, None)
    assert left.tolist() == [0, 2, 3]  # nobody sent 1 and 4: no row of zeros is taught
    np.testing.assert_allclose(mean, [[0.9, 0.1], [0.4, 0.6], [0.5, 0.5]], atol=1e-7)


def test_the_server_drops_the_ambiguous():
    soft = [torch.tensor([[0.9, 0.1, 0.0], [0.5, 0.3, 0.2], [0.4, 0.3, 0.3]], dtype=torch.float64)]
    rows = [torch.arange(3)]
    one_hot = np.eye(3)[[0, 0, 0]]
    distance = np.abs(soft[0].numpy() - one_hot).sum(1)  # 0.2, 1.0, 1.2
    for threshold in (0.1, 0.5, 1.1, 2.0):
        left, _ = ensemble(rows, soft, 3, threshold)
        assert left.tolist() == np.flatnonzero(distance <= threshold).tolist()


@pytest.mark.parametrize(("quantile", "unknown"), [(0.0, 1), (1.0, None)])
def test_what_is_at_the_quantile_is_not_known(quantile, unknown, monkeypatch):
    """Asked about its own examples, a client knows all but the least likely at 0, and at 1 not even the likeliest."""
    half = client("selectivefd", f"strategy.client_quantile={quantile}")
    monkeypatch.setattr(type(half), "transfer", property(lambda self: self.x))
    known = half.known()
    assert int((~known).sum()) == (unknown or len(half.x))


def test_without_selectors_it_is_plain_averaging():
    words = ("strategy.client_quantile=null", "strategy.server_threshold=null", "rounds=1")
    with federation("selectivefd", *words) as (built, _):
        sent = uploads(built, "soft")
        built.run()
        got, mean = built.strategy.published("ensemble"), torch.stack([one["p"].double() for one in sent]).mean(0)
        assert got["rows"].tolist() == list(range(24))
        torch.testing.assert_close(got["p"], mean.float(), rtol=2e-7, atol=0)


def test_a_client_without_examples_knows_no_row_even_without_a_selector():
    built = server("selectivefd", "strategy.client_quantile=null", "strategy.server_threshold=null")
    rows, p = torch.arange(24, dtype=torch.int32), [random_labels(24, 10, seed).float() for seed in range(3)]
    everyone = [{"soft": {"rows": rows, "p": one}} for one in p]
    built.fuse(shares(built, *everyone, examples=(10, 0, 30)))
    got = built.published("ensemble")
    torch.testing.assert_close(got["p"], (p[0] + p[2]) / 2)


def test_selection_cuts_the_bytes_and_says_so():
    whole = play("selectivefd", "strategy.client_quantile=null", "rounds=1")
    some = play("selectivefd", "partition=shards", "rounds=1")
    assert whole.totals["up_bytes"] == 3 * 24 * (10 * 4 + 4)
    assert some.totals["up_bytes"] < whole.totals["up_bytes"]
    assert some.totals["up_bytes"] % 44 == 0


def test_nothing_left_teaches_nothing():
    quiet = play("selectivefd", "strategy.server_threshold=0", "rounds=2")
    assert ("ensemble", "") not in quiet.strategy.board.items
    scores = dict(quiet.federation.headline)
    assert scores.pop("accuracy/personal_trained") == scores["accuracy/personal"]
    assert scores == play("local").federation.headline


def test_three_architectures_and_a_subset():
    assert play(
        "selectivefd", "model.pool=[mlp_small,mlp,mlp_wide]", "strategy.subset=10", "strategy.width=null"
    ).digest


@pytest.mark.parametrize("rows", [[0, 0], [1, 0], [-1, 2], [2, 24], [0, 1, 2]])
def test_rows_that_are_none_are_refused(rows):
    share = {"soft": {"rows": torch.tensor(rows, dtype=torch.int32), "p": torch.full((2, 4), 0.25)}}
    with pytest.raises(InvalidArrays):
        registry.entry("selectivefd").server.examine(Scope({"subset": 24}, {}), share)
