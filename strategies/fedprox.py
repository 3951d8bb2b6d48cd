"""FedProx: FedAvg with a proximal term that keeps local models near the common one.

Box (Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, arXiv 1812.06127):

    client k:  w_k ← argmin_w F_k(w) + (μ/2)·‖w − w_t‖²     (E epochs, from w_t)
    server:    as FedAvg

Travels: P·B_f bytes each way. The term enters as its gradient, μ·(w − w_t), before each step; μ = 0 is FedAvg bit for
bit.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedfuse import AnchoredClient, AveragingStrategy, Metrics, hyper, strategy, training


@dataclass(frozen=True)
class FedProxHyper:
    """Hyper-parameters of FedProx."""

    mu: float = hyper(0.01, "μ, weight of the proximal term (paper: 0.001, 0.01, 0.1, 1)", low=0)
    weighting: str = hyper("examples", "weights n_k, or all alike", choices=("examples", "uniform"))


class FedProxClient(AnchoredClient):
    """Trains with the proximal term."""

    def fit(self) -> Metrics:
        """min F_k(w) + (μ/2)‖w − w_t‖²."""
        return self.train(after_backward=training.proximal(self.start, self.hyper.mu))


@strategy("fedprox", client=FedProxClient, hyper=FedProxHyper, paper="Li et al. 2020, arXiv 1812.06127")
class FedProx(AveragingStrategy):
    """FedAvg with a proximal term at the clients."""

    staleness = "updates"
