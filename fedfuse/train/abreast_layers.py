"""Layers of many clients at once, (K, B, …) through K sets of weights: each gets the numbers it would get alone.

A batched product computes each of its matrices as it does one alone, whatever their number, so what a client gets does
not depend on who else is there. It also has the bits of a plain product, but for the smallest ones, which are taken
one by one here (`tests/train/test_abreast.py` compares).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedfuse.compat.torch_hooks import has_hooks
from fedfuse.models.feedforward import Classifier, Convolutional, channels_last
from fedfuse.train.abreast_images import convolution, pooling

Weights = Mapping[str, Tensor]  # by name, (K, *shape); what all clients share has no K
Forward = Callable[[Weights, Tensor], Tensor]

SMALL = 400  # multiplications of one product below which torch has a loop of its own for batched ones


def stacked(module: nn.Module, prefix: str = "") -> Forward | None:
    """A forward pass of many clients' copies of a module at once; None where there is none.

    Parameters
    ----------
    module
        One of the copies: structure is read from it, never weights.
    prefix
        What its parameters' names begin with among the weights.
    """
    if "forward" in vars(module) or has_hooks(module):
        return None
    build = KINDS.get(type(module))
    return None if build is None else build(module, prefix)


def _sequential(module: Any, prefix: str) -> Forward | None:
    return _chain([stacked(child, f"{prefix}{name}.") for name, child in module.named_children()])


def _classifier(module: Any, prefix: str) -> Forward | None:
    return _chain([stacked(getattr(module, name), f"{prefix}{name}.") for name in ("body", "head")])


def _convolutional(module: Any, prefix: str) -> Forward | None:
    return _chain([_channels_last, _classifier(module, prefix)])


def _channels_last(weights: Weights, x: Tensor) -> Tensor:
    return channels_last(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def _chain(steps: list[Forward | None]) -> Forward | None:
    return None if None in steps else Chain(cast("list[Forward]", steps))


class Chain:
    """Layers one after another; chains within are dissolved, and what leaves everything as it is is left out."""

    def __init__(self, steps: Sequence[Forward]) -> None:
        self.steps: list[Forward] = []
        for step in steps:
            if step is not _identity:
                self.steps += step.steps if isinstance(step, Chain) else [step]

    def __call__(self, weights: Weights, x: Tensor) -> Tensor:
        """Pass inputs (K, B, …) through all of them."""
        for step in self.steps:
            x = step(weights, x)
        return x


class Linear:
    """A linear layer; its weights are `weight` and `bias` among the stacked ones."""

    def __init__(self, module: Any, prefix: str) -> None:
        self.weight, self.bias = f"{prefix}weight", None if module.bias is None else f"{prefix}bias"

    def __call__(self, weights: Weights, x: Tensor) -> Tensor:
        """x Wᵀ + b of each client."""
        w, b = weights[self.weight], None if self.bias is None else weights[self.bias]
        return F.linear(x, w, b) if w.ndim == 2 else products(x, w, b)  # common to all, or each client's own


def small(rows: int, w: Tensor) -> bool:
    """Whether products of so many rows with weights (K, outputs, inputs) have other bits where they are batched."""
    _, outputs, inputs = w.shape
    return min(rows, outputs, inputs) == 1 or rows * outputs * inputs < SMALL


def products(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """x Wᵀ + b of each client, from x (K, B, k), W (K, d, k) and b (K, d)."""
    if not x.is_cuda and small(x.shape[1], w):
        biases = [None] * len(w) if b is None else b.unbind()
        return torch.stack([F.linear(*one) for one in zip(x.unbind(), w.unbind(), biases, strict=True)])
    out: Tensor = _Products.apply(x, w, b)
    return out


class _Products(torch.autograd.Function):
    """x Wᵀ + b of each client; the gradient of W comes out as W lies, where torch's own would be copied once more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, w)
        ctx.biased = b is not None
        return torch.bmm(x, w.transpose(1, 2)) if b is None else torch.baddbmm(b.unsqueeze(1), x, w.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, w = ctx.saved_tensors
        back, weight, _ = ctx.needs_input_grad
        return (
            torch.bmm(out, w) if back else None,
            torch.bmm(out.transpose(1, 2), x) if weight else None,
            out.sum(1) if ctx.biased else None,
        )


def _flatten(module: Any, prefix: str) -> Forward | None:
    return flatten if (module.start_dim, module.end_dim) == (1, -1) else None


def flatten(weights: Weights, x: Tensor) -> Tensor:
    """Each example as one row."""
    return x.flatten(2)


def relu(weights: Weights, x: Tensor) -> Tensor:
    """`nn.ReLU`."""
    return torch.relu(x)


def _identity(weights: Weights, x: Tensor) -> Tensor:
    return x


def _relu(module: Any, prefix: str) -> Forward | None:
    return None if module.inplace else relu


def _each(module: Any, prefix: str) -> Forward:
    # torch rounds the last few numbers of a tensor otherwise than those before: their place must be that in one's own
    return lambda weights, x: module(x) if x.is_cuda else torch.stack([module(one) for one in x.unbind()])


KINDS: dict[type[nn.Module], Callable[[Any, str], Forward | None]] = {
    nn.Sequential: _sequential,
    Classifier: _classifier,
    Convolutional: _convolutional,
    nn.Linear: Linear,
    nn.Flatten: _flatten,
    nn.Conv2d: convolution,
    nn.MaxPool2d: pooling,
    nn.ReLU: _relu,
    nn.Identity: lambda module, prefix: _identity,
    **dict.fromkeys((nn.Tanh, nn.Sigmoid, nn.GELU), _each),
}
