"""FLoRA: the clients' adapters are stacked and merged into the base; everybody starts a new adapter each round.

Box (Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
Adaptations", NeurIPS 2024, arXiv 2409.05976). In round t, for the sampled clients S_t, every adapted layer
being W₀ + Δ + s·B A:

    client i:  A_i fresh, B_i = 0, of its own rank r_i; E epochs of SGD on both (and the head)
    server:    B* = [s·B_1 … s·B_C],  A* = [p_1 A_1; …; p_C A_C],   Δ ← Δ + B* A* = Δ + Σ p_i s·B_i A_i

Exact, at any mixture of ranks. Travels: up b·r_i·(d+k); down b·(Σ_j r_j)·(d+k), to absent clients too once
they come back, or Δ itself if that is the smaller; with the head. Open in the paper, read so: α_i/r_i is one
s for all clients, as in its scripts (α = 2r there; s = 1 by default here); the new A is drawn as at the start, afresh
for each client and round. As each round restarts from zero, short rounds learn little (their users' finding).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedfuse import AdapterClient, AdapterStrategy, Metrics, RankedHyper, Records, Shares, Topic, lora, strategy


def stack(bs: Sequence[Tensor], as_: Sequence[Tensor], p: Sequence[float], scale: float) -> tuple[Tensor, Tensor]:
    """B* (d × Σ r_i) and A* (Σ r_i × k), with B* A* = Σ p_i s·B_i A_i; the weight enters once, on A."""
    return torch.cat([scale * b for b in bs], 1), torch.cat([w * a for w, a in zip(p, as_, strict=True)], 0)


class FLoRAClient(AdapterClient):
    """Starts a new adapter each round over the merged base."""

    folded = "stack"

    def fit(self) -> Metrics:
        """Draw A, of this client's rank, and train."""
        rank = lora.rank_of(self.hyper, self.client)
        draw = self.generator("fresh A")
        with torch.no_grad():
            for module in lora.adapted(self.model).values():
                assert isinstance(module, lora.LoRA)
                bound = 1 / math.sqrt(module.inputs)  # Kaiming uniform with a = √5
                a = module.lora_A.weight
                a.copy_((2 * torch.rand(a.shape, generator=draw) - 1) * bound)
                a[rank:] = 0  # zero rows of A and columns of B have no gradient: they stay zero
        return super().fit()

    def share(self) -> Records:
        """A_i and B_i; and the head."""
        adapter = self.parts("lora_A", "lora_B", head=False)
        return {"adapter": lora.cut(adapter, lora.rank_of(self.hyper, self.client)), "head": self.parts()}


@strategy("flora", client=FLoRAClient, hyper=RankedHyper, paper="Wang et al. 2024, arXiv 2409.05976")
class FLoRA(AdapterStrategy):
    """Stack of all clients' adapters, merged into the base: exact, at any ranks."""

    folded = "stack"
    topics = {
        "stack": Topic("fold", fold=lora.fold, increment=lora.increments),
        "head": Topic("state", lora.part()),
    }
    records = {"adapter": lora.at_most(lora.part("lora_A", "lora_B", head=False)), "head": lora.part()}

    @property
    def sums(self) -> dict[str, str | None]:
        """Only heads are averaged."""
        return {"head": self.weight}

    def publish_initial(self) -> None:
        """The head."""
        if head := self.parts():
            self.publish("head", head)

    def fuse(self, shares: Shares) -> None:
        """Stack every layer; average the heads."""
        everyone = list(shares)
        p = self.weights_of(everyone)
        stacks = ((name, *lora.compact(*stack(bs, as_, p, s))) for name, s, bs, as_ in self.factors(everyone))
        self.fold(stacks, self.dtype_of(everyone[0]))
        if self.parts():
            self.publish("head", shares.mean("head"))
