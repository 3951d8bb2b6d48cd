"""SCAFFOLD: control variates take the clients' drift out of local steps.

Box (Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020,
arXiv 1910.06378, algorithm 1). With c_i = c = 0 at first, in round t for the sampled clients S:

    client i:  y ← x;  K times:  y ← y − η (g_i(y) − c_i + c)
               c_i⁺ ← c_i − c + (x − y)/(Kη)     (option II);   sends Δy = y − x and Δc = c_i⁺ − c_i
    server:    x ← x + η_g · mean_S Δy;   c ← c + (|S|/N) · mean_S Δc

Travels: model and variate both ways, 2P·B_f bytes a client and round. The server's c stays the mean of all c_i.

Local steps are plain SGD as in the box, whatever `train.momentum` is: `local_momentum=0`. c − c_i is the same in all K
steps and of last round's model, so that steps must be short: momentum ρ makes a constant correction 1/(1 − ρ) times as
long. On MNIST, 10 clients of two or three classes, η = 0.05 reaches 73.6 % with ρ = 0 and diverges with ρ = 0.9, as
η = 0.2 with ρ = 0 does. FedAvg, which corrects nothing, bears both.

Options. (x − y)/(Kη) is the mean corrected gradient only for plain SGD: with momentum it is about 1/(1 − ρ) times
that, which biases c_i (Flower's baseline). So `variate=path` takes the mean of the gradients g_i met on the way,
the same number under plain SGD and right under any optimiser; `variate=difference` is the formula as printed and
asks for plain SGD. The correction enters the gradient before the optimiser's step, as in the box. K counts
mini-batch steps. Buffers and, with `weighting=examples`, models are averaged as in FedAvg; variates never are weighted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fedfuse import (
    AnchoredClient,
    Arrays,
    AveragingStrategy,
    Item,
    Metrics,
    Records,
    Shares,
    Topic,
    UserError,
    Workspace,
    hyper,
    model_arrays,
    model_topic,
    parts,
    strategy,
    without_effect,
)


@dataclass(frozen=True)
class ScaffoldHyper:
    """Hyper-parameters of SCAFFOLD."""

    server_lr: float = hyper(1.0, "η_g, server learning rate", above=0)
    variate: str = hyper("path", "how c_i is renewed (option II both)", choices=("path", "difference"))
    weighting: str = hyper("uniform", "of the models; the paper's mean is uniform", choices=("uniform", "examples"))
    local_momentum: float | None = hyper(
        0.0, "of the clients' SGD, in place of train.momentum (paper: none); null: train.momentum", low=0, high=0.999
    )


def stepping(chosen: Any, train: Any) -> Any:
    """A client's `train.*`, with the momentum of `chosen.local_momentum`."""
    own = chosen.local_momentum is not None and train.optimizer == "sgd"
    return replace(train, momentum=chosen.local_momentum) if own else train


def renewed(own: Arrays, common: Arrays, start: Arrays, end: Arrays, steps: int, lr: float) -> Arrays:
    """c_i⁺ = c_i − c + (x − y)/(Kη), option II as printed."""
    return {name: c - common[name] + (start[name] - end[name]) / (steps * lr) for name, c in own.items()}


class ScaffoldClient(AnchoredClient):
    """Takes corrected steps and keeps its control variate."""

    @property
    def training(self) -> Any:
        """`train.*`, stepping as `local_momentum` says."""
        return stepping(self.hyper, super().training)

    def receive(self, knowledge: Mapping[str, Item]) -> None:
        """y ← x; remember x and c."""
        super().receive(knowledge)
        self.common = knowledge["control"].arrays

    def fit(self) -> Metrics:
        """K corrected steps, then c_i⁺."""
        own: Arrays = self.state.get("control") or {name: torch.zeros_like(c) for name, c in self.common.items()}
        correction = {name: c - own[name] for name, c in self.common.items()}
        met = {name: torch.zeros_like(c, dtype=torch.float64) for name, c in own.items()}

        def correct(model: nn.Module) -> None:
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    met[name].add_(parameter.grad)
                    parameter.grad.add_(correction[name])

        metrics = self.train(after_backward=correct)
        steps = int(metrics["steps"])
        new = own
        if steps and self.hyper.variate == "difference":
            new = renewed(own, self.common, self.start, self.weights(), steps, self.training.lr)
        elif steps:
            new = {name: (total / steps).to(own[name].dtype) for name, total in met.items()}
        self.change = {name: c - own[name] for name, c in new.items()}
        self.state["control"] = new
        return metrics

    def share(self) -> Records:
        """The model y and Δc."""
        return {"model": self.weights(), "control": self.change}


