"""Versions that flights outlive: fused after K arrivals, after every one, or every W seconds of virtual time.

A strategy says what a stale share is worth. *Updates* are what a client moved: under `fedbuff` w + η_g·mean(s·Δ), under
`fedasync` (1 − α·s)·w + α·s·w_new, each put to the strategy as models that its own mean takes. *Newest* shares stand in
a table, one a client, each with the weight s(age): buffered distillation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from flwr.app import Message

from fedfuse.clock.draws import nanoseconds
from fedfuse.clock.events import Collected
from fedfuse.clock.staleness import discount
from fedfuse.clock.world import ARRIVED, Flight, Work
from fedfuse.core.shares import FAILED, nobody
from fedfuse.core.virtual_clock import UNKNOWN, Over, VirtualClock, why, worked
from fedfuse.core.waiting import Waiting, difference, moved, newest, shifted, waiting
from fedfuse.wire.knowledge import Address

if TYPE_CHECKING:
    from fedfuse.core.loop import Federation


def play_version(clock: VirtualClock, federation: Federation, round: int) -> None:
    """Let time pass until a version can be made, and make it.

    Raises
    ------
    Over
        If it would be made after `until.seconds`.
    WorldError
        If every client fails, or nobody arrives for a whole period.
    """
    strategy, schedule, sky = clock.strategy, clock.schedule, clock.sky
    strategy.ensure_begun()
    strategy.round = round
    count = {"fedbuff": schedule.buffer, "fedasync": 1}.get(schedule.name)
    window = nanoseconds(schedule.seconds) if schedule.name == "semiasync" else None
    version = _Version(clock, federation, round)
    while True:
        passed = sky.collect(round, version.owed, version.work, count, window)
        if not passed.unknown:
            break
        version.train(passed.unknown)
    if clock.limit is not None and passed.now > clock.limit:
        raise Over
    version.settle(passed)
    sky.accept(passed)
    version.deliver(passed.arrived)


class _Version:
    """One version in the making: who was trained for it, and what that came to."""

    def __init__(self, clock: VirtualClock, federation: Federation, round: int) -> None:
        self.clock, self.federation, self.round = clock, federation, round
        self.strategy, self.outbox = clock.strategy, clock.strategy.outbox
        self.work: dict[int, Work] = {}
        self.trained: dict[int, Waiting] = {}
        self.lost: list[Flight] = []
        self.tag = ""

    def owed(self, client: int) -> int:
        """Bytes that a client has to be sent; one that was lost on the way has had what it had before."""
        before = self.clock.waiting.get(client)
        return self.outbox.owed(client, self.outbox.used(client) if before is None else self._used(client, before))

    def _used(self, client: int, before: Waiting) -> dict[Address, int]:
        return {address: before.used.get(address, -1) for address in self.outbox.used(client)}

    def train(self, clients: list[int]) -> None:
        """Let clients work, all at once; keep what they answer."""
        strategy, outbox = self.strategy, self.outbox
        messages = strategy.messages(clients, "train", {})
        self.tag = outbox.request.tag
        for reply in self.federation.exchange(messages):
            client = outbox.client_of(reply)
            self.work[client] = worked(reply)
            if reply.has_error():
                self.trained[client] = Waiting({}, {"reason": reply.error.reason or "failed"}, {}, "", {}, {})
                continue
            kept = waiting(reply, self.tag, outbox.sent(client), {})
            if self.clock.schedule.name == "fedbuff" and strategy.staleness == "updates":
                self._rebase(client, kept, difference)
            self.trained[client] = kept
        lost = {client: UNKNOWN for client, flight in self.clock.sky.flying.items() if flight.outcome != ARRIVED}
        known = lost | self.work
        if len(known) == strategy.scenario.clients and all(work == UNKNOWN for work in known.values()):
            reason = self.trained[clients[0]].config["reason"]  # no matter of time: it would happen again
            raise nobody(self.round, "train", [f"client {clients[0]}: {reason}"])

    def _rebase(self, client: int, kept: Waiting, change: object, *scale: float) -> None:
        """Put each record that is the new value of a topic in another form, by what the client was sent of it."""
        architecture = self.strategy.scenario.architectures[client]
        for name, arrays in kept.records.items():
            topic = "model" if name == "arrays" else name
            start = newest(self.strategy.board, topic, client, architecture)
            if topic in self.strategy.topics and start is not None:
                kept.records[name] = change(arrays, start, *scale)  # type: ignore[operator]

    def settle(self, passed: Collected) -> None:
        """Charge what was sent, take back what was lost, and keep what is on its way."""
        clock, outbox = self.clock, self.outbox
        gone = {(flight.client, flight.attempt): flight for flight in passed.lost}
        self.lost = passed.lost
        self.strategy.messages(sorted({flight.client for flight in passed.sent}), "train", {})
        for flight in passed.lost:
            kept = self.trained.get(flight.client)
            if flight.round < self.round:
                kept = clock.waiting.pop(flight.client)
                outbox.lost(flight.client, self._used(flight.client, kept))
            self.strategy.inbox.leave_out(
                flight.client, (kept.config.get("reason") if kept else "") or why(flight), FAILED
            )
        for flight in passed.sent:
            used = outbox.used(flight.client)
            if flight.client not in outbox.unsent:  # invited twice: lost, and again
                self.strategy.messages([flight.client], "train", {})
            outbox.charge(flight.client)
            if (flight.client, flight.attempt) in gone:
                outbox.lost(flight.client, used)
            else:
                kept = self.trained.get(flight.client) or Waiting({}, {}, {}, "", {}, {})
                kept.used = used
                clock.waiting[flight.client] = kept

    def deliver(self, arrived: list[Flight]) -> None:
        """Fuse what has arrived, in client order."""
        clock, strategy, outbox = self.clock, self.strategy, self.outbox
        ages = {flight.client: self.round - flight.round for flight in arrived}
        here = {client: clock.waiting.pop(client) for client in sorted(ages)}
        table = strategy.staleness == "newest" and clock.schedule.name != "semiasync"
        members = {**clock.table, **here} if table else here
        strategy.messages([], "train", {})  # a new phase: nobody is asked, these are awaited
        outbox.expect(outbox.request, members)
        for client, kept in here.items():
            outbox.deliver(client, kept.sent, kept.made)
        since = {**clock.table_since, **{flight.client: flight.round for flight in arrived}}
        weights = {client: self._worth(self.round - since[client]) for client in members}
        rebased = strategy.staleness == "updates" and clock.schedule.name != "semiasync"
        outbox.weights = {} if rebased else weights
        outbox.repeated = set(members) - set(here)
        strategy.aggregate_train(self.round, self._replies(members, weights, rebased))
        if table:
            for client in strategy.inbox.taken:
                clock.table[client], clock.table_since[client] = here[client], since[client]
        clock.book.note(self.round, "train", [*arrived, *self.lost], weights)

    def _replies(self, members: dict[int, Waiting], weights: dict[int, float], rebased: bool) -> Iterator[Message]:
        schedule = self.clock.schedule
        for client in sorted(members):
            kept = members[client]
            if rebased and schedule.name == "fedbuff":
                self._rebase(client, kept, shifted, schedule.server_lr * weights[client])
            elif rebased:
                self._rebase(client, kept, moved, schedule.mixing * weights[client])
            yield kept.message(client)

    def _worth(self, age: int) -> float:
        schedule = self.clock.schedule
        return discount(schedule.staleness, age, schedule.a, schedule.b)
