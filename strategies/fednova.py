"""FedNova: updates are divided by the steps they took before they are averaged.

Box (Wang et al., "Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization", NeurIPS
2020, arXiv 2007.07481, algorithm 1 and section 4). In round t, with p_i = n_i / Σ n_j over the sampled clients:

    client i:  τ_i local steps from x;   d_i = (x − y_i) / ‖a_i‖₁;   sends d_i and ‖a_i‖₁
    server:    τ_eff = Σ p_i ‖a_i‖₁;   x ← x − τ_eff Σ p_i d_i

a_i are the weights with which gradients entered the update: ones for SGD, so ‖a_i‖₁ = τ_i; with momentum ρ
‖a_i‖₁ = (τ_i − ρ(1 − ρ^τ_i)/(1 − ρ)) / (1 − ρ). Both are of one learning rate for all steps: `train.schedule` and
`train.warmup` are refused. With equal ‖a_i‖₁ it is FedAvg.

Travels: P·B_f bytes each way and one number. Readings of ours: adaptive optimisers have no fixed a_i and count steps;
buffers are averaged as in FedAvg; a client without a step sends zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedfuse import (
    AnchoredClient,
    AveragingStrategy,
    Metrics,
    Records,
    Shares,
    UserError,
    Workspace,
    hyper,
    model_arrays,
    parts,
    strategy,
)


@dataclass(frozen=True)
class FedNovaHyper:
    """Hyper-parameters of FedNova."""

    server_lr: float = hyper(1.0, "factor on the mean update", above=0)
    weighting: str = hyper("examples", "weights n_k, or all alike", choices=("examples", "uniform"))


def normaliser(steps: int, momentum: float = 0.0) -> float:
    """‖a_i‖₁ of a run of SGD steps with (heavy-ball) momentum ρ, the velocity starting at zero."""
    if not momentum:
        return float(steps)
    if momentum == 1:
        return steps * (steps + 1) / 2
    return (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)


class FedNovaClient(AnchoredClient):
    """Sends its update per unit of local progress."""

    def fit(self) -> Metrics:
        """τ_i local steps."""
        train = self.training
        metrics = self.train()
        self.progress = normaliser(int(metrics["steps"]), train.momentum if train.optimizer == "sgd" else 0.0)
        return {**metrics, "progress": self.progress}

    def share(self) -> Records:
        """d_i for parameters, values for buffers."""
        end, scale = self.weights(), self.progress or 1.0
        moved = {k: (self.start[k] - end[k]) / scale for k in parts.parameters(self.model) if k in end}
        return {"update": {**end, **moved}}


@strategy("fednova", client=FedNovaClient, hyper=FedNovaHyper, paper="Wang et al. 2020, arXiv 2007.07481")
class FedNova(AveragingStrategy):
    """FedAvg of updates normalised by local progress."""

    records = {"update": model_arrays}
    metrics = {"progress": (0, 2**53)}
    averaged = "update"
    means = ()  # times the steps that clients say they took

    def __init__(self, hyper: Any, workspace: Workspace) -> None:
        super().__init__(hyper, workspace)
        trains = (self.scenario.training(i) for i in range(self.scenario.clients))
        uneven = next((t for t in trains if t.schedule != "constant" or t.warmup), None)
        if uneven is not None:
            raise UserError(
                f"train.schedule={uneven.schedule} train.warmup={uneven.warmup:g}: fednova's ‖a_i‖₁ is of steps of one "
                f"rate; allowed: constant and 0"
            )

    def fuse(self, shares: Shares) -> None:
        """x ← x − τ_eff Σ p_i d_i."""
        alike = self.weight is None
        told = [
            (float(share.examples > 0) if alike else share.examples, float(share.metrics["progress"]))
            for share in shares
        ]
        mean, old = shares.mean("update"), self.model  # of what was streamed above
        effective = self.hyper.server_lr * sum(n * a for n, a in told) / sum(n for n, _ in told)
        for name in parts.parameters(self.workspace.model(self.architecture)):
            if name in mean:
                mean[name] = (old[name].double() - effective * mean[name].double()).to(old[name].dtype)
        self.log("progress", effective)
        self.publish("model", mean)
