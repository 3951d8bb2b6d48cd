"""What an update is worth that was made from a version τ older: s(τ)."""

from __future__ import annotations


def discount(kind: str, age: int, a: float, b: int) -> float:
    """s(τ) of Xie et al. 2019, arXiv 1903.03934: 1 | (1+τ)^−a | 1 if τ ≤ b, else 1/(a·(τ−b)+1).

    FedBuff's 1/√(1+τ) is the polynomial with a = ½.
    """
    if kind == "constant":
        return 1.0
    if kind == "polynomial":
        return float((1 + age) ** -a)
    return 1.0 / (a * max(age - b, 0) + 1)
