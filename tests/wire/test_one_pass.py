"""Compiled loops add and look as torch does, to the bit, and are left alone where they do not fit or are not there."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedfuse.wire import one_pass
from fedfuse.wire.one_pass import INFINITE, Loops, Patience, add_scaled, compiled, finite, patience, scaled

LOOPS = compiled()
needs_compiler = pytest.mark.skipif(LOOPS is None, reason="llvmlite is not installed")
SINGLE = st.floats(width=32, allow_nan=False, allow_infinity=False)
WEIGHTS = st.one_of(st.integers(0, 2**31).map(float), st.floats(0, 1e6))


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "left", 0)


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "left", 2**60)


def plain(total: torch.Tensor, value: torch.Tensor, weight: float) -> torch.Tensor:
    return total + value.double() * weight


@needs_compiler
@given(arrays(np.float32, st.integers(1, 70), elements=SINGLE), WEIGHTS, st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_products_and_sums_are_rounded_as_torch_rounds_them(value: np.ndarray, weight: float, seed: int) -> None:
    assert LOOPS is not None
    total = torch.randn(len(value), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    total[seed % len(value)] = -0.0
    x, expected = torch.from_numpy(value), plain(total, torch.from_numpy(value), weight)
    LOOPS.add(total.data_ptr(), x.data_ptr(), len(value), weight)
    assert torch.equal(total.view(torch.int64), expected.view(torch.int64))
    LOOPS.store(total.data_ptr(), x.data_ptr(), len(value), weight)
    assert torch.equal(total.view(torch.int64), (x.double() * weight).view(torch.int64))


@needs_compiler
@pytest.mark.parametrize("size", [1, 7, 8, 33, 5000])
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_seen_wherever_it_stands(size: int, odd: float, at_once: None) -> None:
    value = torch.full((size,), torch.finfo(torch.float32).max)
    assert finite(value)
    for place in {0, size // 2, size - 1}:
        spoilt = value.clone()
        spoilt[place] = odd
        assert not finite(spoilt)


def test_torch_looks_as_far(never: None) -> None:
    assert finite(torch.full((9,), torch.finfo(torch.float32).max))  # whose sum is not
    assert not finite(torch.tensor([1.0, float("nan")]))
    assert not finite(torch.tensor([1.0, -float("inf")]))


@needs_compiler
def test_only_flat_single_precision_is_handed_to_them(at_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("handed over")

    monkeypatch.setattr(one_pass, "compiled", lambda: Loops(refuse, refuse, refuse, None))  # type: ignore[arg-type]
    wide = torch.arange(12.0).view(3, 4)
    for value in (wide.double(), wide.half(), wide.int(), wide.T, wide[:, :2], torch.empty(0)):
        total = torch.ones(value.shape, dtype=torch.float64)
        add_scaled(total, value, 3.0)
        assert torch.equal(total, 1 + 3 * value.double())
        assert torch.equal(scaled(value, 3.0), 3 * value.double())
        assert not value.is_floating_point() or finite(value)
    for total in (torch.ones(3, 8, dtype=torch.float64)[:, ::2], torch.ones(4, 3, dtype=torch.float64).T):
        add_scaled(total, wide, 2.0)
        assert torch.equal(total, 1 + 2 * wide.double())
    with pytest.raises(AssertionError, match="handed over"):
        add_scaled(torch.ones(3, 4, dtype=torch.float64), wide, 1.0)
    with pytest.raises(AssertionError, match="handed over"):
        finite(wide)
    with pytest.raises(AssertionError, match="handed over"):
        scaled(wide, 1.0)


@needs_compiler
@pytest.mark.parametrize("weight", [50.0, 0.3, 0.0, 2.0**30 + 1])
def test_equal_bits_before_and_after_the_compiler_is_asked(weight: float, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    values = [torch.randn(40_000, generator=draw) * 10.0 ** (k - 3) for k in range(6)]
    sums = []
    for numbers in (0, 100_000, 2**60):
        monkeypatch.setattr(patience, "left", numbers)
        total = scaled(values[0], weight)
        for value in values[1:]:
            add_scaled(total, value, weight)
        sums.append(total)
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0], sums[2])


def test_the_compiler_waits_for_enough_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_pass, "compiled", lambda: "loops")
    waiting = Patience(100)
    assert [waiting.loops(60), waiting.loops(), waiting.loops(60), waiting.loops(1)] == [None, None, None, "loops"]


def test_without_it_torch_adds_and_looks(at_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llvmlite.binding", None)
    compiled.cache_clear()
    try:
        assert compiled() is None
        value, total = torch.tensor([1.5, -2.0]), torch.tensor([1.0, 1.0], dtype=torch.float64)
        add_scaled(total, value, 2.0)
        assert total.tolist() == [4.0, -3.0]
        assert scaled(value, 2.0).tolist() == [3.0, -4.0]
        assert finite(value)
        assert not finite(value / 0)
    finally:
        compiled.cache_clear()


def test_all_bits_of_the_exponent() -> None:
    assert int(np.float32(np.inf).view(np.uint32)) == INFINITE
