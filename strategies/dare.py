"""DARE: most of each task vector is dropped at random, and the rest is scaled up for it, before vectors are averaged.

Box (Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch", ICML
2024, arXiv 2311.03099, section 3). In round t, θ₀ the broadcast:

    client k:  θ_k ← θ₀; E epochs of SGD;   τ_k = θ_k − θ₀;   m_k ~ Bernoulli(1 − p), entry by entry
               τ̂_k = m_k τ_k / (1 − p); sends the entries that are left
    server:    θ ← θ₀ + Σ n_k τ̂_k / Σ n_k

E τ̂_k = τ_k, so FedAvg is what it does in expectation, and p = 0 is FedAvg; the variance that is added grows with
p/(1 − p)·τ². Travels: about (1 − p)·P·B_f bytes up and P·B_f down, a client and round; masks are drawn from the run's
seed at both ends and never travel (so they hide nothing either). With `rank=r` LoRA's A and B and the head instead of
the network. The paper merges fine-tuned language models, whose τ is tiny, once and at p of 0.9 and more. Buffers are
not dropped but averaged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedfuse import (
    Arrays,
    Layout,
    MergingClient,
    MergingHyper,
    MergingStrategy,
    Metrics,
    Records,
    Scope,
    Share,
    Shares,
    Sum,
    generator,
    hyper,
    merging,
    parts,
    strategy,
)


@dataclass(frozen=True)
class DAREHyper(MergingHyper):
    """Hyper-parameters of DARE."""

    drop: float = hyper(0.9, "p, probability that an entry is dropped (paper: 0.9 and more)", low=0, high=0.99)
    weighting: str = hyper("examples", "weights n_k, or all alike", choices=("examples", "uniform"))


def mask(size: int, drop: float, *moment: object) -> Tensor:
    """m (P) bool, Bernoulli(1 − p), from (seed, client, round)."""
    return torch.rand(size, generator=generator("dare", *moment)) >= drop


def shared_arrays(scope: Scope) -> Layout:
    """Layout of what a client shares: at most P entries, and buffers as they are."""
    size = sum(torch.Size(shape).numel() for _, shape in merging.parameter_arrays(scope).values())
    return {"entries": ("float32", (-size,)), **merging.rest_arrays(scope)}


class DAREClient(MergingClient):
    """Sends what is left of its task vector, scaled."""

    def fit(self) -> Metrics:
        """Local training; says which round the mask is of."""
        return {**self.train(), "drawn": self.round}

    def share(self) -> Records:
        """The entries of τ̂ that are left, and the buffers."""
        end, p = self.weights(), self.hyper.drop
        names = merging.parameters(self.model, end)
        tau = torch.cat([(end[n].double() - self.start[n].double()).flatten() for n in names])
        kept = mask(len(tau), p, self.seed, self.client, self.round).to(tau.device)
        return {
            "update": {"entries": (tau[kept] / (1 - p)).float(), **parts.without(end, parts.parameters(self.model))}
        }


@strategy("dare", client=DAREClient, hyper=DAREHyper, paper="Yu et al. 2024, arXiv 2311.03099")
class DARE(MergingStrategy):
    """Mean of task vectors of which most entries are dropped and the others rescaled."""

    records = {"update": shared_arrays}
    metrics = {"drawn": (1, 2**53)}

    def widened(self, share: Share) -> Arrays | None:
        """τ̂_k by name, 0 where dropped; None where the mask leaves another number of entries than came."""
        like = {name: self.model[name] for name in self.merged}
        entries = share.records["update"]["entries"].double()
        size = sum(value.numel() for value in like.values())
        moment = (self.scenario.seed, share.client, int(share.metrics["drawn"]))
        kept = mask(size, self.hyper.drop, *moment).to(entries.device)
        if int(kept.sum()) != len(entries):
            return None
        whole = torch.zeros(size, dtype=torch.float64, device=entries.device)
        whole[kept] = entries
        return merging.shaped(whole, like)

    def fuse(self, shares: Shares) -> None:
        """θ ← θ₀ + Σ n_k τ̂_k / Σ n_k."""
        updates, buffers = Sum(), Sum()
        for share in shares:
            weight = float(share.examples) if self.weight else float(share.examples > 0)
            update = self.widened(share)
            if update is None:
                self.exclude(share, "update/entries: not as many as its mask leaves")
            elif weight:
                updates.add(share.group, update, weight)
                buffers.add(share.group, parts.without(share.records["update"], ["entries"]), weight)
        if updates.total()[1]:
            self.publish("model", {**self.moved(updates.mean()), **buffers.mean()})
