"""COMET in closed form: cluster means, κ = 1 as plain averaging, κ = N as self-distillation, joint steps."""

import pytest
import torch
import torch.nn.functional as F

from fedfuse.config import registry
from fedfuse.config.compose import compose
from fedfuse.core.fit import remarks
from fedfuse.errors import UserError
from fedfuse.strategies.comet import cluster, means, memberships, nearest
from fedfuse.wire.records import InvalidArrays
from tests.federations import federation, play, uploads
from tests.halves import client, server, shares, take


def soft(n=4, rows=5, classes=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(n, rows, classes, generator=draw, dtype=torch.float64)).softmax(-1)


def two_groups():
    a, b = soft(1, seed=1), soft(1, seed=2)
    return torch.cat([a, b, a * 0.99 + 0.01 / 3, b * 0.98 + 0.02 / 3])


@pytest.mark.parametrize("by", ["client", "sample"])
def test_one_cluster_is_plain_averaging(by):
    s = soft()
    member = memberships(s, 1, by, 0)
    torch.testing.assert_close(means(s, member, 1)[0], s.mean(0), rtol=1e-14, atol=0)


def test_as_many_clusters_as_clients_is_each_alone():
    s = soft()
    member = memberships(s, 9, "client", 0)[:, 0]
    assert sorted(member.tolist()) == [0, 1, 2, 3]
    torch.testing.assert_close(means(s, member[:, None], 4)[member], s, rtol=1e-14, atol=0)


def test_clusters_of_clients_by_hand():
    s = two_groups()
    member = memberships(s, 2, "client", 7)[:, 0]
    assert member[0] == member[2] != member[1] == member[3]
    mean = means(s, member[:, None], 2)
    torch.testing.assert_close(mean[member[0]], (s[0] + s[2]) / 2, rtol=1e-14, atol=0)
    torch.testing.assert_close(mean[member[1]], (s[1] + s[3]) / 2, rtol=1e-14, atol=0)


def test_clusters_per_sample_may_differ_from_sample_to_sample():
    s = two_groups()
    s[:, 0] = s[[0, 0, 1, 1], 0]  # on the first sample it is 0, 1 against 2, 3
    member = memberships(s, 2, "sample", 0)
    assert (member[0] == member[1]).tolist() == [True, False, False, False, False]
    assert (member[0] == member[2]).tolist() == [False, True, True, True, True]
    mean = means(s, member, 2)
    torch.testing.assert_close(nearest(s[0], mean)[1:], (s[0, 1:] + s[2, 1:]) / 2, rtol=1e-14, atol=0)
    torch.testing.assert_close(nearest(s[0], mean)[0], (s[0, 0] + s[1, 0]) / 2, rtol=1e-14, atol=0)


def test_clusters_do_not_depend_on_the_order_of_clients_nor_on_chance():
    s = two_groups()
    assert torch.equal(cluster(s, 2, 3), cluster(s, 2, 3))
    order = torch.tensor([2, 0, 3, 1])
    a, b = cluster(s, 2, 3), cluster(s[order], 2, 3)
    assert torch.equal(a[order][:, None] == a[order][None], b[:, None] == b[None])
    assert len(set(cluster(s[[0, 0, 0]], 2, 0).tolist())) == 1  # equal clients are one cluster, without a warning
    torch.testing.assert_close(means(s[[0, 0]], torch.zeros(2, 1, dtype=torch.int64), 2), s[[0, 0]])


def test_the_distance_is_squared_and_sums_over_classes():
    from fedfuse.train.losses import loss

    logits, target = torch.randn(6, 3, dtype=torch.float64), soft(1, 6)[0]
    value = loss("mse", weight=3.0).from_probabilities(logits, target)
    assert value.item() == pytest.approx(((logits.softmax(1) - target) ** 2).sum(1).mean().item(), rel=1e-12)


def test_the_mean_of_ones_cluster_reaches_each_client():
    with federation("comet", "strategy.clusters=1", "rounds=1") as (built, _):
        sent = uploads(built, "soft")
        built.run()
        mean = torch.stack([one["p"].double() for one in sent]).mean(0)
        for client in range(3):
            got = built.strategy.published("means", to=client)["p"]
            torch.testing.assert_close(got[0], mean.float(), rtol=2e-7, atol=0)


