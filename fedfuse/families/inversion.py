"""What strategies share that invert clients' models: a pool of generated inputs, and a student taught on it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedfuse.config.registry import hyper
from fedfuse.core.workspace import Workspace
from fedfuse.families import synthesis
from fedfuse.families.one_shot import Ensemble, OneShotStrategy
from fedfuse.models.in_place import variable
from fedfuse.wire.records import Arrays


@dataclass(frozen=True)
class InversionHyper:
    """Hyper-parameters of every strategy that fills a pool with generated inputs and teaches a student on it."""

    epochs: int = hyper(20, "E, batches in the pool at the end; each epoch adds one (papers: 200 and more)", low=1)
    generator_steps: int = hyper(30, "Adam's steps for a batch (code: 30)", low=1)
    generator_lr: float = hyper(1e-3, "Adam's step size for generator and noise (code: 0.001)", above=0)
    batch: int = hyper(256, "B, inputs of a batch, and rows of a step of the student (code: 256)", low=2)
    noise_dim: int = hyper(256, "d_ε, size of the noise (code: 256)", low=1)
    width: int = hyper(16, "channels of the generator before its last layer; hidden units are 16 times that", low=1)
    statistics: float = hyper(1.0, "weight of the distance to the models' running statistics, with BatchNorm", low=0)
    adversarial: float = hyper(1.0, "weight of the divergence where student and ensemble disagree", low=0)
    distill_lr: float = hyper(0.005, "SGD's step size for the student", above=0)
    momentum: float = hyper(0.9, "momentum of that SGD (code: 0.9)", low=0, high=0.999)


class InversionStrategy(OneShotStrategy):
    """Server half: each epoch a fresh generator adds a batch to a pool, and the student takes one pass over it.

    D(x) = Σ_k w_k f_k(x) is what the student learns, by KL at `temperature`; the weights w are uniform unless
    `weighed` says otherwise. Students of further architectures are taught on the full pool afterwards, in as many
    passes as there were epochs.
    """

    hyper: Any

    def __init__(self, hyper: Any, workspace: Workspace) -> None:
        super().__init__(hyper, workspace)
        self._fresh(0)  # refuses inputs that cannot be made

    # -- what a strategy says --------------------------------------------------------------------------------

    def synthesis_loss(self, d: Tensor, s: Tensor, y: Tensor) -> Tensor:
        """What the generator minimises beside the statistics, of logits D and of the student (B × C)."""
        raise NotImplementedError

    def weighed(self, w: Tensor, ensemble: Ensemble, pool: Pool, epoch: int) -> Tensor:
        """The ensemble's weights (K) after a batch has joined the pool."""
        return w

    def hardened(self, x: Tensor, w: Tensor, ensemble: Ensemble, draw: torch.Generator) -> Tensor | None:
        """Rows that the student gets in place of x; None for x itself."""
        return None

    # -- what it does ----------------------------------------------------------------------------------------

    def students(self, ensemble: Ensemble) -> dict[str, Arrays]:
        """E epochs of the first architecture's student, then the others on the pool."""
        h, device = self.hyper, self.workspace.device
        first, pool, draw = self.architecture, Pool(), self.generator("synthesis")
        w = torch.full((len(ensemble),), 1 / len(ensemble), device=device)
        student = Student(self.workspace, first, self.student(first), h)
        for epoch in range(h.epochs):
            pool.add(*self.synthesised(ensemble, student.model, w, draw, epoch), ensemble)
            w = self.weighed(w, ensemble, pool, epoch)
            self._passes(student, ensemble, pool, w, draw)
        found = {first: student.arrays}
        for name in self.names:
            if name != first:
                student = Student(self.workspace, name, self.student(name), h)
                for _ in range(h.epochs):
                    self._passes(student, ensemble, pool, w, draw)
                found[name] = student.arrays
        for k, weight in enumerate(w.tolist()):
            self.log(f"ensemble/{k}", weight)
        return found

    def synthesised(
        self, ensemble: Ensemble, student: nn.Module, w: Tensor, draw: torch.Generator, epoch: int
    ) -> tuple[Tensor, Tensor]:
        """A batch and its labels: of a fresh generator's steps, the inputs of the least loss."""
        h, device = self.hyper, self.workspace.device
        net = self._fresh(epoch).train()
        y = torch.randint(self.classes, (h.batch,), generator=draw).to(device)
        noise = torch.randn(h.batch, h.noise_dim, generator=draw).to(device).requires_grad_()
        optimizer = torch.optim.Adam([*net.parameters(), noise], lr=h.generator_lr, betas=(0.5, 0.999))
        best, least = torch.empty(0), float("inf")
        student.eval()
        with synthesis.watched(ensemble.networks.values()) as seen:
            for _ in range(h.generator_steps):
                x, seen.total = net(noise, y), 0.0
                d = mixture(ensemble.logits(x), w)
                value = self.synthesis_loss(d, student(x), y) + h.statistics * seen.total / len(ensemble)
                reached = float(value.detach())
                if reached < least or not len(best):
                    best, least = x.detach(), reached
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
        self.log(f"loss/synthesis/{epoch}", least)
        return best, y

    def notes(self) -> list[str]:
        """Also, that no network has statistics to compare with."""
        said = super().notes()
        if not synthesis.norms(self.workspace.model(name) for name in self.names):
            said.append(
                f"{self.name}: no model has a BatchNorm, so that the generator's distance to running statistics is 0 "
                f"and strategy.statistics does nothing"
            )
        return said

    def _passes(self, student: Student, ensemble: Ensemble, pool: Pool, w: Tensor, draw: torch.Generator) -> None:
        for rows in torch.randperm(len(pool), generator=draw).split(self.hyper.batch):
            x = pool.x[rows]
            harder = self.hardened(x, w, ensemble, draw)
            with torch.no_grad():
                logits = pool.logits[:, rows] if harder is None else ensemble.logits(harder)
            student.learn(x if harder is None else harder, mixture(logits, w))

    def _fresh(self, epoch: int) -> synthesis.Generator:
        return synthesis.build(self.workspace, self.hyper.noise_dim, self.hyper.width, 0, self.round, epoch)


