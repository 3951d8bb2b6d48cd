"""Centralized training: one model on everybody's data pooled. The ceiling no federation may use.

Travels: nothing that a federation could send; the figures counted are the model going to and from the pool, P·B_f bytes
each way a round. With a single client this is FedAvg on that client, bit for bit.
"""

from __future__ import annotations

from fedfuse import Arrays, FusionClient, FusionStrategy, Shares, strategy


@strategy("centralized", client=FusionClient, paper="baseline")
class Centralized(FusionStrategy):
    """Pooled data, one model: an upper bound for comparison."""

    heterogeneous = False
    pooled = True
    sums = {"model": "num-examples"}

    def fuse(self, shares: Shares) -> None:
        """Take the pool's model over."""
        self.publish("model", shares.mean("model"))

    def server_models(self) -> dict[str, tuple[str, Arrays]]:
        """The pooled model."""
        return {"model": (self.architecture, self.model)}
