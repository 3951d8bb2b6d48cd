"""Distillation objectives that compare sample by sample. Exact forms: docs/losses.md of the specification.

s, t: logits of student and teacher, (B, C); p_s = softmax(s/T), p_t = softmax(t/T). Means are over the batch
(`batchmean`), never over batch and classes. T² keeps gradients at one scale as T varies (Hinton et al. 2015).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fedfuse.errors import UserError
from fedfuse.train.objective import Loss, log_softened
from fedfuse.train.row_targets import RowMean


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p‖q) per row, from logarithms of shape (B, C)."""
    return (log_p.exp() * (log_p - log_q)).sum(1)


class KL(RowMean):
    """T² · mean KL(p_t‖p_s)."""

    @property
    def factor(self) -> float:
        """T²."""
        return self.temperature * self.temperature

    def terms(self, student: Tensor, teacher: Tensor) -> Tensor:
        """KL(p_t‖p_s) by row."""
        return divergence(log_softened(teacher, self.temperature), (student / self.temperature).log_softmax(1))


class ReverseKL(KL):
    """T² · mean KL(p_s‖p_t)."""

    def terms(self, student: Tensor, teacher: Tensor) -> Tensor:
        """KL(p_s‖p_t) by row."""
        return divergence((student / self.temperature).log_softmax(1), log_softened(teacher, self.temperature))


class JS(RowMean):
    """Mean of ½ KL(p_s‖m) + ½ KL(p_t‖m), m = ½ (p_s + p_t); no T², so that it stays below log 2."""

    @property
    def factor(self) -> float:
        """½."""
        return 0.5

    def terms(self, student: Tensor, teacher: Tensor) -> Tensor:
        """KL(p_s‖m) + KL(p_t‖m) by row."""
        log_s = (student / self.temperature).log_softmax(1)
        log_t = log_softened(teacher, self.temperature)
        log_m = torch.logaddexp(log_s, log_t) - math.log(2)
        return divergence(log_s, log_m) + divergence(log_t, log_m)