class Pool:
    """Generated inputs, their labels, and what each client's model says of them (K × n × C)."""

    def __init__(self) -> None:
        self.x, self.y, self.logits = torch.empty(0), torch.empty(0), torch.empty(0)

    def __len__(self) -> int:
        return len(self.x)

    def add(self, x: Tensor, y: Tensor, ensemble: Ensemble) -> None:
        """Add a batch."""
        with torch.no_grad():
            logits = ensemble.logits(x)
        if not len(self):
            self.x, self.y, self.logits = x, y, logits
        else:
            self.x, self.y = torch.cat([self.x, x]), torch.cat([self.y, y])
            self.logits = torch.cat([self.logits, logits], 1)


class Student:
    """A network of one architecture that learns by SGD with momentum from logits."""

    def __init__(self, workspace: Workspace, name: str, arrays: Arrays, h: Any) -> None:
        self.model, self._temperature = copy.deepcopy(workspace.loaded(name, arrays)), h.temperature
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=h.distill_lr, momentum=h.momentum)

    def learn(self, x: Tensor, teacher: Tensor) -> None:
        """One step on T²·KL(softmax(teacher/T) ‖ softmax(student/T))."""
        self.model.train()
        self._optimizer.zero_grad()
        softened(self.model(x), teacher, self._temperature).backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()

    @property
    def arrays(self) -> Arrays:
        """A copy of its weights."""
        return {name: value.detach().clone() for name, value in variable(self.model).items()}


def mixture(logits: Tensor, w: Tensor) -> Tensor:
    """D = Σ_k w_k f_k (B × C), of logits (K × B × C)."""
    return (w[:, None, None].to(logits) * logits).sum(0)


def softened(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T²·KL(softmax(teacher/T) ‖ softmax(student/T)), the mean over rows."""
    log_p, log_q = (teacher / temperature).log_softmax(1), (student / temperature).log_softmax(1)
    return temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def disagreement(d: Tensor, s: Tensor) -> Tensor:
    """mean_b 1[argmax s ≠ argmax D]·KL(softmax D ‖ softmax s), of logits (B × C)."""
    log_p, log_q = d.log_softmax(1), s.log_softmax(1)
    each = (log_p.exp() * (log_p - log_q)).sum(1)
    return ((d.argmax(1) != s.argmax(1)) * each).mean()
