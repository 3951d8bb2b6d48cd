"""Residual networks for small images (He et al. 2016, §4.2), with GroupNorm or BatchNorm.

Shortcuts are option A: strided identity with zero-padded channels, so they have no parameters. GroupNorm has
two groups, as in Reddi et al. 2021, and keeps no statistics that a server would have to average.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from fedfuse.models.feedforward import channels_last, check_image, scaled


class Block(nn.Module):
    """Two 3×3 convolutions and an option-A shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = norm(outputs)
        self.stride = stride
        self.padding = ((outputs - inputs) // 2, outputs - inputs - (outputs - inputs) // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output of shape (B, outputs, H / stride, W / stride)."""
        z = F.relu(self.norm1(self.conv1(x)))
        z = self.norm2(self.conv2(z))
        if self.stride > 1 or any(self.padding):
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *self.padding))
        return F.relu(z + x)


class ResNet(nn.Module):
    """Three stages of blocks with 16, 32 and 64 channels, mean pooling, a linear head.

    Parameters
    ----------
    channels
        Channels of the images.
    classes
        Number of logits.
    blocks
        Blocks per stage; the depth is 6·blocks + 2.
    width
        Scales the channels.
    feature_dim
        If it differs from the last stage's channels, a linear layer with a ReLU leads there.
    norm
        Normalisation of a number of channels.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        blocks: int,
        width: float,
        feature_dim: int | None,
        norm: Callable[[int], nn.Module],
    ) -> None:
        super().__init__()
        sizes = [scaled(size, width) for size in (16, 32, 64)]
        self.conv1 = nn.Conv2d(channels, sizes[0], 3, padding=1, bias=False)
        self.norm1 = norm(sizes[0])
        self.layer1 = _stage(sizes[0], sizes[0], blocks, 1, norm)
        self.layer2 = _stage(sizes[0], sizes[1], blocks, 2, norm)
        self.layer3 = _stage(sizes[1], sizes[2], blocks, 2, norm)
        self.feature_dim = feature_dim or sizes[2]
        self.projection: nn.Module = nn.Identity()
        if self.feature_dim != sizes[2]:
            # Features stay non-negative, as those of the other architectures in a pool are.
            self.projection = nn.Sequential(nn.Linear(sizes[2], self.feature_dim), nn.ReLU())
        self.head = nn.Linear(self.feature_dim, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def features(self, x: Tensor) -> Tensor:
        """Return features of shape (B, feature_dim)."""
        z = F.relu(self.norm1(self.conv1(channels_last(x))))
        z = self.layer3(self.layer2(self.layer1(z)))
        return self.projection(z.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape (B, classes)."""
        return self.head(self.features(x))

    @staticmethod
    def translate(key: str) -> str:
        """Return our name of a parameter of the public CIFAR ResNets (akamaster/pytorch_resnet_cifar10)."""
        return re.sub(r"(^|\.)bn(\d)\.", r"\1norm\2.", re.sub(r"^linear\.", "head.", key))


def _stage(inputs: int, outputs: int, blocks: int, stride: int, norm: Callable[[int], nn.Module]) -> nn.Sequential:
    rest = (Block(outputs, outputs, 1, norm) for _ in range(blocks - 1))
    return nn.Sequential(Block(inputs, outputs, stride, norm), *rest)


def _group_norm(channels: int) -> nn.Module:
    # A group of one channel over one pixel would normalise a single number.
    return nn.GroupNorm(2 if channels % 2 == 0 and channels > 2 else 1, channels)


def resnet(
    shape: tuple[int, ...],
    classes: int,
    width: float,
    feature_dim: int | None,
    *,
    name: str,
    blocks: int,
    norm: Callable[[int], nn.Module],
) -> ResNet:
    """Build a residual network for images of at least 4×4."""
    check_image(name, shape, least=4)
    return ResNet(shape[0], classes, blocks, width, feature_dim, norm)


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    name: partial(resnet, name=name, blocks=blocks, norm=norm)
    for name, blocks, norm in (
        ("resnet8", 1, _group_norm),
        ("resnet8_bn", 1, nn.BatchNorm2d),
        ("resnet20", 3, _group_norm),
        ("resnet20_bn", 3, nn.BatchNorm2d),
    )
}
