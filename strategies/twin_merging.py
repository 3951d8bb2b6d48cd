"""Twin-Merging: what is common is merged at the server, what is a client's own stays with it as a sparse vector.

A reconstruction for a federation. Box (Lu et al., "Twin-Merging: Dynamic Integration of Modular Expertise in Model
Merging", NeurIPS 2024, arXiv 2406.15479, and its code). In round t, θ₀ the broadcast:

    client k:  θ_k ← θ₀; E epochs of SGD;   τ_k = θ_k − θ₀;   keeps θ_k
    server:    θ* ← θ₀ + λ Σ_k τ_k                                                    (the shared expert, sent)
    client k:  v_k = the fraction `keep` of θ_k − θ* that is greatest in magnitude     (the exclusive expert)
               predicts with θ* + v_k

Travels: P·B_f bytes each way, a client and round; v_k never does. With `rank=r` LoRA's A and B and the head instead of
the network. In the paper one model serves all tasks, θ* + Σ_t softmax(router(x))_t v_t; here each client is its own
task, and needs no router (ours). λ is 0.29 there, for one merge; repeated with 10 clients that diverges, so by default
λ·K = 1.2 (ours, as in task arithmetic). `keep=0` is task arithmetic. A client that has
not trained yet predicts with θ*. v_k is made anew of each θ*, from the θ_k of the client's last round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedfuse import (
    Arrays,
    Item,
    MergingClient,
    MergingHyper,
    MergingStrategy,
    Metrics,
    Shares,
    hyper,
    merging,
    parts,
    strategy,
)


@dataclass(frozen=True)
class TwinMergingHyper(MergingHyper):
    """Hyper-parameters of Twin-Merging."""

    lam: float | None = hyper(
        None, "λ, factor on the sum of task vectors; null: 1.2/K (code: 0.29 for its tasks, once)", above=0
    )
    keep: float = hyper(0.2, "fraction of the exclusive expert that is kept; 0: none (ours)", low=0, high=1)


def exclusive(own: Arrays, common: Arrays, keep: float) -> Arrays:
    """v: the entries of θ_k − θ*, all arrays together, that are greatest in magnitude, else 0."""
    apart = {name: value.double() - common[name].double() for name, value in own.items()}
    if keep == 0:
        return {name: 0 * value for name, value in apart.items()}
    (whole,) = merging.flat([apart])
    return merging.shaped(whole * merging.largest(whole.abs(), keep), apart)


class TwinMergingClient(MergingClient):
    """Trains from θ*, and predicts with θ* + v_k."""

    def receive(self, knowledge: Mapping[str, Item]) -> None:
        """Remember θ*, load θ* + v_k."""
        super().receive(knowledge)
        if own := self.state.get("own"):
            apart = exclusive(own, self.start, self.hyper.keep)
            both = {name: (self.start[name].double() + v).to(self.start[name].dtype) for name, v in apart.items()}
            self.load({**self.start, **parts.with_tied(self.model, both)})

    def fit(self) -> Metrics:
        """E epochs from θ*; keeps θ_k."""
        self.load(self.start)
        metrics = self.train()
        if metrics["num-examples"]:
            end = self.weights()
            self.state["own"] = {name: end[name] for name in merging.parameters(self.model, end)}
        return metrics


@strategy(
    "twin_merging",
    client=TwinMergingClient,
    hyper=TwinMergingHyper,
    paper="Lu et al. 2024, arXiv 2406.15479 (reconstruction)",
)
class TwinMerging(MergingStrategy):
    """A merged common expert at the server, and a sparse one of each client's own."""

    sums = {"model": None}

    def fuse(self, shares: Shares) -> None:
        """θ* ← θ₀ + λ Σ τ_k."""
        self.fuse_sum(shares, self.hyper.lam)
