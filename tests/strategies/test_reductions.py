"""Settings in which one algorithm is another, bit for bit."""

from __future__ import annotations

import torch

from tests.federations import federation, play, uploads


def final(played) -> dict[str, torch.Tensor]:
    return played.strategy.model


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_fedprox_without_its_term_is_fedavg() -> None:
    assert equal(final(play("fedprox", "strategy.mu=0")), final(play("fedavg")))
    assert not equal(final(play("fedprox", "strategy.mu=1")), final(play("fedavg")))


def test_fedavg_with_one_client_is_centralized() -> None:
    assert equal(final(play("fedavg", "clients=1")), final(play("centralized", "clients=1")))


def test_fedmd_consensus_is_the_mean_of_logits() -> None:
    """By hand, from the logits each client sent."""
    with federation("fedmd", "rounds=1") as (built, _):
        sent = uploads(built, "logits")
        built.run()
        consensus = built.strategy.published("consensus")["logits"].double()
    a, b, c = (one["logits"].double() for one in sent)
    torch.testing.assert_close(consensus, (a + b + c) / 3, rtol=0, atol=1e-6)


def test_fedmd_digests_the_rows_of_its_own_version() -> None:
    """The subset is redrawn each round; with every row of one round's subset it still equals itself over the wire."""
    words = ("transfer.subset=8", "rounds=3", "participation=0.67")
    first = play("fedmd", *words)
    assert play("fedmd", *words, grid="serial").digest == first.digest
    assert play("fedmd", *words, "transfer.redraw=false").digest != first.digest
    assert play("fedmd", *words, "evaluate.every=3").digest == first.digest


def test_fedavg_bytes() -> None:
    """Σ_t |S_t|·P both ways, however often one evaluates."""
    played = play("fedavg", "rounds=3", "participation=0.67")
    size = sum(v.numel() * v.element_size() for v in final(played).values())
    assert played.totals["up_bytes"] == played.totals["down_bytes"] == 3 * 2 * size
    assert played.totals["down_unique_bytes"] == 3 * size


def test_uniform_weights() -> None:
    """With equal clients the two weightings agree; with unequal ones they do not."""
    skewed = ("partition=dirichlet", "partition.alpha=0.5", "partition.min_size=5", "rounds=1")
    assert not equal(final(play("fedavg", *skewed)), final(play("fedavg", *skewed, "strategy.weighting=uniform")))
