"""What a model's predictions are worth on labelled examples."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fedfuse.data.dataset import SCORED
from fedfuse.train.task import IGNORED, trimmed

CHUNK = 64  # texts whose logits are held at once
NUMBERS = 1 << 22  # that are scored at once: in float64 a thousand classes take five times their logits


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
        is the share of such. `constant` is there, and 1, where examples of several classes all get one answer.
    """
    if len(y) < SCORED:
        return dict.fromkeys(("accuracy", "accuracy_macro", "loss"), float("nan"))
    rows = max(1, NUMBERS // classes)
    defined = torch.cat([part.isfinite().all(1) for part in logits.split(rows)])
    answers = logits.argmax(1)
    right = (answers == y) & defined
    count = torch.bincount(y, minlength=classes)
    hits = torch.bincount(y[right], minlength=classes)
    present = count > 0
    loss = sum(
        F.cross_entropy(part.double(), wanted, reduction="sum").item()
        for part, wanted in zip(logits.split(rows), y.split(rows), strict=True)
    )
    lost = {} if defined.all() else {"undefined": 1 - defined.double().mean().item()}
    if not lost and int(present.sum()) > 1 and bool((answers == answers[0]).all()):
        lost = {"constant": 1.0}
    return {
        **lost,
        "accuracy": right.double().mean().item(),
        "accuracy_macro": (hits[present].double() / count[present]).mean().item(),
        "loss": loss / len(y),
    }


@torch.no_grad()
def scored(
    predict: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, classes: int, byte_count: int | None = None
) -> dict[str, float]:
    """Score a model that predicts classes, or next tokens where `y` are the tokens (n, T) themselves.

    Parameters
    ----------
    byte_count
        UTF-8 bytes that all the predicted tokens stand for, where it is known.

    Returns
    -------
    dict
        As `scores`; for next tokens `accuracy` counts tokens (and is `accuracy_macro`), `loss` is per token, and
        `perplexity` = exp(loss). With a byte count, `bits_per_byte` = total loss / (bytes · ln 2), which does not
        depend on the tokenizer. Where texts begin with a prompt, `exact_match` is the share of texts of whose tokens
        to predict each is the likeliest: those that greedy generation would give word for word.
    """
    if y.ndim == 1:
        return scores(predict(x), y, classes)
    right = count = exact = lost = 0
    loss = 0.0
    for part, labels in zip(x.split(CHUNK), y.split(CHUNK), strict=True):  # logits over a vocabulary are large
        labels, part = trimmed(labels, part)
        logits, wanted = predict(part)[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        loss += F.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum").item()
        defined = (logits < math.inf).all(1)  # a token that a model excludes may have -inf
        hits = (logits.argmax(1) == wanted) & defined
        lost += int((~defined & (wanted != IGNORED)).sum())
        right += int(hits.sum())
        exact += int((hits | (wanted == IGNORED)).view(labels.shape[0], labels.shape[1] - 1).all(1).sum())
        count += int((wanted != IGNORED).sum())
    prompted = bool((y[:, 1:2] == IGNORED).any())
    names = ["accuracy", "accuracy_macro", "loss", "perplexity"]
    names += ["bits_per_byte"] * (byte_count is not None) + ["exact_match"] * prompted
    if not count:
        return dict.fromkeys(names, math.nan)
    accuracy, mean = right / count, loss / count
    found = {"accuracy": accuracy, "accuracy_macro": accuracy, "loss": mean, "perplexity": math.exp(min(mean, 700.0))}
    if lost:
        found["undefined"] = lost / count
    if byte_count is not None:
        found["bits_per_byte"] = loss / (byte_count * math.log(2)) if byte_count else math.nan
    return {**found, "exact_match": exact / len(y)} if prompted else found
