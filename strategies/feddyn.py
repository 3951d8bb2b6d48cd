"""FedDyn: each client's objective is bent so that its optimum agrees with everybody's.

Box (Acar et al., "Federated Learning Based on Dynamic Regularization", ICLR 2021, arXiv 2111.04263, algorithm 1).
With ∇_k = 0, h = 0 at first, in round t for the sampled clients P of m:

    client k:  θ_k ← argmin_θ L_k(θ) − ⟨∇_k, θ⟩ + (α/2)·‖θ − θ_t‖²;   ∇_k ← ∇_k − α(θ_k − θ_t);   sends θ_k
    server:    h ← h − α·(1/m)·Σ_P (θ_k − θ_t);   θ ← (1/|P|)·Σ_P θ_k − h/α

Travels: P·B_f bytes each way; ∇_k and h stay where they are. α = 0 is FedAvg with equal weights.

Readings: the argmin is `train.epochs` epochs; both terms enter as their gradient, −∇_k + α(θ − θ_t), before each
step. The penalty is the squared norm (PFLlib: the norm itself) and is there beside the linear term (FL-bench:
without weight decay it is not). Buffers are averaged. `scaled=true` is the official code's α_k = α/(m·n_k/Σ n_j).
Scored on the global test set are both θ, which algorithm 1 returns and clients are sent (`scored=server`, the default:
`accuracy/global` is its), and the participants' mean θ + h/α, which the official code plots (`scored=mean`); each has
its row `accuracy/global/…`. Personal scores are θ's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fedfuse import AnchoredClient, Arrays, AveragingStrategy, Metrics, Scenario, Shares, hyper, parts, strategy


@dataclass(frozen=True)
class FedDynHyper:
    """Hyper-parameters of FedDyn."""

    alpha: float = hyper(0.01, "α, strength of the regulariser (paper: 0.1, 0.01, 0.001)", low=0)
    scaled: bool = hyper(False, "divide a client's α by its share of the data (official code)", only="alpha")
    scored: str = hyper(
        "server",
        "whose accuracy/global it is: θ, or the participants' mean (official code)",
        choices=("server", "mean"),
    )


def strength(h: FedDynHyper, scenario: Scenario, client: int) -> float:
    """α of a client: the paper's, or scaled by the mean client's examples over its own."""
    if not h.scaled:
        return h.alpha
    everyone = [scenario.examples(c) for c in range(scenario.clients)]
    return h.alpha * sum(everyone) / len(everyone) / max(1, everyone[client])


class FedDynClient(AnchoredClient):
    """Trains on the bent objective and keeps its gradient estimate ∇_k."""

    def fit(self) -> Metrics:
        """min L_k(θ) − ⟨∇_k, θ⟩ + (α/2)‖θ − θ_t‖²."""
        alpha = strength(self.hyper, self.scenario, self.client)
        if alpha == 0:
            return self.train()
        names = [name for name in parts.parameters(self.model) if name in self.start]
        slope: Arrays = self.state.get("slope") or {name: torch.zeros_like(self.start[name]) for name in names}

        def bend(model: nn.Module) -> None:
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.detach() - self.start[name], alpha=alpha).sub_(slope[name])

        metrics = self.train(after_backward=bend)
        end = self.weights()
        self.state["slope"] = {name: slope[name] - alpha * (end[name] - self.start[name]) for name in names}
        return metrics


@strategy("feddyn", client=FedDynClient, hyper=FedDynHyper, paper="Acar et al. 2021, arXiv 2111.04263")
class FedDyn(AveragingStrategy):
    """FedAvg with dynamic regularisation of the local objectives."""

    staleness = "wrong"  # h adds up what was moved from the model that is published
    weight = None

    def fuse(self, shares: Shares) -> None:
        """θ ← mean θ_k − h/α."""
        mean, old, alpha = shares.mean("model"), self.model, self.hyper.alpha
        total, taking_part = shares.total("model")
        if alpha > 0:
            h: Arrays = self.state.setdefault("h", {})
            for name in parts.parameters(self.workspace.model(self.architecture)):
                if name in mean:
                    before = h.get(name, torch.zeros_like(total[name]))
                    moved = total[name] - taking_part * old[name].double()
                    h[name] = before - alpha / self.scenario.clients * moved
                    mean[name] = (total[name] / taking_part - h[name] / alpha).to(old[name].dtype)
        self.publish("model", mean)

    def server_models(self) -> dict[str, tuple[str, Arrays]]:
        """θ, and where they differ the mean of the round's clients, θ + h/α."""
        theta, h, alpha = self.model, self.state.get("h", {}), self.hyper.alpha
        if not h:
            return {"model": (self.architecture, theta)}
        mean = {n: (v.double() + h[n] / alpha).to(v.dtype) if n in h else v for n, v in theta.items()}
        return {"model": (self.architecture, theta), "mean": (self.architecture, mean)}

    @property
    def headline(self) -> str | None:
        """Which of the two is the run's figure."""
        return {"server": "model", "mean": "mean"}[self.hyper.scored] if self.state.get("h") else None

    def notes(self) -> list[str]:
        """Which of the two is the run's figure."""
        if self.headline is None:
            return []
        whose = {"model": "the server's model", "mean": "the mean of the last round's clients"}
        return [f"feddyn: accuracy/global is of {whose[self.headline]} (strategy.scored); metrics has both"]
