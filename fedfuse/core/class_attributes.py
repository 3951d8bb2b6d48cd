"""What a strategy's classes and modules hold: clients, and runs of one process, share it, so what is left may leak."""

from __future__ import annotations

import random
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedfuse.compat.torch_writes import writes
from fedfuse.models.as_built import PLAIN, copy_of, inside


class ClassAttributes:
    """Attributes of a class and of what it extends, and globals that its methods use, as they are now.

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
        self._globals = [Globals(*one) for one in _read(value for _, then in self._then for value in then.values())]

    def written(self) -> str:
        """The class and an attribute, or a module and a global, written to since, told once; empty if none is."""
        found = ""
        for kind, then in self._then:
            if not equal(vars(kind), then):
                found = found or _differing(vars(kind), then)
        found = found or next((name for name, now, then in self._inside if not equal(now, then)), "")
        found = found or next((n for n, tensor in self._tensors.items() if writes([tensor]) != self._writes[n]), "")
        found = (
            f"{self._kind.__name__}.{found}" if found else next(filter(None, (g.written() for g in self._globals)), "")
        )
        if found:
            self._then, self._inside, self._tensors, self._globals = [], [], {}, []
        return found


class Globals:
    """Some globals of a module, as they are now: their values, what is in small containers, and how far generators are.

    Parameters
    ----------
    module : dict
    names : set of str
    """

    def __init__(self, module: dict[str, Any], names: set[str]) -> None:
        self._module, self._name = module, str(module.get("__name__", ""))
        self._then = {name: module.get(name, ABSENT) for name in sorted(names)}
        held = [(name, one) for name, value in self._then.items() if _small(value) for one in inside(value)]
        self._inside = [(name, now, copy_of(now)) for name, now in held]
        self._moving = [(n, value, _at(value)) for n, value in self._then.items() if isinstance(value, MOVING)]

    def written(self) -> str:
        """The module and a global that has been written to since; empty if there is none."""
        module, names = self._module, list[str]()
        names += [name for name, then in self._then.items() if module.get(name, ABSENT) is not then]
        names += [name for name, now, then in self._inside if not equal(now, then)]
        names += [name for name, one, at in self._moving if _at(one) != at]
        return f"{self._name}.{names[0]}" if names else ""


MOVING = Tensor, torch.Generator, np.random.Generator, random.Random
SMALL = 1000  # entries: a table of data that stands in a notebook is not copied


def _small(value: Any) -> bool:
    return type(value) in PLAIN and len(value) <= SMALL


def _at(one: Any) -> Any:
    """What changes as a tensor is written to, or as a generator is drawn from."""
    if isinstance(one, Tensor):
        return writes([one])
    if isinstance(one, torch.Generator):
        return one.get_state().tolist()
    return one.getstate() if isinstance(one, random.Random) else str(one.bit_generator.state)


def _read(values: Iterator[Any]) -> Iterator[tuple[dict[str, Any], set[str]]]:
    """Modules of functions, and the names that they use there, or a function that they call does."""
    found, rest, known = dict[int, tuple[dict[str, Any], set[str]]](), list(values), set[int]()
    while rest:
        one = rest.pop()
        one = getattr(one, "__func__", None) or getattr(one, "fget", None) or getattr(one, "func", None) or one
        if not isinstance(one, FunctionType) or id(one) in known:
            continue
        known.add(id(one))
        module = one.__globals__
        names = {name for name in _names(one.__code__) if not name.startswith("__")}
        called = {name for name in names if isinstance(module.get(name), FunctionType)}
        rest += [module[name] for name in called if module[name].__globals__ is module]
        found.setdefault(id(module), (module, set()))[1].update(names - called)
    yield from found.values()


def _names(code: CodeType) -> set[str]:
    return {*code.co_names}.union(*(_names(one) for one in code.co_consts if isinstance(one, CodeType)))


def _differing(now: Any, then: dict[str, Any]) -> str:
    names = sorted(name for name in {*now, *then} if now.get(name, ABSENT) is not then.get(name, ABSENT))
    for name in (made := [name for name in names if name.startswith("__")]):
        then[name] = now.get(name)  # which Python itself makes when they are first asked for
    return next((name for name in names if name not in made), "")


ABSENT = object()


def equal(now: Any, then: Any) -> bool:
    """Whether two values are the same; those that do not compare are not."""
    try:
        return bool(now == then)
    except Exception:  # tensors that were put in place of others do not compare
        return False
