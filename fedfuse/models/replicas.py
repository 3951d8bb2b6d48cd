"""Copies of one model whose weights lie side by side in memory, so that a step of all of them is one computation."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedfuse.compat.torch_state import carry, parameters
from fedfuse.models.as_built import AsBuilt, built_of
from fedfuse.models.in_place import frozen, variable
from fedfuse.wire.records import Arrays
from fedfuse.wire.rows import Row


class Replicas:
    """Copies of a model; each one's parameters and buffers are a row of a common tensor.

    What is frozen is not copied: all replicas share it with the model.

    Parameters
    ----------
    model
        What is copied, in whatever state it is.
    count
        Number of copies.

    Attributes
    ----------
    modules : list of nn.Module
        The copies. `twin` of each is the model it was made from.
    stacks : dict
        By name, parameters and buffers of all copies, (count, *shape).
    """

    def __init__(self, model: nn.Module, count: int) -> None:
        fixed = frozen(model)
        self.modules: list[nn.Module] = [copied(model) for _ in range(count)]
        self.stacks: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, value in (*model.named_parameters(), *model.named_buffers()):
                if name not in fixed:
                    self.stacks[name] = stack = value.detach().unsqueeze(0).repeat(count, *[1] * value.ndim)
                    path, _, leaf = name.rpartition(".")
                    for module, row in zip(self.modules, stack, strict=True):
                        if isinstance(value, nn.Parameter):
                            module.get_parameter(name).data = row
                        else:
                            setattr(module.get_submodule(path), leaf, row)
        for module in self.modules:
            module.__dict__["twin"] = model
        built: AsBuilt | None = None
        self.parameters = [dict(module.named_parameters()) for module in self.modules]
        for slot, module in enumerate(self.modules):
            row = Row(variable(module), self.stacks, slot)
            module.__dict__["row"] = row
            built = AsBuilt(module, built)

    def fill(self, slots: Sequence[int], arrays: Arrays) -> bool:
        """Overwrite all parameters and buffers of copies that lie behind each other; False if they do not fit."""
        row = self.modules[slots[0]].__dict__["row"]
        if arrays.keys() != row.keys() or any(value.shape != row[name].shape for name, value in arrays.items()):
            return False
        with torch.no_grad():
            for name, value in arrays.items():
                self.stacks[name][slots[0] : slots[-1] + 1].copy_(value)
        return True

    def __len__(self) -> int:
        return len(self.modules)


def copied(model: nn.Module) -> nn.Module:
    """A copy of a model, which shares with it what is frozen."""
    fixed = frozen(model)
    named = (*model.named_parameters(), *model.named_buffers())
    made = copy.deepcopy(model, {id(value): value for name, value in named if name in fixed})
    for old, new in zip(parameters(model), parameters(made), strict=True):
        carry(old, new)
    return made


def shared(model: nn.Module) -> Arrays:
    """The model's parameters and buffers but the frozen ones, not copied; of a replica, as the row that they are."""
    row: Row | None = model.__dict__.get("row")
    return row if row is not None and built_of(model).intact() else variable(model)


def nbytes(model: nn.Module) -> int:
    """Bytes that one more replica of a model takes."""
    fixed = frozen(model)
    named = [*model.named_parameters(), *model.named_buffers()]
    return sum(value.numel() * value.element_size() for name, value in named if name not in fixed)
