"""The loss of the task itself: cross-entropy of a class per example, or of the next token at every place."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # a label that does not count (padding)


def task_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy.

    Parameters
    ----------
    logits
        (B, C), or (B, T, V) of a language model.
    labels
        Classes (B,), or the tokens themselves (B, T): place t predicts token t + 1; `IGNORED` does not count.
    """
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def task_step(logits: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
    """The task's loss as `fedfuse.train.training.train` calls a loss."""
    return task_loss(logits, labels)


def task_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy by example, (B,): of a class, or the mean over the places of a text that count."""
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels, reduction="none")
    wanted = labels[:, 1:]
    places = F.cross_entropy(logits[:, :-1].transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none")
    return places.sum(1) / (wanted != IGNORED).sum(1).clamp(min=1)
