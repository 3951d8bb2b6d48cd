"""A message as it crosses the network: all its records in one, but for large arrays.

Flower carries every record as an object of its own, and each object costs four requests that are checked and looked up
in the server's database: 8 objects there and 7 back for a message that trains. Joined they are 3 and 3.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedfuse.compat.flower_grid import announced
from fedfuse.core.shares import INVALID
from fedfuse.network.replies import MOST
from fedfuse.wire.packing import PACKED
from fedfuse.wire.records import InvalidArrays, plain_numpy

JOINED, ORDER = "*", "*"  # the one record, others beside it are named by their place; its entry that names all in order
SMALL = 2**20  # bytes of a packed record that goes with the others; larger ones travel in Flower's chunks
KINDS: dict[str, Any] = {"config": ConfigRecord, "metrics": MetricRecord}


def joined(content: RecordDict) -> RecordDict:
    """Return packed content as it is to be sent; what it was made of stays as it is."""
    out, order, entries = RecordDict(), list[list[str]](), dict[str, Any]()
    for i, (name, value) in enumerate(content.items()):
        small = _small(name, value) if isinstance(value, ArrayRecord) else None
        if small is not None:
            order.append(["arrays", name])
            entries[f"{i}/"] = small
        elif isinstance(value, ArrayRecord):
            order.append(["apart", name])
            out[str(i)] = value
        else:
            order.append(["metrics" if isinstance(value, MetricRecord) else "config", name])
            entries |= {f"{i}/{key}": entry for key, entry in value.items()}
    out[JOINED] = ConfigRecord({ORDER: json.dumps(order), **entries})
    return out


def _small(name: str, arrays: ArrayRecord) -> bytes | None:
    if set(arrays) != {PACKED}:
        return None
    whole = plain_numpy(name, arrays[PACKED])
    return whole.tobytes() if whole.dtype == np.uint8 and whole.nbytes <= SMALL else None


def parted(content: RecordDict) -> RecordDict:
    """Undo `joined`; content that came otherwise stays as it is, to be checked like any.

    Raises
    ------
    InvalidArrays
        If it is not what `joined` makes.
    """
    whole = content.config_records.get(JOINED)
    if whole is None:
        return content
    try:
        return _parted(content, dict(whole))
    except Exception as error:  # whatever a stranger wrote there
        raise InvalidArrays(f"a message that is not joined as it should be ({str(error)[:100]})") from error


def _parted(content: RecordDict, entries: dict[str, Any]) -> RecordDict:
    order: list[list[str]] = json.loads(entries.pop(ORDER))
    if not 0 < len(order) <= 2 * MOST or len({name for _, name in order}) < len(order):
        raise ValueError("it has no records, too many, or two of one name")
    inside: dict[str, dict[str, Any]] = {str(i): {} for i in range(len(order))}
    for key, value in entries.items():
        at, _, rest = key.partition("/")
        inside[at][rest] = value
    apart = {str(i) for i, (kind, _) in enumerate(order) if kind == "apart"}
    if apart | {JOINED} != set(content):
        raise ValueError("records beside it that it does not name")
    out = RecordDict()
    for (kind, name), (at, values) in zip(order, inside.items(), strict=True):
        if kind == "apart":
            out[name] = content.array_records[at]
        elif kind == "arrays":
            if len(packed := values.pop("")) > SMALL:  # what is large comes in chunks, which are counted first
                raise ValueError(f"record {name[:40]!r} is too large to go with the others")
            out[name] = ArrayRecord({PACKED: Array(np.frombuffer(packed, np.uint8))})
        else:
            out[name], values = KINDS[kind](values), {}
        if values:
            raise ValueError(f"record {name[:40]!r} has entries that it cannot have")
    return out


def answered(message: Message, handle: Callable[[Message], Message]) -> Message:
    """Answer a message that came joined; the reply goes back so."""
    if message.has_content():
        try:
            message.content = parted(message.content)
        except InvalidArrays as error:
            return Message(Error(INVALID, f"received {error}"), reply_to=message)
    reply = handle(message)
    if reply.has_content():
        reply.content = joined(reply.content)
    return reply


class JoinedGrid(Grid):
    """A grid of Flower's over which messages travel joined.

    Parameters
    ----------
    grid : Grid
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def set_run(self, run: Any) -> None:
        """Pass on the run."""
        self.grid.set_run(run)

    @property
    def run(self) -> Any:
        """Flower's run."""
        return self.grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Not there: Flower's own is deprecated."""
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        """Nodes that are online."""
        return self.grid.get_node_ids()

    def get_nodes(self) -> Iterable[Any]:
        """Nodes that are online, with their keys."""
        return self.grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages without waiting."""
        sent = list(messages)
        for message in sent:
            message.content = joined(message.content)
        return self.grid.push_messages(sent)

    def announced(self, keys: Iterable[str]) -> dict[str, Grid] | None:
        """For each message that is answered, a grid that reads the answer; None if nobody can say."""
        found = announced(self.grid, keys)
        return None if found is None else {key: JoinedGrid(grid) for key, grid in found.items()}

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Take replies that are there.

        Raises
        ------
        InvalidArrays
            If one of them is not what `joined` makes.
        """
        replies = list(self.grid.pull_messages(message_ids))
        for reply in replies:
            if reply.has_content():
                reply.content = parted(reply.content)
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Not there: nothing of ours waits in Flower's own loop."""
        raise NotImplementedError
