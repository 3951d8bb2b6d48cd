"""DS-FL in closed form: ERA, where the softmax sits, and lessons on their own round's rows."""

import numpy as np
import pytest
import torch

from fedfuse.strategies.dsfl import DSFL, DSFLHyper, aggregate, era
from fedfuse.wire.records import InvalidArrays, Scope
from tests.federations import play
from tests.halves import client, random_labels, server, shares, take


def entropy(p):
    return -(p * p.clamp_min(1e-300).log()).sum(1)


def test_entropy_falls_with_temperature():
    mean = random_labels(50, 10)
    found = torch.stack([entropy(era(mean, T)) for T in (1.0, 0.5, 0.2, 0.1, 0.05, 0.01)])
    assert bool((found[1:] < found[:-1]).all())
    assert bool((era(mean, 1e-4).argmax(1) == mean.argmax(1)).all())


def test_era_against_numpy_and_its_bound():
    mean = random_labels(20, 5, seed=1)
    z = np.exp(mean.numpy() / 0.1)
    np.testing.assert_allclose(era(mean, 0.1), z / z.sum(1, keepdims=True), rtol=1e-12)
    # a second softmax of numbers in [0, 1] cannot sharpen beyond e^(1/T); of logits it can
    one_hot = torch.eye(5, dtype=torch.float64)
    q = era(one_hot, 0.1)
    assert (q.amax(1) / q.amin(1)).tolist() == pytest.approx([np.exp(10)] * 5)
    assert (era(40 * one_hot, 0.1).amin(1) < 1e-100).all()


@pytest.mark.parametrize("place", ["client", "server"])
@pytest.mark.parametrize("aggregation", ["era", "sa"])
def test_where_the_softmax_sits(place, aggregation):
    strategy = server(
        "dsfl", f"strategy.softmax={place}", f"strategy.aggregation={aggregation}", "strategy.server_model=false"
    )
    logits = 3 * torch.randn(3, 24, 10, generator=torch.Generator().manual_seed(0))
    sent = logits.softmax(2) if place == "client" else logits
    strategy.fuse(shares(strategy, *[{"labels": {"p": p}} for p in sent]))
    mean = sent.double().mean(0)
    expected = {
        ("client", "era"): (mean / 0.1).softmax(1),
        ("client", "sa"): mean,
        ("server", "era"): (mean / 0.1).softmax(1),
        ("server", "sa"): mean.softmax(1),
    }[place, aggregation]
    np.testing.assert_allclose(strategy.published("labels")["p"], expected, rtol=1e-5, atol=1e-7)


def test_simple_averaging_keeps_the_mean():
    mean = random_labels(4, 3)
    assert aggregate(mean, DSFLHyper(aggregation="sa")) is mean


def test_a_lesson_stands_on_its_own_rounds_rows(monkeypatch):
    half = client("dsfl", "strategy.subset=5", round=7)
    assert half.subset(5, 3).tolist() != half.subset(5, 7).tolist()  # redrawn
    seen = {}
    monkeypatch.setattr(half, "train", lambda loss, x, y, **options: seen.update(x=x, loss=loss))
    p = torch.eye(10)[:5]
    take(half, "labels", version=3, p=p)
    assert torch.equal(seen["x"], half.transfer[half.subset(5, 3)])
    logits = torch.randn(2, 10)
    expected = -(p[[4, 1]] * logits.log_softmax(1)).sum(1).mean()
    assert seen["loss"](logits, None, torch.tensor([4, 1])).item() == pytest.approx(expected.item(), rel=1e-6)


def test_bytes_of_a_redrawn_subset():
    totals = play("dsfl", "strategy.subset=5", "rounds=3").totals
    assert totals["up_bytes"] == 3 * 3 * 5 * 10 * 4
    assert totals["down_bytes"] == 2 * 3 * 5 * 10 * 4  # the last lesson reaches evaluation only


def test_batchnorm_moves_while_distilling_and_not_while_predicting():
    over = ("model=resnet8_bn", "model.width=0.25", "strategy.distill_batch=12")
    half = client("dsfl", *over)
    before = {k: v.clone() for k, v in half.model.state_dict().items() if "running_mean" in k}
    half.share()
    assert all(torch.equal(v, half.model.state_dict()[k]) for k, v in before.items())
    take(half, "labels", p=torch.full((24, 10), 0.1))
    assert not any(torch.equal(v, half.model.state_dict()[k]) for k, v in before.items())


def test_rows_that_are_no_distributions_are_refused():
    scope = Scope({}, {}, DSFLHyper())
    with pytest.raises(InvalidArrays, match="no distributions"):
        DSFL.examine(scope, {"labels": {"p": torch.full((2, 4), 0.3)}})
    DSFL.examine(Scope({}, {}, DSFLHyper(softmax="server")), {"labels": {"p": torch.full((2, 4), 0.3)}})


def test_pool_of_three_and_every_loss_by_name():
    for over in (("model.pool=[mlp,mlp_small,mlp_wide]",), ("loss=reverse_kl",), ("strategy.server_model=false",)):
        assert play("dsfl", *over).strategy.inbox.failures["replies"] == 0
