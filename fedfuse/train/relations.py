"""Distillation objectives on a batch as a whole: transport between predictions, relations between rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fedfuse.train.objective import Loss


@dataclass(eq=False)
class Sinkhorn(Loss):
    """Σ P∘M with M_ij = ‖p_s,i − p_t,j‖₁ and P the entropic transport plan. SinKD, LREC-COLING 2024.

    P comes from K = exp(−M/ε) by alternating row and column normalisations, in log space since K underflows
    as ε → 0. It depends on the batch; as ε → 0 it tends to the cost of the optimal assignment. The paper adds
    it to other losses with a weight of about 8e-4.

    Parameters
    ----------
    epsilon
        Entropic regularisation ε.
    iterations
        Number of row and column normalisations.
    """

    temperature: float = 2.0
    epsilon: float = 0.1
    iterations: int = 20

    positive: ClassVar[tuple[str, ...]] = ("temperature", "epsilon", "iterations")

    def value(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """Return the unweighted loss."""
        p_s, p_t = (student / self.temperature).softmax(1), (teacher / self.temperature).softmax(1)
        cost = (p_s[:, None] - p_t).abs().sum(2)
        log_plan = -cost / self.epsilon
        for _ in range(int(self.iterations)):
            log_plan = log_plan.log_softmax(1).log_softmax(0)
        return (log_plan.exp() * cost).sum()


@dataclass(eq=False)
class RKD(Loss):
    """Huber loss between pairwise distances (over their mean) and between cosines of all triples. CVPR 2019.

    Works on logits or on features, which may differ in size; means run over all B² pairs and B³ triples, as
    in the published code. Given probabilities, it relates probabilities.

    Parameters
    ----------
    distance_weight, angle_weight
        Weights of the two terms.
    """

    distance_weight: float = 25.0
    angle_weight: float = 50.0

    min_batch: ClassVar[int] = 3
    same_width: ClassVar[bool] = False
    softens_logits: ClassVar[bool] = False

    def value(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """Return the unweighted loss."""
        distance_s, cosine_s = _relations(student)
        distance_t, cosine_t = _relations(teacher)
        distance, angle = F.smooth_l1_loss(distance_s, distance_t), F.smooth_l1_loss(cosine_s, cosine_t)
        return self.distance_weight * distance + self.angle_weight * angle


def _relations(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return distances over their mean between distinct rows, (B, B), and cosines at each row, (B, B, B)."""
    steps = rows.flatten(1)[None] - rows.flatten(1)[:, None]
    distance = torch.linalg.vector_norm(steps, dim=2)  # its gradient at 0 is 0, unlike a square root's
    count = len(rows) * (len(rows) - 1)
    tiny = torch.finfo(rows.dtype).tiny
    directions = F.normalize(steps, dim=2)
    return distance / (distance.sum() / count).clamp_min(tiny), directions @ directions.transpose(1, 2)


LOSSES: dict[str, type[Loss]] = {"sinkhorn": Sinkhorn, "rkd": RKD}
