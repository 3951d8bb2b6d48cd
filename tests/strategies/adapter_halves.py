"""Server halves of adapter strategies with made-up float64 shares, for closed-form tests."""

from __future__ import annotations

import copy

import torch

from fedfuse.config import registry
from fedfuse.core.build import build_strategy
from fedfuse.core.strategy import Share, Shares
from fedfuse.train.adapters import adapted, products
from fedfuse.train.stack import deltas
from fedfuse.wire.sums import Sum
from tests.federations import TINY, scenario_of

LAYER = "body.1"  # the adapted layer of mlp_small on digits: 32 × 64, not square
D, K = 32, 64
SEEDED = "strategy.init=random_orthonormal"  # a basis from the run's seed, which needs no set-up


def server(name: str, *overrides: str):
    """A server half that has begun, on three clients of different size."""
    own = (SEEDED,) if name == "fed_sb" else ("strategy.alpha=8",)  # s = 1 and s = 2: a forgotten scale is seen
    base = (*TINY, f"strategy={name}", "strategy.rank=4", *own, *overrides)
    _, scenario = scenario_of(base)
    strategy = build_strategy(registry.entry(name), scenario)
    strategy.outbox.groups = dict.fromkeys(range(scenario.clients), 0)
    strategy.ensure_begun()
    return strategy


def shares(strategy, records: list[dict], counts: list[int]) -> Shares:
    """Shares as the platform would hand them to `fuse`."""
    sums = {name: Sum() for name in strategy.sums}
    out = []
    for client, (content, count) in enumerate(zip(records, counts, strict=True)):
        content = dict(content)
        for name, total in sums.items():
            total.add(0, content.pop(name), float(count) if strategy.sums[name] else 1.0)
        out.append(Share(client, content, {"num-examples": count}))
    return Shares(iter(out), sums)


def drawn(strategy, client: int, ranks: list[int] | None = None, seed: int = 0) -> dict:
    """Random float64 arrays in the layout of what a client shares."""
    draw = torch.Generator().manual_seed(100 * seed + client + 1)
    scope = strategy.workspace.scope(client, strategy.hyper)
    rank = ranks[client] if ranks else None
    out = {}
    for record, spec in strategy.records.items():
        out[record] = {
            name: torch.randn([(rank or -n) if n < 0 else n for n in shape], generator=draw, dtype=torch.float64)
            for name, (_, shape) in spec(scope).items()
        }
    return out


def update(strategy) -> torch.Tensor:
    """ΔW of the server's model (d × k), float64."""
    model = copy.deepcopy(strategy.workspace.fresh(strategy.architecture)).double()
    model.load_state_dict(strategy.state_of_model(), strict=False)
    return products(model)[LAYER].double()


def own_update(strategy, record: dict) -> torch.Tensor:
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


__all__ = ["LAYER", "D", "K", "deltas", "drawn", "own_update", "server", "shares", "update"]
