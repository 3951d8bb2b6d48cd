"""FedRep: a common representation, a private head, trained one after the other.

Box (Collins et al., "Exploiting Shared Representations for Personalized Federated Learning", ICML 2021,
arXiv 2102.07078, algorithm 1). In round t, for the r·n sampled clients:

    client i:  h_i ← τ_h epochs on the head, the body φ_t fixed
               φ_i ← epochs on the body from φ_t, the new head fixed;   sends φ_i
    server:    φ_{t+1} ← (1/rn) Σ φ_i

Travels: P_body·B_f bytes each way; the head never leaves. The first head is the model's initial one. With
`weighting=examples` the mean is weighted. BatchNorm's statistics belong to the body and move in both phases, as in the
official code. There is no server model: it would have no head.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedfuse import Metrics, PartClient, PartStrategy, hyper, parts, strategy


@dataclass(frozen=True)
class FedRepHyper:
    """Hyper-parameters of FedRep."""

    head_epochs: int = hyper(10, "τ_h, epochs on the head (paper: 10)", low=0)
    body_epochs: int | None = hyper(None, "epochs on the body (paper: 1 to 5); null: train.epochs", low=0)
    weighting: str = hyper("uniform", "of the bodies; the paper's mean is uniform", choices=("uniform", "examples"))


class FedRepClient(PartClient):
    """Fits its head to the common body, then the body to its head."""

    def trainings(self) -> list[int | None]:
        """Head and body; both are fitted to private examples."""
        return [self.hyper.head_epochs, self.hyper.body_epochs]

    def fit(self) -> Metrics:
        """Head first, then body; keep the head."""
        private = set(parts.head(self.model))
        groups: tuple[list, list] = ([], [])
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                groups[name in private].append(parameter)
        self.train(purpose="head", params=groups[True], epochs=self.hyper.head_epochs)
        metrics = self.train(purpose="body", params=groups[False], epochs=self.hyper.body_epochs)
        self.keep()
        return metrics


@strategy("fedrep", client=FedRepClient, hyper=FedRepHyper, paper="Collins et al. 2021, arXiv 2102.07078")
class FedRep(PartStrategy):
    """Mean of the bodies; private heads, fitted before the body."""

    staleness = "updates"

    needs_features = True
