"""FedDF: the server fuses models by distilling their ensemble into the averaged one, also across architectures.

Box (Lin et al., "Ensemble Distillation for Robust Model Fusion in Federated Learning", NeurIPS 2020, arXiv 2006.07242).
In round t, S_t the participants, D_t unlabelled and known to the server only:

    client k:  w_k ← the model of its architecture; E epochs of SGD on its labels; sends w_k                   (P)
    server:    for each architecture p:  w_p ← Σ_{k∈p} n_k w_k / Σ_{k∈p} n_k
               N steps on D_t:  min KL( σ(mean_{k∈S_t} f(w_k, x)) ‖ σ(f(w_p, x)) )    all models teach each student
               sends w_p to its clients                                                                        (P)

Travels: P·B_f bytes each way, a client and round; the transfer set stays at the server. No distillation step is FedAvg.
Paper: Adam 10⁻³ with cosine annealing, batch 128, at most 10⁴ steps ended after 10³ without gain on a labelled
validation set. Here N = distill_epochs·⌈|D_t|/B⌉, since the server has no labels. `ensemble=prob` averages softmax
outputs: up to a constant that is the released code's `avg_losses`, the mean of KLs to each teacher. Choices: an
architecture nobody of which took part starts from its newest model and is taught too; a client without examples
neither counts nor teaches; teachers predict in evaluation mode, students train in training mode, so BatchNorm
statistics move to the transfer set's. "Drop-worst" needs labels at the server and is left out.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedfuse.client import FusionClient
from fedfuse.records import Arrays
from fedfuse.registry import hyper, strategy
from fedfuse.strategy import FusionStrategy, Shares
from fedfuse.sums import Sum
from fedfuse.train import local


@dataclass(frozen=True)
class FedDFHyper:
    """Hyper-parameters of FedDF."""

    distill_epochs: int = hyper(10, "passes over D_t each round; 0: FedAvg (paper: up to 10⁴ steps)", low=0)
    distill_batch: int = hyper(128, "batch size of distillation", low=1)
    distill_lr: float = hyper(1e-3, "Adam's learning rate, annealed to 0 by a cosine", above=0)
    ensemble: str = hyper(
        "logit", "what teachers are averaged in (paper: logits; code's default: prob)", choices=("logit", "prob")
    )


def cosine(lr: float, step: int, steps: int) -> float:
    """Learning rate of step 0 … steps − 1: lr·(1 + cos(π·step/steps)) / 2."""
    return lr * (1 + math.cos(math.pi * step / steps)) / 2


@strategy("feddf", client=FusionClient, hyper=FedDFHyper, paper="Lin et al. 2020, arXiv 2006.07242")
class FedDF(FusionStrategy):
    """Averaged models, one an architecture, each taught by the ensemble of all clients' models."""

    transfer = "server"

    def fuse(self, shares: Shares) -> None:
        """Average by architecture while the models stream in and teach; then distil into each average."""
        h: FedDFHyper = self.hyper
        x, _ = self.residents.tensors("transfer")
        means: dict[str, Sum] = {}
        ensemble, teachers = torch.zeros(len(x), self.classes, dtype=torch.float64, device=x.device), 0
        for share in shares:
            if share.examples == 0:
                continue
            name, weights = self.scenario.architectures[share.client], share.records["model"]
            means.setdefault(name, Sum()).add(self.groups[share.client], weights, share.examples)
            if h.distill_epochs:
                logits = self.predict(self.residents.loaded(name, weights), x, h.distill_batch).double()
                ensemble += logits.softmax(1) if h.ensemble == "prob" else logits
                teachers += 1
        names = sorted(set(self.scenario.architectures))
        for name in names:
            to = name if len(names) > 1 else None
            student = means[name].mean() if name in means else self.published("model", to)
            if teachers:
                student = self._distil(name, student, x, (ensemble / teachers).float())
            self.publish("model", student, to=to)

    def _distil(self, name: str, student: Arrays, x: Tensor, teacher: Tensor) -> Arrays:
        h: FedDFHyper = self.hyper
        loss, (_, labels) = self.loss("kl"), self.residents.tensors("transfer")
        compare = loss.from_probabilities if h.ensemble == "prob" else loss
        model = self.residents.loaded(name, student)
        config = dataclasses.replace(self.scenario.config.train, optimizer="adam", lr=h.distill_lr, weight_decay=0.0)
        optimizer = local.optimizer(model.parameters(), config)
        steps = sum(1 for _ in local.batches(len(x), h.distill_batch, h.distill_epochs, "count"))
        step = iter(range(steps))

        def anneal(_: torch.nn.Module) -> None:  # between backward and step
            optimizer.param_groups[0]["lr"] = cosine(h.distill_lr, next(step), steps)

        def distil(logits: Tensor, y: Tensor | None, rows: Tensor) -> Tensor:
            return compare(logits, teacher[rows], y)

        return self.train(
            model, x, labels, distil, purpose=f"distil {name}", optimizer=optimizer, after_backward=anneal,
            epochs=h.distill_epochs, batch_size=h.distill_batch,
        )  # fmt: skip

    def server_models(self) -> dict[str, tuple[str, Arrays]]:
        """One model an architecture."""
        names = sorted(set(self.scenario.architectures))
        if len(names) == 1:
            return {"model": (names[0], self.model)}
        return {name: (name, self.published("model", name)) for name in names}
