"""A second head in float64: what it is taught, what reaches the network, the projection, what is kept."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedfuse.config.schema import TrainConfig
from fedfuse.errors import UserError
from fedfuse.models.feedforward import Classifier
from fedfuse.train import training
from fedfuse.train.losses import loss
from fedfuse.train.objective import followed
from fedfuse.train.second_head import Heads, attached
from tests.federations import federation, play
from tests.halves import random_labels


def network() -> nn.Module:
    torch.manual_seed(3)
    return Classifier(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), 4, 3).double()


X = torch.randn(7, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.tensor([0, 2, 1, 1, 0, 2, 2])
P = random_labels(7, 3, seed=5)


def gradients(value: torch.Tensor, params: list[nn.Parameter]) -> torch.Tensor:
    found = torch.autograd.grad(value, params, retain_graph=True, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(found, params, strict=True)])


def parts(model: nn.Module, heads: Heads, p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[nn.Parameter]]:
    """CE of the first head, the binary divergence of the second, written out, and all parameters."""
    z = model.features(X)
    s, t = heads.second(z).log_softmax(1), p.log()
    q = torch.sigmoid((s - t) / 2)
    kd = 4 * (0.5 * (0.5 / q).log() + 0.5 * (0.5 / (1 - q)).log()).sum(1).mean()
    return F.cross_entropy(model.head(z), Y), kd, [*model.parameters(), *heads.second.parameters()]


@pytest.mark.parametrize("against", [False, True])
def test_value_and_gradient_by_hand(against: bool) -> None:
    """Taught the labels or their opposite: in the second case the two gradients pull apart, and kd's is projected."""
    model, one = network(), loss("dhkd", gamma=0.7, weight=1.3)
    right = F.one_hot(Y, 3).double()
    p = 0.05 / 3 + 0.95 * (right if not against else (1 - right) / 2)
    with attached([one], model, 3, 0):
        with torch.no_grad():  # the heads begin alike, so that the two objectives meet in the features
            one.heads_of.second.weight.copy_(model.head.weight)
        value = one.from_probabilities(model(X), p, Y)
        ce, kd, params = parts(model, one.heads_of, p)
        g1, g2, found = gradients(ce, params), 1.3 * gradients(kd, params), gradients(value, params)
    dot = g1 @ g2
    assert (dot < 0).item() is against
    want = 0.7 * g1 + (g2 - dot / (g1 @ g1) * g1 if against else g2)
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)
    if against:
        assert ((found - 0.7 * g1) @ g1).abs().item() < 1e-12  # what is left of it does the cross-entropy no harm
    else:
        assert value.item() == pytest.approx(0.7 * ce.item() + 1.3 * kd.item(), rel=1e-12)


def test_without_labels_the_own_head_gets_nothing_and_the_features_do() -> None:
    model, one = network(), loss("dhkd")
    with attached([one], model, 3, 0):
        value = one.from_probabilities(model(X), P)
        assert torch.autograd.grad(value, model.head.weight, retain_graph=True, allow_unused=True) == (None,)
        assert gradients(value, [one.heads_of.second.weight]).abs().sum() > 0
        assert gradients(value, [next(model.parameters())]).abs().sum() > 0
        _, kd, _ = parts(model, one.heads_of, P)
        assert value.item() == pytest.approx(kd.item(), rel=1e-12)


def test_one_head_and_no_head_compare_the_logits_given() -> None:
    model = network()
    single = loss("dhkd", heads=1)
    with attached([single, loss("kl")], model, 3, 0) as more:
        assert more == {}
        found = single(model(X), P.log(), Y)
    torch.testing.assert_close(found, loss("dhkd")(model(X), P.log(), Y))
    with pytest.raises(UserError, match=r"heads=3.* must be 1 or 2"):
        loss("dhkd", heads=3)


def test_the_network_is_left_as_it_was_and_the_head_goes_on() -> None:
    """Two trainings: the second takes up the first's head, which is nobody else's; the network keeps no trace of it."""
    state: dict = {}
    names = set(network().state_dict())
    config, ends, model = TrainConfig(lr=0.1, momentum=0.0), [], network()
    for moment in range(2):
        one = loss("dhkd")
        with attached([one], model, 3, 0) as params, followed([one], state, "receive", (0, 1)) as more:
            begun = copy.deepcopy(one.state_dict())
            if moment:
                torch.testing.assert_close(begun, ends[0])
            training.train(model, X, Y, one.towards(P), config, (moment,), epochs=2, batch_size=4, **params, **more)
        ends.append(state["losses"]["receive 0"])
        assert not torch.equal(ends[-1]["weight"], begun["weight"])
        assert one.state_dict() == {}
        assert set(model.state_dict()) == names
        assert not model.head._forward_pre_hooks


def test_rows_that_are_not_the_last_read_are_refused() -> None:
    model, one = network(), loss("dhkd")
    with attached([one], model, 3, 0), pytest.raises(UserError, match="read 7 rows, the objective compares 4"):
        one(model(X)[:4], P[:4].log())


def test_in_a_run_it_is_private_and_the_same_on_any_grid() -> None:
    words = ("loss=dhkd", "transfer.labelled=true", "transfer.size=12", "distil.steps=2", "clients=2", "data.limit=60")
    with federation("fedmd", *words) as (built, directory):
        built.run()
        tags, topics = built.strategy.outbox.tags, set(built.strategy.board.topics)
        kept = [directory.clients.load(c, tags[c])["losses"]["receive 0"] for c in range(2)]
    assert {name: tuple(v.shape) for name, v in kept[0].items()} == {"weight": (10, 32), "bias": (10,)}
    assert not torch.equal(kept[0]["weight"], kept[1]["weight"])
    assert topics == {"consensus"}  # no head travels
    assert play("fedmd", *words, grid="serial").digest == built.digest


def test_where_no_whole_network_distils_it_is_refused_in_a_line() -> None:
    for name in ("fml", "fedgkt"):
        with pytest.raises(UserError, match=rf"loss=dhkd trains a second head.*{name}.*heads=1"):
            play(name, "loss=dhkd")


def test_a_network_without_a_head_is_refused() -> None:
    pool = ("model=custom", "model.build=tests.halves:featureless")
    with pytest.raises(UserError, match=r"loss=dhkd needs models with features\(x\), head\(z\)"):
        play("fedmd", "loss=dhkd", *pool)
