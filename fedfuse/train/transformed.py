"""Distillation objectives that transform the teacher, or look at something else than a divergence of distributions.

s, t: logits of student and teacher, (B, C); p_s = softmax(s), p_t = softmax(t). Means are over the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fedfuse.errors import UserError
from fedfuse.train.divergences import divergence
from fedfuse.train.objective import Loss, log_softened
from fedfuse.train.row_targets import RowMean


@dataclass(eq=False)
class TTM(RowMean):
    """Mean KL(q‖p_s), q = p_t^λ / Σ_c p_t^λ. TTM, ICLR 2024 (arXiv 2402.11148), and its code.

    λ = 1/T: q is softmax(λ t), and the student stays at temperature 1, so there is no T².

    Parameters
    ----------
    lam
        Power λ, in place of a temperature (which is refused other than 1).
    """

    lam: float = 0.25

    positive: ClassVar[tuple[str, ...]] = ("temperature", "lam")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature != 1:
            raise UserError(f"loss option temperature={self.temperature}: a power takes its place: set lam")

    def terms(self, student: Tensor, teacher: Tensor) -> Tensor:
        """KL(q‖p_s) by row."""
        return divergence(log_softened(teacher, 1 / self.lam), student.log_softmax(1))


class WTTM(TTM):
    """Mean of (Σ_c p_t^λ)·KL(q‖p_s): a teacher that is unsure counts for more, if λ < 1. WTTM, as TTM."""

    def value(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """Return the unweighted loss."""
        weights = (self.lam * log_softened(teacher, 1.0)).exp().sum(1)
        return (weights * self.terms(student, teacher)).mean()


@dataclass(eq=False)
class OFA(Loss):
    """−mean_b Σ_c [(p_t + 1_y)^ε − 1_y]·log p_s. OFA-KD, NeurIPS 2023 (arXiv 2310.19444); for differing architectures.

    At ε = 1 it is cross-entropy with the teacher's soft labels: with the task's own cross-entropy beside it, CE and KD.

    Parameters
    ----------
    epsilon
        Power ε on the target class's confidence, at least 1 in the paper.
    """

    epsilon: float = 1.5

    needs_labels: ClassVar[bool] = True
    positive: ClassVar[tuple[str, ...]] = ("temperature", "epsilon")

    def value(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """Return the unweighted loss."""
        assert labels is not None
        T = self.temperature
        target = F.one_hot(labels, student.shape[1]).to(student)
        weights = ((teacher / T).softmax(1) + target) ** self.epsilon - target
        return -(weights * (student / T).log_softmax(1)).sum(1).mean()


@dataclass(eq=False)
class ND(Loss):
    """mean_b [1 − ⟨s_b, c_y/‖c_y‖⟩ / max(‖s_b‖, ‖t_b‖)]. ND of KD++, 2023 (arXiv 2305.17007).

    c_y is the mean of the teacher's rows of class y in the batch (the paper: over all training data). A row that points
    as c_y does is still pulled while it is shorter than the teacher's, and no more once it is longer. Works on features
    of one size, or on logits; given probabilities, on probabilities.
    """

    needs_labels: ClassVar[bool] = True
    softens_logits: ClassVar[bool] = False

    def value(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """Return the unweighted loss."""
        assert labels is not None
        same = (labels[:, None] == labels).to(teacher)
        centres = F.normalize(same @ teacher / same.sum(1, keepdim=True), dim=1)
        longest = torch.maximum(student.norm(dim=1), teacher.norm(dim=1)).clamp_min(torch.finfo(student.dtype).tiny)
        return (1 - (student * centres).sum(1) / longest).mean()


@dataclass(eq=False)
class DHKD(Loss):
    """γ·CE(h₁) + T²·mean_b Σ_c KL(Bern(½)‖Bern(σ((s₂ − t)/T))). DHKD, 2024 (arXiv 2411.08937), and its code.

    s₂ are the logits of a second, linear head h₂ on the student's features. It stays with whom it is trained by, and
    predicts nothing. Where the divergence's gradient pulls against the cross-entropy's, over all parameters, it is
    projected off it. Without labels there is no cross-entropy: h₁ then learns from private data alone. A shift of the
    logits counts; given probabilities, logarithms of probabilities are compared. A class that the teacher excludes is
    held at the smallest number's logarithm.

    Parameters
    ----------
    gamma
        Weight γ of the cross-entropy (α is `weight`).
    heads
        2; or 1: the divergence on the student's own logits, without cross-entropy and projection.
    """

    temperature: float = 2.0
    gamma: float = 1.0
    heads: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads not in (1, 2):
            raise UserError(f"loss option heads={self.heads} must be 1 or 2")
        if self.heads == 1 and self.gamma != 1:
            raise UserError(f"loss option gamma={self.gamma:g}: heads=1 brings no cross-entropy; allowed: 1")

    @property
    def second_head(self) -> bool:
        """Two heads are what the paper trains."""
        return self.heads == 2

    def __call__(
        self,
        student_logits: Tensor,
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        state: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Compare the second head's logits, where there is one; else those given."""

        def compare(s: Tensor) -> Tensor:
            return super(DHKD, self).__call__(s, teacher, labels, state=state)

        return self._with_heads(student_logits, labels, compare)

    def from_probabilities(
        self,
        student_logits: Tensor,
        probabilities: Tensor,
        labels: Tensor | None = None,
        *,
        softened: float = 1.0,
        state: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Compare the second head's logits, where there is one; else those given."""

        def compare(s: Tensor) -> Tensor:
            return super(DHKD, self).from_probabilities(s, probabilities, labels, softened=softened, state=state)

        return self._with_heads(student_logits, labels, compare)

    def _with_heads(self, logits: Tensor, labels: Tensor | None, compare: Callable[[Tensor], Tensor]) -> Tensor:
        if (heads := self.heads_of) is None:
            return compare(logits)
        value: Tensor = heads.beside(compare(heads(logits)), logits, labels, self.gamma)
        return value

    def state_dict(self) -> dict[str, Tensor]:
        """Return the second head's weights, where there is one."""
        if self.heads_of is None:
            return {}
        return {name: value.detach().clone() for name, value in self.heads_of.second.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on with a second head."""
        if self.heads_of is not None:
            self.heads_of.second.load_state_dict(state)

    def value(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """Return the unweighted loss."""
        T = self.temperature
        apart = (student - teacher.clamp_min(FLOOR)) / T
        # KL(½‖σ(x)) = −½ log σ(x) − ½ log σ(−x) − log 2
        return T * T * (-0.5 * (F.logsigmoid(apart) + F.logsigmoid(-apart)) - LOG_2).sum(1).mean()

    def value_of_probabilities(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """Return the unweighted loss on logarithms of probabilities."""
        return self.value(student.log_softmax(1), teacher.log_softmax(1), labels)


FLOOR, LOG_2 = -87.0, math.log(2)  # the logarithm of about the smallest normal float32, and of 2

LOSSES: dict[str, type[Loss]] = {"ttm": TTM, "wttm": WTTM, "nd": ND, "ofa": OFA, "dhkd": DHKD}
