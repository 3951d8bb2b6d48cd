"""A reply that waits for its moment: what a client shared, as plain arrays that a checkpoint can hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from fedfuse.compat.flower_replies import reply_to
from fedfuse.core.outbox import Outbox
from fedfuse.wire.knowledge import Address, Board
from fedfuse.wire.records import Arrays, arrays_in, config_in, entries, record, tensors, trusted


@dataclass
class Waiting:
    """A reply in flight, and what the server has to know when it is there.

    Parameters
    ----------
    records, config, metrics : dict
        The reply's content.
    made : str
        The client state it made.
    sent : dict
        Versions of knowledge that its client holds with it.
    used : dict
        Versions that training at its client had had before; it has them again if the flight is lost.
    """

    records: dict[str, Arrays]
    config: dict[str, Any]
    metrics: dict[str, Any]
    made: str
    sent: dict[Address, int]
    used: dict[Address, int]

    def message(self, client: int) -> Message:
        """The reply, as an inbox takes it."""
        content: dict[str, Any] = {name: record(arrays) for name, arrays in self.records.items()}
        content["config"] = trusted(ConfigRecord, dict(self.config))
        content["metrics"] = MetricRecord(self.metrics)
        asked = Message(RecordDict(), Outbox.node_of(client), "train")
        return reply_to(asked, trusted(RecordDict, content))

    def saved(self) -> dict[str, Any]:
        """As a tree of tensors and plain values."""
        plain = [self.config, self.metrics, self.made, _rows(self.sent), _rows(self.used), list(self.records)]
        arrays = {str(i): listed(value) for i, value in enumerate(self.records.values())}
        return {"about": json.dumps(plain), "records": arrays}

    @classmethod
    def restored(cls, slot: Mapping[str, Any]) -> Waiting:
        """Undo `saved`."""
        config, metrics, made, sent, used, names = json.loads(slot["about"])
        arrays = {name: unlisted(slot["records"][str(i)]) for i, name in enumerate(names)}
        return cls(arrays, config, metrics, made, _unrows(sent), _unrows(used))


def waiting(reply: Message, made: str, sent: dict[Address, int], used: dict[Address, int]) -> Waiting:
    """Keep a reply: its arrays are copied, since a grid's memory may be given to the next."""
    content = reply.content
    records = {name: {k: v.clone() for k, v in tensors(value).items()} for name, value in arrays_in(content).items()}
    config: Any = config_in(content) or {}
    measured = entries(content).get("metrics")
    metrics = {key: _plain(value) for key, value in dict(entries(measured)).items()} if measured is not None else {}
    return Waiting(records, {k: _plain(v) for k, v in dict(config).items()}, metrics, made, dict(sent), dict(used))


def newest(board: Board, topic: str, client: int, architecture: str) -> Arrays | None:
    """What a client would hold of a topic, as `Cache.for_client` says it."""
    found = None
    for to in ("", f"model:{architecture}", f"client:{client}"):
        item = board.items.get((topic, to))
        if item is not None and (found is None or item.version >= found.version):
            found = item
    return None if found is None else found.arrays


def moved(arrays: Arrays, start: Arrays, scale: float) -> Arrays:
    """start + scale·(arrays − start), entry by entry; what `start` lacks, or has otherwise, as it is."""
    return shifted(difference(arrays, start), start, scale)


def difference(arrays: Arrays, start: Arrays) -> Arrays:
    """What an update moved; what `start` lacks, or has otherwise, as it is."""
    return {name: value - start[name] if _alike(start.get(name), value) else value for name, value in arrays.items()}


def shifted(change: Arrays, start: Arrays, scale: float) -> Arrays:
    """start + scale·change, entry by entry."""
    return {
        name: added(start[name], value, scale) if _alike(start.get(name), value) else value
        for name, value in change.items()
    }


def added(start: torch.Tensor, change: torch.Tensor, scale: float) -> torch.Tensor:
    """start + scale·change in the dtype of `start`; whole numbers (counters of batches) move whole."""
    if not start.dtype.is_floating_point:
        return start + change
    return (start.double() + scale * change.double()).to(start.dtype)


def _alike(one: torch.Tensor | None, other: torch.Tensor) -> bool:
    return one is not None and one.shape == other.shape and one.dtype == other.dtype and other.dtype != torch.bool


def listed(arrays: Arrays) -> dict[str, Any]:
    """Arrays by number, with their names beside: a name may hold a slash."""
    return {"names": list(arrays), "arrays": {str(i): value for i, value in enumerate(arrays.values())}}


def unlisted(slot: Mapping[str, Any]) -> Arrays:
    """Undo `listed`."""
    return {name: slot["arrays"][str(i)] for i, name in enumerate(slot["names"])}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


def _rows(versions: Mapping[Address, int]) -> list[list[Any]]:
    return [[topic, to, version] for (topic, to), version in versions.items()]


def _unrows(rows: list[list[Any]]) -> dict[Address, int]:
    return {(topic, to): version for topic, to, version in rows}
