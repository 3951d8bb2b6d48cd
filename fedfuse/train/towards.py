"""Teachers whose rows stand beside the examples: an objective as a training calls a loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from fedfuse.train.objective import Loss

_FLOOR = -1e4  # stands for log 0: exp of it is 0 at every temperature used, yet 0 · _FLOOR is 0 and not NaN


class Towards:
    """An objective as `train` calls a loss, whose teacher's rows stand beside the examples.

    Parameters
    ----------
    loss
    teacher
        Probabilities (n, C), or logits if `softened` is None.
    softened
        The temperature that probabilities were softened with already.
    """

    def __init__(self, loss: Loss, teacher: Tensor, softened: float | None) -> None:
        self.loss, self.teacher, self.softened = loss, teacher, softened

    def __call__(self, logits: Tensor, labels: Tensor | None, rows: Tensor) -> Tensor:
        """Compare the logits of a batch with its rows' teacher."""
        if self.softened is None:
            return self.loss(logits, self.teacher[rows], labels)
        return self.loss.from_probabilities(logits, self.teacher[rows], labels, softened=self.softened)

    def ready(self, teacher: Tensor) -> Tensor:
        """Some of the teacher's rows as the logits that the objective compares with."""
        return finite(teacher) if self.softened is None else as_logits(teacher, self.softened)


def as_logits(probabilities: Tensor, softened: float) -> Tensor:
    """Logits of probabilities that were softened with a temperature already."""
    logits = probabilities.detach().log()
    return (logits if softened == 1 else (softened * logits).log_softmax(1)).clamp_min(_FLOOR)


def finite(logits: Tensor) -> Tensor:
    """A teacher's logits, detached, whose excluded classes are only very unlikely."""
    return logits.detach().clamp_min(_FLOOR)
