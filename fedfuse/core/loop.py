"""The round loop: drives any fusion strategy over any Flower grid; everything else is a callback."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from fedfuse.core.buffered import play_version
from fedfuse.core.class_attributes import ClassAttributes
from fedfuse.core.evaluation import Row, of_clients, of_server, splits_of
from fedfuse.core.scenario import Scenario
from fedfuse.core.server_attributes import ServerAttributes
from fedfuse.core.shares import SPOILT, STALE
from fedfuse.core.strategy import FusionStrategy
from fedfuse.core.virtual_clock import Over, VirtualClock
from fedfuse.errors import WorldError
from fedfuse.train.work import counting
from fedfuse.wire.records import digest_of

PACE = 30.0  # seconds of a phase after which callbacks hear how far it is, and again


class Callback:
    """Something that happens beside the loop. Callbacks run in the order they are given."""

    def start(self, federation: Federation) -> None:
        """Before the first round (or the first after a resume)."""

    def heard(self, federation: Federation, answers: int, asked: int) -> None:
        """Twice a minute, while a phase goes on: so many of the clients that were asked have answered."""

    def round(self, federation: Federation) -> None:
        """After a round's fuse."""

    def undo(self, federation: Federation) -> None:
        """When what was begun since the last round does not count."""

    def end(self, federation: Federation) -> None:
        """After the last round."""


