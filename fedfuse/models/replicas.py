"""Copies of one model whose weights lie side by side in memory, so that a step of all of them is one computation."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fedfuse.models.in_place import frozen


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
        shared: dict[int, Tensor] = {id(value): value for name, value in model.named_parameters() if name in fixed}
        shared |= {id(value): value for name, value in model.named_buffers() if name in fixed}
        self.modules: list[nn.Module] = [copy.deepcopy(model, dict(shared)) for _ in range(count)]
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
        self.parameters = [dict(module.named_parameters()) for module in self.modules]

    def __len__(self) -> int:
        return len(self.modules)


def nbytes(model: nn.Module) -> int:
    """Bytes that one more replica of a model takes."""
    fixed = frozen(model)
    named = [*model.named_parameters(), *model.named_buffers()]
    return sum(value.numel() * value.element_size() for name, value in named if name not in fixed)
