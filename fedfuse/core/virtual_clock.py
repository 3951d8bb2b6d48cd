"""Virtual time around the loop: who is invited, when a reply is there, and when the next version is made.

*Compute at dispatch, deliver at arrival.* All who were invited since the last version see the same board and are one
batch for the grid; each reply waits for its moment. Who is known to be lost is never trained. An evaluation takes no
virtual time. Clients are fused in client order in groups of eight, never in order of arrival, so that digests depend on
who arrived and on nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

from flwr.app import ArrayRecord, ConfigRecord, Error, Message

from fedfuse.clock.draws import SECOND, nanoseconds
from fedfuse.clock.events import Sky, close, stopped
from fedfuse.clock.world import ARRIVED, DROPPED, FAILED, LATE, Flight, Work, World
from fedfuse.core import shares
from fedfuse.core.strategy import FusionStrategy
from fedfuse.core.timekeeping import Timekeeping
from fedfuse.core.waiting import Waiting
from fedfuse.errors import WorldError
from fedfuse.wire.group_sums import kept_back
from fedfuse.wire.knowledge import Address
from fedfuse.wire.records import arrays_in, config_in, entries, listed_nbytes, nbytes, tensors

if TYPE_CHECKING:
    from fedfuse.core.loop import Federation

UNKNOWN = Work(-1, 1, 0)  # of a client that failed


class Over(Exception):
    """Virtual time is up: what would come next does not count."""


class Called(NamedTuple):
    """A client of a phase: its message, and what training at it had had before."""

    message: Message
    start: Flight
    used: dict[Address, int]


class VirtualClock:
    """Keeps virtual time for one run.

    Parameters
    ----------
    strategy : FusionStrategy
    world : World
        Devices and their absence.

    Attributes
    ----------
    now : int
        Virtual nanoseconds since the run began.
    book : Timekeeping
        Flights that have ended.
    sky : Sky
        Clients in flight, where flights outlive versions, and everybody's attempts.
    waiting : dict of int to Waiting
        Replies of clients in flight.
    table : dict of int to Waiting
        The newest share of each client, where the strategy fuses those.
    """

    def __init__(self, strategy: FusionStrategy, world: World) -> None:
        config = strategy.scenario.config
        self.strategy, self.world, self.schedule = strategy, world, config.schedule
        self.limit = None if config.until.seconds is None else nanoseconds(config.until.seconds)
        self.book = Timekeeping(world)
        self.sky = Sky(world, config.schedule.concurrency or strategy.scenario.cohort_size)
        self.waiting: dict[int, Waiting] = {}
        self.table: dict[int, Waiting] = {}
        self.table_since: dict[int, int] = {}
        self.apart = not world.certain or self.schedule.name != "sync"
        self._cohort: tuple[int, list[int] | None] = (-1, None)
        strategy.calendar = self

    @property
    def now(self) -> int:
        """Virtual nanoseconds since the run began."""
        return self.sky.now

    @property
    def seconds(self) -> float:
        """Virtual seconds since the run began."""
        return self.sky.now / SECOND

    @property
    def _wanted(self) -> int | None:
        return self.strategy.scenario.cohort_size if self.schedule.name == "overcommit" else None

    @property
    def outlives(self) -> bool:
        """Whether a flight may outlive the version it began under."""
        stale = self.strategy.staleness in ("updates", "newest") and self.strategy.phases(1) == ("train",)
        return self.schedule.name in ("fedbuff", "fedasync") or (self.schedule.name == "semiasync" and stale)

    # -- who can be invited (the strategy asks) ------------------------------------------------------------

    def sampled(self, round: int) -> list[int]:
        """The first of the round's order that are on; in later phases, who is still with it."""
        known, members = self._cohort
        if known != round or members is None:
            scenario, factor = self.strategy.scenario, self.schedule.factor
            size = scenario.cohort_size
            if self._wanted is not None:
                size = min(scenario.clients, round_up(factor * size))
            on = [client for client in scenario.order(round) if self.there(client)]
            members = sorted(on[:size])
            self._cohort = (round, members)
        return [client for client in members if self.there(client)]

    def there(self, client: int) -> bool:
        """Whether a client's device is on, and not at work."""
        return client not in self.sky.flying and self.world.on(client, self.now)

    # -- a phase -------------------------------------------------------------------------------------------

    def play(self, federation: Federation, round: int, phase: str) -> None:
        """Play one phase in virtual time.

        Raises
        ------
        Over
            If it would end after `until.seconds`; nothing of it counts then.
        WorldError
            If every client fails, or nobody arrives for a whole period.
        """
        while not self._together(federation, round, phase):
            self._cohort = (-1, None)
            if self.now - self.sky.last >= self.world.patience:
                raise WorldError(
                    f"round {round}, {phase}: nobody has arrived since virtual second {self.sky.last / SECOND:.0f}, "
                    f"a whole period"
                )

    def _together(self, federation: Federation, round: int, phase: str) -> bool:
        """Invite a cohort and fuse what counts; whether anybody arrived."""
        strategy, start = self.strategy, self.now
        messages = list(strategy.configure_train(round, ArrayRecord(), ConfigRecord(), federation.grid))
        if not messages:
            self._wait_for_somebody()
            return False
        called = [self._call(message, round) for message in messages]
        going = [one.message for one in called if not one.start.known]
        flights: list[Flight] = []
        answers = self._answers(called, federation.exchange(going) if going else (), flights)
        name, wanted = self.schedule.name, self._wanted
        limit = nanoseconds(self.schedule.seconds) if name in ("deadline", "semiasync") else None
        if wanted is not None or self.limit is not None:  # nothing may be fused before the end is known
            answers = iter(list(answers))
            self._check_limit(close(flights, start, limit, wanted).end)
        for message in messages:  # not before it is known that this phase counts
            strategy.outbox.charge(message.metadata.dst_node_id - 1)
        over = () if wanted is None else close(flights, start, None, wanted).ended
        let_go = {flight.client for flight in over if flight.outcome == LATE}
        anybody = self._fuse(self._counting(answers, start, limit, let_go), round)
        if all(flight.outcome == FAILED for flight in flights):  # no matter of time: it would happen again
            raise shares.nobody(round, phase, strategy.inbox.left_out[-1:])
        closed = close(flights, start, limit, wanted)
        self.book.note(round, phase, closed.ended)
        counting = {flight.client for flight in closed.counted}
        for one, flight in zip(called, sorted(flights), strict=True):
            self.sky.attempts[flight.client] = flight.attempt + 1
            if flight.client not in counting:
                strategy.outbox.lost(flight.client, one.used)
        self.sky.now = closed.end
        if anybody:
            self.sky.last = closed.end
            self._cohort = (round, [flight.client for flight in closed.counted])
        return anybody

    def _fuse(self, replies: Iterator[Message], round: int) -> bool:
        """Let the strategy fuse, if anybody arrived; whoever did not is left out either way."""
        inbox, nobody = self.strategy.inbox, list[Message]()
        for reply in replies:
            if not reply.has_error():
                self.strategy.aggregate_train(round, chain(nobody, [reply], replies))
                return True
            nobody.append(reply)
        for reply in nobody:
            inbox.leave_out(self.strategy.outbox.client_of(reply), reply.error.reason or "failed", reply.error.code)
        return False

    def _call(self, message: Message, round: int) -> Called:
        """A client that is sent a message; its flight as far as it is known."""
        outbox = self.strategy.outbox
        client = message.metadata.dst_node_id - 1
        used = outbox.used(client)
        down, attempt = outbox.owed(client, used), self.sky.attempts.get(client, 0)
        return Called(message, self.world.flight(client, attempt, round, self.now, down, None), used)

    def _answers(
        self, called: list[Called], replies: Iterable[Message], flights: list[Flight]
    ) -> Iterator[tuple[Flight, Message]]:
        """Everybody's flight and reply, in client order; who was lost at once has an error for a reply."""
        stream = iter(replies)
        for one in called:
            flight, reply = one.start, None
            if not flight.known:
                reply = next(stream)
                flight = self.world.flight(*flight[:4], flight.down, worked(reply))
            flights.append(flight)
            yield flight, reply if reply is not None else _lost(one.message, flight)

    def _counting(
        self,
        answers: Iterator[tuple[Flight, Message]],
        start: int,
        limit: int | None,
        let_go: set[int],
    ) -> Iterator[Message]:
        """Replies that count, and an error in place of each that does not."""
        for flight, reply in answers:
            late = limit is not None and not close([flight], start, limit).counted
            if flight.client in let_go and flight.outcome != FAILED:  # enough others came first: it is lost to nobody
                self.strategy.outbox.awaited.discard(flight.client)
            elif (flight.outcome == ARRIVED and not late) or reply.has_error():
                yield reply
            else:
                told = stopped(flight, start + limit) if limit is not None and flight.outcome == ARRIVED else flight
                yield _lost(reply, told)

    def _check_limit(self, end: int) -> None:
        if self.limit is not None and end > self.limit:
            raise Over

    def _wait_for_somebody(self) -> None:
        """Nobody can be invited: time passes until somebody is on."""
        moments = [at for one in self.world.intervals if (at := one.on_from(self.now)) is not None and at > self.now]
        if not moments:
            raise WorldError(f"virtual second {self.seconds:.0f}: none of the cohort is on, and nobody else will be")
        self._check_limit(min(moments))
        self.sky.now = min(moments)

    # -- checkpoint ----------------------------------------------------------------------------------------

    def saved(self) -> dict[str, Any]:
        """As a tree of tensors and plain values: flights, what waits for its moment, and the newest shares."""
        sky, book = self.sky, self.book
        plain = {
            "now": sky.now,
            "last": sky.last,
            "serial": sky.serial,
            "flying": [list(flight) for flight in sky.flying.values()],
            "attempts": [[client, n] for client, n in sorted(sky.attempts.items())],
            "chain": book.chain,
            "totals": book.totals,
            "since": [[client, round] for client, round in sorted(self.table_since.items())],
        }
        return {
            "plain": json.dumps(plain),
            "waiting": {str(client): one.saved() for client, one in self.waiting.items()},
            "table": {str(client): one.saved() for client, one in self.table.items()},
        }

    def restore(self, tree: dict[str, Any]) -> None:
        """Undo `saved`."""
        plain = json.loads(tree["plain"])
        flying = {row[0]: Flight(*row) for row in plain["flying"]}
        self.sky = Sky(
            self.world, self.sky.concurrency, plain["now"], plain["last"], plain["serial"], flying,
            dict(plain["attempts"]),
        )  # fmt: skip
        self.book.chain, self.book.totals, self.book.rows = plain["chain"], plain["totals"], []
        self.table_since = dict(plain["since"])
        self.waiting = {int(c): Waiting.restored(slot) for c, slot in tree.get("waiting", {}).items()}
        self.table = {int(c): Waiting.restored(slot) for c, slot in tree.get("table", {}).items()}


def round_up(number: float) -> int:
    """The least whole number that is not smaller, but for what floats add: 1.1 · 10 is 11."""
    return -int(-number // 1) if abs(number - round(number)) > 1e-9 else round(number)


def worked(reply: Message) -> Work:
    """What a reply says of the work it took, and its bytes."""
    if reply.has_error():
        return UNKNOWN
    config: Any = config_in(reply.content) or {}
    size = sum(
        nbytes(tensors(value)) for name, value in arrays_in(reply.content).items() if not name.startswith("sum:")
    )
    size += listed_nbytes(entries(reply.content["metrics"])) + sum(kept_back(config).values())
    return Work(int(config.get("flops", 0)), int(config.get("unit", 1)), size)


def _lost(message: Message, flight: Flight) -> Message:
    """The reply that never came, in words."""
    client = flight.client
    asked = message if message.metadata.dst_node_id == client + 1 else Message(message.content, client + 1, "train")
    return Message(Error(code=shares.FAILED, reason=why(flight)), reply_to=asked)


def why(flight: Flight) -> str:
    """What became of a flight that brought nothing."""
    what = {DROPPED: "dropped out", LATE: "late"}.get(flight.outcome, "went away")
    return f"{what} at virtual second {flight.end / SECOND:.3f}"