@pytest.mark.parametrize(("by", "pairs"), [("client", (0, 1, 0)), ("sample", (1 / 3, 2 / 3, 0))])
def test_the_similarity_is_how_often_two_are_of_one_cluster(by, pairs):
    """0 is like 2; by sample, on 8 of the 24 rows, like 1 instead."""
    strategy = server("comet", "strategy.clusters=2", f"strategy.cluster_by={by}")
    (a, b), some = soft(2, 24, 10), (torch.arange(24) < 8)[:, None]
    told = (a, torch.where(some, a, b), torch.where(some, b, a)) if by == "sample" else (a, b, 0.99 * a + 0.001)
    strategy.fuse(shares(strategy, *({"soft": {"p": p.float()}} for p in told)))
    got = {name: value for *_, name, value in strategy.logged if name.startswith("similarity/")}
    want = {f"similarity/{i}/{j}": 1 if i == j else pairs[i + j - 1] for i in range(3) for j in range(3)}
    assert got == pytest.approx(want)


def test_a_joint_step_sees_both_terms(monkeypatch):
    """One private batch and one public batch a step."""
    seen = []
    from fedfuse.train import training

    original = training.train

    def spied(model, x, y, loss, config, seed_parts, **options):
        def watched(logits, labels, rows):
            value = loss(logits, labels, rows)
            seen.append((value.item(), F.cross_entropy(logits, labels).item()))
            return value

        return original(model, x, y, watched, config, seed_parts, **options)

    monkeypatch.setattr(training, "train", spied)
    play("comet", "strategy.lam=3", "strategy.clusters=1")
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert all(total == ce for total, ce in first)  # nothing to be drawn to yet
    assert all(total > ce for total, ce in second)


def test_variants_and_pools_run():
    pool = "model.pool=[mlp_small,mlp,mlp_wide]"
    assert play("comet", pool, "strategy.cluster_by=sample", "strategy.distill=separate").digest
    assert play("comet", pool, "strategy.subset=7", "strategy.clusters=5").digest
    assert play("comet", "strategy.lam=0").federation.headline == play("local").federation.headline


def test_distilling_is_asked_about_only_where_it_is_separate():
    """Joint steps hear neither `distil.*` nor the epochs: the keys are refused, and no note advises them."""
    with pytest.raises(UserError, match=r"distil.epochs=3 does nothing here: it goes with a strategy that distils"):
        compose(["strategy=comet", "distil.epochs=3"])
    with pytest.raises(UserError, match=r"strategy.distill_epochs=3 does nothing with strategy.distill=joint"):
        compose(["strategy=comet", "strategy.distill_epochs=3"])
    assert remarks(server("comet")) == []
    compose(["strategy=comet", "strategy.distill=separate", "strategy.distill_epochs=3", "distil.lr=0.1"])
    (said,) = remarks(server("comet", "strategy.distill=separate"))
    assert "strategy=comet distils 24 rows a round" in said


def test_rows_that_are_no_distributions_are_refused():
    with pytest.raises(InvalidArrays, match="no distributions"):
        registry.entry("comet").server.examine(None, {"soft": {"p": -soft(1)[0]}})


def test_the_distance_to_the_mean_is_multiplied_by_lambda(monkeypatch):
    half, seen = client("comet", "strategy.distill=separate", "strategy.lam=3"), {}
    target = soft(1, 24, 10, seed=3)[0].float()
    take(half, "means", p=target[None])
    monkeypatch.setattr(half, "distil", lambda loss, x, y, **effort: seen.update(loss=loss, effort=effort))
    half.fit()
    logits, rows = torch.randn(3, 10, dtype=torch.float64), torch.tensor([7, 0, 23])
    wanted = 3 * ((logits.softmax(1) - target[rows]) ** 2).sum(1).mean()
    assert seen["loss"](logits, None, rows).item() == pytest.approx(wanted.item(), rel=1e-6)
    assert seen["effort"] == {"purpose": "distil", "epochs": 1, "batch_size": 64}


def test_of_several_means_each_row_takes_the_nearest(monkeypatch):
    half = client("comet", "strategy.cluster_by=sample")
    said = half.predict(half.transfer).softmax(1)
    near, far = said.clone(), said.roll(1, 1)
    far[3], near[3] = near[3].clone(), far[3].clone()
    take(half, "means", p=torch.stack([near, far]))
    rows, mean = half.target
    assert rows.tolist() == list(range(24))
    torch.testing.assert_close(mean, said)
    monkeypatch.setattr(half, "predict", None)  # a single mean is nobody's choice: nothing is predicted for it
    take(half, "means", p=near[None])
    assert torch.equal(half.target[1], near)
