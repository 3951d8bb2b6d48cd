"""Models of one frozen base, many clients' at once: their rows pass the base as one batch, and each client's adapters.

A base computes a row by itself, so its large products are made once for all; only adapters and heads are products of
each client's own. Whether that gives a client the bits that it has alone is looked at, not taken for granted: once for
each shape, forward and backward, against its model alone. Where it does not, clients pass one by one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedfuse.models.in_place import frozen, variable
from fedfuse.models.replicas import copied
from fedfuse.train import training
from fedfuse.train.abreast_layers import Weights, products
from fedfuse.train.adapters import adapted

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)

CLOSE = 1e-3  # of the largest number, on a GPU, where bits of a stack depend on its size anyway


class Base:
    """A forward pass, (K, B, …) through a base that all share and K sets of all else; see `common_base`."""

    def __init__(self, model: nn.Module) -> None:
        self.alone, self.many = copied(model), copied(model)
        self.names = [
            name for name, _ in (*model.named_parameters(), *model.named_buffers()) if name not in frozen(model)
        ]
        self.weights: Weights = {}
        for name, layer in [*self.many.named_modules()]:
            if isinstance(layer, nn.Linear) and f"{name}.weight" in self.names:
                parent, _, leaf = name.rpartition(".")
                setattr(self.many.get_submodule(parent), leaf, _Own(self, name, layer.bias is not None))
        self.layers = adapted(self.many)
        for layer in self.layers.values():
            layer.__dict__["linear"] = _by_client
        # a layer's attribute by one of these names is found before the buffer that it has by that name
        self.buffers = [
            (vars(layer), kind, f"{name}.{kind}")
            for name, layer in self.layers.items()
            for kind, _ in layer.named_buffers(recurse=False, remove_duplicate=False)
        ]
        for one in (self.alone, self.many):
            training.training_mode(one)
        self.alike: dict[Any, bool] = {}

    def __call__(self, weights: Weights, x: Tensor) -> Tensor:
        """Outputs of each client (K, B, …)."""
        if len(x) == 1:
            return self._one_by_one(weights, x)
        key = x.shape, torch.is_grad_enabled()
        if key not in self.alike:
            self.alike[key] = self._same(weights, x)
        return (self._together if self.alike[key] else self._one_by_one)(weights, x)

    def _together(self, weights: Weights, x: Tensor) -> Tensor:
        self.weights = weights
        for attributes, kind, name in self.buffers:
            attributes[kind] = weights[name]
        out: Tensor = self.many(x.flatten(0, 1))
        return out.unflatten(0, x.shape[:2])

    def _one_by_one(self, weights: Weights, x: Tensor) -> Tensor:
        own = {name: weights[name].unbind() for name in self.names}
        return torch.stack(
            [functional_call(self.alone, {n: w[k] for n, w in own.items()}, (one,)) for k, one in enumerate(x.unbind())]
        )

    def _same(self, weights: Weights, x: Tensor) -> bool:
        """Whether both ways give the same numbers, outputs and gradients of whatever is trained."""
        found = []
        draw = torch.Generator(x.device).manual_seed(0)
        before = torch.default_generator.get_state()
        slope: Tensor | None = None
        for way in (self._together, self._one_by_one):
            own = {name: weights[name].detach().requires_grad_(weights[name].requires_grad) for name in self.names}
            out = way(own, x)
            trained = [value for value in own.values() if value.requires_grad]
            slope = torch.randn(out.shape, generator=draw, device=x.device) if slope is None else slope
            # of a single number: given a gradient for each, torch imports sympy to compare shapes, 0.3 s
            slopes = torch.autograd.grad((out * slope).sum(), trained, allow_unused=True) if out.requires_grad else ()
            found.append([out.detach(), *slopes])
        self.weights = {}
        if not torch.equal(torch.default_generator.get_state(), before):
            raise RuntimeError("the model draws random numbers, which it would draw otherwise for several clients")
        return all(map(_equal, *found))


class _Own(nn.Module):
    """A linear layer whose weights are each client's own."""

    def __init__(self, base: Base, name: str, biased: bool) -> None:
        super().__init__()
        self.read = lambda: (base.weights[f"{name}.weight"], base.weights[f"{name}.bias"] if biased else None)

    def forward(self, x: Tensor) -> Tensor:
        """x Wᵀ + b of each client."""
        return _by_client(x, *self.read())


def _by_client(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x Wᵀ + b of rows of K clients that lie behind each other."""
    rows = x.reshape(len(w), -1, x.shape[-1])
    return products(rows, w, b).view(*x.shape[:-1], w.shape[1])


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    if a.is_cuda:
        return bool(torch.allclose(a, b, rtol=0, atol=CLOSE * float(b.abs().max())))
    a, b = (one.contiguous().view(torch.uint8) for one in (a, b))
    return torch.equal(a, b)


def common_base(model: nn.Module) -> Base | None:
    """A forward pass of many clients' copies of a model over one frozen base; None where there is none.

    What is a client's own are weights of linear layers and what adapters hold. A model that draws at random has
    none, as a client's draws are its own; nor has one of packed weights.
    """
    fixed, layers = frozen(model), adapted(model)
    if not fixed or any(layer.quantized for layer in layers.values()) or any(map(_draws, model.modules())):
        return None
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} | layers.keys()
    return Base(model) if all(name.rpartition(".")[0] in linear for name in variable(model)) else None


def _draws(module: nn.Module) -> bool:
    """Whether a module drops something out: by `p`, or by a rate of its own among its attributes."""
    if isinstance(module, DROPOUTS):
        return module.p > 0
    return any("drop" in key and isinstance(value, float) and value > 0 for key, value in vars(module).items())
