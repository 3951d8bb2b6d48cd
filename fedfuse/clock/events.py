"""The server's side of virtual time: who is invited when, whose reply counts, and when the next version is made.

Events are `(time, kind, client, attempt)`; kinds at one instant come in the order below, and a client is in flight once
at most, so the order is total: no ties. Everything here is plain arithmetic over flights; nothing trains.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from fedfuse.clock.draws import SECOND, uniform
from fedfuse.clock.world import ARRIVED, LATE, Flight, Work, World
from fedfuse.errors import WorldError

ARRIVAL, LOSS, DEADLINE, AVAILABILITY, DISPATCH = range(5)
TRIES = 8  # draws of a client that turns out to be off before all are looked at


# -- rounds that begin and end together ------------------------------------------------------------------------


class Closed(NamedTuple):
    """A phase that is over: when, whose replies count, and all flights as they ended."""

    end: int
    counted: list[Flight]
    ended: list[Flight]


def close(flights: Iterable[Flight], start: int, limit: int | None = None, wanted: int | None = None) -> Closed:
    """End a phase whose flights all started together.

    Parameters
    ----------
    flights : iterable of Flight
        All of known end.
    start : int
        When they started.
    limit : int, optional
        Nanoseconds that the server waits at most (`deadline`).
    wanted : int, optional
        Replies that the server waits for at most (`overcommit`).

    Returns
    -------
    Closed
        `counted` and `ended` in client order. Who had not arrived at the end was stopped there: late.
    """
    order = sorted(flights, key=lambda f: (f.end, f.client))
    end = max((f.end for f in order), default=start)
    if limit is not None:
        end = min(end, start + limit)
    arrived = [f for f in order if f.outcome == ARRIVED and f.end <= end]
    if wanted is not None and len(arrived) >= wanted:
        arrived = arrived[:wanted]
        end = arrived[-1].end
    counted = {f.client for f in arrived}
    ended = [f if f.client in counted else stopped(f, end) for f in order]
    return Closed(end, sorted(arrived), sorted(ended))


def stopped(flight: Flight, end: int) -> Flight:
    """A flight that the server waits for no longer; an upload that had begun was for nothing."""
    if flight.end < end or (flight.end == end and flight.outcome != ARRIVED):
        return flight
    return flight._replace(
        received=min(flight.received, end),
        computed=min(flight.computed, end),
        end=end,
        outcome=LATE,
        up=flight.up if flight.computed < end else 0,
    )


# -- versions that flights outlive -----------------------------------------------------------------------------


class Collected(NamedTuple):
    """What happened until a version was made, or could not be made without knowing more.

    Parameters
    ----------
    now : int
    arrived, lost : list of Flight
        That ended, in order of time.
    sent : list of Flight
        That began.
    unknown : list of int
        Clients whose work has to be known before this is final; while there are any, nothing else here counts.
    """

    now: int
    arrived: list[Flight]
    lost: list[Flight]
    sent: list[Flight]
    unknown: list[int]
    flying: dict[int, Flight]
    free: list[int]
    last: int


@dataclass
class Sky:
    """Clients in flight, and the server that keeps so many of them at work.

    Parameters
    ----------
    world : World
    concurrency : int
        Clients at work at once.
    """

    world: World
    concurrency: int
    now: int = 0
    last: int = 0  # when somebody arrived last
    serial: int = 0  # invitations so far
    flying: dict[int, Flight] = field(default_factory=dict)
    attempts: dict[int, int] = field(default_factory=dict)
    free: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.free = self.free or [client for client in range(self.world.clients) if client not in self.flying]

    def collect(
        self,
        round: int,
        down: Callable[[int], int],
        work: Mapping[int, Work],
        count: int | None = None,
        window: int | None = None,
    ) -> Collected:
        """Let time pass until `count` replies have arrived, or a `window` of nanoseconds that brought any is over.

        Nothing of this object changes: with more `work` known the same question is asked again, until nothing is
        unknown. A client whose reply has arrived, or whose message of this round went out and arrived, is not invited
        again before the version is made.

        Parameters
        ----------
        round : int
            The version being made.
        down : callable
            Bytes that a client has to be sent.
        work : mapping
            What the training of each client that was invited in this round came to, as far as it is known.

        Raises
        ------
        WorldError
            If nobody arrives for a whole period.
        """
        return _Passing(self, round, down, work, count, window).run()

    def accept(self, passed: Collected) -> None:
        """Take over what happened: a version is made of what arrived, and who arrived may be invited again."""
        self.now, self.last, self.flying = passed.now, passed.last, passed.flying
        self.serial += len(passed.sent)
        for flight in passed.sent:
            self.attempts[flight.client] = flight.attempt + 1
        self.free = passed.free
        for flight in passed.arrived:
            insort(self.free, flight.client)


class _Passing:
    """Time passing, on copies."""

    def __init__(
        self,
        sky: Sky,
        round: int,
        down: Callable[[int], int],
        work: Mapping[int, Work],
        count: int | None,
        window: int | None,
    ) -> None:
        self.sky, self.world, self.round, self.down, self.work = sky, sky.world, round, down, work
        self.count, self.window = count, window
        self.now, self.last = sky.now, sky.last
        self.flying, self.free = dict(sky.flying), list(sky.free)
        self.heap = [_event(flight) for flight in self.flying.values()]
        heapq.heapify(self.heap)
        self.arrived: list[Flight] = []
        self.lost: list[Flight] = []
        self.sent: list[Flight] = []
        self.tried: dict[int, int] = {}  # attempts begun since
        self.unknown: list[int] = []
        self.pending: int | None = None  # moment of the dispatch that is in the heap
        self.waking = 0  # moment of the last availability event that was put into the heap

    def run(self) -> Collected:
        self._dispatch_at_once()
        if self.window is not None:
            self._expect(self.now + self.window, DEADLINE)
        while not self._over():
            pass
        return Collected(self.now, self.arrived, self.lost, self.sent, self.unknown, self.flying, self.free, self.last)

    def _over(self) -> bool:
        """Let one event happen; whether the version is made, or cannot be without knowing more."""
        if not self.heap:
            if self.unknown:
                return True
            raise WorldError(f"{self._said()}: nobody is at work, and nobody will be on again")
        self.now, kind, client, _ = heapq.heappop(self.heap)
        if kind == ARRIVAL:
            self.arrived.append(self.flying.pop(client))
            self.last = self.now
            if len(self.arrived) == self.count:
                return True
            self._dispatch_at_once()
        elif kind == LOSS:
            self.lost.append(self.flying.pop(client))
            insort(self.free, client)
            if self._hopeless():
                return True
            self._dispatch_at_once()
        elif kind == DEADLINE:
            # where somebody's end is unknown it may lie before this window: a day of empty ones would tell no more
            if self.arrived or self.unknown or self._hopeless():
                return True
            self._expect(self.now + (self.window or 1), DEADLINE)
        elif kind == AVAILABILITY:
            if self._hopeless():
                return True
            self._dispatch_at_once()
        else:
            self._fill()
        return False

    def _expect(self, moment: int, kind: int) -> None:
        """Put an event that is no client's into the heap."""
        heapq.heappush(self.heap, (moment, kind, 0, 0))

    def _dispatch_at_once(self) -> None:
        if self.pending != self.now:
            self.pending = self.now
            self._expect(self.now, DISPATCH)

    def _fill(self) -> None:
        """Invite clients that are on, as many as may be at work."""
        self.pending = None  # who is lost at once is made up for at the same instant
        while len(self.flying) < self.sky.concurrency and self.free:
            place = self._pick()
            if place is None:
                wake = [at for c in self.free if (at := self.world.intervals[c].on_from(self.now)) is not None]
                if wake and (self.waking <= self.now or min(wake) < self.waking):
                    self.waking = min(wake)
                    self._expect(self.waking, AVAILABILITY)
                return
            client = self.free.pop(place)
            attempt = self.tried.get(client, self.sky.attempts.get(client, 0))
            self.tried[client] = attempt + 1
            known = self.work.get(client)
            flight = self.world.flight(client, attempt, self.round, self.now, self.down(client), known)
            self.sent.append(flight)
            self.flying[client] = flight
            if flight.known:
                heapq.heappush(self.heap, _event(flight))
            else:
                self.unknown.append(client)

    def _pick(self) -> int | None:
        """The place among the free of a client that is on, drawn."""
        serial, seed, n = self.sky.serial + len(self.sent), self.world.seed, len(self.free)
        for k in range(TRIES):
            place = int(uniform(seed, "choice", serial, k) * n)
            if self.world.on(self.free[place], self.now):
                return place
        on = [place for place in range(n) if self.world.on(self.free[place], self.now)]
        return on[int(uniform(seed, "choice", serial, TRIES) * len(on))] if on else None

    def _hopeless(self) -> bool:
        """Whether more has to be known; raise if nobody has come for a period and nobody is on the way."""
        if self.now - self.last < self.world.patience or any(f.outcome == ARRIVED for f in self.flying.values()):
            return False
        if self.unknown:
            return True
        raise WorldError(f"{self._said()}: nobody has arrived since {self.last / SECOND:.0f} s, a whole period")

    def _said(self) -> str:
        return f"round {self.round}, virtual second {self.now / SECOND:.0f}"


def _event(flight: Flight) -> tuple[int, int, int, int]:
    return flight.end, ARRIVAL if flight.outcome == ARRIVED else LOSS, flight.client, flight.attempt
