"""What all grids of ours share, without what only FedFuse's own runs need: an app of Flower's may do without torch."""

from __future__ import annotations

from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedfuse.compat.flower_identity import claim_identity


class FusionGrid(Grid):
    """What all grids of ours share.

    Attributes
    ----------
    inside : bool
        Whether nodes are processes of this run, whose sums of a group are believed.
    timed : list
        Rows that the loop takes after each phase: scope, what, seconds.
    """

    inside = False

    def __init__(self) -> None:
        claim_identity()
        self.timed: list[tuple[str, str, float]] = []
        self._run: Any = None

    def set_run(self, run: Any) -> None:
        """Remember the run."""
        self._run = run

    @property
    def run(self) -> Any:
        """The run, if one was set."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message (Flower's older spelling)."""
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)
