"""FedDyn: the bent gradient against its formula, both of its terms, the server's rule, α = 0."""

from __future__ import annotations

import pytest
import torch

from fedfuse.strategies.feddyn import FedDynHyper, strength
from tests.federations import play
from tests.halves import PLAIN, final_states, gradients, server, wake


def test_alpha_zero_is_fedavg_with_equal_weights() -> None:
    ours = play("feddyn", "strategy.alpha=0").strategy
    theirs = play("fedavg", "strategy.weighting=uniform").strategy.model
    assert all(torch.equal(v, theirs[k]) for k, v in ours.model.items())
    assert ours.state == {}


def test_steps_against_a_plain_loop() -> None:
    """Each step's gradient is g − ∇_k + α(θ − θ_t): the squared norm, and the linear term beside it."""
    alpha = 0.5
    built = server("feddyn", *PLAIN, "train.epochs=3", f"strategy.alpha={alpha}")
    start = {k: v.clone() for k, v in built.model.items()}
    slope = {k: torch.full_like(v, 0.03) for k, v in start.items()}
    reference, theta = wake(built), {k: v.clone() for k, v in start.items()}
    for _ in range(3):
        reference.load(theta)
        g = gradients(reference)
        theta = {k: v - 0.05 * (g[k] - slope[k] + alpha * (v - start[k])) for k, v in theta.items()}
    client = wake(built, state={"slope": slope})
    client.fit()
    for name, value in client.weights().items():
        torch.testing.assert_close(value, theta[name], rtol=1e-4, atol=1e-6)
        expected = slope[name] - alpha * (value - start[name])
        torch.testing.assert_close(client.state["slope"][name], expected)


def test_the_pull_grows_with_the_distance() -> None:
    """PFLlib's un-squared norm pulls with constant force; FL-bench's client is not pulled at all."""
    moved = {}
    for alpha in (0.0, 1.0, 10.0):
        client = wake(server("feddyn", *PLAIN, "train.epochs=40", f"strategy.alpha={alpha}"))
        start = client.weights()
        client.fit()
        moved[alpha] = sum(float((v - start[k]).square().sum()) for k, v in client.weights().items()) ** 0.5
    # at the optimum α(θ − θ_t) balances the gradient: a tenfold α leaves about a tenth of the way
    assert moved[10.0] < 0.25 * moved[1.0] < 0.25 * moved[0.0]


def test_server_rule_with_absent_clients() -> None:
    """h ← h − α/m Σ_P(θ_k − θ_t) over all m clients, θ ← mean_P θ_k − h/α."""
    from fedfuse.core.strategy import Share, Shares
    from fedfuse.wire.sums import Sum

    strategy = server("feddyn", "strategy.alpha=0.1")
    start = {k: v.clone() for k, v in strategy.model.items()}
    for round, moves in ((1, (1.0, 3.0)), (2, (2.0,))):
        total, before = Sum(), {k: v.clone() for k, v in strategy.model.items()}

        def stream(moves=moves, total=total, before=before):
            for i, move in enumerate(moves):
                total.add(0, {k: v + move for k, v in before.items()}, 1.0)
                yield Share(i, {}, {"num-examples": 1})

        strategy.round = round
        strategy.fuse(Shares(stream(), {"model": total}))
    # of 3 clients: h/α = −4/3, then −4/3 − 2/3; θ = start + 2 + 4/3, then + 2 + 2
    for name, value in strategy.model.items():
        torch.testing.assert_close(value, start[name] + (2 + 4 / 3) + (2 + 2))
        torch.testing.assert_close(
            strategy.state["h"][name], torch.full_like(value.double(), -0.2), rtol=1e-5, atol=1e-6
        )


def test_the_servers_h_is_the_mean_of_the_clients_slopes() -> None:
    """Both accumulate −α(θ_k − θ_t): h = (1/m) Σ ∇_k, always."""
    strategy, states = final_states("feddyn", "rounds=3", "strategy.alpha=0.1", "participation=0.6")
    for name, h in strategy.state["h"].items():
        held = [s["slope"][name].double() if "slope" in s else torch.zeros_like(h) for s in states]
        torch.testing.assert_close(h, torch.stack(held).mean(0), rtol=1e-4, atol=1e-6)


def test_scaled_alpha_is_the_official_codes() -> None:
    scenario = server("feddyn", "partition=size").scenario
    counts = [scenario.examples(c) for c in range(scenario.clients)]
    assert len(set(counts)) == 3
    for client, n in enumerate(counts):
        official = 0.1 / (n / sum(counts) * len(counts))
        assert strength(FedDynHyper(0.1, True), scenario, client) == pytest.approx(official)
        assert strength(FedDynHyper(0.1), scenario, client) == 0.1


def test_both_scorings_are_told_and_one_is_the_runs() -> None:
    """θ, which clients are sent, and the participants' mean, from their own uploads: θ = mean − h/α."""
    from fedfuse.train.scores import scores
    from fedfuse.train.training import predict

    words = ("strategy.alpha=0.1", "rounds=3", "participation=0.67", "partition=dirichlet", "train.epochs=4")
    told, digests = {}, set()
    for scored in ("server", "mean"):
        played = play("feddyn", *words, f"strategy.scored={scored}")
        strategy, headline = played.strategy, played.federation.headline
        digests.add(played.digest)
        models, (x, y) = strategy.server_models(), strategy.workspace.tensors("test")
        for name, (architecture, arrays) in models.items():
            logits = predict(strategy.workspace.loaded(architecture, arrays), x)
            told[scored, name] = scores(logits, y, 10)["accuracy_macro"]
        named = {"server": "model", "mean": "mean"}[scored]
        assert headline["accuracy/global"] == told[scored, named]
        assert any("strategy.scored" in note for note in strategy.notes())
    assert told["server", "model"] != told["server", "mean"]
    assert len(digests) == 1  # a matter of scoring


def test_the_mean_is_that_of_the_rounds_clients() -> None:
    from fedfuse.core.strategy import Share, Shares
    from fedfuse.wire.sums import Sum

    strategy, total = server("feddyn", "strategy.alpha=0.1"), Sum()
    strategy.round = 1
    start = {k: v.clone() for k, v in strategy.model.items()}
    for move in (1.0, 4.0):
        total.add(0, {k: v + move for k, v in start.items()}, 1.0)
    strategy.fuse(Shares(iter([Share(0, {}, {"num-examples": 1})]), {"model": total}))
    for name, value in strategy.server_models()["mean"][1].items():
        torch.testing.assert_close(value, start[name] + 2.5)
        torch.testing.assert_close(strategy.server_models()["model"][1][name], start[name] + 2.5 + 5 / 3)
