"""Updates folded into the base weights of a federation: kept as factors while that is smaller, then dense.

A value maps layers to `<layer>.B` (d × n) and `<layer>.A` (n × k), whose product is Δ, or, once n·(d + k)
exceeds d·k, to `<layer>.W` (d × k) = Δ. An increment is always factors. Server and nodes fold alike, in
float64.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedfuse.train.adapters import layer_names
from fedfuse.wire.records import Arrays, Layout, Scope


def empty(layers: Mapping[str, tuple[int, int]]) -> Arrays:
    """Δ = 0 for layers of given (d, k): factors of rank 0, which cost nothing to send."""
    out: Arrays = {}
    for name, (d, k) in layers.items():
        out[f"{name}.B"], out[f"{name}.A"] = torch.zeros(d, 0), torch.zeros(0, k)
    return out


def fold(value: Arrays, increment: Arrays) -> Arrays:
    """Δ + B A, for each layer."""
    out: Arrays = {}
    for name in layer_names(increment, "B"):
        b, a = increment[f"{name}.B"], increment[f"{name}.A"]
        if f"{name}.W" in value:
            out[f"{name}.W"] = (value[f"{name}.W"].double() + b.double() @ a.double()).to(b.dtype)
            continue
        b, a = torch.cat([value[f"{name}.B"], b], 1), torch.cat([value[f"{name}.A"], a], 0)
        if b.numel() + a.numel() < len(b) * a.shape[1]:
            out[f"{name}.B"], out[f"{name}.A"] = b, a
        else:
            out[f"{name}.W"] = (b.double() @ a.double()).to(b.dtype)
    return out


def deltas(value: Arrays) -> Arrays:
    """Δ of each layer, as `<layer>.delta` (d × k)."""
    out: Arrays = {f"{name}.delta": value[f"{name}.W"] for name in layer_names(value, "W")}
    for name in layer_names(value, "B"):
        b, a = value[f"{name}.B"], value[f"{name}.A"]
        out[f"{name}.delta"] = (b.double() @ a.double()).to(b.dtype)
    return out


def compact(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with at most min(d, k) columns of B."""
    d, k = len(b), a.shape[1]
    if b.shape[1] <= min(d, k):
        return b, a
    product = b @ a
    return (torch.eye(d, dtype=b.dtype), product) if d <= k else (product, torch.eye(k, dtype=b.dtype))


def increments(scope: Scope) -> Layout:
    """Spec of an increment: factors of at most min(d, k) columns."""
    out: Layout = {}
    for name in layer_names(scope.model, "delta"):
        d, k = scope.model[f"{name}.delta"][1]
        out[f"{name}.B"] = "float32", (d, -min(d, k))
        out[f"{name}.A"] = "float32", (-min(d, k), k)
    return out
