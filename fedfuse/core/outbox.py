"""What goes out: each client's message, with just the knowledge that its node lacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from fedfuse.compat.flower_replies import like
from fedfuse.core.scenario import Scenario
from fedfuse.wire.client_store import INITIAL
from fedfuse.wire.knowledge import ABOUT, Address, Board, Parcel
from fedfuse.wire.records import record, trusted
from fedfuse.wire.sums import GROUP
from fedfuse.wire.traffic import Traffic


@dataclass(frozen=True)
class Request:
    """What a phase asks of its clients, all alike.

    Attributes
    ----------
    kind : {"train", "evaluate"}
    round : int
    phase : str
    label : {"setup", "train", "evaluate"}
        How its bytes are counted.
    tag : str
        Name of the client state it makes; "" for an evaluation, which makes none.
    said : ConfigRecord
        What every message says: run, strategy, round, phase, hyper-parameters.
    """

    kind: str
    round: int
    phase: str
    label: str
    tag: str
    said: ConfigRecord

    @property
    def type(self) -> str:
        """Flower's message type."""
        return self.kind if self.kind == "evaluate" or self.phase == "train" else f"{self.kind}.{self.phase}"


class Delivery(NamedTuple):
    """The knowledge of a message, alike for all clients who need the same and lack the same of it."""

    parcels: list[Parcel]
    records: dict[str, ArrayRecord]
    columns: dict[str, list[Any]]  # of the message's config
    versions: dict[Address, int]  # what the node holds afterwards


