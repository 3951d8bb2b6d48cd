"""FedPer: a common body, a private head, trained together.

Box (Arivazhagan et al., "Federated Learning with Personalization Layers", 2019, arXiv 1912.00818, algorithms 1–2):

    client k:  loads the body w_B, keeps its head w_Pk; trains both jointly; sends w_B
    server:    w_B ← Σ n_k w_Bk / Σ n_k

Travels: P_body·B_f bytes each way; the head never leaves. The personalisation layers are the model's `head` (the paper
tries the last one to four blocks of a network). There is no server model: it would have no head.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedfuse import PartClient, PartStrategy, hyper, strategy


@dataclass(frozen=True)
class FedPerHyper:
    """Hyper-parameters of FedPer."""

    weighting: str = hyper("examples", "weights n_k, or all alike", choices=("examples", "uniform"))


@strategy("fedper", client=PartClient, hyper=FedPerHyper, paper="Arivazhagan et al. 2019, arXiv 1912.00818")
class FedPer(PartStrategy):
    """FedAvg of the body; heads are private, trained jointly with it."""

    staleness = "updates"

    needs_features = True
