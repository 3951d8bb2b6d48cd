"""Objectives whose teachers stand row by row beside the examples, and which are means: of several clients at once, too.

A client alone computes such an objective batch by batch. Of clients in step it is computed once, over the rows of all
of them, each client's mean over its own rows alone: to the last bit the same, and so is the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedfuse.train.objective import Loss
from fedfuse.train.towards import Towards

WIDTH = 16  # numbers that a processor's widest instruction takes; what is left over is rounded by itself


class RowMean(Loss):
    """An objective that is a factor times the mean of terms, each of which looks at one row only."""

    @property
    def factor(self) -> float:
        """What the mean is multiplied by."""
        return 1.0

    def terms(self, student: Tensor, teacher: Tensor) -> Tensor:
        """What each row adds, (B,), or each of its numbers, (B, C)."""
        raise NotImplementedError

    def value(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """Return the unweighted loss."""
        return self.factor * self.terms(student, teacher).mean()


def kind_of(loss: Any) -> Any:
    """What clients' losses must have in common to be computed at once; None of a loss that never is."""
    if type(loss) is not Towards or not isinstance(loss.loss, RowMean):
        return None
    kind = type(loss.loss)
    ways = ("__call__",) if loss.softened is None else ("from_probabilities", "value_of_probabilities")
    if any(getattr(kind, way) is not getattr(RowMean, way) for way in ("value", *ways)):  # it has one of its own
        return None
    if loss.softened is not None and not kind.softens_logits:  # its terms are of probabilities, `ready` gives logits
        return None
    settings = tuple(vars(loss.loss).items())
    if not all(value is None or isinstance(value, int | float | str) for _, value in settings):
        return None
    return kind, settings, loss.softened, loss.teacher.dtype, loss.teacher.shape[1:]


def losses_of(losses: Sequence[Towards], out: Tensor, rows: Sequence[Tensor]) -> Tensor | None:
    """Losses (K,) of clients with logits (K, B, C), of one kind, whose gradient is put into that of the logits.

    None, and nothing is done, where the bits would not be each one's own.
    """
    if out.is_cuda or out[0].numel() % WIDTH or out.shape[2:] != losses[0].teacher.shape[1:]:
        return None
    loss: Any = losses[0].loss
    teacher = torch.cat([one.teacher.index_select(0, own) for one, own in zip(losses, rows, strict=True)])
    terms: Tensor = loss.terms(out.flatten(0, 1), losses[0].ready(teacher))
    each = terms[: out.shape[1]].numel()
    # from a single number: given a gradient for each, torch imports sympy to compare shapes, 0.3 s of every process
    (terms.sum() * (loss.factor * (loss.weight * torch.ones(()))).div(each)).backward()
    return loss.weight * (loss.factor * terms.detach().view(len(out), -1).mean(1))  # type: ignore[no-any-return]
