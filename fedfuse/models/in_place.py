"""A model in place: which weights never travel, what they hold, how they are overwritten; its mode for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import cast

from torch import nn

from fedfuse.compat.torch_lists import copy_all
from fedfuse.compat.torch_state import contents
from fedfuse.wire.records import Arrays


def frozen(model: nn.Module) -> frozenset[str]:
    """Names of parameters that never change and never travel: `model.frozen`, which adapters set; default none."""
    return cast("frozenset[str]", model.__dict__.get("frozen") or getattr(type(model), "frozen", _NONE))


_NONE: frozenset[str] = frozenset()


def variable(model: nn.Module) -> Arrays:
    """The model's parameters and buffers but the frozen ones, not copied."""
    fixed, found = frozen(model), contents(model)
    if found is None:
        found = model.state_dict()
    return {name: value for name, value in found.items() if name not in fixed} if fixed else found


def overlay(model: nn.Module, arrays: Arrays, strict: bool = True) -> None:
    """Overwrite parameters and buffers in place.

    Raises
    ------
    RuntimeError
        If `arrays` has a name or shape the model has not, or, if strict, lacks one that is not frozen.
    """
    fixed, found = frozen(model), contents(model)
    if found is not None:  # what load_state_dict does for such models, at a tenth of its cost
        own = [value for name, value in found.items() if name not in fixed]
        new = [arrays[name] for name in found if name in arrays and name not in fixed]
        if len(own) == len(new) == len(arrays) and all(a.shape == b.shape for a, b in zip(own, new, strict=True)):
            copy_all(own, new)  # which are detached
            return
    answer = model.load_state_dict(arrays, strict=False)
    missing = sorted(set(answer.missing_keys) - fixed) if strict else []
    if missing or answer.unexpected_keys:
        raise RuntimeError(f"state does not fit: missing {missing[:3]}, unexpected {answer.unexpected_keys[:3]}")


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; what was training then goes on, one by one: a frozen BatchNorm stays as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
