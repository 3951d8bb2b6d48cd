"""FedEx-LoRA: FedIT's means, plus what they miss, added to every client's frozen weights.

Box (Singhal et al., "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation
Models", ACL 2025, arXiv 2410.09432). In round t, for the sampled clients S_t, C = |S_t|, every adapted layer
being W₀ + Δ + s·B A:

    client i:  (A_i, B_i) ← (A_t, B_t); E epochs of SGD on both (and the head)
    server:    Ā = Σ p_i A_i,  B̄ = Σ p_i B_i,   E = s·(Σ p_i B_i A_i − B̄ Ā),   Δ ← Δ + E

E = s·Σ_{i<C} p_i (B_i − B̄)(A_i − A_C), of rank at most (C−1)·r, is sent as those factors, or Δ itself once
it is the smaller. Travels: up b·r·(d+k); down b·C·r·(d+k) (means and factors), at most b·(r·(d+k) + d·k);
with the head. The released code adds E transposed on `nn.Linear` and averages unweighted; neither is done
here (`weighting=uniform` for the latter).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fedfuse import AdapterClient, AdapterHyper, AdapterStrategy, Arrays, Item, Shares, Topic, lora, strategy


def residual(bs: Sequence[Tensor], as_: Sequence[Tensor], p: Sequence[float], scale: float) -> tuple[Tensor, Tensor]:
    """Factors of E = s·(Σ p_i B_i A_i − B̄ Ā).

    Parameters
    ----------
    bs, as_ : sequence of Tensor
        B_i (d × r) and A_i (r × k).
    p : sequence of float
        Weights p_i, of sum 1.
    scale : float
        s = α/r.

    Returns
    -------
    tuple of Tensor
        d × (C−1)r and (C−1)r × k; the deviations of B sum to zero under p, which saves the last client's.
    """
    mean = sum(w * b for w, b in zip(p, bs, strict=True))
    left = [scale * w * (b - mean) for w, b in zip(p[:-1], bs[:-1], strict=True)]
    right = [a - as_[-1] for a in as_[:-1]]
    if not left:
        return bs[0][:, :0], as_[0][:0]
    return lora.compact(torch.cat(left, 1), torch.cat(right, 0))


class FedExLoRAClient(AdapterClient):
    """Trains A and B over a base that takes in every round's residual."""

    @staticmethod
    def equip(model: nn.Module, hyper: AdapterHyper, build: Callable[[str], nn.Module]) -> nn.Module:
        """LoRA over a base with Δ."""
        return lora.equip(model, hyper, delta=True)

    def receive(self, knowledge: Mapping[str, Item]) -> None:
        """Take the means and all residuals so far."""
        self.load(knowledge["adapter"].arrays, strict=False)
        self.load(lora.deltas(knowledge["residual"].arrays), strict=False)
        self.restore()


@strategy("fedex_lora", client=FedExLoRAClient, hyper=AdapterHyper, paper="Singhal et al. 2025, arXiv 2410.09432")
class FedExLoRA(AdapterStrategy):
    """Mean of LoRA's A and B, and the residual of their product into the base: exact."""

    topics = {
        "adapter": Topic("state", lora.part("lora_A", "lora_B")),
        "residual": Topic("fold", fold=lora.fold, increment=lora.increments),
    }
    records = {"adapter": lora.part("lora_A", "lora_B")}
    sums = {}

    def publish_initial(self) -> None:
        """Version 0: the seed's adapters over Δ = 0."""
        super().publish_initial()
        layers = lora.adapted(self.residents.model(self.architecture))
        self.publish("residual", lora.empty({name: (m.outputs, m.inputs) for name, m in layers.items()}))

    def fuse(self, shares: Shares) -> None:
        """The means, and E of each layer."""
        everyone = list(shares)
        mean, _ = self.mean((share, share.records["adapter"]) for share in everyone)
        weights = [self.weight_of(share) for share in everyone]
        p = [weight / sum(weights) for weight in weights]
        folded: Arrays = {}
        for name, layer in lora.adapted(self.residents.model(self.architecture)).items():
            bs = [share.records["adapter"][f"{name}.lora_B.weight"].double() for share in everyone]
            as_ = [share.records["adapter"][f"{name}.lora_A.weight"].double() for share in everyone]
            b, a = residual(bs, as_, p, layer.scale)
            dtype = mean[f"{name}.lora_A.weight"].dtype
            folded[f"{name}.B"], folded[f"{name}.A"] = b.to(dtype), a.to(dtype)
        self.publish("adapter", mean)
        self.publish("residual", folded)

    def state_of_model(self) -> Arrays:
        """Means over the base with Δ."""
        return super().state_of_model() | lora.deltas(self.published("residual"))
