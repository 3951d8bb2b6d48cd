"""Local training: every client alone, nothing is shared. The floor that any fusion has to beat.

Travels: nothing (0 bytes).
"""

from __future__ import annotations

from fedfuse import FusionClient, FusionStrategy, Records, Shares, strategy


class LocalClient(FusionClient):
    """Keeps its model to itself."""

    personal = True

    def share(self) -> Records:
        """Share nothing."""
        return {}


@strategy("local", client=LocalClient, paper="baseline")
class Local(FusionStrategy):
    """No fusion: each client trains alone."""

    topics = {}
    records = {}

    def fuse(self, shares: Shares) -> None:
        """Do nothing."""
