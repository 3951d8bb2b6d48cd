"""MKL's kernels give the same bits wherever in memory an array lies, in every process that fedfuse computes in."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import fedfuse  # noqa: F401  # says so to MKL
from fedfuse.compat import mkl

SHAPES = [(1, 8, 8), (10, 784, 10), (1, 64, 10), (2, 21, 10), (33, 100, 77)]


def elsewhere(value: torch.Tensor, offset: int) -> torch.Tensor:
    """The same numbers, so many bytes behind a cache line's beginning."""
    room = torch.empty(value.numel() * value.element_size() + 128, dtype=torch.uint8)
    start = -room.data_ptr() % 64 + offset
    moved = room[start : start + value.numel() * value.element_size()].view(value.dtype).view(value.shape)
    return moved.copy_(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_do_not_depend_on_where_an_array_lies(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """A resumed run reads its arrays from files, and clients abreast have rows of common arrays."""
    m, k, n = shape
    draw = torch.Generator().manual_seed(0)
    x, w = torch.randn(m, k, generator=draw, dtype=dtype), torch.randn(n, k, generator=draw, dtype=dtype)
    v = torch.randn(k, generator=draw, dtype=dtype)
    want = x @ w.t(), x @ v, torch.dot(x[0], v), (x @ w.t()) @ w
    for offset in range(0, 64, x.element_size()):
        a, b, c = (elsewhere(one, offset) for one in (x, w, v))
        for p, q, r in ((a, w, v), (x, b, v), (x, w, c), (a, b, c)):
            for got, one in zip((p @ q.t(), p @ r, torch.dot(p[0], r), (p @ q.t()) @ q), want, strict=True):
                assert torch.equal(got, one), offset


FIRST = {"import fedfuse": "True", "torch.ones(9, 9) @ torch.ones(9, 9)": "False"}


@pytest.mark.skipif(mkl.steady() is None, reason="this torch has no MKL that can be asked")
@pytest.mark.parametrize("first", FIRST)
def test_who_computed_before_is_warned(first: str) -> None:
    then = "import fedfuse; torch.ones(9, 9) @ torch.ones(9, 9); from fedfuse.compat.mkl import steady; print(steady())"
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)}
    said = subprocess.check_output([sys.executable, "-c", f"import torch; {first}; {then}"], env=environment, text=True)
    assert said.strip() == FIRST[first]
