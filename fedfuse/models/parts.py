"""Which of a model's arrays are parameters, normalisation layers or the head; and layouts made of them.

A strategy that shares a part of the model declares it by one of these specs, so that a reply with anything more or
less is refused.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fedfuse.compat.torch_norms import KEEP_STATISTICS
from fedfuse.errors import UserError, first_line
from fedfuse.models.in_place import evaluating
from fedfuse.seeding import seed_of
from fedfuse.wire.records import Arrays, Layout, Scope, sha_arrays

HEADS = ("head", "classifier", "score", "fc")  # names of classification heads: under adapters not adapted, but trained


def parameters(module: nn.Module) -> list[str]:
    """Return the names of the parameters, not of buffers, in the module's order; a tied one under each of its names."""
    return [name for name, _ in module.named_parameters(remove_duplicate=False)]


def with_tied(module: nn.Module, arrays: Arrays) -> Arrays:
    """Return the arrays, those of tied parameters under their further names too."""
    first: dict[int, str] = {}
    out = dict(arrays)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name and first[id(parameter)] in arrays:
            out[name] = arrays[first[id(parameter)]]
    return out


def norms(module: nn.Module, every: bool = False) -> list[str]:
    """Return the names of the arrays of BatchNorm and InstanceNorm layers: scale, shift, running statistics, counters.

    Parameters
    ----------
    module
    every
        Also layers that keep no statistics: GroupNorm and LayerNorm.
    """
    kinds: tuple[type[nn.Module], ...] = (*KEEP_STATISTICS, *((nn.GroupNorm, nn.LayerNorm) if every else ()))
    inside = [f"{path}." for path, layer in module.named_modules() if isinstance(layer, kinds)]
    return [name for name in module.state_dict() if any(name.startswith(path) for path in inside)]


def head(module: nn.Module) -> list[str]:
    """Return the names of the arrays of `head`, the last layer of every built-in model."""
    return [name for name in module.state_dict() if name.startswith("head.")]


def without(arrays: Arrays, names: Iterable[str]) -> Arrays:
    """Return the arrays that are not named."""
    left = set(names)
    return {name: value for name, value in arrays.items() if name not in left}


@contextlib.contextmanager
def seeded_by(model: nn.Module, purpose: str) -> Iterator[None]:
    """Draw what is built inside from the model's own weights, and so from the run's seed (for `equip`)."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(purpose, sha_arrays(model.state_dict())))
        yield


def classes_of(model: Any) -> int:
    """Return the number of logits of a model with `head` and `feature_dim`."""
    return int(model.head(torch.zeros(1, int(model.feature_dim))).shape[1])


def parameter_arrays(scope: Scope) -> Layout:
    """Spec: the parameters alone (control variates), a tied one once."""
    return {name: scope.model[name] for name, _ in scope.module.named_parameters() if name in scope.model}


def layers(model: Any) -> dict[str, int]:
    """Return a network's layers from shallow to deep, each with the width of what it gives, by following one example.

    A layer is a child with parameters, those of a `Sequential` one by one; a normalisation belongs to the layer before
    it. The width is that of a row, or the channels of an image.

    Parameters
    ----------
    model : nn.Module
        As `fedfuse.models.build` makes it, which tells it its `input_shape`.

    Raises
    ------
    UserError
        Where layers cannot be ordered: one that works twice or not at all, or that does not feed the next.
    """
    kind, outputs = f"the layers of {type(model).__name__} cannot be ordered", list[tuple[str, Tensor]]()
    units = dict(_units(model, ""))

    def seen(name: str) -> Any:
        return lambda module, given, out: outputs.append((name, out))

    hooks = [unit.register_forward_hook(seen(name)) for name, unit in units.items()]
    try:
        with evaluating(model), torch.enable_grad():
            model(torch.zeros(2, *model.input_shape, requires_grad=True))
    except (RuntimeError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{kind}: it does not take images or vectors ({first_line(error)})") from None
    finally:
        for hook in hooks:
            hook.remove()
    times = [name for name, _ in outputs]
    for name in units:
        if times.count(name) != 1:
            raise UserError(f"{kind}: {name} works {times.count(name)} times for one example; once is needed")
    if not outputs:
        raise UserError(f"{kind}: no child has parameters")
    for (name, before), (later, after) in itertools.pairwise(outputs):
        if not isinstance(after, Tensor) or not isinstance(before, Tensor):
            raise UserError(f"{kind}: {name} or {later} gives more than one tensor")
        if torch.autograd.grad(after.sum(), before, allow_unused=True, retain_graph=True)[0] is None:
            raise UserError(f"{kind}: {name} does not feed {later}")
    found: dict[str, int] = {}
    for name, out in outputs:
        if isinstance(units[name], _NORMS) and found:
            found.popitem()
        found[name] = int(out.shape[1])
    return found


_NORMS = (*KEEP_STATISTICS, nn.GroupNorm, nn.LayerNorm)


def _units(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if next(child.parameters(), None) is None:
            continue
        if isinstance(child, nn.Sequential) and not any(map(_whole, child)):
            yield from _units(child, f"{path}{name}.")
        else:
            yield f"{path}{name}", child


def _whole(module: nn.Module) -> bool:
    """Whether a module has children of its own, as a residual block has."""
    return next(module.children(), None) is not None
