"""FlexLoRA: the server rebuilds the full update, averages it and cuts each client's rank out of it by SVD.

Box (Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
Resources", NeurIPS 2024, arXiv 2402.11505). In round t, for the sampled clients S_t, client i having rank
r_i:

    client i:  E epochs of SGD on (A_i, B_i) of rank r_i (and the head)
    server:    M = Σ p_i s·B_i A_i = U S Vᵀ;   client j is sent  B = U_{r_j} S_{r_j} / s,  A = V_{r_j}ᵀ

Exact up to truncation. Travels: b·r_i·(d+k) (and the head) each way, a client, a layer and a round. α_i/r_i
is one s for all clients (α_i = α·r_i/r). At the start B = 0 has no decomposition: clients are sent the
leading rows of the seed's A.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from fedfuse import Arrays, RankedClient, RankedHyper, RankedStrategy, Share, Shares, Sum, lora, strategy


def truncated(update: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """B (d × r) and A (r × k) with s·B A the best approximation of rank r of an update M (d × k)."""
    u, s, vt = lora.leading(update, rank)
    return u * s / scale, vt


@strategy("flexlora", client=RankedClient, hyper=RankedHyper, paper="Bai et al. 2024, arXiv 2402.11505")
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
            b, a = truncated(summed[f"{name}.update"] / weight, self.hyper.rank, layer.scale)
            out[f"{name}.lora_B.weight"], out[f"{name}.lora_A.weight"] = b.to(dtype), a.to(dtype).contiguous()
        self.publish_whole(out)

    def update(self, share: Share) -> Arrays:
        """s·B_i A_i of each layer, and the head."""
        whole = replace(share, records={"adapter": self.padded(share)})
        out = {name: value for name, value in share.records["adapter"].items() if lora.is_head(name)}
        for name, scale, (b,), (a,) in self.factors([whole]):
            out[f"{name}.update"] = scale * (b @ a)
        return out
