"""Fed-SB's refresh: what was learned moves into Δ, the model stays, and the new basis is paid for."""

from __future__ import annotations

import pytest
import torch

from fedfuse.errors import UserError
from tests.federations import play
from tests.halves import shares
from tests.strategies.adapter_updates import LAYER, SEEDED, D, K, drawn, own_update, server, update

R, C, HEAD = 4, 3, 32 * 10 + 10  # rank, clients, numbers of the head of mlp_small
LORA = R * (D + K)
COUNTS = [5, 3, 2]
SOURCES = {
    "random": (),
    "weights": ("strategy.init=weight_svd",),
    "clients": ("strategy.init=raw_grad",),
    "sketch": ("strategy.init=sign_grad", "strategy.init_from=sketch", "strategy.r0=singular"),
    "server": ("strategy.init=raw_grad", "strategy.init_from=transfer", "transfer.labelled=true"),
}


@pytest.mark.parametrize("init", ["random_orthonormal", "weight_svd"])
def test_the_model_is_the_mean_update_before_and_after(init: str) -> None:
    strategy = server("fed_sb", "strategy.refresh=2", f"strategy.init={init}", "strategy.alpha=8")
    merged = torch.zeros(D, K, dtype=torch.float64)
    for round in (1, 2, 3):
        strategy.round = round
        before = strategy.state_of_model()[f"{LAYER}.basis_B"].clone()
        records = [drawn(strategy, client, seed=round) for client in range(C)]
        strategy.workspace.loaded(strategy.architecture, strategy.state_of_model())  # the basis `own_update` reads
        own = [own_update(strategy, record["R"]) for record in records]
        total = merged + sum(n / 10 * update for n, update in zip(COUNTS, own, strict=True))
        strategy.fuse(shares(strategy, *records, examples=COUNTS))
        assert (update(strategy) - total).norm() / total.norm() < 1e-12
        after = strategy.state_of_model()
        latent = after[f"{LAYER}.lora_R.weight"]
        if round == 2:
            merged = total
            assert not latent.any()
            assert not torch.equal(before, after[f"{LAYER}.basis_B"])
            assert not strategy.state["momentum"]
        else:
            assert latent.any()
            assert torch.equal(before, after[f"{LAYER}.basis_B"])


@pytest.mark.parametrize("source", sorted(SOURCES))
def test_it_runs_from_every_source_and_over_the_wire(source: str) -> None:
    options = ("strategy.refresh=2", "rounds=5", "participation=0.67", *SOURCES[source])
    assert play("fed_sb", *options).digest == play("fed_sb", *options, grid="serial").digest


def test_bytes_of_a_refresh() -> None:
    totals = play("fed_sb", SEEDED, f"strategy.rank={R}", "strategy.refresh=1").totals  # two rounds, one refresh seen
    assert totals["up_bytes"] == 4 * C * 2 * (R * R + HEAD)
    assert totals["down_bytes"] == 4 * C * (2 * (R * R + HEAD) + LORA)
    assert totals["setup_bytes"] == C * (2 * 32 + 4 * LORA)


def test_private_gradients_are_paid_for_once() -> None:
    with pytest.raises(UserError, match=r"strategy.refresh=2: the privacy budget"):
        server("fed_sb", "strategy.refresh=2", "strategy.init=raw_grad", "privacy.epsilon=8")
