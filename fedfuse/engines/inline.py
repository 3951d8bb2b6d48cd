"""`runtime=inline`: clients one after another in this process, friendly to debuggers."""

from __future__ import annotations

from collections.abc import Iterator

from flwr.app import Message

from fedfuse.core.node import Node
from fedfuse.core.threads import single_thread
from fedfuse.engines.grid import LocalGrid


class InlineGrid(LocalGrid):
    """Runs clients in this process, in client order or (as a check) in reverse.

    Parameters
    ----------
    node : Node
    reverse : bool
        Work in reversed client order; replies still come back in order.
    """

    def __init__(self, node: Node, reverse: bool = False) -> None:
        super().__init__(node.workspace.scenario.clients)
        single_thread()
        self.node, self.reverse = node, reverse

    def exchange(self, groups: list[list[Message]]) -> Iterator[Message]:
        """Run groups one after another."""
        if self.reverse:
            done = [self.node.handle(m, self.cache) for group in reversed(groups) for m in reversed(group)]
            yield from reversed(done)
            return
        for group in groups:
            for message in group:
                yield self.node.handle(message, self.cache)
