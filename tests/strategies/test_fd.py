"""FD in closed form: leave-one-out with missing labels, collected means, targets that are distributions."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedfuse.strategies.fd import FD, label_means, targets
from fedfuse.wire.records import InvalidArrays, Scope
from tests.federations import play
from tests.halves import client, server, shares, take

A, B, Z = [0.8, 0.2], [0.5, 0.5], [0.0, 0.0]


def test_leave_one_out_with_a_missing_label():
    # label 0: held by all three; label 1: by clients 0 and 2; client 1's row there is noise that must not count
    means = torch.tensor([[A, [0.4, 0.6]], [B, [9.0, 9.0]], [[0.2, 0.8], [0.1, 0.9]]], dtype=torch.float64)
    held = torch.tensor([[True, True], [True, False], [True, True]])
    fused, known = targets(means, held)
    expected = [
        [[0.35, 0.65], [0.1, 0.9]],  # without client 0: mean of B and (.2, .8); label 1 from client 2 alone
        [[0.5, 0.5], [0.25, 0.75]],  # client 1 lacks label 1: both holders teach it, divisor 2
        [[0.65, 0.35], [0.4, 0.6]],
    ]
    np.testing.assert_allclose(fused, expected, rtol=1e-15)
    assert known.all()


def test_a_label_that_nobody_else_holds_has_no_target():
    means = torch.tensor([[A, B], [A, Z]], dtype=torch.float64)
    fused, known = targets(means, torch.tensor([[True, True], [True, False]]))
    assert known.tolist() == [[True, False], [True, True]]
    assert fused[0, 1].tolist() == Z
    np.testing.assert_allclose(fused[1, 1], B)


def test_the_ports_mean_over_holders():
    means = torch.tensor([[A, B], [B, Z], [Z, Z]], dtype=torch.float64)
    held = torch.tensor([[True, True], [True, False], [False, False]])
    fused, known = targets(means, held, leave_one_out=False)
    for i in range(3):  # alike for all, divided by holders and not by clients
        np.testing.assert_allclose(fused[i], [[0.65, 0.35], B])
    assert known.all()


def test_label_means_against_numpy():
    rng = np.random.default_rng(0)
    outputs, y = rng.normal(size=(30, 4)), rng.integers(0, 3, 30)
    total, count = label_means(torch.tensor(outputs), torch.tensor(y), 4)
    np.testing.assert_allclose(total, [outputs[y == c].sum(0) for c in range(4)], rtol=1e-12, atol=1e-14)
    assert count.tolist() == np.bincount(y, minlength=4).tolist()


@pytest.mark.parametrize("collect", ["training", "after"])
@pytest.mark.parametrize("space", ["prob", "logit"])
def test_what_is_shared(collect, space):
    half = client("fd", f"strategy.collect={collect}", f"strategy.space={space}", "train.lr=1e-30", "train.epochs=2")
    half.begin("train")
    half.fit()
    content = half.share()["labels"]
    outputs = half.predict(half.x).double()
    outputs = outputs.softmax(1) if space == "prob" else outputs
    for c in range(10):
        mine = outputs[half.y == c]
        assert bool(content["held"][c]) == (len(mine) > 0)
        np.testing.assert_allclose(content["p"][c], mine.mean(0) if len(mine) else torch.zeros(10), atol=1e-5)


def test_a_label_of_one_example_is_its_output():
    half = client("fd")
    half.total = torch.arange(100, dtype=torch.float64).reshape(10, 10)
    half.count = torch.tensor([0, 1, 2, *[4] * 7])
    content = half.share()["labels"]
    assert content["held"].tolist() == [0, *[1] * 9]
    assert content["p"][:4, 3].tolist() == [3.0, 13.0, 23 / 2, 33 / 4]


@pytest.mark.parametrize("space", ["prob", "logit"])
def test_client_loss_by_hand(space):
    half = client("fd", f"strategy.space={space}", "strategy.gamma=0.7", "train.lr=1e-30", "train.batch_size=1000")
    p = 30 * torch.rand(10, 10, generator=torch.Generator().manual_seed(1))  # far from a distribution
    p = p.softmax(1) if space == "prob" else p
    held = torch.tensor([1, 0, 1, 1, 1, 0, 1, 1, 1, 1], dtype=torch.uint8)
    take(half, "labels", p=p, held=held)
    logits, y = half.predict(half.x).double(), half.y
    # raw logits are never a target of cross-entropy: they are softened first
    target = (p if space == "prob" else p.softmax(1)).double()[y]
    soft = -(target * logits.log_softmax(1)).sum(1) * held[y]
    expected = F.cross_entropy(logits, y) + 0.7 * soft.sum() / len(y)
    assert half.fit()["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_without_gamma_it_is_local():
    fd, local = play("fd", "strategy.gamma=0"), play("local")
    assert fd.strategy.inbox.shas == local.strategy.inbox.shas


def test_absent_clients_get_the_mean_over_all_holders():
    strategy = server("fd")
    one, held = torch.full((10, 10), 0.1), torch.ones(10, dtype=torch.uint8)
    strategy.fuse(shares(strategy, *[{"labels": {"p": one, "held": held}}] * 2))  # clients 0 and 1 of three
    assert all(strategy.published("labels", to=c)["held"].all() for c in range(3))
    np.testing.assert_allclose(strategy.published("labels", to=2)["p"], one)


@pytest.mark.parametrize(
    ("p", "held"),
    [
        ([[0.5, 0.4], [0.5, 0.5]], [1, 1]),
        ([[-0.5, 1.5], [0.5, 0.5]], [1, 1]),
        ([A, B], [1, 0]),
        ([A, [0.0, 0.1]], [1, 0]),
        ([A, B], [2, 1]),
    ],
)
def test_rows_that_are_no_distributions_are_refused(p, held):
    scope = Scope({"classes": 2}, {}, type("H", (), {"space": "prob"}))
    content = {"p": torch.tensor(p), "held": torch.tensor(held, dtype=torch.uint8)}
    with pytest.raises(InvalidArrays):
        FD.examine(scope, {"labels": content})


def test_skewed_pool_runs_and_counts_bytes():
    skewed = ("partition=dirichlet", "partition.alpha=0.1", "partition.min_size=5", "clients=4")
    done = play("fd", *skewed, "model.pool=[mlp,mlp_small,mlp_wide]")
    assert done.totals["up_bytes"] == 2 * 4 * (100 * 4 + 10)
    assert done.strategy.inbox.failures == {"replies": 0, "rejected": 0, "retried": 0}
