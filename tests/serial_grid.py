"""A grid that stands in for a network: every message becomes bytes, every client object is new, nothing is shared.

The contract tests run each strategy through it to show that simulation equals deployment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Message, RecordDict

from fedfuse.compat.turns import aside
from fedfuse.core.node import Node
from fedfuse.engines.grid import LocalGrid
from fedfuse.network.site_memory import SiteMemory
from fedfuse.wire.packing import packed, unpacked


def over_the_wire(content: RecordDict) -> RecordDict:
    """Serialise records as a deployment does and read them back."""
    out = RecordDict()
    for name, value in packed(content).items():
        if isinstance(value, ArrayRecord):
            clone = ArrayRecord()
            for key, array in value.items():
                clone[key] = type(array)(array.dtype, tuple(array.shape), array.stype, bytes(array.data))
            out[name] = clone
        else:
            plain: Any = value
            out[name] = type(plain)(dict(plain))
    return unpacked(out)


class SerialGrid(LocalGrid):
    """Sends bytes to one site a client, each with its own directory, built anew for every message.

    Parameters
    ----------
    node : callable
        `node(directory) -> Node`, a new node over a site's directory.
    directory : Path
        One folder a client is made below it.
    clients : int
    drop : callable, optional
        `drop(message, reply) -> bool`: whether a reply is lost on the way (for tests).
    """

    inside = False

    def __init__(
        self,
        node: Callable[[Path], Node],
        directory: Path,
        clients: int,
        drop: Callable[[Message, Message], bool] | None = None,
    ) -> None:
        super().__init__(clients)
        self._node, self.directory, self.drop = node, Path(directory), drop

    def exchange(self, groups: list[list[Message]]) -> Iterator[Message]:
        """Carry each message there and back as bytes."""
        return aside(self._carried(groups))

    def _carried(self, groups: list[list[Message]]) -> Iterator[Message]:
        for group in groups:
            for message in group:
                carried = Message(
                    over_the_wire(message.content),
                    dst_node_id=message.metadata.dst_node_id,
                    message_type=message.metadata.message_type,
                )
                folder = self.directory / str(message.metadata.dst_node_id - 1)
                reply = SiteMemory(folder, self._node(folder)).handle(carried)
                if reply.has_content():
                    reply = Message(over_the_wire(reply.content), reply_to=carried)
                if self.drop is None or not self.drop(message, reply):
                    yield reply
