"""HetLoRA: ranks differ; adapters are zero-padded, averaged by how much they say, and cut on the way down.

Box (Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models", EMNLP 2024,
arXiv 2401.06432; the rule from its abstract and general knowledge, details of formulae not re-read). In round
t, for the sampled clients S_t:

    client i:  (A_i, B_i) ← leading r_i of (A_t, B_t); E epochs of SGD on both (and the head), minimising
               ℓ + λ·‖B_i[:, q:]‖·‖A_i[q:]‖,  q = ⌈γ·r_i⌉;  if that fell, r_i ← q (self-pruning; λ = 0: none)
    server:    p_i ∝ ‖B_i A_i‖_F;   A_{t+1} ← Σ p_i pad(A_i),   B_{t+1} ← Σ p_i pad(B_i)

Not exact. Travels: b·r_i·(d+k) (and the head, averaged by the same p) each way, a client, a layer and a
round. Readings of ours: one p_i for all layers, from the norm over layers; `weighting=uniform|examples`
replaces it where `sparsity=false`; a pruned client is still sent its first rank's share and cuts it itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedfuse import (
    Metrics,
    RankedClient,
    RankedHyper,
    RankedStrategy,
    Shares,
    Sum,
    hyper,
    lora,
    strategy,
    without_effect,
)


@dataclass(frozen=True)
class HetLoRAHyper(RankedHyper):
    """Hyper-parameters of HetLoRA.

    Raises
    ------
    UserError
        If weights are given and the norms weigh.
    """

    sparsity: bool = hyper(True, "weights p_i ∝ ‖B_i A_i‖; false: as `weighting` says")
    prune: float = hyper(0.0, "λ of the self-pruning term; 0: none", low=0)
    gamma: float = hyper(
        0.85, "γ, share of the rank that is not decayed, with prune above 0", above=0, high=1, only="prune"
    )
    weighting: str = hyper(
        "examples", "weights n_k, or all alike, with sparsity=false", choices=("examples", "uniform")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparsity:
            without_effect(self, "weighting", "with strategy.sparsity=true, where norms weigh")


def norm(arrays: Mapping[str, Tensor]) -> float:
    """‖B A‖_F over all layers of one client's adapter, from r × r matrices: ‖B A‖² = tr(BᵀB·A Aᵀ)."""
    total = 0.0
    for name in lora.layer_names(arrays, "lora_A.weight"):
        b, a = arrays[f"{name}.lora_B.weight"].double(), arrays[f"{name}.lora_A.weight"].double()
        total += ((b.T @ b) * (a @ a.T)).sum().item()
    return math.sqrt(max(total, 0.0))


class HetLoRAClient(RankedClient):
    """Trains LoRA of its own rank, which may shrink."""

    @property
    def rank(self) -> int:
        """r_i now."""
        return int(self.state.get("rank", super().rank))

    def trailing(self, kept: int) -> Tensor:
        """Σ over layers of ‖B[:, q:]‖·‖A[q:]‖."""
        layers = [m for m in lora.adapted(self.model).values() if isinstance(m, lora.LoRA)]
        total = torch.zeros(())
        for m in layers:
            b, a = m.lora_B.weight[:, kept:], m.lora_A.weight[kept:]
            total = total + ((b.square().sum() + 1e-12) * (a.square().sum() + 1e-12)).sqrt()  # smooth at zero
        return total

    def fit(self) -> Metrics:
        """Train; with λ > 0 decay the trailing ranks and give them up if they shrank."""
        kept = math.ceil(self.hyper.gamma * self.rank)
        if not self.hyper.prune or kept >= self.rank:
            return super().fit()
        before = self.trailing(kept).item()
        metrics = self.train(
            lambda out, y, rows: self.objective(out, y) + self.hyper.prune * self.trailing(kept), trim=True
        )
        if 0 < self.trailing(kept).item() < before:
            self.state["rank"] = kept
        self.keep()
        return metrics


@strategy("hetlora", client=HetLoRAClient, hyper=HetLoRAHyper, paper="Cho et al. 2024, arXiv 2401.06432")
class HetLoRA(RankedStrategy):
    """Mean of zero-padded LoRA factors, weighted by the norm of each client's product."""

    def fuse(self, shares: Shares) -> None:
        """Σ p_i pad(·), the mean over examples if nobody's product is different from zero."""
        everyone = list(shares)
        by_count = {s.client: self.weight_of(s) for s in everyone}
        by_norm = {s.client: norm(s.records["adapter"]) if s.examples else 0.0 for s in everyone}
        weights = by_norm if self.hyper.sparsity and sum(by_norm.values()) > 0 else by_count
        total = Sum()
        for share in everyone:
            total.add(share.group, self.padded(share), weights[share.client])
        self.publish_whole(total.mean())
