"""Local training: every client alone, nothing is shared. The floor that any fusion has to beat.

Travels: nothing (0 bytes).
"""

from __future__ import annotations

from fedfuse.config.registry import strategy
from fedfuse.core.client import FusionClient
from fedfuse.core.strategy import FusionStrategy, Records, Shares


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
