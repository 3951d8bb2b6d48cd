"""A stand-in for Flower's network: real hosts behind a grid that can lose, delay, repeat and forge."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flwr.app import ArrayRecord, Error, Message, RecordDict
from flwr.app.metadata import Metadata
from flwr.serverapp import Grid

from fedfuse.compat.flower_identity import claim_identity
from fedfuse.config.compose import compose
from fedfuse.config.schema import Config
from fedfuse.core.loop import Federation
from fedfuse.network.remote_grid import Patience
from fedfuse.network.site import Site, SiteConfig
from fedfuse.runs.directory import RunDirectory
from fedfuse.runs.remote import serve
from fedfuse.wire.packing import PACKED, unpacked
from tests.federations import TINY

claim_identity()
Fault = Callable[[Message, Message | None], Message | None]


class Network(Grid):
    """Nodes 100, 101, … are hosts; every message is answered by a new Site object, as by a new process.

    `reply(message, reply)` may change or drop a reply; `before(message)` may drop a message.
    """

    def __init__(self, seats: list[SiteConfig]) -> None:
        self.seats = {100 + i: seat for i, seat in enumerate(seats)}
        self.stamps = dict.fromkeys(self.seats, "start")
        self.away: set[int] = set()
        self.reply: Callable[[Message, Message], Message | None] = lambda message, reply: reply
        self.before: Callable[[Message], bool] = lambda message: True
        self.replies: dict[str, Message] = {}
        self.log: list[str] = []
        self.memories = {node: RecordDict() for node in self.seats}  # what a SuperNode keeps until it ends
        self.packed: set[str] = set()  # records that came as one array
        self._ids = itertools.count()

    def get_nodes(self) -> list[Any]:
        return [
            SimpleNamespace(node_id=node, last_activated_at=self.stamps[node])
            for node in self.seats
            if node not in self.away
        ]

    def get_node_ids(self) -> Iterable[int]:
        return [node.node_id for node in self.get_nodes()]

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        return None

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        keys = []
        for message in messages:
            key = f"m{next(self._ids)}"
            message.metadata.__dict__["_message_id"] = key
            keys.append(key)
            self.log.append(f"{message.metadata.message_type}>{message.metadata.dst_node_id}")
            if not self.before(message):
                continue
            node = message.metadata.dst_node_id
            reply = Site(self.seats[node]).handle(message, self.memories[node])
            if reply.has_content():  # what a test changes is plain; nodes may send it so
                self.packed |= {name for name, value in reply.content.items() if set(value) == {PACKED}}
                reply.content = unpacked(reply.content)
            changed = self.reply(message, reply)
            if changed is not None:
                self.replies[key] = changed
        return keys

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self.replies.pop(key) for key in list(message_ids) if key in self.replies]


def lost(message: Message) -> Message:
    """What Flower says when it lost a message."""
    return Message(Error(3, "Node Unavailable"), reply_to=message)


def seats(path: Path, count: int) -> list[SiteConfig]:
    return [SiteConfig(i, path / f"site-{i}", count) for i in range(count)]


def run(
    config: Config,
    network: Network,
    path: Path,
    patience: Patience | None = None,
    resumed: bool = False,
    own: bool = False,
    quiet: bool = True,
) -> tuple[Federation, list[str]]:
    """A run over a network; the federation and the server's log."""
    said: list[str] = []
    directory = RunDirectory(path, config, 0.0)
    if resumed:
        directory.reopen()
    else:
        directory.create(False)
    try:
        built = serve(
            network, config, directory, patience or Patience(), resumed=resumed, quiet=quiet, own=own, say=said.append
        )
        return built, said
    finally:
        directory.close()


def tiny(strategy: str, *overrides: str) -> Config:
    return compose([*TINY, f"strategy={strategy}", *overrides])


__all__ = ["ArrayRecord", "Metadata", "Network", "RecordDict", "lost", "run", "seats", "tiny"]
