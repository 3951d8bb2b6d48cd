"""What strategies share that average one common model: the server half, and a client half that remembers w_t."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from fedfuse.core.client import FusionClient
from fedfuse.core.shares import Shares
from fedfuse.core.strategy import FusionStrategy
from fedfuse.wire.knowledge import Item
from fedfuse.wire.records import Arrays


class AveragingStrategy(FusionStrategy):
    """Server half: what is common is the weighted mean of what the clients send, w ← Σ p_k w_k.

    A subclass may average another topic than the model, or do more with the mean by a `fuse` of its own.

    Class attributes
    ----------------
    averaged : str
        The topic, and the record that clients send of it.
    """

    averaged: ClassVar[str] = "model"
    heterogeneous = False

    @property
    def weight(self) -> str | None:
        """The metric that weighs clients: as the hyper-parameter `weighting` says; without one, by examples."""
        return "num-examples" if getattr(self.hyper, "weighting", "examples") == "examples" else None

    @property
    def sums(self) -> Mapping[str, str | None]:
        """The mean is all that `fuse` needs."""
        return {self.averaged: self.weight}

    def fuse(self, shares: Shares) -> None:
        """Publish the weighted mean."""
        self.publish(self.averaged, shares.mean(self.averaged))

    def server_models(self) -> dict[str, tuple[str, Arrays]]:
        """The common model, if that is what is averaged."""
        return {"model": (self.architecture, self.model)} if "model" in self.topics else {}


class AnchoredClient(FusionClient):
    """Client half that trains the model it was sent and remembers it, w_t, as `start`."""

    start: Arrays

    def receive(self, knowledge: Mapping[str, Item]) -> None:
        """Load w_t, and remember it."""
        self.start = knowledge["model"].arrays
        self.load(self.start)


def server_step(old: Arrays, mean: Arrays, momentum: Arrays, beta: float, rate: float) -> tuple[Arrays, Arrays]:
    """w + γ·m and m ← β·m + (w̄ − w), in float64; with β = 0 and γ = 1, the mean w̄ itself.

    Parameters
    ----------
    old, mean
        w, and the mean w̄ of what clients made of it.
    momentum
        m of the round before; empty at first.
    beta, rate
        β and γ.

    Returns
    -------
    tuple
        The new w, in the mean's dtype, and m.
    """
    if beta == 0 and rate == 1:
        return mean, {}
    m = {n: beta * momentum.get(n, 0) + (mean[n].double() - old[n].double()) for n in mean}
    return {n: (old[n].double() + rate * m[n]).to(mean[n].dtype) for n in mean}, m
