"""Opacus's optimisers with noise from a source of ours.

Private name of Opacus 1.6: the mark `_processed` of `p.summed_grad`, by which Opacus refuses to use a gradient twice;
`add_noise` is a method that it documents as to be overridden. It buys noise from a cipher in place of torch's
generator,
which keeps 32 bits of its seed. Guard: `tests/train/test_privacy.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def noised_by(kind: type[Any], noise: Callable[[Tensor, float], Tensor]) -> type[Any]:
    """An optimiser whose noise is `noise(like, deviation)`."""

    class Noised(kind):  # type: ignore[misc]
        def add_noise(self) -> None:
            for p in self.params:
                if getattr(p.summed_grad, "_processed", False):
                    raise ValueError("a gradient would be used twice")
                added = noise(p.summed_grad, self.noise_multiplier * self.max_grad_norm)
                p.grad = (p.summed_grad + added).view_as(p)
                p.summed_grad._processed = True

    return Noised
