"""Adapter strategies on one layer, made-up float64 shares for them, and ΔW in closed form."""

from __future__ import annotations

import copy

import torch

from fedfuse.core.strategy import FusionStrategy
from fedfuse.train.adapters import adapted
from fedfuse.wire.records import Arrays
from tests import halves

LAYER = "body.1"  # the adapted layer of mlp_small on digits: 32 × 64, not square
D, K = 32, 64
SEEDED = "strategy.init=random_orthonormal"  # a basis from the run's seed, which needs no set-up


def server(name: str, *overrides: str) -> FusionStrategy:
    """A server half of rank 4."""
    own = SEEDED if name == "fed_sb" else "strategy.alpha=8"  # s = 1 and s = 2: a forgotten scale is seen
    return halves.server(name, "strategy.rank=4", own, *overrides)


def drawn(strategy: FusionStrategy, client: int, rank: int = 4, seed: int = 0) -> dict[str, Arrays]:
    """Random float64 arrays in the layout of what a client shares."""
    draw = torch.Generator().manual_seed(100 * seed + client + 1)
    scope = strategy.workspace.scope(client, strategy.hyper)
    return {
        record: {
            name: torch.randn([rank if n < 0 else n for n in shape], generator=draw, dtype=torch.float64)
            for name, (_, shape) in layout(scope).items()
        }
        for record, layout in strategy.records.items()
    }


def update(strategy: FusionStrategy) -> torch.Tensor:
    """ΔW of the server's model (d × k), float64."""
    model = copy.deepcopy(strategy.workspace.fresh(strategy.architecture)).double()
    model.load_state_dict(strategy.state_of_model(), strict=False)
    return adapted(model)[LAYER].update().detach().double()


def own_update(strategy: FusionStrategy, record: Arrays) -> torch.Tensor:
    """ΔW of a client (d × k): s·B A, or s·B R A."""
    layer = adapted(strategy.workspace.model(strategy.architecture))[LAYER]
    if f"{LAYER}.lora_R.weight" in record:
        b, a = layer.basis_B.double(), layer.basis_A.double()
        r = record[f"{LAYER}.lora_R.weight"]
        return layer.scale * b[:, : len(r)] @ r @ a[: len(r)]
    state = strategy.state_of_model()
    b = record.get(f"{LAYER}.lora_B.weight", state[f"{LAYER}.lora_B.weight"]).double()
    a = record.get(f"{LAYER}.lora_A.weight", state[f"{LAYER}.lora_A.weight"]).double()
    return layer.scale * b @ a
