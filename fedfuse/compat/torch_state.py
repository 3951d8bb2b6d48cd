"""A model's arrays by name, as `state_dict()` gives them, without walking through torch's hooks where there are none.

Private names of torch 2.7 to 2.13: a module's `_parameters`, `_buffers`, `_modules`, `_non_persistent_buffers_set`,
its four lists of state hooks, and `_load_from_state_dict`; a parameter's `_backward_hooks` and
`_post_accumulate_grad_hooks`, which `copy.deepcopy` leaves out. Reading takes 17 µs in place of 25 for an mlp and 45 in
place of 74 for ResNet-8, and overwriting 112 in place of 446; a no-op round inline takes 1.08 times as long without.
If a name is gone, or a module has a hook or its own way to save or load, `contents` says None and the caller takes
torch's `state_dict` and `load_state_dict`. Guard: `tests/compat/test_torch.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import cache
from operator import attrgetter
from typing import Any, cast

import torch
from torch import nn

HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
FIELDS = (*HOOKS, "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


@cache
def known() -> bool:
    """Whether torch keeps a module in the fields that we know."""
    return nn.Module().__dict__.keys() >= set(FIELDS) and all(hasattr(kind, "_load_from_state_dict") for kind in _PLAIN)


def contents(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """The arrays of a model, sharing its memory; None if only torch can tell."""
    if not known():
        return None
    found: dict[str, torch.Tensor] = {}
    rest: list[tuple[str, nn.Module]] = [("", model)]
    while rest:
        prefix, module = rest.pop()
        own = module.__dict__
        hooked = own["_state_dict_hooks"] or own["_state_dict_pre_hooks"]
        hooked = hooked or own["_load_state_dict_pre_hooks"] or own["_load_state_dict_post_hooks"]
        if hooked or not _plain(cast(Any, type(module))):
            return None
        for name, value in own["_parameters"].items():
            if value is not None:
                found[prefix + name] = value.detach()
        for name, value in own["_buffers"].items():
            if value is not None and name not in own["_non_persistent_buffers_set"]:
                found[prefix + name] = value.detach()
        if own["_modules"]:
            inner = [(f"{prefix}{name}.", child) for name, child in own["_modules"].items() if child is not None]
            rest += reversed(inner)
    return found


def parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of a model; one that it has in two places is there twice."""
    if not known():
        return list(model.parameters())
    found, rest = list[nn.Parameter](), [model]
    while rest:
        own = rest.pop().__dict__
        found += [value for value in own["_parameters"].values() if value is not None]
        rest += [child for child in own["_modules"].values() if child is not None]
    return found


def named(model: nn.Module) -> list[dict[str, Any]]:
    """Where each module keeps several layers or parameters by name, in order; nothing if that is elsewhere."""
    if not known():
        return []
    held = [module.__dict__[kind] for module in model.modules() for kind in ("_modules", "_parameters")]
    return [one for one in held if len(one) > 1]


def hooked(parameters: Iterable[torch.Tensor]) -> list[dict[Any, Any]]:
    """Where hooks on parameters' gradients are kept, that are there."""
    try:
        return [found for pair in map(_of_gradients, parameters) if pair != _BARE for found in pair if found]
    except AttributeError:  # pragma: no cover - another torch
        return []


def carry(old: torch.Tensor, new: torch.Tensor) -> None:
    """Give a parameter's copy its attributes and hooks."""
    for name, value in old.__dict__.items():
        new.__dict__.setdefault(name, value)
    for kind in _ON_GRADIENTS:
        if (found := getattr(old, kind, None)) is not None:
            setattr(new, kind, copy.copy(found))


_ON_GRADIENTS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_of_gradients, _BARE = attrgetter(*_ON_GRADIENTS), (None, None)
_PLAIN = (nn.Module, nn.BatchNorm2d)  # the second's own way only adds a counter that old files lack


@cache
def _plain(kind: Any) -> bool:
    """Whether modules of this class are saved and loaded by copying parameters and buffers."""
    inherited = ("state_dict", "load_state_dict", "_save_to_state_dict", "get_extra_state", "set_extra_state")
    copying = [plain._load_from_state_dict for plain in _PLAIN]
    return kind._load_from_state_dict in copying and all(
        getattr(kind, name) is getattr(nn.Module, name) for name in inherited
    )
