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

from collections.abc import Sequence

import torch
from torch import Tensor

from fedfuse import AdapterClient, AdapterHyper, AdapterStrategy, Shares, lora, strategy


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

    folded = "residual"


@strategy("fedex_lora", client=FedExLoRAClient, hyper=AdapterHyper, paper="Singhal et al. 2025, arXiv 2410.09432")
class FedExLoRA(AdapterStrategy):
    """Mean of LoRA's A and B, and the residual of their product into the base: exact."""

    folded = "residual"
    sums = {}  # the residual needs every client's factors

    def fuse(self, shares: Shares) -> None:
        """The means, and E of each layer."""
        everyone = list(shares)
        p = self.weights_of(everyone)
        residuals = ((name, *residual(bs, as_, p, s)) for name, s, bs, as_ in self.factors(everyone))
        self.publish("adapter", self.mean((share, share.records["adapter"]) for share in everyone))
        self.fold(residuals, self.dtype_of(everyone[0]))
