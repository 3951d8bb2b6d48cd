"""How much one message may make a site compute: counted where it is done, whatever a strategy calls its settings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from torch.optim.optimizer import register_optimizer_step_pre_hook

from fedfuse.errors import Refused


class Allowance:
    """Passes over examples, and steps of any optimiser, that may still be made.

    Parameters
    ----------
    epochs, steps : int or None
        None is no limit.
    """

    def __init__(self, epochs: int | None = None, steps: int | None = None) -> None:
        self.epochs, self.steps = epochs, steps
        self.passed, self.stepped = 0.0, 0

    def take(self, epochs: float) -> None:
        """Ask for passes before they are made.

        Raises
        ------
        Refused
            If there are not as many left.
        """
        self.passed += epochs
        if self.epochs is not None and self.passed > self.epochs + 1e-9:
            raise Refused(f"site policy: {self.passed:g} epochs in one message; allowed: at most {self.epochs}")

    def step(self, *_: Any) -> None:
        """Count a step of an optimiser before it is made.

        Raises
        ------
        Refused
            If there is none left.
        """
        self.stepped += 1
        if self.steps is not None and self.stepped > self.steps:
            raise Refused(f"site policy: more than {self.steps} steps of training in one message")


_current: ContextVar[Allowance | None] = ContextVar("allowance", default=None)


@contextlib.contextmanager
def limited(allowance: Allowance) -> Iterator[None]:
    """Count what is trained while this lasts."""
    token, hook = _current.set(allowance), register_optimizer_step_pre_hook(allowance.step)
    try:
        yield
    finally:
        hook.remove()
        _current.reset(token)


def passes(epochs: float) -> None:
    """Tell that training is about to go over its examples so many times."""
    if (allowance := _current.get()) is not None:
        allowance.take(epochs)
