"""What a model's predictions are worth on labelled examples."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fedfuse.train.task import IGNORED

CHUNK = 64  # texts whose logits are held at once


@torch.no_grad()
def scores(logits: Tensor, y: Tensor, classes: int) -> dict[str, float]:
    """Score predictions.

    Parameters
    ----------
    logits
        Shape (n, classes).
    y
        Labels of shape (n,).
    classes
        Number of classes.

    Returns
    -------
    dict
        `accuracy`, `accuracy_macro` (mean over the classes present in `y`) and `loss` (mean cross-entropy);
        NaN for fewer than two examples. Where a prediction is not a number it counts as wrong, and `undefined`
        is the share of such.
    """
    if len(y) < 2:
        return dict.fromkeys(("accuracy", "accuracy_macro", "loss"), float("nan"))
    defined = logits.isfinite().all(1)
    right = (logits.argmax(1) == y) & defined
    count = torch.bincount(y, minlength=classes)
    hits = torch.bincount(y[right], minlength=classes)
    present = count > 0
    lost = {} if defined.all() else {"undefined": 1 - defined.double().mean().item()}
    return {
        **lost,
        "accuracy": right.double().mean().item(),
        "accuracy_macro": (hits[present].double() / count[present]).mean().item(),
        "loss": F.cross_entropy(logits.double(), y).item(),
    }


@torch.no_grad()
def scored(predict: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, classes: int) -> dict[str, float]:
    """Score a model that predicts classes, or next tokens where `y` are the tokens (n, T) themselves.

    Returns
    -------
    dict
        As `scores`; for next tokens `accuracy` counts tokens (and is `accuracy_macro`), `loss` is per token, and
        `perplexity` = exp(loss).
    """
    if y.ndim == 1:
        return scores(predict(x), y, classes)
    right = count = 0
    loss = 0.0
    for part, labels in zip(x.split(CHUNK), y.split(CHUNK), strict=True):  # logits over a vocabulary are large
        logits, wanted = predict(part)[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        loss += F.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum").item()
        right += int((logits.argmax(1) == wanted).sum())
        count += int((wanted != IGNORED).sum())
    if not count:
        return dict.fromkeys(("accuracy", "accuracy_macro", "loss", "perplexity"), math.nan)
    accuracy, mean = right / count, loss / count
    return {"accuracy": accuracy, "accuracy_macro": accuracy, "loss": mean, "perplexity": math.exp(min(mean, 700.0))}
