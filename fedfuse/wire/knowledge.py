"""What is shared: topics with kinds and versions, the server's board, a node's cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from fedfuse.compat.torch_writes import writes
from fedfuse.wire.records import Arrays, Spec, model_arrays, nbytes, sha_arrays

Address = tuple[str, str]  # (topic, to); to is "" for all, "client:3" for one, "model:cnn" for an architecture


class Stale(Exception):
    """The node cannot follow: it lacks the version an increment starts from, or the state a message names."""


@dataclass(frozen=True)
class Topic:
    """A named kind of knowledge.

    Parameters
    ----------
    kind : {"state", "lesson", "fold"}
        *state*: the newest value replaces; `receive` sees it in every message. *lesson*: `receive` sees each
        version once. *fold*: a state whose later publications are increments, folded in version order by node
        and server alike.
    arrays : Spec, optional
        What its arrays look like; checked by the node before use. None checks finiteness only.
    fold : callable, optional
        `fold(value, increment) -> value`, for kind "fold". Must not write to its arguments.
    increment : Spec, optional
        Layout of increments, for kind "fold".
    once : bool
        Counted as set-up traffic (a one-off basis), not as per-round traffic.
    sometimes : bool
        Published under some hyper-parameters only, so that nobody need wonder where it never is.
    """

    kind: Literal["state", "lesson", "fold"] = "state"
    arrays: Spec | None = None
    fold: Callable[[Arrays, Arrays], Arrays] | None = None
    increment: Spec | None = None
    once: bool = False
    sometimes: bool = False

    def __post_init__(self) -> None:
        if (self.kind == "fold") != (self.fold is not None):
            raise ValueError("a topic of kind 'fold' needs a fold function, and only it has one")


def model_topic() -> Topic:
    """Topic of a whole model, newest replaces."""
    return Topic("state", model_arrays)


@dataclass(frozen=True)
class Item:
    """A value on the board or in a cache, and the round whose fuse published it (0 = initial)."""

    arrays: Arrays
    version: int
    sha: str = ""  # kept for fold topics


ABOUT = ("topic", "to", "version", "since", "sha")  # what a message's config says of a parcel


@dataclass(frozen=True)
class Parcel:
    """One piece on the wire: a whole value (since = -1) or an increment that starts from version `since`."""

    topic: str
    to: str
    version: int
    since: int
    arrays: Arrays
    sha: str = ""  # of the folded value, for fold topics

    @property
    def address(self) -> Address:
        """Which topic it belongs to and whom it is for."""
        return self.topic, self.to

    @cached_property
    def nbytes(self) -> int:
        """Array payload in bytes."""
        return nbytes(self.arrays)


def address_of(to: int | str | None) -> str:
    """Write the receiver of a publication as text: everyone, one client, or one architecture."""
    return "" if to is None else f"client:{to}" if isinstance(to, int) else f"model:{to}"


def reaches(to: str, client: int, architecture: str) -> bool:
    """Whether something addressed `to` is for this client."""
    return to in ("", f"client:{client}", f"model:{architecture}")


@dataclass
class Board:
    """The server's current knowledge: newest values, and the increments that lead to them."""

    topics: Mapping[str, Topic]
    items: dict[Address, Item] = field(default_factory=dict)
    chains: dict[Address, list[Parcel]] = field(default_factory=dict)
    by_receiver: dict[str, list[Address]] = field(default_factory=dict)
    _wholes: dict[Address, Parcel] = field(default_factory=dict, init=False, repr=False, compare=False)
    _writes: dict[Address, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    def publish(self, topic: str, arrays: Arrays, to: int | str | None, version: int) -> None:
        """Put a value (or, for a fold topic that has one, an increment) on the board.

        Raises
        ------
        ValueError
            If the topic is not declared, or was published for the same receiver in this round already.
        """
        if topic not in self.topics:
            raise ValueError(f"topic {topic!r} is not declared; declared: {', '.join(sorted(self.topics))}")
        kind, address = self.topics[topic], (topic, address_of(to))
        old = self.items.get(address)
        if old is not None and old.version >= version:
            raise ValueError(f"topic {topic!r} was published for {address[1] or 'all'} in round {version} already")
        arrays = {name: value.detach().clone().contiguous() for name, value in arrays.items()}
        if kind.fold is not None and old is not None:
            value = kind.fold(old.arrays, arrays)
            chain = self.chains.setdefault(address, [])
            hashed = sha_arrays(value)
            chain.append(Parcel(topic, address[1], version, old.version, arrays, hashed))
            while sum(step.nbytes for step in chain) > nbytes(value):  # longer than the snapshot: never sent
                chain.pop(0)
            arrays = value
        else:
            hashed = sha_arrays(arrays) if kind.fold is not None else ""
        if old is None:
            self.by_receiver.setdefault(address[1], []).append(address)
        self.items[address] = Item(arrays, version, hashed)
        self._writes[address] = writes(arrays.values())
        self._wholes.pop(address, None)

    def written(self) -> str:
        """A topic whose value was written to in place since it was published; empty if there is none."""
        told = (a[0] for a, item in self.items.items() if writes(item.arrays.values()) != self._writes[a])
        return next(told, "")

    def addresses(self, client: int, architecture: str) -> Iterator[Address]:
        """Everything on the board that is for this client."""
        for to in ("", f"model:{architecture}", f"client:{client}"):
            yield from self.by_receiver.get(to, ())

    def path(self, address: Address, have: int) -> list[Parcel]:
        """What brings a node from version `have` (-1: none) to the newest: increments or the value, the smaller."""
        item = self.items[address]
        if have >= item.version:
            return []
        whole = self._wholes.get(address)
        if whole is None:
            whole = self._wholes[address] = Parcel(*address, item.version, -1, item.arrays, item.sha)
        chain = self.chains.get(address)
        if not chain:
            return [whole]
        start = next((i for i, step in enumerate(chain) if step.since == have), None)
        if have < 0 or start is None or sum(step.nbytes for step in chain[start:]) >= whole.nbytes:
            return [whole]
        return chain[start:]

    def restore(self, items: dict[Address, Item], chains: dict[Address, list[Parcel]]) -> None:
        """Take over a checkpoint."""
        self.items, self.chains, self.by_receiver, self._wholes = items, chains, {}, {}
        self._writes = {address: writes(item.arrays.values()) for address, item in items.items()}
        for address in items:
            self.by_receiver.setdefault(address[1], []).append(address)


class Cache(dict[Address, Item]):
    """What one site holds of the board: the newest value of each topic it was sent."""

    def take(self, parcel: Parcel, topics: Mapping[str, Topic]) -> None:
        """Bring the cache up to date with one parcel; what it holds already is skipped.

        Raises
        ------
        Stale
            If an increment starts from a version that is not held, or the value has another hash.
        """
        held = self.get(parcel.address)
        if held is not None and held.version >= parcel.version:
            return
        if parcel.since < 0:
            if parcel.sha and sha_arrays(parcel.arrays) != parcel.sha:
                raise Stale(f"{parcel.topic}: the value differs from the server's")
            self[parcel.address] = Item(parcel.arrays, parcel.version)
            return
        if held is None or held.version != parcel.since:
            have = "nothing" if held is None else f"version {held.version}"
            raise Stale(f"{parcel.topic}: holds {have}, the increment starts from {parcel.since}")
        fold = topics[parcel.topic].fold
        if fold is None:
            raise Stale(f"{parcel.topic}: an increment of a topic that does not fold")
        value = fold(held.arrays, parcel.arrays)
        if parcel.sha and sha_arrays(value) != parcel.sha:
            del self[parcel.address]
            raise Stale(f"{parcel.topic}: the folded value differs from the server's")
        self[parcel.address] = Item(value, parcel.version)

    def for_client(self, client: int, architecture: str, topics: Iterable[str]) -> dict[str, Item]:
        """The newest value of each topic for this client; at equal age, what is meant for it alone goes first."""
        seen: dict[str, Item] = {}
        for to in ("", f"model:{architecture}", f"client:{client}"):
            for topic in topics:
                item = self.get((topic, to))
                if item is not None and (topic not in seen or item.version >= seen[topic].version):
                    seen[topic] = item
        return seen
