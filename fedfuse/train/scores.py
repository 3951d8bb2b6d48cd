"""What a model's predictions are worth on labelled examples."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
        NaN for fewer than two examples.
    """
    if len(y) < 2:
        return dict.fromkeys(("accuracy", "accuracy_macro", "loss"), float("nan"))
    right = logits.argmax(1) == y
    count = torch.bincount(y, minlength=classes)
    hits = torch.bincount(y[right], minlength=classes)
    present = count > 0
    return {
        "accuracy": right.double().mean().item(),
        "accuracy_macro": (hits[present].double() / count[present]).mean().item(),
        "loss": F.cross_entropy(logits.double(), y).item(),
    }
