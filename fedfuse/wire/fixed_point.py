"""Weighted sums in whole numbers: what secure aggregation adds up, the same bits in any order and with any masks.

A client's value x with weight w counts as the whole number round(clip(x, ±c) · w/W · T/2c), where c is
`secure.clipping_range`, T `secure.quantization_range`, and W the largest weight a client can have. Sums are taken
modulo 2³², and N clients stay below it where N·T ≤ 2³². A step of the weighted sum Σ w·x is 2cW/T, and rounding moves
each client's w·x by at most half a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fedfuse.wire.records import Arrays, InvalidArrays

BITS = 32  # of the modulus: a value travels in four bytes
WHOLE = float(2**20)  # clipping range of integer buffers, which are counters


@dataclass(frozen=True)
class FixedPoint:
    """How one record is quantised.

    Attributes
    ----------
    clip : float
        c, what values are clipped to.
    levels : int
        T, steps from -c to c of a client with the largest weight.
    heaviest : float
        W, the largest weight.
    """

    clip: float
    levels: int
    heaviest: float

    def range_of(self, dtype: torch.dtype) -> float:
        """The c of an array: integer buffers are counters, and have a range of their own."""
        return self.clip if dtype.is_floating_point else WHOLE

    def step(self, dtype: torch.dtype) -> float:
        """What 1 stands for in Σ w·x."""
        return 2 * self.range_of(dtype) * self.heaviest / self.levels

    def quantised(self, value: torch.Tensor, weight: float) -> torch.Tensor:
        """w·x in steps: whole numbers, in float64.

        Raises
        ------
        InvalidArrays
            If the weight is above the largest, or the value is not finite.
        """
        self.check(weight)
        c = self.range_of(value.dtype)
        out = value.to(torch.float64, copy=True)
        if not bool(torch.isfinite(out).all()):
            raise InvalidArrays("arrays to be summed are not finite")
        return out.clamp_(-c, c).mul_(weight / self.heaviest * self.levels / (2 * c)).round_()

    def check(self, weight: float) -> None:
        """Refuse a weight above the largest: its sum would wrap around.

        Raises
        ------
        InvalidArrays
            With both.
        """
        if not weight <= self.heaviest:
            raise InvalidArrays(f"weight {weight:g}; secure sums were planned for at most {self.heaviest:g}")


def beyond(records: Mapping[str, Arrays], points: Mapping[str, FixedPoint]) -> float:
    """The share of a client's summed values that lie outside their clipping range."""
    outside = total = 0
    for name, point in points.items():
        for value in records.get(name, {}).values():
            outside += int((value.abs() > point.range_of(value.dtype)).sum())
            total += value.numel()
    return outside / total if total else 0.0
