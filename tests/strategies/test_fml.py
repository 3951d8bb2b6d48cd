"""FML: the mutual losses, what stays, local training and FedAvg at α = β = 1, pools."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fedfuse import run
from fedfuse.errors import UserError
from fedfuse.models.pair import private_part, shared_part
from tests.federations import play
from tests.halves import PLAIN, final_states, server, wake


def test_the_loss_is_the_papers() -> None:
    """α·CE + (1 − α)·KL(p_meme‖p_own), and the other way round."""
    client = wake(server("fml", *PLAIN, "strategy.alpha=0.7", "strategy.beta=0.2"))
    with torch.no_grad():
        own, meme = (out.double() for out in client.model.both(client.x))
    p, q = own.softmax(1), meme.softmax(1)
    expected = 0.7 * F.cross_entropy(own, client.y) + 0.2 * F.cross_entropy(meme, client.y)
    expected += 0.3 * (q * (q / p).log()).sum(1).mean() + 0.8 * (p * (p / q).log()).sum(1).mean()
    assert client.fit()["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_each_takes_the_others_predictions_as_given() -> None:
    """The own network's step is that of its own loss alone."""
    built = server("fml", *PLAIN, "strategy.alpha=0.5")
    client = wake(built)
    own = {k: v.clone().requires_grad_() for k, v in client.model.own.named_parameters()}
    with torch.no_grad():
        teacher = client.model.shared(client.x).softmax(1)
    logits = torch.func.functional_call(client.model.own, own, (client.x,))
    kl = (teacher * (teacher.log() - logits.log_softmax(1))).sum(1).mean()
    gradients = torch.autograd.grad(0.5 * F.cross_entropy(logits, client.y) + 0.5 * kl, list(own.values()))
    expected = {name: (v - 0.05 * g).detach() for (name, v), g in zip(own.items(), gradients, strict=True)}
    client.fit()
    for name, value in client.model.own.named_parameters():
        torch.testing.assert_close(value.detach(), expected[name], rtol=1e-4, atol=1e-6)


def test_without_mutual_learning_it_is_local_beside_fedavg() -> None:
    strategy, states = final_states("fml", "strategy.alpha=1", "strategy.beta=1", "strategy.meme=mlp")
    common = play("fedavg", "model=mlp").strategy.model
    assert all(torch.equal(v, common[k]) for k, v in strategy.published("meme").items())
    _, alone = final_states("local")
    for ours, theirs in zip(states, alone, strict=True):
        assert all(torch.equal(ours["own"][f"own.{k}"], v) for k, v in theirs["model"].items())


def test_only_the_meme_travels() -> None:
    client = wake(server("fml"))
    client.fit()
    assert set(client.share()) == {"meme"}
    assert set(client.share()["meme"]) == {n for n, _ in client.model.shared.named_parameters()}
    assert set(client.state["own"]) == {f"own.{n}" for n, _ in client.model.own.named_parameters()}


def test_twins_start_from_different_weights() -> None:
    """Equal networks on equal batches would have nothing to teach each other."""
    weights = wake(server("fml", "strategy.meme=mlp_small")).weights()
    own, meme = private_part(weights), shared_part(weights)
    assert not torch.equal(own["own.head.weight"], meme["head.weight"])


def test_twins_keep_what_they_were_given(tmp_path: Path) -> None:
    """The meme's weights of a checkpoint were wiped, and those of a pretrained language model."""
    torch.save(wake(server("fedavg", "seed=7", "model=mlp")).model.state_dict(), tmp_path / "a.pt")
    words = ("model=mlp", f"model.checkpoint={tmp_path / 'a.pt'}", "model.checkpoint_head=false")
    weights = wake(server("fml", *words)).weights()
    own, meme = private_part(weights), shared_part(weights)
    same = {name for name, value in meme.items() if torch.equal(value, own[f"own.{name}"])}
    assert meme.keys() - same == {"head.weight", "head.bias"}  # which were drawn


def test_the_meme_is_what_the_server_scores_on_the_global_set() -> None:
    """On its own, as built, without a client's network beside it; before, the clients' networks were scored there."""
    played = play("fml", "strategy.meme=mlp")
    strategy = played.strategy
    ((architecture, arrays),) = strategy.server_models().values()
    x, y = strategy.workspace.tensors("test")
    meme = strategy.workspace.build("mlp")
    meme.load_state_dict(strategy.published("meme"))
    assert (architecture, arrays.keys()) == ("mlp", meme.state_dict().keys())
    right = (meme(x).argmax(1) == y).double().mean()
    assert played.federation.headline["accuracy/global_plain"] == pytest.approx(float(right))


def test_the_meme_is_kept_and_comes_back(tmp_path: Path) -> None:
    words = {"data": "digits", "data.limit": 120, "clients": 2, "rounds": 1, "runtime": "inline"}
    done = run({"strategy": "fml", "strategy.meme": "mlp", "model": "mlp_small", "out": str(tmp_path / "r"), **words})
    x = torch.rand(5, 64)
    pair, meme = done.model(client=1), done.model()
    assert torch.equal(pair(x), pair.own(x))
    assert meme.state_dict().keys() == pair.shared.state_dict().keys()
    assert torch.equal(meme(x), pair.shared(x))  # what a client holds last is what the server has


def test_a_pool_of_three_architectures() -> None:
    played = play("fml", "model.pool=[mlp_small,mlp,mlp_wide]", "strategy.meme=mlp_small")
    assert played.strategy.inbox.failures == {"replies": 0, "rejected": 0, "retried": 0}


def test_an_unknown_meme_is_refused() -> None:
    with pytest.raises(UserError, match="not known"):
        server("fml", "strategy.meme=resnet9")
