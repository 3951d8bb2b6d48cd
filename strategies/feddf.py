"""FedDF: the server fuses models by distilling their ensemble into the averaged one, also across architectures.

Box (Lin et al., "Ensemble Distillation for Robust Model Fusion in Federated Learning", NeurIPS 2020, arXiv 2006.07242).
In round t, S_t the participants, D_t unlabelled and known to the server only:

    client k:  w_k ← the model of its architecture; E epochs of SGD on its labels; sends w_k                   (P)
    server:    for each architecture p:  w_p ← Σ_{k∈p} n_k w_k / Σ_{k∈p} n_k
               N steps on D_t:  min KL( σ(mean_{k∈S_t} f(w_k, x)) ‖ σ(f(w_p, x)) )    all models teach each student
               sends w_p to its clients                                                                        (P)

Travels: P·B_f bytes each way, a client and round; the transfer set stays at the server. No distillation step is FedAvg.
Paper: Adam 10⁻³ with cosine annealing, batch 128, at most 10⁴ steps, here distill_epochs·⌈|D_t|/B⌉. `ensemble=prob`
averages softmax outputs: up to a constant that is the released code's `avg_losses`, the mean of KLs to each teacher.
The paper's early stop (`patience`, 10³ steps) and drop-worst (models at chance) read a labelled validation set at the
server: a fixed share of a labelled D_t, which is not distilled then. Left open, and so ours: a student is validated
once an epoch and its best weights, those before distillation among them, are kept. Of the released code: near chance
is an accuracy below 1.2/C, and gradients are clipped at norm 5. Who is dropped neither teaches nor is averaged; if all
are near chance nobody is dropped. Choices: an architecture nobody of which took part starts from its newest model and
is taught too; a client without examples neither counts nor teaches; teachers predict in evaluation mode, students
train in training mode, so BatchNorm statistics move to the transfer set's.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedfuse import (
    Arrays,
    FusionClient,
    FusionStrategy,
    Shares,
    Sum,
    UserError,
    Workspace,
    distil,
    generator,
    hyper,
    strategy,
    training,
    variable,
)


@dataclass(frozen=True)
class FedDFHyper:
    """Hyper-parameters of FedDF."""

    distill_epochs: int = hyper(
        10, "passes over D_t each round; 0: FedAvg (paper: up to 10⁴ steps)", low=0, effort="epochs"
    )
    distill_batch: int = hyper(128, "batch size of distillation", low=1, only="distill_epochs", effort="batch_size")
    distill_lr: float = hyper(
        1e-3, "Adam's learning rate, annealed to 0 by a cosine", above=0, only="distill_epochs", effort="lr"
    )
    ensemble: str = hyper(
        "logit",
        "what teachers are averaged in (paper: logits; code's default: prob)",
        choices=("logit", "prob"),
        only="distill_epochs",
    )
    patience: int | None = hyper(
        None,
        "steps without a gain on validation that end a student's distillation (paper: 1000); null: off",
        low=1,
        only="distill_epochs",
    )
    drop_worst: bool = hyper(False, "leave out models that are near chance on validation: below 1.2/C (code)")
    clip: float | None = hyper(
        5.0, "largest norm of a distillation step's gradient (code: 5); null: off", above=0, only="distill_epochs"
    )
    validation: float = hyper(
        0.1,
        "share of a labelled D_t that the two read; not distilled then",
        above=0,
        high=0.9,
        only="patience or drop_worst",
    )


NEAR_CHANCE = 1.2  # of the released code, times 1/C


def cosine(lr: float, step: int, steps: int) -> float:
    """Learning rate of step 0 … steps − 1: lr·(1 + cos(π·step/steps)) / 2."""
    return lr * (1 + math.cos(math.pi * step / steps)) / 2


class Best:
    """The best student so far on validation."""

    def __init__(self, accuracy: float, arrays: Arrays) -> None:
        self.accuracy, self.step, self.arrays = accuracy, 0, arrays

    def look(self, accuracy: float, step: int, model: nn.Module) -> None:
        """Keep the model if it gained."""
        if accuracy > self.accuracy:
            arrays = {name: value.detach().clone() for name, value in variable(model).items()}
            self.accuracy, self.step, self.arrays = accuracy, step, arrays


class Ensemble:
    """What models add up to as they stream in: a mean for each architecture, and the mean of their outputs."""

    def __init__(self) -> None:
        self.means: dict[str, Sum] = {}
        self.models, self._outputs = 0, torch.zeros(())

    def add(self, name: str, group: int, weights: Arrays, examples: float, outputs: Tensor | None) -> None:
        """Add a model of architecture `name`, and its outputs (T × C, float64) if it teaches."""
        self.means.setdefault(name, Sum()).add(group, weights, examples)
        self.models += 1
        if outputs is not None:
            self._outputs = self._outputs.to(outputs) + outputs

    @property
    def outputs(self) -> Tensor:
        """The teachers' mean output, float32."""
        return (self._outputs / self.models).float()


