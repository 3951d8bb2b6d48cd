"""Mentors: models ranked by their loss on labelled rows; each is taught by those that are no worse than itself.

With CE_m the mean cross-entropy of model m on the rows, worth_m = 1 unless its share is stale, and N models:

    r_m = worth_m·exp(−CE_m);    w_m = (N − 1)·r_m / Σ_j r_j
    model n's mentors:  m ≠ n with w_m ≥ w_n, each at τ_nm = 1 + 12·|w_m − w_n| / max(w_m, w_n)
    model n's loss:     w_n·CE + Σ_m w_m·KL_{τ_nm}(p_m ‖ p_n)

Rule: Sarode et al. 2024, arXiv 2409.20237, who rank anew on every batch; here it is done once, where all outputs are.
KL_τ is the platform's, with τ² (theirs has (τ − 1)², by which a mentor as good as its student teaches nothing).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fedfuse.train.objective import Loss
from fedfuse.wire.records import Arrays, InvalidArrays, Layout, Scope

SLOPE = 12.0  # what a temperature rises by, from a mentor as good as its student to one infinitely better
_WORST = 1e4  # a row's loss where the right class has probability 0, so that a model's mean stays a number


def standing(logits: Tensor, labels: Tensor, worth: Tensor | None = None) -> Tensor:
    """w of each model.

    Parameters
    ----------
    logits : Tensor
        Or logarithms of probabilities, of each model on each row (N × T × C).
    labels : Tensor
        Classes of the rows (T).
    worth : Tensor, optional
        What each model counts for (N), by its staleness. Default: 1.

    Returns
    -------
    Tensor
        (N), summing to N − 1.
    """
    n, rows, classes = logits.shape
    ce = F.cross_entropy(logits.reshape(-1, classes), labels.repeat(n), reduction="none").clamp_max(_WORST)
    log_r = -ce.view(n, rows).mean(1)
    return (n - 1) * (log_r if worth is None else log_r + worth.log()).softmax(0)


def mentors(w: Tensor, able: Tensor | None = None) -> Tensor:
    """Row n says which models teach n (N × N): others with w_m ≥ w_n, of those that are able (N) to teach."""
    out = (w[None] >= w[:, None]) & ~torch.eye(len(w), dtype=torch.bool)
    return out if able is None else out & able


def temperatures(w: Tensor) -> Tensor:
    """τ_nm (N × N), 1 where two models are alike."""
    return 1 + SLOPE * (w[None] - w[:, None]).abs() / torch.maximum(w[None], w[:, None])


def lesson(n: int, p: Tensor, w: Tensor, able: Tensor | None = None) -> Arrays:
    """What model n is taught.

    Parameters
    ----------
    n : int
    p : Tensor
        Probabilities of all models (N × T × C).
    w, able : Tensor
        As of `mentors`.

    Returns
    -------
    dict of str to Tensor
        `own` (1): w_n; for its M mentors `p` (M × T × C), `weight` (M) and `temperature` (M).
    """
    who = mentors(w, able)[n]
    found = {"own": w[n : n + 1], "p": p[who], "weight": w[who], "temperature": temperatures(w)[n, who]}
    return {name: value.float() for name, value in found.items()}


def lessons(scope: Scope) -> Layout:
    """Layout of a lesson: at most as many mentors as there are clients."""
    most, kind = -scope.dims["clients"], "float32"
    rows = (most, scope.dims["subset"], scope.dims["classes"])
    return {"own": (kind, (1,)), "p": (kind, rows), "weight": (kind, (most,)), "temperature": (kind, (most,))}


def objective(
    taught: Arrays, loss: Callable[..., Loss], softened: float = 1.0
) -> Callable[[Tensor, Tensor | None, Tensor], Tensor]:
    """`step(logits, labels, rows)` for `train`: w_n·CE + Σ_m w_m·KL_τ.

    Parameters
    ----------
    taught : dict of str to Tensor
        A `lesson`, on the model's device.
    loss : callable
        `loss("kl", temperature=τ)` makes one mentor's objective, as `FusionClient.loss` does.
    softened : float
        The temperature that `p` was softened with.
    """
    weights, heat = taught["weight"].tolist(), taught["temperature"].tolist()
    if not len(weights) == len(heat) == len(taught["p"]):
        raise InvalidArrays(f"a lesson of {len(taught['p'])} mentors has {len(weights)} weights, {len(heat)} τ")
    if any(one < 1 for one in heat):
        raise InvalidArrays("a lesson has a temperature below 1")
    steps = [loss("kl", temperature=t).towards(p, softened=softened) for t, p in zip(heat, taught["p"], strict=True)]
    (own,) = taught["own"].tolist()

    def step(logits: Tensor, y: Tensor | None, rows: Tensor) -> Tensor:
        value = own * F.cross_entropy(logits, y) if y is not None else 0 * logits.sum()
        return sum((w * one(logits, y, rows) for w, one in zip(weights, steps, strict=True)), value)

    return step
