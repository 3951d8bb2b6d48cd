"""Centralized training: one model on everybody's data pooled. The ceiling no federation may use.

Travels: nothing that a federation could send; the figures counted are the model going to and from the pool, P·B_f bytes
each way a round. With a single client this is FedAvg on that client, bit for bit.
"""

from __future__ import annotations

from fedfuse import AveragingStrategy, FusionClient, strategy


@strategy("centralized", client=FusionClient, paper="baseline")
class Centralized(AveragingStrategy):
    """Pooled data, one model: an upper bound for comparison."""

    pooled = True
