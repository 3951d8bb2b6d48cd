"""FlexLoRA: the server rebuilds the full update, averages it and cuts each client's rank out of it by SVD.

Box (Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
Resources", NeurIPS 2024, arXiv 2402.11505). In round t, for the sampled clients S_t, client i having rank
r_i:

    client i:  E epochs of SGD on (A_i, B_i) of rank r_i (and the head)
    server:    M = Σ p_i s·B_i A_i = U S Vᵀ;   client j is sent  B = U_{r_j} (S_{r_j}/s)^½,  A = (S_{r_j}/s)^½ V_{r_j}ᵀ

Paper and released code send B = U S/s and A = Vᵀ, the same product (`split=left`). The gradient of A has the factor B,
that of B the factor A: with all of S in B, a step of SGD moves A's part of the update S² times as far as B's. Under
SGD S grew from 0.5 to 8.6 in seven rounds on MNIST with clients of two or three classes, and the run diverged; split
evenly S ends at 4.3 and the accuracy at 63.9 %. Under Adam, whose steps do not grow with the gradient, both splits hold
(64.5 and 63.2 %).

Exact up to truncation. Travels: b·r_i·(d+k) (and the head) each way, a client, a layer and a round. α_i/r_i
is one s for all clients (α_i = α·r_i/r). At the start B = 0 has no decomposition: clients are sent the
leading rows of the seed's A.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedfuse import Arrays, RankedClient, RankedHyper, RankedStrategy, Share, Shares, Sum, hyper, lora, strategy

NOTHING = 1e-7  # of the largest singular value: below it is what rounding leaves of zero


@dataclass(frozen=True)
class FlexLoRAHyper(RankedHyper):
    """Hyper-parameters of FlexLoRA."""

    split: str = hyper(
        "even", "of singular values: half to B and half to A, or all to B (paper)", choices=("even", "left")
    )


def truncated(update: Tensor, rank: int, scale: float, split: str = "even") -> tuple[Tensor, Tensor]:
    """B (d × r) and A (r × k) with s·B A the best approximation of rank r of an update M (d × k).

    A direction that M lacks has its row of Vᵀ in A and zeros in B, in either split, so that it can be learnt.
    """
    u, values, vt = lora.leading(update, rank)
    values = values / scale
    if split == "left":
        return u * values, vt
    root = values.sqrt()
    there = values > NOTHING * values[:1]
    return u * torch.where(there, root, values), torch.where(there, root, 1.0)[:, None] * vt


@strategy("flexlora", client=RankedClient, hyper=FlexLoRAHyper, paper="Bai et al. 2024, arXiv 2402.11505")
class FlexLoRA(RankedStrategy):
    """Mean of the full updates, cut to each client's rank by singular value decomposition."""

    def fuse(self, shares: Shares) -> None:
        """Σ p_i s·B_i A_i and its leading directions."""
        total, old = Sum(), self.state["whole"]
        for share in shares:
            dtype = self.dtype_of(share)
            total.add(share.group, self.update(share), self.weight_of(share))
        summed, weight = total.total()
        out = {name: (summed[name] / weight).to(old[name].dtype) for name in old if name in summed}
        for name, layer in self.layers.items():
            b, a = truncated(summed[f"{name}.update"] / weight, self.hyper.rank, layer.scale, self.hyper.split)
            out[f"{name}.lora_B.weight"], out[f"{name}.lora_A.weight"] = b.to(dtype), a.to(dtype).contiguous()
        self.publish_whole(out)

    def update(self, share: Share) -> Arrays:
        """s·B_i A_i of each layer, and the head."""
        whole = replace(share, records={"adapter": self.padded(share)})
        out = {name: value for name, value in share.records["adapter"].items() if lora.is_head(name)}
        for name, scale, (b,), (a,) in self.factors([whole]):
            out[f"{name}.update"] = scale * (b @ a)
        return out
