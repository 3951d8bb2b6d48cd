"""What a strategy's server half keeps beside its `state`: a resumed run would start without it."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from fedfuse.compat.torch_writes import writes
from fedfuse.core.class_attributes import equal
from fedfuse.models.as_built import PLAIN, copy_of, inside

VALUES = (bool, int, float, complex, str, bytes, tuple, type(None), Tensor, np.ndarray, np.generic)


class ServerAttributes:
    """Attributes of a server half that hold values, as they are now.

    An object of another class (a network that is filled from `state`, one of Flower's strategies) may be made anew in
    every round, and is taken for that.

    Parameters
    ----------
    half : FusionStrategy
        As its `__init__` left it, which a resumed run repeats.
    platforms : set of str
        Attributes that are the platform's own.
    """

    def __init__(self, half: Any, platforms: set[str]) -> None:
        self._half, self._platforms = half, platforms
        self._then = self._look()

    def changed(self) -> list[str]:
        """The class and each attribute that was set, or written to, since this was asked last."""
        then, self._then = self._then, self._look()
        names = [name for name, now in self._then.items() if name not in then or not equal(now, then[name])]
        return [f"{type(self._half).__name__}.{name}" for name in sorted(names)]

    def _look(self) -> dict[str, Any]:
        """Each attribute's containers, copied, and how often the tensors in them were written to."""
        found = {}
        for name, value in vars(self._half).items():
            held = inside([value])
            leaves = [one for each in held for one in (each.values() if isinstance(each, dict) else each)]
            if name not in self._platforms and all(isinstance(one, (*VALUES, *PLAIN)) for one in leaves):
                found[name] = [copy_of(each) for each in held], writes(v for v in leaves if isinstance(v, Tensor))
        return found
