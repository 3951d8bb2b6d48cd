"""Clients abreast: who runs beside others asks here for a training, and is given it together with them.

`fedfuse.train.training` asks the desk, if one is open, before it computes anything itself. The desk answers None to
what does not fit, which then runs as if there were no desk. `fedfuse.core.abreast` keeps it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from fedfuse.config.schema import TrainConfig


class Apart(BaseException):
    """A computation of several clients failed: each starts anew from its committed state, alone.

    Not an `Exception`, so that no client code takes it for a failure of its own.

    Parameters
    ----------
    why
        What failed, in words.
    smaller
        Whether they may sit together again, fewer of them: what failed was memory.
    """

    def __init__(self, why: str, smaller: bool = False) -> None:
        super().__init__(why)
        self.why, self.smaller = why, smaller


@dataclass(eq=False)
class Training:
    """A training as `fedfuse.train.training.train` is asked for it."""

    model: nn.Module
    x: Tensor
    y: Tensor | None
    loss: Callable[[Any, Any, Tensor], Tensor]
    config: TrainConfig
    seed_parts: tuple[object, ...]
    epochs: int
    batch_size: int
    least: int
    after_backward: Callable[[nn.Module], None] | None
    after_step: Callable[[int, int], object] | None
    max_steps: int | None = None
    trim: bool = False


class Desk(Protocol):
    """Who answers."""

    def train(self, asked: Training) -> dict[str, Any] | None:
        """`steps`, `loss` and `rows` of a training that is done, its model trained; None if it does not fit."""

    def replica(self, workspace: Any, architecture: str) -> nn.Module | None:
        """The model of the client that runs now; None if it has no other than the resident one."""

    def away(self) -> float:
        """Seconds that the client that runs now has waited for others."""

    def apart(self) -> str:
        """Why the client that runs now was taken out of a stack; empty if it was not."""


desk: Desk | None = None  # of this process, whose clients take turns in one thread