class SoftCE(RowMean):
    """Mean of −Σ p_t log p_s: `kl` at T = 1 plus the teacher's entropy."""

    @property
    def factor(self) -> float:
        """−1."""
        return -1.0

    def terms(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Σ p_t log p_s by row."""
        T = self.temperature
        return ((teacher / T).softmax(1) * (student / T).log_softmax(1)).sum(1)


class MSE(Loss):
    """Mean of (s − t)² over batch and classes; given probabilities, of (p_s − p_t)²."""

    softens_logits = False

    def value(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """Return the unweighted loss."""
        return F.mse_loss(student, teacher)


class MAE(RowMean):
    """Mean of abs(s − t) over batch and classes; given probabilities, of abs(p_s − p_t)."""

    softens_logits = False

    def terms(self, student: Tensor, teacher: Tensor) -> Tensor:
        """abs(s − t)."""
        return (student - teacher).abs()


@dataclass(eq=False)
class TAID(Loss):
    """T² · mean KL(q‖p_s), q = softmax(((1 − τ)·stopgrad(s) + τ·t) / T), with τ rising as the student learns.

    After each step δ = (L_prev − L) / (L_prev + 1e-15), m ← β m + (1 − β) δ, Δ = α·sigmoid(m)·(1 − τ) and
    τ ← min(τ_end, max(τ_start + (τ_end − τ_start)·progress, τ + Δ)); the first step only records L.
    TAID, ICLR 2025, and its released code. τ never falls; at τ = 1 it is `kl`.

    Parameters
    ----------
    tau_start, tau_end
        First and last τ, in [0, 1].
    alpha
        Step size α of τ.
    beta
        Momentum β of the relative improvement, below 1.
    """

    tau_start: float = 0.4
    tau_end: float = 1.0
    alpha: float = 5e-4
    beta: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tau_start <= self.tau_end <= 1:
            raise UserError(f"loss=taid needs tau_start ≤ tau_end ≤ 1, got {self.tau_start} and {self.tau_end}")
        if self.beta >= 1:
            raise UserError(f"loss option beta={self.beta} must be below 1")
        self.tau = float(self.tau_start)
        self.momentum = 0.0
        self.previous: float | None = None

    def value(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """Return the unweighted loss."""
        T = self.temperature
        mixed = (1 - self.tau) * student.detach() + self.tau * teacher
        found = T * T * divergence(log_softened(mixed, T), (student / T).log_softmax(1)).mean()
        self.seen = found.detach()
        return found

    def after_step(self, loss_value: Tensor | float, progress: float) -> None:
        """Move τ by the relative improvement of the loss and the share of training done, in [0, 1]."""
        value = float(loss_value)
        if not math.isfinite(value):
            return  # a diverged step must not poison τ for good
        if self.previous is not None:
            improvement = (self.previous - value) / (self.previous + 1e-15)
            self.momentum = self.beta * self.momentum + (1 - self.beta) * improvement
            step = self.alpha * _sigmoid(self.momentum) * (1 - self.tau)
            goal = self.tau_start + (self.tau_end - self.tau_start) * progress
            self.tau = min(self.tau_end, max(goal, self.tau + step))
        self.previous = value

    def state_dict(self) -> dict[str, Tensor]:
        """Return τ, m, L_prev and whether there is an L_prev."""
        values = {
            "tau": self.tau,
            "momentum": self.momentum,
            "previous": 0.0 if self.previous is None else self.previous,
            "started": float(self.previous is not None),
        }
        return {key: torch.tensor(value, dtype=torch.float64) for key, value in values.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state_dict` gave."""
        self.tau = float(state["tau"])
        self.momentum = float(state["momentum"])
        self.previous = float(state["previous"]) if float(state["started"]) else None


@dataclass(eq=False)
class BDKD(Loss):
    """T² · mean of a·KL(p_t‖p_s) + b·KL(p_s‖p_t), weights by the sign of H(p_t) − H(p_s) per sample.

    A student more certain than its teacher gets the forward divergence emphasised (it spreads), one less
    certain the reverse (it concentrates), at equal entropies neither. BD-KD; side and constants are ours.

    Parameters
    ----------
    emphasis, other
        Weight of the emphasised divergence and of the other.
    """

    emphasis: float = 2.0
    other: float = 1.0

    def value(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """Return the unweighted loss."""
        T = self.temperature
        log_s, log_t = (student / T).log_softmax(1), log_softened(teacher, T)
        with torch.no_grad():
            gap = (log_s.exp() * log_s).sum(1) - (log_t.exp() * log_t).sum(1)
        high, low = torch.full_like(gap, self.emphasis), torch.full_like(gap, self.other)
        forward, reverse = torch.where(gap > 0, high, low), torch.where(gap < 0, high, low)
        return T * T * (forward * divergence(log_t, log_s) + reverse * divergence(log_s, log_t)).mean()


@dataclass(eq=False)
class DKD(Loss):
    """T² · mean of α·KL over (target, rest) + β·KL over the other classes, renormalised. DKD, CVPR 2022.

    Parameters
    ----------
    alpha
        Weight α of the target part.
    beta
        Weight β of the non-target part.
    """

    temperature: float = 4.0
    alpha: float = 1.0
    beta: float = 8.0

    needs_labels: ClassVar[bool] = True

    def value(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """Return the unweighted loss."""
        assert labels is not None
        T = self.temperature
        pair_s, rest_s = _target_and_rest((student / T).log_softmax(1), labels)
        pair_t, rest_t = _target_and_rest((teacher / T).log_softmax(1), labels)
        target, others = divergence(pair_t, pair_s), divergence(rest_t, rest_s)
        return T * T * (self.alpha * target + self.beta * others).mean()


def _target_and_rest(log_p: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return log (p_y, 1 − p_y), (B, 2), and log p over the other classes, renormalised, (B, C − 1)."""
    classes = torch.arange(log_p.shape[1], device=log_p.device)
    rest = log_p[classes != labels[:, None]].view(len(log_p), -1)
    total = rest.logsumexp(1, keepdim=True)
    return torch.cat([log_p.gather(1, labels[:, None]), total], 1), rest - total


def _sigmoid(x: float) -> float:
    # A loss that grew from almost 0 makes m hugely negative; exp(-m) would overflow.
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


LOSSES: dict[str, type[Loss]] = {
    "kl": KL,
    "reverse_kl": ReverseKL,
    "js": JS,
    "soft_ce": SoftCE,
    "mse": MSE,
    "mae": MAE,
    "taid": TAID,
    "bdkd": BDKD,
    "dkd": DKD,
}
