"""FedSVD: as FFA-LoRA, but the server turns the frozen A into the best orthonormal one every few rounds.

Box (Lee et al., "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA", NeurIPS 2025,
arXiv 2505.12805, and its code). In round t, for the sampled clients S_t:

    client i:  B_i ← B_t; E epochs of SGD on B_i (and the head), A fixed
    server:    B̄ ← Σ p_i B_i;  every `period` rounds B̄ A = U S Vᵀ (rank r),  B ← U S,  A ← Vᵀ;  else B ← B̄

Exact: the refactoring does not change B̄ A. A's orthonormal rows bound the gradient of B, which helps under
differential privacy. The decomposition needs only a QR of B̄ and one of Aᵀ. Travels: up b·r·d; down b·r·d,
and b·r·(d+k) after a refactoring; with the head. The first A is the seed's and is not sent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedfuse import AdapterClient, AdapterHyper, AdapterStrategy, Arrays, Shares, Topic, hyper, lora, strategy


@dataclass(frozen=True)
class FedSVDHyper(AdapterHyper):
    """Hyper-parameters of FedSVD."""

    period: int = hyper(1, "rounds between refactorings (`recalculate_svd_period`)", low=1)


def refactor(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """U S (d × r) and Vᵀ (r × k) of B A, by QR of both factors and a decomposition of r × r, in float64."""
    qb, rb = torch.linalg.qr(b.double())
    qa, ra = torch.linalg.qr(a.double().T)
    u, s, vt = lora.leading(rb @ ra.T, len(a))
    return qb @ (u * s), vt @ qa.T


class FedSVDClient(AdapterClient):
    """Trains B in the rows of the server's A."""

    trains = ("lora_B",)


@strategy("fedsvd", client=FedSVDClient, hyper=FedSVDHyper, paper="Lee et al. 2025, arXiv 2505.12805")
class FedSVD(AdapterStrategy):
    """Mean of LoRA's B, with A refreshed to the leading right singular vectors of B A: exact."""

    kinds = ("lora_B",)
    topics = {"adapter": Topic("state", lora.part("lora_B")), "A": Topic("state", lora.part("lora_A", head=False))}

    def fuse(self, shares: Shares) -> None:
        """Mean, and a refactoring if it is time; B̄ = 0 has none."""
        mean = shares.mean("adapter")
        if self.round % self.hyper.period == 0:
            fresh: Arrays = {}
            now = self.state_of_model()
            for name in list(lora.layer_names(mean, "lora_B.weight")):
                b, a = mean[f"{name}.lora_B.weight"], now[f"{name}.lora_A.weight"]
                dtype = b.dtype
                if bool((b != 0).any()):
                    b, a = refactor(b, a)
                mean[f"{name}.lora_B.weight"] = b.to(dtype).contiguous()
                fresh[f"{name}.lora_A.weight"] = a.to(dtype).contiguous()
            self.publish("A", fresh)
        self.publish("adapter", mean)
