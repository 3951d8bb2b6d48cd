"""What a strategy's classes hold: clients, and runs of one process, share it, so what is left there may leak."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fedfuse.compat.torch_writes import writes
from fedfuse.models.as_built import copy_of, inside


class ClassAttributes:
    """Attributes of a class and of what it extends, as they are now.

    Parameters
    ----------
    kind : type
    base : type
        The platform's class that it extends; what that one extends too is not looked at.
    """

    def __init__(self, kind: type, base: type) -> None:
        self._kind = kind
        self._then = [(one, dict(vars(one))) for one in kind.__mro__ if one not in base.__mro__]
        held = [(name, one) for _, then in self._then for name, value in then.items() for one in inside(value)]
        self._inside = [(name, now, copy_of(now)) for name, now in held]
        self._tensors = {
            name: value for _, then in self._then for name, value in then.items() if isinstance(value, Tensor)
        }
        self._writes = {name: writes([value]) for name, value in self._tensors.items()}

    def written(self) -> str:
        """The class and an attribute that has been written to since, told once; empty if there is none."""
        found = ""
        for kind, then in self._then:
            if not _equal(vars(kind), then):
                found = found or _differing(vars(kind), then)
        found = found or next((name for name, now, then in self._inside if not _equal(now, then)), "")
        found = found or next((n for n, tensor in self._tensors.items() if writes([tensor]) != self._writes[n]), "")
        if not found:
            return ""
        self._then, self._inside, self._tensors = [], [], {}
        return f"{self._kind.__name__}.{found}"


def _differing(now: Any, then: dict[str, Any]) -> str:
    names = sorted(name for name in {*now, *then} if now.get(name, ABSENT) is not then.get(name, ABSENT))
    for name in (made := [name for name in names if name.startswith("__")]):
        then[name] = now.get(name)  # which Python itself makes when they are first asked for
    return next((name for name in names if name not in made), "")


ABSENT = object()


def _equal(now: Any, then: Any) -> bool:
    try:
        return bool(now == then)
    except Exception:  # tensors that were put in place of others do not compare
        return False
