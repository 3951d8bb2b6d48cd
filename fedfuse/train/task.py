"""The loss of the task itself: cross-entropy of a class per example, or of the next token at every place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedfuse.data.dataset import IGNORED
from fedfuse.errors import UserError
from fedfuse.models.in_place import evaluating

__all__ = ["IGNORED", "check_order", "task_loss", "task_losses", "trimmed"]

AHEAD = 1e-3  # of the greatest logit; less is what rounding may leave


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


def trimmed(labels: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Labels (B, T) and what goes with them, without the last places that count in no row: nothing before reads them.

    At least two places are left. Labels of classes, and rows without any place to leave out, are returned as they are.
    """
    if labels.ndim == 1 or labels.shape[1] < 3 or bool((labels[:, -1] != IGNORED).any()):
        return (labels, *others)
    counted = (labels != IGNORED).any(0).nonzero()
    length = max(2, int(counted[-1]) + 1 if len(counted) else 0)
    return tuple(one[:, :length] for one in (labels, *others))


@torch.no_grad()
def check_order(model: nn.Module, architecture: str, length: int, vocabulary: int) -> None:
    """Refuse a model of next tokens that reads the tokens it is asked for, as BERT does: its figures say nothing.

    It is asked: what stands in the second half of a text must not change the logits of the first half.

    Raises
    ------
    UserError
        Naming the model.
    """
    x, half = torch.arange(1, min(length, 16) + 1) % vocabulary, min(length, 16) // 2
    if not half:
        return
    texts = torch.stack([x, torch.cat([x[:half], (x[half:] + 1) % vocabulary])])
    try:
        with evaluating(model):
            logits = model(texts.to(next(model.parameters()).device))
    except Exception:  # it fails at the first batch as well, where that is told
        return
    if logits.ndim != 3:  # no model of next tokens at all
        return
    first, second = logits[:, :half]
    if bool((first - second).abs().max() > AHEAD * first.abs().max()):
        raise UserError(
            f"model={architecture} reads the tokens that it is to predict: its logits at a place change with the text "
            f"after it; allowed is a causal model"
        )
