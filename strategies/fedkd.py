"""FedKD: a private teacher and a common small student; the student's updates travel as truncated SVDs.

Box (Wu et al., "Communication-efficient federated learning via knowledge distillation", Nature Communications 13,
2032, 2022). In round t of T, client k with teacher (private) and student s ← s_t; for each batch, both at once, with
d = 1 / (CE_teacher + CE_student):

    L_teacher = CE + d·KL(p_student ‖ p_teacher) + d·MSE(H_teacher, W H_student)
    L_student = CE + d·KL(p_teacher ‖ p_student) + d·MSE(H_teacher, W H_student)
    Δ_k = s_k − s_t; each matrix ≈ U_r Σ_r V_r, least r with Σ_{i≤r} σ_i² ≥ e_t·Σ σ_i²;  e_t from 0.95 to 0.98, sent
    server:  Δ ← Σ n_k Δ_k / Σ n_k, truncated likewise, sent;   s_{t+1} ← s_t + Δ

Travels: Σ_layers r(m + n + 1)·B_f bytes each way, a whole matrix where that is less; vectors whole. The student is a
folded topic: clients and server add the same truncated updates, and an absent client gets the missing ones or the
snapshot. The search for r includes the full rank (the released code stops before it and then sends zeros). Readings:
convolutions are matrices (m × rest); d is a weight, so no gradient flows through it (`through=true`: it does);
hidden states are the models' features, attention maps have no counterpart here; W is private. Clients predict with the
teacher.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedfuse import (
    Arrays,
    CompanionClient,
    CompanionStrategy,
    Layout,
    Metrics,
    Records,
    Scope,
    Shares,
    Topic,
    hyper,
    pair,
    strategy,
    truncate,
)


@dataclass(frozen=True)
class FedKDHyper:
    """Hyper-parameters of FedKD."""

    student: str = hyper("auto", "architecture of the student, common to all clients")
    energy_start: float = hyper(0.95, "e_0, from which e_t rises to e_T, share of Σσ²; 1: full rank", above=0, high=1)
    energy_end: float = hyper(0.98, "e_T, share of Σσ² kept at the end", above=0, high=1)
    hidden: bool = hyper(True, "also compare features")
    through: bool = hyper(False, "let the gradient flow through d, as the printed formula read literally does")


def energy(h: FedKDHyper, round: int, rounds: int) -> float:
    """e_t, linear in t / T."""
    return h.energy_start + (h.energy_end - h.energy_start) * min(1.0, round / rounds)


def apply(student: Arrays, increment: Arrays) -> Arrays:
    """s + Δ, of a truncated Δ; buffers that count are added up as integers."""
    change = truncate.unpack(increment, student)
    return {name: value + change[name] for name, value in student.items()}


def increments(scope: Scope) -> Layout:
    """Spec: a truncated update of the student."""
    return truncate.packed_layout(pair.shared_arrays(scope))


class FedKDClient(CompanionClient):
    """Trains its teacher and the common student on each other."""

    averaged = "student"

    @classmethod
    def equip(cls, model: nn.Module, hyper: Any, build: Callable[[str], nn.Module]) -> nn.Module:
        """Add the student, and W where features are compared."""
        return pair.paired(model, hyper.student, build, bridge=hyper.hidden)

    def mutual(self) -> Metrics:
        """Adaptive mutual distillation on private data."""
        h, model = self.hyper, self.model
        to_teacher, to_student = self.loss("kl"), self.loss("kl")

        def adaptive(out: tuple[Tensor, ...], y: Tensor, rows: Tensor) -> Tensor:
            right = F.cross_entropy(out[0], y) + F.cross_entropy(out[1], y)
            lesson = to_teacher(out[0], out[1], y) + to_student(out[1], out[0], y)
            if h.hidden:  # equal in both losses; what each network gets from it is its own gradient
                lesson = lesson + F.mse_loss(out[3], out[2])
            return right + lesson / ((right if h.through else right.detach()) + 1e-8)

        return self.train(adaptive, forward=model.everything if h.hidden else model.both)  # type: ignore[arg-type]

    def share(self) -> Records:
        """Δ_k, truncated."""
        end = pair.shared_part(self.weights())
        kept = energy(self.hyper, self.round, self.scenario.config.rounds)
        packed = truncate.pack({name: value - self.start[name] for name, value in end.items()}, kept)
        return {"update": packed}


@strategy("fedkd", client=FedKDClient, hyper=FedKDHyper, paper="Wu et al. 2022, Nat. Commun. 13, 2032")
class FedKD(CompanionStrategy):
    """Private teachers, a common student whose updates travel as truncated SVDs."""

    averaged = "student"
    topics = {"student": Topic("fold", pair.shared_arrays, fold=apply, increment=increments)}
    records = {"update": increments}
    sums = {}  # what is summed is unpacked first
    of_logits = True

    @property
    def needs_features(self) -> bool:  # type: ignore[override]
        """Whether features are compared."""
        return self.hyper.hidden

    def planned(self) -> str:
        """e_t, unless it is constant."""
        return "" if self.hyper.energy_start == self.hyper.energy_end else "the energy kept grows over the rounds"

    @classmethod
    def examine(cls, scope: Scope, records: Records) -> None:
        """Factors must fit together."""
        if "update" in records:
            truncate.check_packed(records["update"], pair.shared_arrays(scope))

    def fuse(self, shares: Shares) -> None:
        """s ← s + truncated mean Δ_k."""
        student = self.published("student")
        total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in student.items()}
        weight = 0
        for share in shares:
            for name, change in truncate.unpack(share.records["update"], student).items():
                total[name] += share.examples * change.double()
            weight += share.examples
        if weight == 0:
            return
        mean = {name: value / weight for name, value in total.items()}
        mean = {k: v if student[k].is_floating_point() else v.round().to(student[k].dtype) for k, v in mean.items()}
        kept = energy(self.hyper, self.round, self.scenario.config.rounds)
        self.publish("student", truncate.pack(mean, kept))
