"""FedHKD in closed form: hyper-knowledge against NumPy, means over holders, FedAvg without the extra terms."""

import numpy as np
import pytest
import torch

from fedfuse.config import registry
from fedfuse.errors import UserError
from fedfuse.strategies.fedhkd import hyper_knowledge
from fedfuse.train.losses import loss
from fedfuse.wire.records import InvalidArrays, Scope
from tests.federations import federation, play, uploads
from tests.halves import client, take

SKEWED = ("partition=dirichlet", "partition.alpha=0.1", "clients=4")


def test_hyper_knowledge_against_numpy():
    rng = np.random.default_rng(0)
    z, logits, y = rng.normal(size=(7, 2)), rng.normal(size=(7, 4)), np.array([1, 1, 3, 0, 3, 3, 1])
    known = hyper_knowledge(torch.tensor(z), torch.tensor(logits), torch.tensor(y), 0.5)
    soft = np.exp(logits / 0.5)
    soft /= soft.sum(1, keepdims=True)
    assert known["counts"].tolist() == [1, 3, 0, 3]
    for c in (0, 1, 3):
        np.testing.assert_allclose(known["embeddings"][c], z[y == c].mean(0), rtol=1e-13)
        np.testing.assert_allclose(known["predictions"][c], soft[y == c].mean(0), rtol=1e-13)


def test_the_teacher_is_not_softened_twice():
    """Q_c is softened by T already: the loss' minimum, 0, is where the student's softened prediction is Q_c."""
    logits = torch.tensor([[1.0, -0.5, 0.3]], dtype=torch.float64)
    taught = (logits / 0.5).softmax(1)
    same = loss("kl", temperature=0.5).from_probabilities(logits, taught, softened=0.5)
    assert same.item() == pytest.approx(0, abs=1e-15)
    other = torch.tensor([[0.0, 0.2, 0.4]], dtype=torch.float64)
    p, q = taught.numpy(), (other / 0.5).softmax(1).numpy()
    value = loss("kl", temperature=0.5).from_probabilities(other, taught, softened=0.5)
    assert value.item() == pytest.approx(0.25 * (p * np.log(p / q)).sum(), rel=1e-12)


def test_a_class_that_is_too_rare_is_not_shared():
    """ν = 0.25 of eight examples: a class with one is silent, one with two is heard."""
    rng = np.random.default_rng(1)
    z, logits, y = (
        torch.tensor(rng.normal(size=(8, 2))),
        torch.tensor(rng.normal(size=(8, 3))),
        [0, 1, 1, 2, 2, 2, 2, 2],
    )
    free = hyper_knowledge(z, logits, torch.tensor(y), 0.5)
    known = hyper_knowledge(z, logits, torch.tensor(y), 0.5, 0.25)
    assert free["counts"].tolist() == [1, 2, 5]
    assert known["counts"].tolist() == [0, 2, 5]
    for name in ("embeddings", "predictions"):
        assert not known[name][0].any()
        assert torch.equal(known[name][1:], free[name][1:])


def test_a_steps_gradient_is_clipped_once_there_is_knowledge():
    """One step of plain SGD with a pull so strong that its norm is above 1.1: it moves lr·1.1."""
    known = {"embeddings": torch.full((10, 32), 40.0), "predictions": torch.full((10, 10), 0.1)}
    known["held"] = torch.ones(10, dtype=torch.bool)
    moved = {}
    for clip in ("1.1", "null"):
        half = client(
            "fedhkd", "strategy.gamma=3", "train.momentum=0", "train.batch_size=1000", f"strategy.clip={clip}"
        )
        take(half, "classes", **known)
        start = half.weights()
        half.fit()
        moved[clip] = torch.cat([(v - start[k]).flatten() for k, v in half.weights().items()]).norm().item() / 0.05
    assert moved["1.1"] == pytest.approx(1.1, rel=1e-4)
    assert moved["null"] > 2


