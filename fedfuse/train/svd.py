"""Leading singular triples: exact, by a seeded random projection, or of a product of thin factors without the product.

The randomised way (Halko, Martinsson and Tropp 2011, arXiv 0909.4061) multiplies by a few random vectors more than are
wanted, with some power iterations, orthonormalised in between. Its vectors are drawn from a generator that the shape
seeds, so that every machine finds the same. What it misses is small where the spectrum falls, and some percent of the
energy where it is flat, as that of a matrix of signs is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedfuse.seeding import generator

WAYS = ("auto", "exact", "randomised")
OVERSAMPLE = 10  # random vectors beyond those wanted
ITERATIONS = 4  # of the power method
LARGE = 256  # `auto` is exact for layers with a side below this
Factors = tuple[Tensor, Tensor]  # B (d × n) and A (n × k) of a matrix B A

Triples = tuple[Tensor, Tensor, Tensor]


def leading(matrix: Tensor, rank: int, way: str = "exact") -> Triples:
    """U_r (d × r), S_r (r), V_rᵀ (r × k) of a matrix (d × k), in float64.

    In each column of U the entry of largest size is positive.

    Parameters
    ----------
    way : {"exact", "randomised", "auto"}
        `auto` is randomised for large matrices of which less than a quarter of the triples is wanted.
    """
    least = min(matrix.shape)
    if way == "auto":
        way = "randomised" if least >= LARGE and 4 * (rank + OVERSAMPLE) <= least else "exact"
    if way == "exact" or rank + OVERSAMPLE >= least:
        return _signed(torch.linalg.svd(matrix.double(), full_matrices=False), rank)
    m = matrix.double()
    draw = generator("singular vectors", *matrix.shape, rank)
    q = m @ torch.randn(m.shape[1], rank + OVERSAMPLE, dtype=m.dtype, generator=draw).to(m.device)
    for _ in range(ITERATIONS):
        q = m @ _range(m.T @ _range(q))
    q = _range(q)
    u, s, vt = torch.linalg.svd(q.T @ m, full_matrices=False)
    return _signed((q @ u, s, vt), rank)


def of_factors(factors: Factors, rank: int) -> Triples:
    """The same of B A, exactly, without the product: by the singular values of a core as small as B is thin."""
    left, upper = torch.linalg.qr(factors[0].double())
    right, lower = torch.linalg.qr(factors[1].double().T)
    u, s, vt = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    return _signed((left @ u, s, vt @ right.T), rank)


def square_norm(matrix: Tensor | Factors) -> Tensor:
    """‖M‖² of a matrix, or of the product of factors."""
    if isinstance(matrix, Tensor):
        return matrix.double().square().sum()
    b, a = matrix[0].double(), matrix[1].double()
    return ((b.T @ b) * (a @ a.T)).sum()


def _range(matrix: Tensor) -> Tensor:
    return torch.linalg.qr(matrix)[0]


def _signed(triples: Triples, rank: int) -> Triples:
    u, s, vt = triples[0][:, :rank], triples[1][:rank], triples[2][:rank]
    at = u.abs().argmax(0, keepdim=True)
    sign = torch.where(u.gather(0, at) < 0, -1.0, 1.0)
    return u * sign, s, vt * sign.T
