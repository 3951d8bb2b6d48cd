"""SCAFFOLD: steps and control variates against plain loops, and the invariant of full participation."""

from __future__ import annotations

import pytest
import torch

from fedfuse.config.compose import compose
from fedfuse.config.idle import idle
from fedfuse.errors import UserError
from fedfuse.strategies.scaffold import renewed
from tests.federations import play
from tests.halves import PLAIN, final_states, gradients, server, wake


def test_variates_sum_to_the_servers_under_full_participation() -> None:
    strategy, states = final_states("scaffold", "rounds=3")
    for name, common in strategy.published("control").items():
        mean = torch.stack([state["control"][name].double() for state in states]).mean(0)
        torch.testing.assert_close(common.double(), mean, rtol=0, atol=1e-6)
        assert common.abs().max() > 0


def test_variates_keep_summing_when_some_are_absent() -> None:
    strategy, states = final_states("scaffold", "rounds=3", "participation=0.6")
    for name, common in strategy.published("control").items():
        held = [s["control"][name].double() if "control" in s else torch.zeros_like(common).double() for s in states]
        torch.testing.assert_close(common.double(), torch.stack(held).mean(0), rtol=0, atol=1e-6)


def test_the_first_round_is_fedavg_with_equal_weights() -> None:
    ours = play("scaffold", "rounds=1").strategy.model
    theirs = play("fedavg", "strategy.weighting=uniform", "rounds=1", "train.momentum=0").strategy.model
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())


def test_steps_and_variates_against_a_plain_loop() -> None:
    """y ← y − η(g − c_i + c), three times; then option II as printed."""
    built = server("scaffold", *PLAIN, "train.epochs=3", "strategy.variate=difference")
    start = {k: v.clone() for k, v in built.model.items()}
    common = {k: torch.full_like(v, 0.01) for k, v in start.items()}
    own = {k: torch.full_like(v, -0.02) for k, v in start.items()}
    reference = wake(built)
    y = {k: v.clone() for k, v in start.items()}
    for _ in range(3):
        reference.load(y)
        g = gradients(reference)
        y = {k: v - 0.05 * (g[k] - own[k] + common[k]) for k, v in y.items()}
    client = wake(built, state={"control": own}, control=common)
    assert client.fit()["steps"] == 3
    shared = client.share()
    for name, value in y.items():
        torch.testing.assert_close(shared["model"][name], value, rtol=1e-4, atol=1e-6)
        new = own[name] - common[name] + (start[name] - value) / (3 * 0.05)
        torch.testing.assert_close(client.state["control"][name], new, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(shared["control"][name], client.state["control"][name] - own[name])


def test_both_forms_agree_under_plain_sgd() -> None:
    path = play("scaffold", "train.momentum=0").strategy.model
    printed = play("scaffold", "train.momentum=0", "strategy.variate=difference").strategy.model
    for name, value in path.items():
        torch.testing.assert_close(value, printed[name], rtol=1e-4, atol=1e-5)


def test_momentum_does_not_bias_the_variate() -> None:
    """Flower's baseline divides a momentum update by Kη: about 1/(1 − ρ) times the gradients."""
    with_it = "strategy.local_momentum=0.9"
    built = server("scaffold", "train.batch_size=1000", "train.epochs=8", "train.lr=1e-4", with_it)
    client = wake(built)
    at_start = gradients(client)
    start = client.weights()
    client.fit()
    zeros = {k: torch.zeros_like(v) for k, v in start.items()}
    biased = renewed(zeros, zeros, start, client.weights(), 8, 1e-4)
    for name, gradient in at_start.items():  # at this rate the gradient hardly changes on the way
        norm = gradient.norm()
        assert (client.state["control"][name] - gradient).norm() < 0.02 * norm
        assert (biased[name] - gradient).norm() > norm


def test_the_printed_formula_refuses_momentum() -> None:
    with pytest.raises(UserError, match=r"plain SGD, the run has train\.optimizer=sgd and momentum 0\.5"):
        server("scaffold", "strategy.variate=difference", "strategy.local_momentum=0.5")
    server("scaffold", "strategy.variate=difference")


def test_steps_are_mini_batches_and_epochs_are_epochs() -> None:
    """FL-bench's local_epoch counts mini-batch steps."""
    client = wake(server("scaffold", "train.epochs=2", "train.batch_size=16"))
    assert client.fit()["steps"] == 2 * -(-len(client.x) // 16)


def test_both_model_and_variate_travel_both_ways() -> None:
    both, one = play("scaffold").totals, play("fedavg").totals
    assert both["up_bytes"] == 2 * one["up_bytes"]
    assert both["down_bytes"] == 2 * one["down_bytes"]


def test_server_rate_scales_the_step() -> None:
    built = play("scaffold", "rounds=1", "strategy.server_lr=0.5").strategy
    whole = play("scaffold", "rounds=1").strategy.model
    for name, start in built.workspace.initial("mlp_small").items():
        torch.testing.assert_close(built.model[name], (start + whole[name]) / 2)


def test_clients_step_without_momentum_unless_asked() -> None:
    """Two steps of a heavy ball are η(2g₁ + …): from equal gradients 2.9 times η, where plain SGD makes 2 η."""
    moved = {}
    for word in ("seed=0", "strategy.local_momentum=0.5", "strategy.local_momentum=null"):
        built = server("scaffold", "train.batch_size=1000", "train.epochs=2", "train.lr=1e-5", word)
        client = wake(built)
        start = client.weights()
        client.fit()
        moved[word] = (client.weights()["head.bias"] - start["head.bias"]).double().norm()
    plain, half, asked = moved.values()
    assert (half / plain).item() == pytest.approx(2.5 / 2, rel=1e-2)
    assert (asked / plain).item() == pytest.approx(2.9 / 2, rel=1e-2)


def test_an_optimiser_without_momentum_keeps_its_own_settings() -> None:
    client = wake(server("scaffold", "train.optimizer=adam"))
    assert client.training == client.scenario.training(0)


def test_momentum_that_clients_do_not_have_is_named() -> None:
    config = compose(["strategy=scaffold", "train.momentum=0.5"])
    assert "strategy.local_momentum" in idle(config)["train.momentum"]
    assert idle(compose(["strategy=scaffold", "train.momentum=0.5", "strategy.local_momentum=null"])) == {}
    assert idle(compose(["strategy=fedavg", "train.momentum=0.5"])) == {}


def test_a_run_says_how_its_clients_step() -> None:
    (said,) = server("scaffold").notes()
    assert "step without momentum, as in the paper, not with train.momentum=0.9" in said
    (said,) = server("scaffold", "strategy.local_momentum=0.3").notes()
    assert "made for plain SGD; with train.optimizer=sgd and momentum 0.3 a run of strong skew can diverge" in said
    assert server("scaffold", "train.momentum=0").notes() == []
