"""What the grids of simulated clients do alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import count, groupby

from flwr.app import Message

from fedfuse.engines.fusion_grid import FusionGrid
from fedfuse.wire.knowledge import Cache
from fedfuse.wire.records import config_in


class LocalGrid(FusionGrid):
    """A Flower grid whose nodes are the simulated clients: client i is node i + 1.

    Replies come back in client order, whatever the order of work. An unmodified Flower strategy runs on it.
    """

    inside = True

    def __init__(self, clients: int) -> None:
        super().__init__()
        self.clients = clients
        self.cache = Cache()  # one copy a machine: what one client was sent, no other needs a copy of
        self._ids = count()
        self._pushed: dict[str, Message] = {}

    def get_node_ids(self) -> Iterable[int]:
        """All nodes, in client order."""
        return range(1, self.clients + 1)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take messages; they run when they are pulled."""
        pushed = {f"m{next(self._ids)}": message for message in messages}
        self._pushed |= pushed
        return list(pushed)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Run what was pushed and return the replies."""
        found = [self._pushed.pop(key) for key in message_ids if key in self._pushed]
        return list(self.send_and_receive(found))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Run messages; replies are streamed in client order."""
        ordered = sorted(messages, key=lambda message: message.metadata.dst_node_id)
        return self.exchange(grouped(ordered))

    def exchange(self, groups: list[list[Message]]) -> Iterator[Message]:
        """Run groups of messages and yield the replies in order."""
        raise NotImplementedError

    def await_workers(self) -> None:
        """Return once those who compute have begun, so that the first round's time is its own."""

    def close(self) -> None:
        """End everything this grid started."""


def group_of(message: Message) -> int:
    """The group that the cohort fixed for this message, or its own where nobody fixed one."""
    config = config_in(message.content)
    if config is None or "group" not in config:
        return -message.metadata.dst_node_id
    return int(config["group"])


def grouped(ordered: Sequence[Message]) -> list[list[Message]]:
    """Cut messages in client order into the groups that the cohort fixed."""
    return [list(members) for _, members in groupby(ordered, key=group_of)]
