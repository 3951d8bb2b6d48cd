"""Two networks in one: a client's own that stays beside a common one that travels, or a server's half behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedfuse.models.parts import seeded_by
from fedfuse.wire.records import Arrays, Layout, Scope

_PREFIX = "shared."


class Pair(nn.Module):
    """A private network and a shared one; calling it is calling the private one."""

    def __init__(self, own: nn.Module, shared: nn.Module) -> None:
        super().__init__()
        self.own, self.shared = own, shared

    def forward(self, x: Tensor) -> Tensor:
        """Return the private network's logits."""
        return self.own(x)

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of the private and the shared network, with gradients: a `forward` for `train`."""
        return self.own(x), self.shared(x)


class Split(nn.Module):
    """A client's network up to its features, and the server's network on them."""

    def __init__(self, front: nn.Module, back: nn.Module) -> None:
        super().__init__()
        self.front, self.back = front, back

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.back(cast(Any, self.front).features(x))


class FeaturePair(Pair):
    """A pair whose networks have features, with a linear map between them if they are compared.

    Parameters
    ----------
    own, shared
    bridge
        Add a map from the shared network's features to the private one's; it is private.
    """

    def __init__(self, own: nn.Module, shared: nn.Module, bridge: bool = False) -> None:
        super().__init__(own, shared)
        self.feature_dim = int(cast(Any, own).feature_dim)
        if bridge:
            self.bridge = nn.Linear(int(cast(Any, shared).feature_dim), self.feature_dim, bias=False)

    def features(self, x: Tensor) -> Tensor:
        """Return the private network's features."""
        return cast(Any, self.own).features(x)

    def head(self, z: Tensor) -> Tensor:
        """Return the private network's logits from its features."""
        return cast(Any, self.own).head(z)

    def everything(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return logits of both networks, the private features, and the shared ones across the bridge."""
        own, shared = cast(Any, self.own), cast(Any, self.shared)
        z, seen = own.features(x), shared.features(x)
        return own.head(z), shared.head(seen), z, self.bridge(seen)


def paired(own: nn.Module, name: str, build: Callable[..., nn.Module], bridge: bool = False) -> Pair:
    """Give a client's model a shared companion.

    Two networks of one architecture would start equal, and twins that see the same batches have nothing to teach
    each other: of the companion, layers that are drawn are then drawn anew. What comes from a directory, a checkpoint
    or a builder of one's own, whatever the seed, stays.

    Parameters
    ----------
    own
        The client's network.
    name
        Architecture of the shared one.
    build
        As `FusionClient.equip` gets it.
    bridge
        As in `FeaturePair`; ignored where one of the two has no features.
    """
    shared = build(name)
    mine, other = own.state_dict(), shared.state_dict()
    with seeded_by(own, "companion"):
        if mine.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in mine.items()):
            another = build(name, draw=1)
            for layer, other_layer in zip(shared.modules(), another.modules(), strict=True):
                if hasattr(layer, "reset_parameters") and not _alike(layer, other_layer):
                    cast(Any, layer).reset_parameters()
        if hasattr(own, "features") and hasattr(shared, "features"):
            return FeaturePair(own, shared, bridge)
        return Pair(own, shared)


def _alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether two layers have the same weights, those of layers in them left out."""
    return all(map(torch.equal, one.parameters(recurse=False), other.parameters(recurse=False)))


def shared_part(weights: Arrays) -> Arrays:
    """Return the shared network's arrays, under its own names."""
    return {name.removeprefix(_PREFIX): value for name, value in weights.items() if name.startswith(_PREFIX)}


def private_part(weights: Arrays) -> Arrays:
    """Return everything but the shared network's arrays."""
    return {name: value for name, value in weights.items() if not name.startswith(_PREFIX)}


def joined(private: Arrays, shared: Arrays) -> Arrays:
    """Return a pair's arrays from its parts."""
    return {**private, **{f"{_PREFIX}{name}": value for name, value in shared.items()}}


def shared_arrays(scope: Scope) -> Layout:
    """Spec: the shared network's arrays."""
    return {name.removeprefix(_PREFIX): value for name, value in scope.model.items() if name.startswith(_PREFIX)}
