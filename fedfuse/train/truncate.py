"""Updates as truncated singular value decompositions: the least rank that keeps a share of the energy Σσ²."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedfuse.wire.records import Arrays, InvalidArrays, Layout


def truncate(matrix: Tensor, energy: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (m × r), σ (r,) and V (r × n) with the least r such that Σ_{i≤r} σ_i² ≥ energy·Σ σ_i².

    The full rank is one of the candidates, so that some r always satisfies it; `energy=1` keeps all of it. A matrix
    of zeros has r = 0. Computed in float64.
    """
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    squares = s.square()
    if energy >= 1:
        rank = len(s)
    else:
        rank = min(len(s), int((squares.cumsum(0) < energy * squares.sum()).sum()) + 1)
    if not bool(squares.sum() > 0):
        rank = 0
    return u[:, :rank], s[:rank], v[:rank]


def most(shape: tuple[int, ...]) -> int:
    """Return the largest rank at which factors are smaller than the matrix; 0 for what is no matrix."""
    if len(shape) < 2 or 0 in shape:
        return 0
    m, n = shape[0], math.prod(shape[1:])
    return min((m * n - 1) // (m + n + 1), m, n)


def packed_layout(layout: Layout) -> Layout:
    """Return the layout of a packed update: of each matrix its factors, or (where they are longer) the whole."""
    vectors = {name: (dtype, shape) for name, (dtype, shape) in layout.items() if not most(shape)}
    out = dict(vectors)
    for name, (dtype, shape) in layout.items():
        if r := most(shape):
            m, n = shape[0], math.prod(shape[1:])
            out[f"{name}.u"], out[f"{name}.s"] = (dtype, (m, -r)), (dtype, (-r,))
            out[f"{name}.v"], out[f"{name}.whole"] = (dtype, (-r, n)), (dtype, (-m, n))
    return out


def pack(update: Arrays, energy: float) -> Arrays:
    """Truncate every matrix of an update; convolutions are matrices of their first dimension by the rest.

    Returns
    -------
    dict
        Laid out as `packed_layout` says; what a matrix does not need has no rows or columns. Floats are float32.
    """
    matrices = {name for name, value in update.items() if value.is_floating_point() and most(tuple(value.shape))}
    out: Arrays = {}
    for name, value in update.items():
        if name not in matrices:
            out[name] = value.float() if value.is_floating_point() else value
    for name in update:
        if name in matrices:
            matrix = update[name].flatten(1)
            u, s, v = truncate(matrix, energy)
            whole = matrix[:0]
            if len(s) > most(tuple(update[name].shape)):
                u, s, v, whole = u[:, :0], s[:0], v[:0], matrix
            parts = {"u": u, "s": s, "v": v, "whole": whole}
            out |= {f"{name}.{part}": value.float().contiguous() for part, value in parts.items()}
    return out


def unpack(packed: Mapping[str, Tensor], like: Arrays) -> Arrays:
    """Return the update that was packed, each array of the shape and dtype of its namesake in `like`."""
    out: Arrays = {}
    for name, value in like.items():
        if f"{name}.u" not in packed:
            out[name] = packed[name].to(value.dtype)
        elif len(packed[f"{name}.whole"]):
            out[name] = packed[f"{name}.whole"].reshape(value.shape).to(value.dtype)
        else:
            u, s, v = (packed[f"{name}.{part}"].double() for part in "usv")
            out[name] = ((u * s) @ v).reshape(value.shape).to(value.dtype)
    return out


def check_packed(packed: Mapping[str, Tensor], layout: Layout) -> None:
    """Refuse factors that do not fit together.

    Raises
    ------
    InvalidArrays
        If the ranks of a matrix's factors differ, or it is sent whole and in factors, or in part.
    """
    for name, (_, shape) in layout.items():
        if not most(shape):
            continue
        ranks = {packed[f"{name}.u"].shape[1], packed[f"{name}.s"].shape[0], packed[f"{name}.v"].shape[0]}
        rows = len(packed[f"{name}.whole"])
        if len(ranks) > 1 or rows not in (0, shape[0]) or (rows and ranks != {0}):
            raise InvalidArrays(f"update/{name}: factors of ranks {sorted(ranks)} and {rows} whole rows do not fit")
