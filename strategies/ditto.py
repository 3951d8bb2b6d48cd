"""Ditto: every client keeps a model of its own, pulled towards the common one.

Box (Li et al., "Ditto: Fair and Robust Federated Learning Through Personalization", ICML 2021, arXiv 2012.04221,
algorithm 1). In round t, for the sampled clients:

    client k:  w_k ← w_t; local epochs on F_k, sent                                        (FedAvg's part)
               v_k ← v_k − η(∇F_k(v_k) + λ(v_k − w_t)), s steps                            (its own, kept)
    server:    w_{t+1} ← Σ n_k w_k / Σ n_k

Travels: P·B_f bytes each way. A client predicts with v_k; the figures on the global set are those of w. λ = 0 is local
training, bit for bit; the common model is FedAvg's. v_k starts at w_0 and is pulled to the w_t it was sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedfuse import AveragingStrategy, FusionClient, Item, Metrics, Records, hyper, strategy, training


@dataclass(frozen=True)
class DittoHyper:
    """Hyper-parameters of Ditto."""

    lam: float = hyper(1.0, "λ, pull towards the common model (paper: 0.05 to 2)", low=0)
    personal_epochs: int | None = hyper(None, "epochs of v_k; null: train.epochs", low=0)
    weighting: str = hyper("examples", "weights n_k, or all alike", choices=("examples", "uniform"))


class DittoClient(FusionClient):
    """Trains the common model for the others and its own for itself."""

    personal = True

    def receive(self, knowledge: Mapping[str, Item]) -> None:
        """Remember w_t; v_k is untouched."""
        self.common = knowledge["model"].arrays

    def fit(self) -> Metrics:
        """w_k by FedAvg's rule, then v_k with the pull."""
        own = self.weights()
        self.load(self.common)
        metrics = self.train(x=self.x, y=self.y)  # not its own examples' optimiser: that one is v_k's
        self.shared = self.weights()
        self.load(own)
        pull = training.proximal(self.common, self.hyper.lam)
        self.train(after_backward=pull if self.hyper.lam else None, epochs=self.hyper.personal_epochs)
        return metrics

    def share(self) -> Records:
        """w_k alone."""
        return {"model": self.shared}


@strategy("ditto", client=DittoClient, hyper=DittoHyper, paper="Li et al. 2021, arXiv 2012.04221")
class Ditto(AveragingStrategy):
    """FedAvg, and beside it a personal model a client, pulled towards the common one."""

    staleness = "updates"
    uncovered = "looks at private examples outside of training"