class Outbox:
    """Builds messages, and keeps what the server believes of each client.

    Attributes
    ----------
    tags : dict of int to str
        The state last accepted from each client.
    held : dict of int to dict
        Versions of knowledge that each client's node holds.
    traffic : Traffic
        Bytes, both ways.
    groups : dict of int to int
        This phase's clients, each in the group that is summed together.
    awaited : set of int
        Clients of this phase.
    weights : dict of int to float
        What a client's share counts for beside others; 1 where nothing is said (virtual time: staleness).
    made : dict of int to str
        The state that a client's reply made, where it is not the request's.
    repeated : set of int
        Clients whose share was taken in an earlier phase and is only looked at again.
    reaches : callable
        Whether a client's messages are sent at all, so that they are charged; the grid says so.
    """

    def __init__(self, scenario: Scenario, board: Board) -> None:
        self.scenario, self.board, self.traffic = scenario, board, Traffic()
        self.tags: dict[int, str] = {}
        self.held: dict[int, dict[Address, int]] = {}
        self.groups: dict[int, int] = {}
        self.awaited: set[int] = set()
        self.weights: dict[int, float] = {}
        self.made: dict[int, str] = {}
        self.repeated: set[int] = set()
        self.reaches: Callable[[int], bool] = lambda client: True
        self._sent: dict[int, dict[Address, int]] = {}  # versions a node holds once it has answered
        self._parcels: dict[int, list[Parcel]] = {}  # of messages that are not charged yet

    def messages(self, request: Request, clients: Iterable[int], charge: bool = True) -> list[Message]:
        """The messages of one phase, in client order; charged at once, or one by one by `charge`."""
        self.expect(request, clients)
        self._wire: dict[Any, ArrayRecord] = {}
        self._deliveries: dict[Any, Delivery] = {}
        self._first: Message | None = None
        messages = [self._message(client) for client in sorted(self.awaited)]
        for client in filter(self.reaches, sorted(self.awaited)) if charge else ():
            self.charge(client)
        return messages

    def expect(self, request: Request, clients: Iterable[int]) -> None:
        """Await replies of clients, in groups of eight in client order."""
        clients = sorted(clients)
        self.request, self.awaited = request, set(clients)
        self.groups = {client: i // GROUP for i, client in enumerate(clients)}
        self.weights, self.made, self.repeated = {}, {}, set()

    def charge(self, client: int) -> None:
        """Count the bytes of a message."""
        request = self.request
        needed, parcels = tuple(self._sent[client]), self._parcels.pop(client)
        self.traffic.down(request.label, request.round, client, needed, parcels, self.board)

    # -- virtual time: what was sent to a client in flight -------------------------------------------------

    def owed(self, client: int, used: Mapping[Address, int]) -> int:
        """Bytes of knowledge that training at a client lacks; evaluations, which take no time, are left out."""
        needed = self.board.addresses(client, self.scenario.architectures[client])
        return sum(p.nbytes for address in needed for p in self.board.path(address, used.get(address, -1)))

    def used(self, client: int) -> dict[Address, int]:
        """Versions that training at a client has had."""
        needed, used = self.board.addresses(client, self.scenario.architectures[client]), self.traffic.used
        return {address: used.get((client, address), -1) for address in needed}

    def lost(self, client: int, used: Mapping[Address, int]) -> None:
        """A client that was sent something is lost: its training has had what it had before."""
        for address, version in used.items():
            self.traffic.used[client, address] = version

    @property
    def unsent(self) -> set[int]:
        """Clients whose message is made and not charged."""
        return set(self._parcels)

    def sent(self, client: int) -> dict[Address, int]:
        """Versions that a client holds once it has answered."""
        return self._sent[client]

    def deliver(self, client: int, sent: dict[Address, int], made: str) -> None:
        """A reply to a message of an earlier round is awaited now."""
        self._sent[client], self.made[client] = sent, made

    def again(self, client: int) -> Message:
        """A client's message anew, with whole values, after its node said that it could not follow."""
        self.held.pop(client, None)
        return self._message(client, again=True)

    @staticmethod
    def node_of(client: int) -> int:
        """A client's node, as grids of ours number them."""
        return client + 1

    @staticmethod
    def client_of(reply: Message) -> int:
        """The client a reply comes from."""
        return reply.metadata.src_node_id - 1

    def arrived(self, client: int) -> None:
        """A client has answered: its node holds what it was sent, or newer."""
        held = self.held.setdefault(client, {})
        for address, version in self._sent[client].items():
            held[address] = max(version, held.get(address, -1))

    def _message(self, client: int, again: bool = False) -> Message:
        request, held = self.request, self.held.get(client, {})
        needed = tuple(self.board.addresses(client, self.scenario.architectures[client]))
        parcels = [p for address in needed for p in self.board.path(address, held.get(address, -1))]
        key = (needed, tuple(map(id, parcels)))  # ids of what the deliveries keep
        delivery = self._deliveries.get(key)
        if delivery is None:
            delivery = self._deliveries[key] = self._deliver(needed, parcels)
        self._sent[client] = delivery.versions
        config: dict[str, Any] = {
            "client": client,
            "group": self.groups[client],
            "tag": self.tags.get(client, INITIAL),
            "new-tag": request.tag,
            **delivery.columns,
        }
        content = {**delivery.records, "config": trusted(ConfigRecord, config), "run": request.said}
        if again:
            self.traffic.resent(request.round, client, delivery.parcels)
        else:
            self._parcels[client] = delivery.parcels
        if self._first is None:
            self._first = Message(trusted(RecordDict, content), self.node_of(client), request.type)
            return self._first
        return like(self._first, trusted(RecordDict, content), self.node_of(client))

    def _deliver(self, needed: tuple[Address, ...], parcels: list[Parcel]) -> Delivery:
        """What brings a node to the newest version of all that it needs."""
        records: dict[str, ArrayRecord] = {}
        for parcel in parcels:
            name = "arrays" if parcel.topic == "model" else parcel.topic
            if name in records:
                name = f"{name}@{parcel.version}{parcel.to}"
            key = (parcel.address, parcel.version, parcel.since)
            if key not in self._wire:  # one record object per distinct array and phase: grids broadcast it once
                self._wire[key] = record(parcel.arrays)
            records[name] = self._wire[key]
        versions = {address: self.board.items[address].version for address in needed}
        columns: dict[str, list[Any]] = {}
        if parcels:
            columns["parcel.record"] = list(records)
            columns |= {f"parcel.{part}": [getattr(p, part) for p in parcels] for part in ABOUT}
        if needed:
            columns["needs.topic"] = [topic for topic, _ in needed]
            columns["needs.to"] = [to for _, to in needed]
            columns["needs.version"] = list(versions.values())
        return Delivery(parcels, records, columns, versions)
