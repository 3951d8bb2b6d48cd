"""Multilayer perceptrons and plain convolutional networks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from fedfuse.errors import UserError


class Classifier(nn.Module):
    """A body that gives features and a linear head that gives logits.

    Parameters
    ----------
    body
        Maps a batch of inputs to features of shape (B, feature_dim).
    feature_dim
        Size of the features.
    classes
        Number of logits.
    """

    def __init__(self, body: nn.Module, feature_dim: int, classes: int) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.body = body
        self.head = nn.Linear(feature_dim, classes)

    def features(self, x: Tensor) -> Tensor:
        """Return features of shape (B, feature_dim)."""
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape (B, classes)."""
        return self.head(self.features(x))


class Convolutional(Classifier):
    """A classifier of images, whose channels lie side by side in memory."""

    def features(self, x: Tensor) -> Tensor:
        """Return features of shape (B, feature_dim)."""
        return self.body(channels_last(x))


def channels_last(x: Tensor) -> Tensor:
    """Return images (B, C, H, W) with the same values, channels varying fastest in memory.

    Pooling is up to nine times faster so on a CPU, a forward pass twice. One channel is both layouts at once, and torch
    takes the slow one unless the strides say otherwise, which `contiguous(memory_format=…)` leaves as they are.
    """
    batch, channels, height, width = x.shape
    return x.movedim(1, -1).flatten().view(batch, height, width, channels).movedim(-1, 1)


def scaled(channels: int, width: float) -> int:
    """Return a number of channels scaled by `width`, at least 1."""
    return max(1, round(channels * width))


def check_image(name: str, shape: tuple[int, ...], least: int) -> None:
    """Raise UserError unless `shape` is (channels, height, width) with sides of at least `least`."""
    if len(shape) != 3:
        raise UserError(f"model={name} needs images (channels, height, width), the data have shape {shape}: use mlp")
    if min(shape[1:]) < least:
        raise UserError(f"model={name} needs images of at least {least}×{least}, the data have {shape[1]}×{shape[2]}")


def dense(sizes: list[int]) -> list[nn.Module]:
    """Return linear layers between consecutive `sizes`, each with a ReLU."""
    layers: list[nn.Module] = []
    for i in range(len(sizes) - 1):
        layers += [nn.Linear(sizes[i], sizes[i + 1]), nn.ReLU()]
    return layers


def mlp(
    shape: tuple[int, ...], classes: int, width: float, feature_dim: int | None, *, hidden: tuple[int, ...]
) -> Classifier:
    """Build a multilayer perceptron; its last hidden layer is the features."""
    inputs = 1
    for side in shape:
        inputs *= side
    sizes = [inputs, *(scaled(size, width) for size in hidden)]
    sizes[-1] = feature_dim or sizes[-1]
    return Classifier(nn.Sequential(nn.Flatten(), *dense(sizes)), sizes[-1], classes)


def convolutional(
    shape: tuple[int, ...],
    classes: int,
    width: float,
    feature_dim: int | None,
    *,
    name: str,
    channels: tuple[int, int],
    kernel: int,
    hidden: tuple[int, ...],
    narrow: bool = False,
) -> Classifier:
    """Build two convolutions, each with 2×2 max pooling, and hidden layers; the last one is the features.

    `narrow` leaves the second convolution unpadded, as LeNet has it, on images it still fits (12×12 and up).
    """
    check_image(name, shape, least=4)
    first, second = (scaled(size, width) for size in channels)
    padding = kernel // 2
    side = [size // 2 for size in shape[1:]]
    unpadded = narrow and min(side) > kernel
    side = [(size - 2 * padding * unpadded) // 2 for size in side]
    sizes = [second * side[0] * side[1], *(scaled(size, width) for size in hidden)]
    sizes[-1] = feature_dim or sizes[-1]
    # Pooling before the ReLU gives the same values on a quarter of the elements.
    body = nn.Sequential(
        nn.Conv2d(shape[0], first, kernel, padding=padding),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(first, second, kernel, padding=0 if unpadded else padding),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        *dense(sizes),
    )
    return Convolutional(body, sizes[-1], classes)


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "mlp": partial(mlp, hidden=(128, 64)),
    "mlp_small": partial(mlp, hidden=(32,)),
    "mlp_wide": partial(mlp, hidden=(512, 128)),
    "cnn": partial(convolutional, name="cnn", channels=(8, 16), kernel=3, hidden=(64,)),
    "cnn_large": partial(convolutional, name="cnn_large", channels=(32, 64), kernel=5, hidden=(512,)),
    "lenet": partial(convolutional, name="lenet", channels=(6, 16), kernel=5, hidden=(120, 84), narrow=True),
}
