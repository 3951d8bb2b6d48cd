"""A network's passes forwards and back, written out for linear layers with ReLUs between them.

What autograd does beside the products (a graph, a tensor for every gradient, copies) costs more than the products of
small networks, and sends the weights of large ones out of the cache. Here the gradients of weights come to lie in the
same tensors at every step. Every number is what autograd's own calls give.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedfuse.train.abreast_layers import Chain, Forward, Linear, flatten, relu, small


class Passes:
    """Passes of many clients through their own weights, (K, B, …), on a CPU.

    Parameters
    ----------
    layers
        Linear layers, and whether a ReLU follows each.
    """

    def __init__(self, layers: list[tuple[Linear, bool]]) -> None:
        self.layers = layers
        self.seen: list[Tensor] = []  # what each layer was given

    def suits(self, rows: int, weights: Mapping[str, Tensor]) -> bool:
        """Whether batches of so many rows have the bits of each client alone."""
        return not any(small(rows, weights[layer.weight]) for layer, _ in self.layers)

    def forward(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Outputs (K, B, C)."""
        x, self.seen = x.flatten(2), []
        for layer, bent in self.layers:
            self.seen.append(x)
            w = weights[layer.weight].transpose(1, 2)
            x = torch.bmm(x, w) if layer.bias is None else torch.baddbmm(weights[layer.bias].unsqueeze(1), x, w)
            if bent:
                x = x.relu_()
        return x

    def backward(self, weights: Mapping[str, Tensor], out: Tensor, into: Mapping[str, Tensor]) -> None:
        """Put the gradients of all weights into `into`, from that of the outputs."""
        for i in reversed(range(len(self.layers))):
            layer, x = self.layers[i][0], self.seen[i]
            torch.bmm(out.transpose(1, 2), x, out=into[layer.weight])
            if layer.bias is not None:
                torch.sum(out, 1, out=into[layer.bias])
            if i:
                out = torch.bmm(out, weights[layer.weight])
                if self.layers[i - 1][1]:
                    out = torch.ops.aten.threshold_backward(out, x, 0)
        self.seen = []


def written_out(forward: Forward, leaves: Mapping[str, Tensor]) -> Passes | None:
    """Passes that do what a stacked network does, if they are written and train all of its weights; else None."""
    steps: list[Any] = forward.steps if isinstance(forward, Chain) else [forward]
    layers: list[tuple[Linear, bool]] = []
    for step in steps[1:] if steps[:1] == [flatten] else steps:
        if isinstance(step, Linear):
            layers.append((step, False))
        elif step is relu and layers and not layers[-1][1]:
            layers[-1] = layers[-1][0], True
        else:
            return None
    names = [name for layer, _ in layers for name in (layer.weight, layer.bias) if name is not None]
    if not layers or sorted(names) != sorted(leaves) or any(leaf.is_cuda for leaf in leaves.values()):
        return None
    return Passes(layers)
