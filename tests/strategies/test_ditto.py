"""Ditto: local at λ = 0, FedAvg's common model, and the pull against a plain loop."""

from __future__ import annotations

import pytest
import torch

from tests.federations import play
from tests.halves import PLAIN, gradients, server, wake


@pytest.mark.parametrize("keep", ["fresh", "keep"])
def test_lambda_zero_is_local_training(keep: str) -> None:
    ours = play("ditto", "strategy.lam=0", f"train.optimizer_state={keep}").strategy
    theirs = play("local", f"train.optimizer_state={keep}").strategy
    assert ours.inbox.shas == theirs.inbox.shas


def test_the_common_model_is_fedavgs_whatever_lambda() -> None:
    ours, theirs = play("ditto").strategy.model, play("fedavg").strategy.model
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())


def test_the_personal_model_against_a_plain_loop() -> None:
    """v ← v − η(∇F(v) + λ(v − w_t)), with the w_t received and not the w_k just trained."""
    lam = 0.7
    built = server("ditto", *PLAIN, "train.epochs=3", f"strategy.lam={lam}")
    common = {k: v + 0.1 for k, v in built.model.items()}
    reference, v = wake(built), {k: v.clone() for k, v in built.model.items()}
    for _ in range(3):
        reference.load(v)
        g = gradients(reference)
        v = {k: x - 0.05 * (g[k] + lam * (x - common[k])) for k, x in v.items()}
    client = wake(built, model=common)
    client.fit()
    for name, value in client.weights().items():
        torch.testing.assert_close(value, v[name], rtol=1e-4, atol=1e-6)
        assert not torch.equal(client.share()["model"][name], value)


def test_a_strong_pull_gives_the_common_model() -> None:
    built = server("ditto", *PLAIN, "train.epochs=200", "train.lr=0.001", "strategy.lam=500")
    common = {k: v + 1.0 for k, v in built.model.items()}
    client = wake(built, model=common)
    client.fit()
    for name, value in client.weights().items():
        torch.testing.assert_close(value, common[name], rtol=0, atol=0.05)
