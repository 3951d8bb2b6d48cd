"""FedProto in closed form: prototypes against NumPy, the pull, nearest-prototype prediction, missing classes."""

import numpy as np
import pytest
import torch

from fedfuse.config import registry
from fedfuse.errors import UserError
from fedfuse.strategies.fedproto import nearness
from fedfuse.train import training
from fedfuse.train.classwise import pull
from tests.federations import federation, play
from tests.halves import client, take

SKEWED = ("partition=dirichlet", "partition.alpha=0.1", "clients=4")


def test_the_pull_by_hand():
    z = torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    prototypes = torch.tensor([[0.0, 0.0], [5.0, 5.0], [9.0, 9.0]], dtype=torch.float64)
    held = torch.tensor([True, False, True])
    value = pull(z, torch.tensor([0, 1, 2]), prototypes, held)
    assert value.item() == pytest.approx((1 + 4 + 0 + 0 + 81 + 64) / 6, rel=1e-15)
    value.backward()
    assert z.grad[1].abs().max() == 0  # its class has no prototype: not pulled anywhere, least of all to zero
    np.testing.assert_allclose(z.grad[0], [2 / 6, 4 / 6], rtol=1e-15)


def test_nearest_prototype_against_brute_force():
    rng = np.random.default_rng(1)
    z, prototypes = rng.normal(size=(20, 4)), rng.normal(size=(5, 4))
    held = np.array([True, True, False, True, False])
    distance = ((z[:, None] - prototypes[None]) ** 2).sum(-1)
    score = nearness(torch.tensor(z), torch.tensor(prototypes), torch.tensor(held))
    np.testing.assert_allclose(score[:, held], -distance[:, held], rtol=1e-12)
    distance[:, ~held] = np.inf
    assert score.argmax(1).tolist() == distance.argmin(1).tolist()
    assert torch.isfinite(score).all()


@pytest.mark.parametrize("weighting", ["count", "holders"])
def test_a_round_against_numpy(weighting):
    """Prototypes of the trained weights, averaged over holders: recomputed from the committed client models."""
    with federation("fedproto", *SKEWED, "rounds=1", f"strategy.weighting={weighting}") as (built, directory):
        built.run()
        server, classes = built.strategy, built.scenario.classes
        total, weight = np.zeros((classes, 32)), np.zeros(classes)
        lacking = 0
        for client in range(4):
            state = directory.clients.load(client, server.outbox.tags[client])
            model = server.workspace.loaded("mlp_small", state["model"])
            x, y = built.scenario.data.tensors(client, "train")
            z = training.predict(model, x, features=True).double().numpy()
            for c in range(classes):
                mine = z[y.numpy() == c]
                lacking += len(mine) == 0
                if len(mine):
                    w = len(mine) if weighting == "count" else 1
                    total[c] += w * mine.mean(0)
                    weight[c] += w
        got = server.published("prototypes")
        assert lacking > 0  # the case is worth something only if somebody lacks a class
        assert (got["held"].numpy() == (weight > 0)).all()
        np.testing.assert_allclose(
            got["means"][weight > 0], (total / np.maximum(weight, 1)[:, None])[weight > 0], rtol=1e-5
        )


def test_a_class_nobody_brought_keeps_its_prototype():
    with federation("fedproto", *SKEWED, "participation=0.25", "rounds=4") as (built, _):
        seen = torch.zeros(10, dtype=torch.bool)

        class Watch:
            def start(self, _): ...
            def end(self, _): ...
            def round(self, federation):
                held = federation.strategy.published("prototypes")["held"]
                assert (held | ~seen).all()
                seen.copy_(held)

        built.callbacks.append(Watch())
        built.run()


def test_without_pull_clients_train_alone():
    alone = play("local", "rounds=1")
    free = play("fedproto", "rounds=1", "strategy.lam=0", "strategy.inference=head")
    assert free.federation.headline["accuracy/personal"] == alone.federation.headline["accuracy/personal"]
    assert play("fedproto").digest != play("fedproto", "strategy.lam=0").digest


def test_three_architectures_of_one_embedding_size():
    pool = "model.pool=[mlp_small,mlp,mlp_wide]"
    assert play("fedproto", pool, "model.feature_dim=16").digest
    with pytest.raises(UserError, match=r"one size.*mlp has 64.*model.feature_dim=32"):
        play("fedproto", pool)


def test_negative_counts_are_refused():
    from fedfuse.wire.records import InvalidArrays, Scope

    with pytest.raises(InvalidArrays, match="negative"):
        registry.entry("fedproto").server.examine(
            Scope({"examples": 9}, {}), {"prototypes": {"counts": torch.tensor([1, -1])}}
        )


def test_a_client_chooses_among_its_own_classes():
    """Authors' test: a prototype of a class that the client has no example of is not looked at, however near."""
    means = 3 * torch.randn(10, 32, generator=torch.Generator().manual_seed(3))
    held = torch.arange(10) != 4
    found = {}
    for among in ("own", "held"):
        half = client("fedproto", *SKEWED, f"strategy.among={among}")
        mine = torch.bincount(half.y, minlength=10) > 0
        assert 1 < mine.sum() < 10
        means[(held & ~mine).nonzero()[0]] = half.embed(half.x).mean(
            0
        )  # of another's class, and in the middle of it all
        take(half, "prototypes", means=means, held=held)
        allowed = held & mine if among == "own" else held
        x = half.workspace.tensors("test")[0]
        distance = torch.cdist(half.embed(x).double(), means.double()).masked_fill(~allowed, float("inf"))
        assert half.predict(x).argmax(1).tolist() == distance.argmin(1).tolist()
        found[among] = half.predict(x).argmax(1)
    assert not mine[found["held"]].all()
    assert mine[found["own"]].all()
    assert registry.entry("fedproto").hyper().among == "own"
