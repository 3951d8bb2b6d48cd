"""What a model is beside the numbers in its tensors: clients take turns with it, and each finds it as it was built."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict, defaultdict, deque
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from fedfuse.compat.torch_state import hooked, named, parameters
from fedfuse.compat.torch_writes import writes

PLAIN = (dict, OrderedDict, defaultdict, Counter, list, deque, set)


class AsBuilt:
    """Layers, their classes, hooks, modes and attributes, and where parameters lie, as they are now.

    Tensors that no state holds (a buffer that is not persistent, an attribute) are kept with what is in them.
    A copy of the model does not have it.

    Parameters
    ----------
    model
        Keeps this as `built`.
    like : AsBuilt, optional
        That of an equal model, whose copies of such tensors serve both.
    """

    def __init__(self, model: nn.Module, like: AsBuilt | None = None) -> None:
        model.__dict__["built"] = self
        self.own = parameters(model)
        self._data = [parameter.data for parameter in self.own]
        self._graded = [parameter.requires_grad for parameter in self.own]
        self._unhooked = [parameter for parameter in self.own if not hooked([parameter])]
        self._layers = list(model.modules())
        self._kinds = [type(module) for module in self._layers]
        # a class of one layer alone, which torch changes when its parametrization goes
        self._ways = [(kind, dict(vars(kind))) for kind in self._kinds if kind.__module__ == PARAMETRIZED]
        held = [*(one.__dict__ for one in (*self._layers, *self.own)), *hooked(self.own)]
        # dicts, lists and sets of the modules, and what was in them: two lists of them compare in 1 µs a module
        self._now = list({id(one): one for whole in held for one in inside(whole)}.values())
        self._then = [copy_of(one) for one in self._now]
        tensors = [
            (one, name, value) for one in self._now if isinstance(one, dict)
            for name, value in one.items() if isinstance(value, torch.Tensor)
        ]  # fmt: skip
        # any other tensor in their place does not compare, but of single numbers two may be equal
        self._numbers = [(one, name, value) for one, name, value in tensors if value.numel() == 1]
        saved = {id(value) for value in model.state_dict(keep_vars=True).values()} | set(map(id, self.own))
        self._loose = list({id(value): value for _, _, value in tensors if id(value) not in saved}.values())
        self.copies: list[torch.Tensor]
        self.copies = [v.detach().clone() for v in self._loose] if like is None else like.copies
        self._writes = writes(self._loose)
        # dicts are equal whatever their order; that of layers and parameters is the order of sums over them
        self._named = named(model)
        self._order = [list(one) for one in self._named]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def intact(self) -> bool:
        """Whether the model still is what it was, whatever its tensors hold and whichever of them are trained."""
        return self._lies() and not hooked(self._unhooked) and self._same()

    def untouched(self) -> bool:
        """Whether it is what it was but for what is in parameters and persistent buffers, and has no gradients."""
        same = self._trained() and all(parameter.grad is None for parameter in self.own)
        return same and writes(self._loose) == self._writes and self.intact()

    def moved(self) -> list[nn.Parameter]:
        """Parameters that lie elsewhere or otherwise than they did: they were given other memory (`p.data = t`)."""
        return [] if self._lies() else [p for p, at in zip(self.own, self._data, strict=True) if not p.is_set_to(at)]

    def restore(self) -> None:
        """Make the model what it was; numbers in what a state holds are left, and gradients are dropped."""
        for parameter in self.own:
            parameter.grad = None
        if not self._trained():
            for parameter, graded in zip(self.own, self._graded, strict=True):
                parameter.requires_grad_(graded)
        if not self._lies():
            for parameter, data in zip(self.own, self._data, strict=True):
                parameter.data = data
        for found in hooked(self._unhooked):
            found.clear()  # autograd goes by this very dict
        if not self._same():
            for module, kind in zip(self._layers, self._kinds, strict=True):
                module.__class__ = kind
            for kind, then in self._ways:
                for name in then.keys() - vars(kind).keys():
                    setattr(kind, name, then[name])
            for now, held in zip(self._now, self._then, strict=True):
                put_back(now, held)
        if writes(self._loose) != self._writes:
            with torch.no_grad():
                for tensor, value in zip(self._loose, self.copies, strict=True):
                    tensor.copy_(value)
            self._writes = writes(self._loose)

    def _lies(self) -> bool:
        return all(map(torch.Tensor.is_set_to, self.own, self._data))

    def _trained(self) -> bool:
        return list(map(GRADED, self.own)) == self._graded

    def _same(self) -> bool:
        try:
            return (
                list(map(type, self._layers)) == self._kinds
                and self._now == self._then
                and (not self._numbers or all(one.get(name) is value for one, name, value in self._numbers))
                and list(map(list, self._named)) == self._order
            )
        except Exception:  # tensors that were put in place of others do not compare
            return False


GRADED = attrgetter("requires_grad")
PARAMETRIZED = "torch.nn.utils.parametrize"


def built_of(model: nn.Module) -> AsBuilt:
    """What a model was when it was built."""
    found: AsBuilt = model.__dict__["built"]
    return found


def inside(one: Any) -> list[Any]:
    """A dict, list, deque or set of Python's own, and those in it."""
    found, rest = dict[int, Any](), [one]
    while rest:
        one = rest.pop()
        if type(one) in PLAIN and id(one) not in found:
            found[id(one)] = one
            rest += one.values() if isinstance(one, dict) else one
    return list(found.values())


def copy_of(one: Any) -> Any:
    """A copy of a dict, list, deque or set; what is in it is not copied."""
    return dict(one) if isinstance(one, dict) else copy.copy(one)


def put_back(now: Any, then: Any) -> None:
    """Fill a dict, list, deque or set with what was in it."""
    if not isinstance(now, dict):
        now.clear()
        now.update(then) if isinstance(now, set) else now.extend(then)
        return
    for name in now.keys() - then.keys():
        del now[name]
    for name, value in then.items():
        if now.get(name) is not value:
            now[name] = value
    if list(now) != list(then):  # a layer that was taken away and put back stands last
        now.clear()
        now.update(then)
