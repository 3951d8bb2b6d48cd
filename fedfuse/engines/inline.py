"""`runtime=inline`: clients one after another in this process, friendly to debuggers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from flwr.app import Message

from fedfuse.compat.turns import aside
from fedfuse.core.groups import Groups
from fedfuse.core.node import Node
from fedfuse.engines.grid import LocalGrid


class InlineGrid(LocalGrid):
    """Runs clients in this process, in client order or (as a check) in reverse.

    Parameters
    ----------
    node : Node
    reverse : bool
        Work in reversed client order; replies still come back in order.

    Attributes
    ----------
    whole : bool
        Whether every reply brings all of its client's arrays, for who looks at single replies (audits, tests);
        otherwise what the strategy only sums leaves as the sum of its group, as on Ray.
    """

    def __init__(self, node: Node, reverse: bool = False) -> None:
        super().__init__(node.workspace.scenario.clients)
        self.node, self.groups, self.reverse, self.whole = node, Groups(node), reverse, reverse

    def exchange(self, groups: list[list[Message]]) -> Iterator[Message]:
        """Run groups one after another; a fuse that draws between two replies has random streams of its own."""
        if self.reverse:
            backwards = [group[::-1] for group in reversed(groups)]
            yield from reversed([reply for replies in aside(self._answers(backwards)) for reply in replies])
            return
        for replies in aside(self._answers(groups)):
            yield from replies

    def _answers(self, groups: list[list[Message]]) -> Iterator[Iterable[Message]]:
        if groups and not self.whole and self.groups.sums(groups[0]):  # nobody needs a copy of what is only summed
            yield from self.groups.all(groups, self.cache)
            return
        for some in self.groups.portions(groups):
            for reply in self.groups.each([message for group in some for message in group], self.cache):
                yield (reply,)
