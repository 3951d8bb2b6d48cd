"""What strategies share that make inputs at the server: a generator taught by an ensemble of clients' models."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedfuse.core.workspace import Workspace
from fedfuse.data.dataset import Dataset
from fedfuse.errors import UserError
from fedfuse.seeding import seed_of

Bounds = tuple[Tensor, Tensor]
_FLAT = 8  # images of at most so many pixels a side are made by linear layers


def bounds(data: Dataset) -> Bounds | None:
    """Least and greatest value an input can have, by channel (c × 1 × 1); None where nothing bounds it."""
    if data.kind != "image" or data.train.inputs.dtype != np.uint8:
        return None
    channels = data.shape[0]
    mean = torch.tensor(data.mean if data.mean is not None else [0.0] * channels).view(-1, 1, 1)
    std = torch.tensor(data.std if data.std is not None else [1.0] * channels).view(-1, 1, 1)
    return (0 - mean) / std, (1 - mean) / std


class Generator(nn.Module):
    """G(ε, y): noise, and a class if it is conditional, to inputs.

    Images beyond 8×8 are made by two convolutions that double a small image, everything else by linear layers. What
    can be bounded is bounded by a sigmoid, the rest normalised over the batch.

    Parameters
    ----------
    shape : tuple of int
        Of one input.
    noise_dim, width : int
        Size of ε; channels before the last convolution. Hidden units are 16 times that.
    classes : int
        0: not conditional.
    limits : pair of Tensor or None
        As `bounds` gives them.
    """

    def __init__(
        self, shape: tuple[int, ...], noise_dim: int, width: int, classes: int = 0, limits: Bounds | None = None
    ) -> None:
        super().__init__()
        self.shape, self.noise_dim, self.classes = shape, noise_dim, classes
        self.limits = limits
        inputs = noise_dim + classes
        if len(shape) == 3 and max(shape[1:]) > _FLAT:
            rows, columns = (-(-side // 4) for side in shape[1:])
            self.body = nn.Sequential(
                nn.Linear(inputs, 2 * width * rows * columns), nn.Unflatten(1, (2 * width, rows, columns)),
                nn.BatchNorm2d(2 * width), nn.Upsample(scale_factor=2),
                nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.LeakyReLU(0.2),
                nn.Upsample(scale_factor=2),
                nn.Conv2d(2 * width, width, 3, padding=1), nn.BatchNorm2d(width), nn.LeakyReLU(0.2),
                nn.Conv2d(width, shape[0], 3, padding=1),
            )  # fmt: skip
        else:
            size, hidden = int(np.prod(shape)), 16 * width
            self.body = nn.Sequential(
                nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.LeakyReLU(0.2),
                nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.LeakyReLU(0.2),
                nn.Linear(hidden, size), nn.Unflatten(1, shape),
            )  # fmt: skip
        channels = shape[0]
        self.last = nn.BatchNorm1d(channels, affine=False) if limits is None else nn.Identity()

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Inputs (B × shape)."""
        if self.classes:
            noise = torch.cat([noise, F.one_hot(labels, self.classes).to(noise)], 1)
        made: Tensor = self.body(noise)
        if made.ndim == 4:  # doubled twice, an image may be larger than asked for
            made = made[..., : self.shape[1], : self.shape[2]]
        if self.limits is None:
            normed: Tensor = self.last(made.flatten(2) if made.ndim > 2 else made)
            return normed.view(-1, *self.shape)
        low, high = (limit.to(made) for limit in self.limits)
        return low + (high - low) * made.sigmoid()


def build(workspace: Workspace, noise_dim: int, width: int, classes: int, *seed_parts: object) -> Generator:
    """A generator of a run's inputs, with weights drawn from (run seed, *seed_parts).

    Raises
    ------
    UserError
        If inputs are tokens, which have no gradient.
    """
    data = workspace.scenario.data.dataset
    if data.kind == "tokens":
        raise UserError(f"data={data.name} has tokens: a generator makes images and features")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(workspace.scenario.seed, "generator", *seed_parts))
        made = Generator(data.shape, noise_dim, width, classes, bounds(data))
    return made.to(workspace.device)


class Statistics:
    """How far a batch is from what networks' BatchNorm layers have seen, summed over the layers it has passed."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0

    def look(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Add ‖mean − running mean‖ + ‖variance − running variance‖ of a layer's input."""
        x = inputs[0].transpose(0, 1).flatten(1)
        far = (x.mean(1) - layer.running_mean).norm() + (x.var(1, correction=0) - layer.running_var).norm()  # type: ignore[operator]
        self.total = self.total + far


def norms(networks: Iterable[nn.Module]) -> list[nn.Module]:
    """The BatchNorm layers of networks that have running statistics."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    return [m for one in networks for m in one.modules() if isinstance(m, kinds) and m.running_mean is not None]


@contextlib.contextmanager
def watched(networks: Iterable[nn.Module]) -> Iterator[Statistics]:
    """Watch the BatchNorm layers of networks for a while."""
    found = Statistics()
    hooks = [layer.register_forward_pre_hook(found.look) for layer in norms(networks)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
