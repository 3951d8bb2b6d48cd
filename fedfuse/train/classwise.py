"""Aggregates per class: means over a client's examples and over the clients that hold a class; the pull to them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fedfuse.wire.records import InvalidArrays


def class_means(values: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Return the mean of `values` per class and how many examples each class has.

    Parameters
    ----------
    values : Tensor
        One row per example, (n, d); n may be 0.
    labels : Tensor
        Classes of the rows, (n,) int64.
    classes : int
        Number of classes C.

    Returns
    -------
    means : Tensor
        (C, d), of `values`' dtype, computed in float64; zeros for a class without examples.
    counts : Tensor
        (C,) int64.
    """
    member = F.one_hot(labels, classes).double()  # a product, not index_add: the same bits on a GPU as well
    counts = torch.bincount(labels, minlength=classes)
    means = member.T @ values.double() / counts.clamp_min(1)[:, None]
    return means.to(values.dtype), counts


def check_counts(name: str, counts: Tensor, examples: int) -> None:
    """Raise `InvalidArrays` unless counts of classes (C) are counts of at most so many examples."""
    if bool((counts < 0).any()):
        raise InvalidArrays(f"{name}: negative")
    if (total := float(counts.double().sum())) > examples:  # whole numbers of 64 bits may wrap around
        raise InvalidArrays(f"{name}: {total:g} examples; the client has {examples}")


def mean_over_holders(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return, class by class, the weighted mean over the clients that hold the class, and which classes are held.

    A client without a class has weight 0 there and counts neither in the sum nor in the divisor.

    Parameters
    ----------
    values : Tensor
        (N, C, d): each client's aggregate per class; ignored where the weight is 0.
    weights : Tensor
        (N, C), non-negative: examples, or 1 for a holder.

    Returns
    -------
    means : Tensor
        (C, d) float64; zeros for a class that nobody holds.
    held : Tensor
        (C,) bool.
    """
    weights = weights.double()
    total = weights.sum(0)
    means = torch.einsum("nc,ncd->cd", weights, values.double()) / total.where(total > 0, 1.0)[:, None]
    return means, total > 0


def pull(z: Tensor, labels: Tensor, means: Tensor, held: Tensor) -> Tensor:
    """Return (1/(B·d)) Σ_i ‖z_i − m_{y_i}‖² over the examples whose class has a mean; the others are not pulled.

    Parameters
    ----------
    z : Tensor
        Embeddings (B × d).
    labels : Tensor
        Classes (B).
    means : Tensor
        m (C × d).
    held : Tensor
        Which classes have one (C) bool.
    """
    return F.mse_loss(z, torch.where(held[labels, None], means[labels], z.detach()))
