"""What a model is beside the numbers in its tensors: clients take turns with it, and each finds it as it was built."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn

from fedfuse.compat.torch_state import layers, parameters

PLAIN = (dict, OrderedDict, list, set)


class AsBuilt:
    """Layers, hooks, modes and attributes of a model's modules, and where its parameters lie, as they are now.

    A copy of the model does not have it.

    Parameters
    ----------
    model
        Keeps this as `built`.
    """

    def __init__(self, model: nn.Module) -> None:
        model.__dict__["built"] = self
        self.own = [(p, p.requires_grad, p.data, p.data_ptr()) for p in parameters(model)]
        # dicts, lists and sets of the modules, and what was in them: two lists of them compare in 1 µs a module
        self._now = list({id(one): one for module in model.modules() for one in inside(module.__dict__)}.values())
        self._then = [copy_of(one) for one in self._now]
        # dicts are equal whatever their order; that of layers is the order of sums over them
        self._layers = layers(model)
        self._order = [list(one) for one in self._layers]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def intact(self) -> bool:
        """Whether the model still is what it was, whatever its tensors hold and whichever of them are trained."""
        return not self.moved() and self._same()

    def moved(self) -> list[nn.Parameter]:
        """Parameters that lie elsewhere than they did: they were given other tensors' memory (`p.data = t`)."""
        return [parameter for parameter, _, _, place in self.own if parameter.data_ptr() != place]

    def restore(self) -> None:
        """Make the model what it was; numbers are left as they are, and gradients are dropped."""
        for parameter, graded, data, place in self.own:
            parameter.grad = None
            if parameter.requires_grad != graded:
                parameter.requires_grad_(graded)
            if parameter.data_ptr() != place:
                parameter.data = data
        if not self._same():
            for now, then in zip(self._now, self._then, strict=True):
                put_back(now, then)

    def _same(self) -> bool:
        try:
            return self._now == self._then and [list(one) for one in self._layers] == self._order
        except Exception:  # tensors that were put in place of others do not compare
            return False


def built_of(model: nn.Module) -> AsBuilt:
    """What a model was when it was built."""
    found: AsBuilt = model.__dict__["built"]
    return found


def inside(one: Any) -> list[Any]:
    """A plain dict, list or set, and those in it."""
    found, rest = dict[int, Any](), [one]
    while rest:
        one = rest.pop()
        if type(one) in PLAIN and id(one) not in found:
            found[id(one)] = one
            rest += one.values() if isinstance(one, dict) else one
    return list(found.values())


def copy_of(one: Any) -> Any:
    """A plain copy of a dict, list or set; what is in it is not copied."""
    return dict(one) if isinstance(one, dict) else list(one) if isinstance(one, list) else set(one)


def put_back(now: Any, then: Any) -> None:
    """Fill a dict, list or set with what was in it."""
    if not isinstance(now, dict):
        now.clear()
        now.extend(then) if isinstance(now, list) else now.update(then)
        return
    for name in now.keys() - then.keys():
        del now[name]
    for name, value in then.items():
        if now.get(name) is not value:
            now[name] = value
    if list(now) != list(then):  # a layer that was taken away and put back stands last
        now.clear()
        now.update(then)
