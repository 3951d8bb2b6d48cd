"""Convolutions and pooling of many clients at once, (K, B, C, H, W), channels varying fastest in memory.

On a CPU each client's convolution is torch's own call, one after another: grouped convolutions and products over
unfolded windows are faster for some shapes and round otherwise, and a client shall have the bits it would have alone.
On CUDA a call costs more than the work of a small one, so all are one batch of products over unfolded windows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedfuse.models.feedforward import channels_last

Weights = Mapping[str, Tensor]
Forward = Callable[[Weights, Tensor], Tensor]


def convolution(module: nn.Conv2d, prefix: str) -> Forward | None:
    """A stacked `nn.Conv2d`; None for strides, gaps, groups and paddings that no built-in model of ours has."""
    kernel, padding = module.kernel_size, module.padding
    if isinstance(padding, str) or module.padding_mode != "zeros" or module.groups != 1:
        return None
    if module.out_channels == 1:  # both layouts at once: which one torch takes the next layer's input for depends
        return None
    if (
        module.stride != (1, 1)
        or module.dilation != (1, 1)
        or any(p >= k for p, k in zip(padding, kernel, strict=True))
    ):
        return None
    weight, bias = f"{prefix}weight", None if module.bias is None else f"{prefix}bias"
    around = (int(padding[0]), int(padding[1]))

    def forward(weights: Weights, x: Tensor) -> Tensor:
        w, b = weights[weight], None if bias is None else weights[bias]
        if w.ndim == 5 and x.is_cuda:
            return windows_products(x, w, b, around)
        ws = w.unbind() if w.ndim == 5 else [w] * len(x)
        bs = [None] * len(x) if b is None else b.unbind() if b.ndim == 2 else [b] * len(x)
        own = map(channels_last, x.unbind())  # strides of sides of 1 decide which kernel torch takes
        each = [F.conv2d(*one, padding=around) for one in zip(own, ws, bs, strict=True)]
        return torch.stack([one.movedim(1, -1) for one in each]).movedim(-1, 2)

    return forward


def windows_products(x: Tensor, w: Tensor, b: Tensor | None, padding: tuple[int, int]) -> Tensor:
    """Convolve each client's images by its own kernels, by products over their windows.

    Parameters
    ----------
    x
        Images (K, B, C, H, W).
    w, b
        Kernels (K, O, C, h, w) and biases (K, O).
    padding
        Zeros around the images; less than the kernels' sides.
    """
    out: Tensor = _Windows.apply(x, w, b, padding)
    return out


class _Windows(torch.autograd.Function):
    """Products of all windows (K, B·H·W, h·w·C) with the kernels; the gradient of x is such a convolution as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, padding: tuple[int, int]) -> Tensor:  # type: ignore[override]
        clients, outputs, _, *sides = w.shape
        cut, (height, width) = _cut(x, sides, padding)
        flat = w.permute(0, 1, 3, 4, 2).reshape(clients, outputs, -1).transpose(1, 2)
        out = torch.bmm(cut, flat) if b is None else torch.baddbmm(b.unsqueeze(1), cut, flat)
        ctx.save_for_backward(cut, w)
        ctx.biased, ctx.padding = b is not None, padding
        return out.view(clients, x.shape[1], height, width, outputs).movedim(-1, 2)

    @staticmethod
    def backward(ctx: Any, out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        cut, w = ctx.saved_tensors
        clients, outputs, channels, height, width = w.shape
        back, weight = ctx.needs_input_grad[:2]
        rows = out.movedim(2, -1).reshape(clients, -1, outputs)
        gradient = earlier = None
        if weight:
            gradient = torch.bmm(rows.transpose(1, 2), cut).view(clients, outputs, height, width, channels)
            gradient = gradient.permute(0, 1, 4, 2, 3).contiguous()
        if back:
            around = (height - 1 - ctx.padding[0], width - 1 - ctx.padding[1])
            seen, sides = _cut(out, [height, width], around)
            turned = w.flip(3, 4).permute(0, 3, 4, 1, 2).reshape(clients, height * width * outputs, channels)
            earlier = torch.bmm(seen, turned).view(clients, out.shape[1], *sides, channels).movedim(-1, 2)
        return earlier, gradient, rows.sum(1) if ctx.biased else None, None


def _cut(x: Tensor, sides: list[int], padding: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """All windows of images (K, B, C, H, W) as rows (K, B·H'·W', h·w·C), and H', W'."""
    (height, width), (up, left) = sides, padding
    padded = F.pad(x.movedim(2, -1), (0, 0, left, left, up, up)).contiguous()
    clients, batch, tall, wide, channels = padded.shape
    inside = (tall - height + 1, wide - width + 1)
    k, i, row, column, channel = padded.stride()
    windows = padded.as_strided(
        (clients, batch, *inside, height, width, channels), (k, i, row, column, row, column, channel)
    )
    return windows.reshape(clients, batch * inside[0] * inside[1], height * width * channels), inside


def pooling(module: nn.MaxPool2d, prefix: str) -> Forward | None:
    """A stacked `nn.MaxPool2d`: a largest number does not depend on what else is looked at."""
    return None if module.return_indices else lambda weights, x: module(x.flatten(0, 1)).unflatten(0, x.shape[:2])