@strategy("feddf", client=FusionClient, hyper=FedDFHyper, paper="Lin et al. 2020, arXiv 2006.07242")
class FedDF(FusionStrategy):
    """Averaged models, one an architecture, each taught by the ensemble of all clients' models."""

    transfer = "server"
    distils = True

    def __init__(self, hyper: FedDFHyper, workspace: Workspace) -> None:
        super().__init__(hyper, workspace)
        self.validates = hyper.patience is not None or hyper.drop_worst
        if self.validates and not self.scenario.config.transfer.labelled:
            what = "drop_worst=true" if hyper.drop_worst else f"patience={hyper.patience}"
            raise UserError(f"strategy.{what} needs labels at the server: set transfer.labelled=true")

    @property
    def of_logits(self) -> bool:  # type: ignore[override]
        """Whether logits are averaged."""
        return self.hyper.ensemble != "prob"

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """Rows of D_t to distil on and to validate on; all and none if nothing reads a validation."""
        total = len(self.workspace.tensors("transfer")[0])
        if not self.validates:
            return torch.arange(total), torch.arange(0)
        order = torch.randperm(total, generator=generator(self.scenario.seed, "feddf validation"))
        kept = max(1, int(self.hyper.validation * total))
        return order[kept:].sort().values, order[:kept].sort().values

    def fuse(self, shares: Shares) -> None:
        """Average by architecture while the models stream in and teach; then distil into each average."""
        h: FedDFHyper = self.hyper
        x, y = self.workspace.transfer(self.rows[0])
        distils = distil.happens(self.scenario.config.distil, h.distill_epochs)
        good, worst = Ensemble(), Ensemble()
        for share in shares:
            if share.examples == 0:
                continue
            name, weights = self.scenario.architectures[share.client], share.records["model"]
            outputs, used = None, good
            if distils or h.drop_worst:
                model = self.workspace.loaded(name, weights)
                logits = self.predict(model, x, h.distill_batch).double()
                outputs = logits.softmax(1) if h.ensemble == "prob" else logits
                used = worst if h.drop_worst and self.accuracy(model) < NEAR_CHANCE / self.classes else good
            used.add(name, share.group, weights, share.examples, outputs)
        if h.drop_worst:
            self.log("dropped", worst.models if good.models else 0)
        used = good if good.models else worst
        names = sorted(set(self.scenario.architectures))
        for name in names:
            to = name if len(names) > 1 else None
            student = used.means[name].mean() if name in used.means else self.published("model", to)
            if distils:
                student = self.distilled(name, student, x, y, used.outputs)
            self.publish("model", student, to=to)

    def _plan(self, rows: int, least: int = 2) -> dict[str, Any]:
        """The effort of a student's distillation: the user's `distil.*`, else the paper's Adam."""
        h, config = self.hyper, self.scenario.config
        own = distil.Effort(h.distill_epochs, h.distill_batch, h.distill_lr, "adam")
        return distil.plan(config.distil, own, config.train, rows, max(2, least))

    def accuracy(self, model: nn.Module) -> float:
        """Share of the validation rows that a model gets right."""
        x, y = self.workspace.transfer(self.rows[1])
        assert y is not None
        return float((self.predict(model, x, self.hyper.distill_batch).argmax(1) == y).double().mean())

    def distilled(self, name: str, student: Arrays, x: Tensor, y: Tensor | None, teacher: Tensor) -> Arrays:
        """A student's weights after it has learnt what the teacher says of x."""
        h: FedDFHyper = self.hyper
        loss = self.loss("kl")
        compare = loss.from_probabilities if h.ensemble == "prob" else loss
        model = self.workspace.loaded(name, student)
        options = self._plan(len(x), loss.min_batch)
        config, batch_size = options.pop("config"), options["batch_size"]
        limit = options.pop("after_step", None)  # of `distil.steps`
        optimizer = training.optimizer(model.parameters(), dataclasses.replace(config, weight_decay=0.0))
        epoch = len(training.sizes_of(len(x), batch_size, max(2, loss.min_batch)))
        steps, best = options["epochs"] * epoch, Best(self.accuracy(model), student) if h.patience else None
        if limit is not None:
            steps = min(steps, int(self.scenario.config.distil.steps or 0))
        step = iter(range(steps))

        def anneal(student: nn.Module) -> None:  # between backward and step
            if h.clip is not None:
                nn.utils.clip_grad_norm_(student.parameters(), h.clip)
            optimizer.param_groups[0]["lr"] = cosine(config.lr, next(step), steps)

        def distil(logits: Tensor, y: Tensor | None, rows: Tensor) -> Tensor:
            return compare(logits, teacher[rows], y)

        def stop(done: int, _: int) -> bool:
            if done == steps:
                return True
            if best is None or h.patience is None or done % epoch:
                return False
            best.look(self.accuracy(model), done, model)
            return done - best.step >= h.patience

        trained = self.train(
            model, x, y, distil, purpose=f"distil {name}", optimizer=optimizer, after_backward=anneal,
            after_step=stop, **options,
        )  # fmt: skip
        if best is None:
            return trained
        self.log(f"steps/{name}", best.step)
        return best.arrays

    def server_models(self) -> dict[str, tuple[str, Arrays]]:
        """One model an architecture."""
        names = sorted(set(self.scenario.architectures))
        if len(names) == 1:
            return {"model": (names[0], self.model)}
        return {name: (name, self.published("model", name)) for name in names}