class Federation:
    """One run of one strategy.

    Parameters
    ----------
    strategy : FusionStrategy
    grid : Grid
        Any Flower grid; replies may come in any order from one that is not ours.
    rounds : int
    callbacks : sequence of Callback

    Attributes
    ----------
    done : int
        The last round that was fused.
    headline : dict of str to float
        The newest evaluation's figures, `accuracy/global` and the like.
    rows, timing : list
        This round's rows, taken away by whoever commits them.
    stop : str
        Why the loop shall end early; empty if it shall not.
    clock : VirtualClock or None
        Keeps virtual time.
    again : bool
        Whether the last round is committed a second time, now as the last: its evaluation replaces an earlier one.
    """

    def __init__(
        self,
        strategy: FusionStrategy,
        grid: Grid,
        rounds: int,
        callbacks: Sequence[Callback] = (),
        clock: VirtualClock | None = None,
    ) -> None:
        self.strategy, self.grid, self.rounds, self.callbacks = strategy, grid, rounds, list(callbacks)
        self.clock, self.again = clock, False
        self.done = 0
        self.evaluated = -1
        self.evaluating = 0.0  # seconds that the last evaluation took
        self.headline: dict[str, float] = {}
        self.history: list[dict[str, float]] = []
        self.rows: list[Row] = []
        self.timing: list[tuple[int, str, str, float]] = []
        self.stop = ""
        self.digest: str | None = None
        self.digest_missing: list[int] = []
        self.set_up = False
        self._classwide = ClassAttributes(type(strategy), FusionStrategy)
        self._beside = ServerAttributes(strategy, strategy.platforms)
        strategy.inbox.inside = bool(getattr(grid, "inside", False))
        strategy.inbox.unmask = getattr(grid, "unmask", None)
        strategy.outbox.reaches = getattr(grid, "reaches", strategy.outbox.reaches)

    @property
    def scenario(self) -> Scenario:
        """The experiment."""
        return self.strategy.scenario

    def run(self) -> None:
        """Play all rounds that are left.

        Raises
        ------
        WorldError
            If in some phase no client succeeded.
        """
        strategy = self.strategy
        for callback in self.callbacks:
            callback.start(self)
        try:
            if not self.set_up:
                strategy.ensure_begun()
                for place, phase in enumerate(strategy.setup):
                    self.play(0, phase, place)
                self.set_up = True
                if strategy.setup:
                    self.collect(0)
                    self._call("round")
            while self.done < self.rounds and not self.stop:
                round = self.done + 1
                for place, phase in enumerate(strategy.phases(round)):
                    self.play(round, phase, place)
                self.done = round
                self.collect(round)
                self._call("round")
        except Over:
            self._end_in_time()
        for callback in self.callbacks:
            callback.end(self)

    def _end_in_time(self) -> None:
        """Virtual time is up: the last whole round is evaluated as the last, and committed so."""
        self._call("undo")
        self.stop = f"until.seconds={self.scenario.config.until.seconds:g}"
        self.again, self.rows, self.timing = True, [], []
        self.strategy.round, self.strategy.logged = self.done, []
        self.strategy.inbox.losses, self.strategy.inbox.timed = [], []
        if self.evaluated == self.done and self.history:
            self.history.pop()
        self.evaluate(final=True)
        self._call("round")
        self.again = False

    def _call(self, hook: str) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self)

    def play(self, round: int, phase: str, place: int = 0) -> None:
        """Play one phase, the round's `place`-th from 0 on: messages out, replies in, fused."""
        strategy, started = self.strategy, time.perf_counter()
        strategy.phase, strategy.place = phase, place
        with counting(in_flops=False) as tally:  # clients count for themselves
            if self.clock is None:
                self._play(round)
            elif self.clock.outlives and phase not in strategy.setup:
                play_version(self.clock, self, round)
            else:
                self.clock.play(self, round, phase)
        strategy.inbox.trained["server"] += tally.examples
        self._time(round, phase, started)

    def _play(self, round: int) -> None:
        strategy = self.strategy
        messages = strategy.configure_train(round, ArrayRecord(), ConfigRecord(), self.grid)
        try:
            strategy.aggregate_train(round, self.exchange(messages))
        finally:
            self._count(round)

    def _count(self, round: int) -> None:
        """Count the bytes of a phase's secure sums beside the arrays: keys, shares of secrets."""
        extra: list[tuple[int, str, str, int]] = getattr(self.grid, "extra", [])
        for client, direction, record, size in extra:
            self.strategy.outbox.traffic.beside(
                self.strategy.outbox.request.label, round, client, direction, record, size
            )
        extra.clear()

    def _time(self, round: int, what: str, started: float) -> None:
        """Note what a phase took here, and on the way if the grid is a network."""
        self.timing.append((round, "server", what, time.perf_counter() - started))
        on_the_way: list[tuple[str, str, float]] = getattr(self.grid, "timed", [])
        self.timing += [(round, *row) for row in on_the_way]
        on_the_way.clear()

    def exchange(self, messages: Iterable[Message]) -> Iterable[Message]:
        """Send messages; a node that cannot follow gets the whole values and is asked again, in its turn."""
        messages = list(messages)
        replies = self.grid.send_and_receive(messages)
        answers = map(self._followed, replies)
        return list(answers) if isinstance(replies, Sequence) else self._told(answers, len(messages))  # ours stream

    def _told(self, answers: Iterable[Message], asked: int) -> Iterator[Message]:
        """Answers as they come; of a phase that takes long, callbacks are told how far it is."""
        looked = time.monotonic()
        for count, answer in enumerate(answers, start=1):
            yield answer
            if (now := time.monotonic()) - looked > PACE:
                looked = now
                for callback in self.callbacks:
                    callback.heard(self, count, asked)

    def _followed(self, reply: Message) -> Message:
        if reply.has_error() and reply.error.code == SPOILT and self.strategy.inbox.inside:
            client = self.strategy.outbox.client_of(reply)
            raise WorldError(f"round {self.strategy.round}, client {client}: {reply.error.reason}")
        if reply.has_error() and reply.error.code == STALE:
            outbox = self.strategy.outbox
            again = [outbox.again(outbox.client_of(reply))]
            return next(iter(self.grid.send_and_receive(again)), reply)
        return reply

    def collect(self, round: int) -> None:
        """Take the round's rows from the strategy, and its mean training loss."""
        strategy = self.strategy
        if name := self._classwide.written():
            strategy.inbox.wrote.add(name)
        strategy.inbox.unkept.update(self._beside.changed())
        self.rows += [(round, *row) for row in strategy.logged]
        self.timing += [(round, *row) for row in strategy.inbox.timed]
        weight = sum(n for n, _ in strategy.inbox.losses)
        loss = sum(n * value for n, value in strategy.inbox.losses) / weight if weight else math.nan
        if strategy.phase not in strategy.setup:
            self.headline = {**self.headline, "loss/train": loss}
            self.rows.append((round, "server", -1, "train", "loss/train", loss))
        strategy.logged, strategy.inbox.timed, strategy.inbox.losses = [], [], []

    # -- evaluation ----------------------------------------------------------------------------------------

    def evaluate(self, final: bool = False) -> dict[str, float]:
        """Score every client on its personal test set, and the global test set; commits nothing.

        Returns
        -------
        dict
            accuracy/personal (mean over clients), accuracy/personal_worst10 (mean of the lowest ⌈N/10⌉),
            accuracy/global (macro over classes), accuracy/global_plain; NaN where there is no such set.
        """
        strategy, started, round = self.strategy, time.perf_counter(), self.done
        models, test = strategy.server_models(), self.scenario.data.dataset.test
        strategy.splits = splits_of(strategy)
        extra = ConfigRecord({"final": True} if final else {})
        messages = strategy.configure_evaluate(round, ArrayRecord(), extra, self.grid)
        strategy.aggregate_evaluate(round, self.exchange(messages))
        for client, metrics in sorted(strategy.inbox.scored.items()):
            for key, value in metrics.items():
                split, _, metric = key.partition("/")
                self.rows.append((round, "client", client, split, metric, float(value)))
        headline = of_clients(strategy.inbox.scored.values())
        if liars := self.scenario.liars:
            honest = [scores for client, scores in strategy.inbox.scored.items() if client not in liars]
            headline["accuracy/personal_honest"] = of_clients(honest)["accuracy/personal"]
        if test is not None and models:
            at_server, rows = of_server(strategy, models, round)
            headline |= at_server
            self.rows += rows
        for key, value in headline.items():
            split = key.split("/")[1].split("_")[0]
            self.rows.append((round, "server", -1, split, key, value))
        self.rows += [(round, *row) for row in strategy.logged]
        strategy.logged, strategy.inbox.timed = [], []
        self.headline = {"loss/train": self.headline.get("loss/train", math.nan), **headline}
        virtual = {} if self.clock is None else {"virtual_s": self.clock.seconds}
        self.history.append({"round": float(round), **virtual, **headline})
        self.evaluated, self.evaluating = round, time.perf_counter() - started
        self._time(round, "evaluate", started)
        if final:
            self._seal()
        return headline

    def _seal(self) -> None:
        """The digest: the server's sha and every client's; none if somebody did not answer."""
        shas = self.strategy.inbox.shas
        self.digest_missing = [c for c in range(self.scenario.clients) if not shas.get(c)]
        if not self.digest_missing:
            clients = [shas[c] for c in range(self.scenario.clients)]
            self.digest = digest_of(self.strategy.sha(), clients)
