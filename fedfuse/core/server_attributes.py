"""What a strategy's server half keeps beside its `state`: a resumed run would start without it."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from fedfuse.compat.torch_writes import writes
from fedfuse.models.as_built import PLAIN

VALUES = (bool, int, float, complex, str, bytes, type(None), Tensor, np.ndarray, np.generic)
MOST = 1000  # entries of what is looked into: who kept a million numbers has added to them, and their count says so


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
        names = [name for name, now in self._then.items() if name not in then or then[name] != now]
        return [f"{type(self._half).__name__}.{name}" for name in sorted(names)]

    def _look(self) -> dict[str, Any]:
        own = {name: value for name, value in vars(self._half).items() if name not in self._platforms}
        return {name: _seen(value) for name, value in own.items() if _holds_values(value)}


class Same:
    """An array that is told from others by being itself, and by how often it was written to."""

    def __init__(self, value: Any) -> None:
        self._value = value
        self._writes = writes([value]) if isinstance(value, Tensor) else 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self._value is other._value and self._writes == other._writes


def _holds_values(value: Any) -> bool:
    if isinstance(value, VALUES):
        return True
    if type(value) not in (*PLAIN, tuple):
        return False
    inside = value.values() if isinstance(value, dict) else value
    return len(value) > MOST or all(map(_holds_values, inside))


def _seen(value: Any) -> Any:
    """What tells a value from another one: compared, it is equal only to itself unchanged."""
    if isinstance(value, Tensor | np.ndarray):
        return Same(value)
    if type(value) not in (*PLAIN, tuple):
        return type(value), value
    if len(value) > MOST:
        return type(value), len(value)
    if isinstance(value, dict):
        return type(value), [(key, _seen(one)) for key, one in value.items()]
    return type(value), set(value) if isinstance(value, set) else [_seen(one) for one in value]
