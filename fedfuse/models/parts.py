"""Which of a model's arrays are parameters, normalisation layers or the head; and layouts made of them.

A strategy that shares a part of the model declares it by one of these specs, so that a reply with anything more or
less is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from fedfuse.compat.torch_norms import KEEP_STATISTICS
from fedfuse.seeding import seed_of
from fedfuse.wire.records import Arrays, Layout, Scope, sha_arrays


def parameters(module: nn.Module) -> list[str]:
    """Return the names of the parameters, buffers excluded, in the module's order."""
    return [name for name, _ in module.named_parameters()]


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
    """Spec: the parameters alone (control variates, updates)."""
    return {name: scope.model[name] for name in parameters(scope.module) if name in scope.model}
