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

from collections.abc import Callable

from torch import Tensor, nn

from fedfuse import (
    AdapterClient,
    Arrays,
    Item,
    RankedHyper,
    RankedStrategy,
    Records,
    Share,
    Shares,
    Sum,
    lora,
    strategy,
)


def truncated(update: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """B (d × r) and A (r × k) with s·B A the best approximation of rank r of an update M (d × k)."""
    u, s, vt = lora.leading(update, rank)
    return u * s / scale, vt


class FlexLoRAClient(AdapterClient):
    """Trains LoRA of its own rank; what is beyond it is zero and stays so."""

    @staticmethod
    def equip(model: nn.Module, hyper: RankedHyper, build: Callable[[str], nn.Module]) -> nn.Module:
        """LoRA of the largest rank."""
        return lora.equip(model, hyper)

    def receive(self, knowledge: dict[str, Item]) -> None:  # type: ignore[override]
        """Take this client's factors, padded with zeros."""
        self.load(lora.pad(knowledge["adapter"].arrays, self.weights()), strict=False)
        self.restore()

    def share(self) -> Records:
        """A_i, B_i and the head."""
        return {"adapter": lora.cut(self.parts("lora_A", "lora_B"), lora.rank_of(self.hyper, self.client))}


@strategy("flexlora", client=FlexLoRAClient, hyper=RankedHyper, paper="Bai et al. 2024, arXiv 2402.11505")
class FlexLoRA(RankedStrategy):
    """Mean of the full updates, cut to each client's rank by singular value decomposition."""

    def fuse(self, shares: Shares) -> None:
        """Σ p_i s·B_i A_i and its leading directions."""
        total = Sum()
        old: Arrays = self.state["whole"]
        scale = float(next(iter(self.layers().values())))
        for share in shares:
            dtype = next(iter(share.records["adapter"].values())).dtype
            total.add(share.group, self.update(share, scale), self.weight_of(share))
        summed, weight = total.total()
        out = {name: (summed[name] / weight).to(old[name].dtype) for name in old if name in summed}
        for name in self.layers():
            b, a = truncated(summed[f"{name}.update"] / weight, self.hyper.rank, scale)
            out[f"{name}.lora_B.weight"], out[f"{name}.lora_A.weight"] = b.to(dtype), a.to(dtype).contiguous()
        self.publish_whole(out)

    def layers(self) -> dict[str, float]:
        """Adapted layers and their s."""
        return {name: m.scale for name, m in lora.adapted(self.residents.model(self.architecture)).items()}

    def update(self, share: Share, scale: float) -> Arrays:
        """s·B_i A_i of each layer, and the head."""
        sent = lora.pad(share.records["adapter"], self.state["whole"])
        out = {name: value for name, value in sent.items() if ".lora_" not in name}
        for name in lora.layer_names(sent, "lora_A.weight"):
            out[f"{name}.update"] = scale * (
                sent[f"{name}.lora_B.weight"].double() @ sent[f"{name}.lora_A.weight"].double()
            )
        return out