@strategy("scaffold", client=ScaffoldClient, hyper=ScaffoldHyper, paper="Karimireddy et al. 2020, arXiv 1910.06378")
class Scaffold(AveragingStrategy):
    """Local steps corrected by control variates."""

    staleness = "wrong"  # c stays the mean of all c_i only if every Δc is of the c that is published
    topics = {"model": model_topic(), "control": Topic("state", parts.parameter_arrays)}
    records = {"model": model_arrays, "control": parts.parameter_arrays}

    def __init__(self, hyper: Any, workspace: Workspace) -> None:
        super().__init__(hyper, workspace)
        trains = [stepping(hyper, self.scenario.training(i)) for i in range(self.scenario.clients)]
        if all(t.optimizer != "sgd" for t in trains):
            without_effect(hyper, "local_momentum", f"with train.optimizer={trains[0].optimizer}, which is no SGD")
        self.uncommon = train = next((t for t in trains if t.optimizer != "sgd" or t.momentum), None)
        if hyper.variate == "difference" and train is not None:
            raise UserError(
                f"strategy.variate=difference: (x − y)/(Kη) is a gradient only under plain SGD, the run has "
                f"train.optimizer={train.optimizer} and momentum {train.momentum}; allowed: sgd with "
                f"strategy.local_momentum=0, or path"
            )
        uneven = next((t for t in trains if t.schedule != "constant" or t.warmup or t.clip), None)
        if hyper.variate == "difference" and uneven is not None:
            raise UserError(
                f"strategy.variate=difference: η must be one number, the run has train.schedule={uneven.schedule} "
                f"train.warmup={uneven.warmup:g} train.clip={uneven.clip}; allowed: constant, 0 and null, or path"
            )

    @property
    def sums(self) -> dict[str, str | None]:
        """Means are all that `fuse` needs."""
        return {"model": self.weight, "control": None}

    def begin(self) -> None:
        """Publish the initial model and c = 0."""
        super().begin()
        names = {name for name, _ in self.workspace.model(self.architecture).named_parameters()}
        self.publish("control", {name: torch.zeros_like(v) for name, v in self.model.items() if name in names})

    def fuse(self, shares: Shares) -> None:
        """x ← x + η_g·mean Δy; c ← c + Σ Δc / N."""
        mean, old, common = shares.mean("model"), self.model, self.published("control")
        rate = self.hyper.server_lr
        if rate != 1:
            names = parts.parameters(self.workspace.model(self.architecture))
            mean |= {name: torch.lerp(old[name], mean[name], rate) for name in names if name in mean}
        change, _ = shares.total("control")
        n = self.scenario.clients
        self.publish("model", mean)
        self.publish("control", {k: (c.double() + change[k] / n).to(c.dtype) for k, c in common.items()})

    def notes(self) -> list[str]:
        """How the clients step, where that is not what `train.*` says, or not as the box has it."""
        if self.uncommon is None:
            asked = self.scenario.config.train.momentum
            return [f"scaffold: clients step without momentum, as in the paper, not with train.momentum={asked:g} "
                    f"(strategy.local_momentum=null: with it)"] if asked else []  # fmt: skip
        how = f"train.optimizer={self.uncommon.optimizer} and momentum {self.uncommon.momentum:g}"
        return [f"scaffold: its corrections are made for plain SGD; with {how} a run of strong skew can diverge"]
