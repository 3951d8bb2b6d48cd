"""The learning rate over a run: warm-up, then constant, linear or cosine, by the share of the run that is done.

A client that trains in round t of T goes through the share from (t − 1)/T to t/T, however many steps that takes it: the
rate depends on round and step alone, never on what a client did before.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from fedfuse.config.schema import TrainConfig


def factor(config: TrainConfig, before: float, after: float) -> float:
    """What `train.lr` is multiplied by in a step that leads from share `before` of the run to share `after`.

    Warm-up rises to 1 in a line; the first step is above 0. Then the factor is 1, or falls from 1 to `train.lr_floor`.
    """
    if before < config.warmup:
        return min(1.0, after / config.warmup)
    if config.schedule == "constant":
        return 1.0
    left = min(1.0, (1 - before) / (1 - config.warmup))
    if config.schedule == "cosine":
        left = (1 + math.cos(math.pi * (1 - left))) / 2
    return config.lr_floor + (1 - config.lr_floor) * left


def over(config: TrainConfig, span: tuple[float, float]) -> Callable[[int, int], float] | None:
    """The factor of step k of K (from 0) in a training that leads through `span` of the run; None: always 1."""
    if config.schedule == "constant" and not config.warmup:
        return None
    start, end = span

    def at(step: int, steps: int) -> float:
        width = (end - start) / max(1, steps)
        return factor(config, start + step * width, start + (step + 1) * width)

    return at
