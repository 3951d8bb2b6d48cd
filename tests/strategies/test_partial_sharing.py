"""FedBN, FedPer and FedRep: what leaves the client, what stays, and who is trained when."""

from __future__ import annotations

import pytest
import torch

from fedfuse.models.parts import head, norms, parameters
from tests.federations import play
from tests.halves import final_states, server, wake

BN = ("model=resnet8_bn", "model.width=0.25", "data.limit=60", "rounds=2", "partition=dirichlet", "partition.alpha=0.5")


def test_fedbn_shares_no_norm_statistics() -> None:
    built = server("fedbn", *BN)
    client = wake(built)
    client.fit()
    shared = client.share()["layers"]
    kept = set(norms(client.model))
    assert any(name.endswith("running_mean") for name in kept)
    assert any(name.endswith("num_batches_tracked") for name in kept)
    assert kept.isdisjoint(shared)
    assert kept | set(shared) == set(client.weights())
    assert kept.isdisjoint(built.published("layers"))
    whole = sum(v.numel() for k, v in client.weights().items() if k in shared)
    assert sum(v.numel() for v in shared.values()) == whole


def test_fedbn_clients_keep_different_norms_and_equal_layers() -> None:
    _, states = final_states("fedbn", *BN)
    means = [v for k, v in states[0]["norms"].items() if k.endswith("running_mean")]
    others = [v for k, v in states[1]["norms"].items() if k.endswith("running_mean")]
    assert any(not torch.equal(a, b) for a, b in zip(means, others, strict=True))
    assert all(set(state) == {"norms"} for state in states)


def test_fedbn_uses_its_own_norms_with_the_common_layers() -> None:
    built = server("fedbn", *BN)
    own = {name: torch.full_like(built.workspace.initial("resnet8_bn")[name], 2) for name in norms(wake(built).model)}
    layers = {k: v + 1 for k, v in built.published("layers").items()}
    weights = wake(built, state={"norms": own}, layers=layers).weights()
    assert all(torch.equal(weights[k], v) for k, v in {**own, **layers}.items())


def test_fedbn_without_batchnorm_is_fedavg() -> None:
    ours, theirs = play("fedbn").strategy, play("fedavg").strategy.model
    assert all(torch.equal(v, theirs[k]) for k, v in ours.published("layers").items())
    assert set(theirs) == set(ours.published("layers"))


def test_fedbn_says_that_it_is_fedavg_where_it_keeps_nothing() -> None:
    assert "this is FedAvg; model=resnet8_bn" in server("fedbn").notes()[0]
    group = ("model=resnet8", "model.width=0.25")
    assert "this is FedAvg; strategy.norms=all" in server("fedbn", *group).notes()[0]
    assert server("fedbn", *group, "strategy.norms=all").notes() == []
    assert server("fedbn", *BN).notes() == []


def test_fedbn_can_keep_group_norms() -> None:
    built = server("fedbn", "model=resnet8", "model.width=0.25", "strategy.norms=all")
    model = built.workspace.model("resnet8")
    assert norms(model) == []
    assert norms(model, every=True)
    assert set(norms(model, every=True)).isdisjoint(built.published("layers"))


@pytest.mark.parametrize("name", ["fedper", "fedrep"])
def test_heads_never_leave(name: str) -> None:
    strategy, states = final_states(name)
    assert set(strategy.published("body")) == {"body.1.weight", "body.1.bias"}
    assert all(set(state["head"]) == {"head.weight", "head.bias"} for state in states)
    assert not torch.equal(states[0]["head"]["head.weight"], states[1]["head"]["head.weight"])


def test_fedper_trains_body_and_head_jointly() -> None:
    built = server("fedper")
    ours, theirs = wake(built), wake(server("fedavg"))
    theirs.fit()
    expected = theirs.weights()
    ours.fit()
    assert all(torch.equal(v, expected[k]) for k, v in ours.weights().items())


def test_fedrep_fits_the_head_before_the_body() -> None:
    built = server("fedrep", "strategy.body_epochs=0")
    client = wake(built)
    start = client.weights()
    client.fit()
    end = client.weights()
    for name in parameters(client.model):
        assert torch.equal(start[name], end[name]) == (name not in head(client.model))
    fitted = {name: end[name] for name in head(client.model)}
    second = wake(server("fedrep", "strategy.head_epochs=0"), state={"head": fitted})
    second.fit()
    end = second.weights()
    assert all(torch.equal(end[name], value) for name, value in fitted.items())
    assert not torch.equal(end["body.1.weight"], start["body.1.weight"])


def test_fedrep_averages_uniformly_unless_told() -> None:
    unequal = ("partition=dirichlet", "partition.alpha=0.3")
    uniform = play("fedrep", *unequal).strategy.published("body")
    weighted = play("fedrep", *unequal, "strategy.weighting=examples").strategy.published("body")
    assert not torch.equal(uniform["body.1.weight"], weighted["body.1.weight"])
