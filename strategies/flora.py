"""FLoRA: the clients' adapters are stacked and merged into the base; everybody starts a new adapter each round.

Box (Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
Adaptations", NeurIPS 2024, arXiv 2409.05976). In round t, for the sampled clients S_t, every adapted layer
being W₀ + Δ + s·B A:

    client i:  A_i fresh, B_i = 0, of its own rank r_i; E epochs of SGD on both (and the head)
    server:    B* = [s·B_1 … s·B_C],  A* = [p_1 A_1; …; p_C A_C],   Δ ← Δ + B* A* = Δ + Σ p_i s·B_i A_i

Exact, at any mixture of ranks. Travels: up b·r_i·(d+k); down b·(Σ_j r_j)·(d+k), to absent clients too once
they come back, or Δ itself if that is the smaller; with the head. Open in the paper, read so: α_i/r_i is one
s for all clients, as in its scripts (α = 2r); the new A is drawn as at the start, afresh for each client and
round. As each round restarts from zero, short rounds learn little (their users' finding).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fedfuse import (
    AdapterClient,
    AdapterStrategy,
    Arrays,
    Item,
    Metrics,
    RankedHyper,
    Records,
    Shares,
    Topic,
    lora,
    strategy,
)


def stack(bs: Sequence[Tensor], as_: Sequence[Tensor], p: Sequence[float], scale: float) -> tuple[Tensor, Tensor]:
    """B* (d × Σ r_i) and A* (Σ r_i × k), with B* A* = Σ p_i s·B_i A_i; the weight enters once, on A."""
    return torch.cat([scale * b for b in bs], 1), torch.cat([w * a for w, a in zip(p, as_, strict=True)], 0)


class FLoRAClient(AdapterClient):
    """Starts a new adapter each round over the merged base."""

    @staticmethod
    def equip(model: nn.Module, hyper: RankedHyper, build: Callable[[str], nn.Module]) -> nn.Module:
        """LoRA over a base with Δ."""
        return lora.equip(model, hyper, delta=True)

    def receive(self, knowledge: Mapping[str, Item]) -> None:
        """Take all stacks so far, and the head."""
        self.load(lora.deltas(knowledge["stack"].arrays), strict=False)
        if "head" in knowledge:
            self.load(knowledge["head"].arrays, strict=False)
        self.restore()

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
        out = {"adapter": lora.cut(self.parts("lora_A", "lora_B", head=False), lora.rank_of(self.hyper, self.client))}
        return out | {"head": self.parts()}


@strategy("flora", client=FLoRAClient, hyper=RankedHyper, paper="Wang et al. 2024, arXiv 2409.05976")
class FLoRA(AdapterStrategy):
    """Stack of all clients' adapters, merged into the base: exact, at any ranks."""

    topics = {"stack": Topic("fold", fold=lora.fold, increment=lora.increments), "head": Topic("state", lora.part())}
    records = {"adapter": lora.at_most(lora.part("lora_A", "lora_B", head=False)), "head": lora.part()}

    @property
    def sums(self) -> dict[str, str | None]:
        """Only heads are averaged."""
        return {"head": self.weight}

    def publish_initial(self) -> None:
        """Δ = 0 and the head."""
        layers = lora.adapted(self.residents.model(self.architecture))
        self.publish("stack", lora.empty({name: (m.outputs, m.inputs) for name, m in layers.items()}))
        if head := self.parts():
            self.publish("head", head)

    def fuse(self, shares: Shares) -> None:
        """Stack every layer; average the heads."""
        everyone = list(shares)
        weights = [self.weight_of(share) for share in everyone]
        p = [weight / sum(weights) for weight in weights]
        folded: Arrays = {}
        for name, module in lora.adapted(self.residents.model(self.architecture)).items():
            pairs = [
                (s.records["adapter"][f"{name}.lora_B.weight"], s.records["adapter"][f"{name}.lora_A.weight"])
                for s in everyone
            ]
            if any(b.shape[1] != a.shape[0] for b, a in pairs):
                raise ValueError(f"{name}: A and B of one client differ in rank")
            b, a = lora.compact(*stack([b.double() for b, _ in pairs], [a.double() for _, a in pairs], p, module.scale))
            folded[f"{name}.B"], folded[f"{name}.A"] = b.to(pairs[0][0].dtype), a.to(pairs[0][0].dtype)
        self.publish("stack", folded)
        if self.parts():
            self.publish("head", shares.mean("head"))

    def state_of_model(self) -> Arrays:
        """The merged base and the head; B = 0."""
        return super().state_of_model() | lora.deltas(self.published("stack"))
