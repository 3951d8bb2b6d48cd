"""MOON: local representations are drawn to the common model's and away from the client's previous ones.

Box (Li, He and Song, "Model-Contrastive Federated Learning", CVPR 2021, arXiv 2103.16257, algorithm 1). A network is an
encoder, a projection head and an output layer on top of it; z = R_w(x) is the projection. In round t:

    client i:  w_i ← w_t;  z = R_{w_i}(x), z_glob = R_{w_t}(x), z_prev = R_{w_i of its last round}(x)
               ℓ = CE(F_{w_i}(x), y) + μ·ℓ_con,
               ℓ_con = −log[ e^{cos(z, z_glob)/τ} / (e^{cos(z, z_glob)/τ} + e^{cos(z, z_prev)/τ}) ]
    server:    as FedAvg

Travels: P·B_f bytes each way, P with the projection head; each client keeps its last local model. The projection
head is a perceptron (d → d → 256) that every client's model is equipped with; `projection=0` leaves it out, as PFLlib
and FL-bench do, and z are the features. z_glob and z_prev are taken in evaluation mode, without gradient. In a client's
first round z_prev is z_glob, and ℓ_con the constant log 2. μ = 0 is FedAvg on the network with its head, and FedAvg on
the model itself only with `projection=0`: where μ = 0 (digits, mlp, 10 clients, Dirichlet 0.3, 10 rounds of 5 epochs,
seed 0) the head alone took FedAvg from 92.2 / 93.5 % (global / personal) to 87.5 / 84.3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fedfuse import AnchoredClient, AveragingStrategy, Metrics, hyper, parts, strategy


@dataclass(frozen=True)
class MoonHyper:
    """Hyper-parameters of MOON."""

    mu: float = hyper(5.0, "μ, weight of the contrastive term (official: 5; tune 0.001 to 10)", low=0)
    temperature: float = hyper(0.5, "τ", above=0, only="mu")
    projection: int = hyper(256, "size of the projection; 0: none", low=0)
    weighting: str = hyper("examples", "weights n_k, or all alike", choices=("examples", "uniform"))


def contrast(z: Tensor, common: Tensor, previous: Tensor, temperature: float) -> Tensor:
    """Mean ℓ_con of a batch of representations (B × d)."""
    near, far = F.cosine_similarity(z, common), F.cosine_similarity(z, previous)
    return F.softplus((far - near) / temperature).mean()


class Projected(nn.Module):
    """A network with a projection head before its output layer."""

    def __init__(self, encoder: nn.Module, size: int, classes: int) -> None:
        super().__init__()
        width = int(encoder.feature_dim)  # type: ignore[arg-type]
        self.encoder, self.feature_dim = encoder, size
        self.projection = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, size))
        self.head = nn.Linear(size, classes)
        encoder.head = nn.Identity()  # its place is taken: nothing unused is trained or sent

    def features(self, x: Tensor) -> Tensor:
        """z = R_w(x)."""
        return self.projection(self.encoder.features(x))  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.features(x))


class MoonClient(AnchoredClient):
    """Trains with the contrastive term and keeps its last local model."""

    @staticmethod
    def equip(model: nn.Module, hyper: Any, build: Callable[[str], nn.Module]) -> nn.Module:
        """Add the projection head; its initial weights depend on the model's own and so on the run's seed."""
        if not hyper.projection or not hasattr(model, "features"):
            return model
        with parts.seeded_by(model, "projection"):
            return Projected(model, hyper.projection, parts.classes_of(model))

    def fit(self) -> Metrics:
        """Cross-entropy plus μ·ℓ_con; keep the result for the next round."""
        if not self.hyper.mu or not len(self.x):
            return self.train()
        model: Any = self.model
        common = previous = self.embed(self.x)
        if "previous" in self.state:
            self.load(self.state["previous"])
            previous = self.embed(self.x)
            self.load(self.start)

        def forward(x: Tensor) -> tuple[Tensor, Tensor]:
            z = model.features(x)
            return model.head(z), z

        def loss(out: tuple[Tensor, Tensor], labels: Tensor, rows: Tensor) -> Tensor:
            term = contrast(out[1], common[rows], previous[rows], self.hyper.temperature)
            return self.objective(out[0], labels) + self.hyper.mu * term

        metrics = self.train(loss, forward=forward)
        self.state["previous"] = self.weights()
        return metrics


@strategy("moon", client=MoonClient, hyper=MoonHyper, paper="Li et al. 2021, arXiv 2103.16257")
class Moon(AveragingStrategy):
    """FedAvg with a contrastive term between representations."""

    staleness = "updates"
    needs_features = True

    @property
    def uncovered(self) -> str:  # type: ignore[override]
        """Representations of them, with a contrastive term."""
        return "looks at private examples outside of training" if self.hyper.mu else ""

    def notes(self) -> list[str]:
        """That a comparison with FedAvg is of two networks."""
        if not self.hyper.projection:
            return []
        return [
            f"moon: strategy.projection={self.hyper.projection} adds layers to the network, so that a difference to "
            f"strategy=fedavg is not the contrastive term's alone; strategy.projection=0 leaves the network as it is"
        ]