def test_a_clients_loss_by_hand(monkeypatch):
    """CE + λ·(mean over held classes and over all C) KL(Q_c ‖ softmax(head(h_c)/T)) + γ·mean over d of the pull."""
    words = ("strategy.lam=0.7", "strategy.gamma=0.3", "strategy.temperature=2", "train.momentum=0")
    half, held = client("fedhkd", *words), torch.arange(10) % 4 != 1
    draw = torch.Generator().manual_seed(0)
    known = {"embeddings": torch.randn(10, 32, generator=draw), "predictions": torch.rand(10, 10, generator=draw)}
    known["predictions"] /= known["predictions"].sum(1, keepdim=True)
    take(half, "classes", **known, held=held)
    monkeypatch.setattr(
        half, "train", lambda loss, forward, after_backward: {"loss": loss(forward(half.x), half.y, None)}
    )
    found = half.fit()["loss"]
    with torch.no_grad():
        z, logits = (out.double() for out in half.features_and_logits(half.x))
        own = (half.model.head(known["embeddings"][held]).double() / 2).log_softmax(1)
    q = known["predictions"][held].double()
    kl = (q * (q.log() - own)).sum() / (int(held.sum()) * 10)
    there = held[half.y]
    pull = (z - known["embeddings"].double()[half.y])[there].square().sum() / z.numel()
    ce = torch.nn.functional.cross_entropy(logits, half.y)
    assert found.item() == pytest.approx((ce + 0.7 * kl + 0.3 * pull).item(), rel=1e-5)


def doubles(sent):
    return [{name: value.double().numpy() for name, value in one.items()} for one in sent]


@pytest.mark.parametrize("weighting", ["count", "holders"])
def test_every_holder_counts_and_the_last_does_not_win(weighting):
    with federation("fedhkd", *SKEWED, "rounds=1", f"strategy.weighting={weighting}") as (built, _):
        sent = uploads(built, "classes")
        built.run()
        sent, got = doubles(sent), built.strategy.published("classes")
        counts = np.stack([u["counts"] for u in sent])
        assert (counts == 0).any()
        assert ((counts > 0).sum(0) > 1).any()
        for name in ("embeddings", "predictions"):
            for c in np.flatnonzero(counts.sum(0)):
                w = counts[:, c] if weighting == "count" else counts[:, c] > 0
                expected = np.average(np.stack([u[name][c] for u in sent]), axis=0, weights=w)
                np.testing.assert_allclose(got[name][c], expected, rtol=1e-5, atol=1e-6)
        assert (got["held"].numpy() == (counts.sum(0) > 0)).all()
        held = got["predictions"][got["held"]]
        torch.testing.assert_close(held.sum(1), torch.ones(len(held)))


def test_noise_is_drawn_per_class_for_held_classes_only():
    def embeddings(noise):
        with federation("fedhkd", *SKEWED, "rounds=1", f"strategy.noise={noise}") as (built, _):
            sent = uploads(built, "classes")
            built.run()
        return [(u["embeddings"], u["counts"]) for u in doubles(sent)]

    for (clean, counts), (noisy, _) in zip(embeddings(0), embeddings(2), strict=True):
        added = noisy - clean
        assert not added[counts == 0].any()
        held = added[counts > 0]
        if len(held) > 1:
            assert np.abs(held[0] - held[1]).max() > 0.1  # the code's one vector for all classes would give 0
            assert 1.4 < held.std() < 2.6


def test_without_the_extra_terms_it_is_fedavg():
    plain, free = play("fedavg"), play("fedhkd", "strategy.lam=0", "strategy.gamma=0")
    for name, value in plain.strategy.model.items():
        assert torch.equal(value, free.strategy.model[name])
    taught = play("fedhkd")
    assert any(not torch.equal(value, taught.strategy.model[name]) for name, value in plain.strategy.model.items())


def test_absent_classes_keep_their_knowledge():
    played = play("fedhkd", *SKEWED, "participation=0.25", "rounds=3")
    known = played.strategy.published("classes")
    torch.testing.assert_close(known["predictions"].sum(1), known["held"].float())


def test_a_pool_is_refused():
    with pytest.raises(UserError, match="one architecture"):
        play("fedhkd", "model.pool=[mlp_small,mlp,mlp_wide]")


def test_predictions_that_are_none_are_refused():
    share = {"classes": {"counts": torch.tensor([2, 0]), "predictions": torch.tensor([[0.7, 0.7], [0.0, 0.0]])}}
    with pytest.raises(InvalidArrays, match="1 rows are no distributions"):
        registry.entry("fedhkd").server.examine(Scope({"examples": 9}, {}), share)
