"""Groups of messages at one node: what is only summed is added up there, and clients sit abreast where that pays."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from flwr.app import Message

from fedfuse.core.node import Answered, Node
from fedfuse.core.shares import INVALID, check_share
from fedfuse.errors import Refused
from fedfuse.wire.group_sums import Sums, empty_totals, hand_over, keep_back, wanted
from fedfuse.wire.knowledge import Cache
from fedfuse.wire.records import InvalidArrays, config_in, entries
from fedfuse.wire.rows import Row, look_through
from fedfuse.wire.sums import Sum, settle


class Groups:
    """Answers groups of messages.

    Parameters
    ----------
    node : Node
        Where their clients live.
    """

    def __init__(self, node: Node) -> None:
        self.node = node

    def one(
        self, messages: Sequence[Message], caches: Sequence[Cache], answers: Sequence[Answered | Message] = ()
    ) -> list[Message]:
        """Answer a group of messages in client order, adding up what the strategy only needs the sum of.

        The arrays of summed records leave with the group's last valid member; every reply says their bytes. `answers`
        are replies that are there already.
        """
        sums = self.sums(messages)
        if not sums:
            if answers:
                return [self.node.reply(answer) for answer in answers]
            return [self.node.handle(m, cache) for m, cache in zip(messages, caches, strict=True)]
        totals, last, replies = self._added(messages, caches, answers, sums)
        if last is not None:
            hand_over(last, totals)
        return replies

    def sums(self, messages: Sequence[Message]) -> Sums:
        """What a group's messages ask for the sums of."""
        return {} if messages[0].metadata.message_type.startswith("evaluate") else wanted(messages[0])

    def _added(
        self, messages: Sequence[Message], caches: Sequence[Cache], answers: Sequence[Answered | Message], sums: Sums
    ) -> tuple[dict[str, Sum], Message | None, list[Message]]:
        """A group's sums, its last valid reply, and all of its replies, without what is summed."""
        totals = empty_totals(sums, config_in(messages[0].content, "run") or {})
        last: Message | None = None
        replies = []
        for i, (message, cache) in enumerate(zip(messages, caches, strict=True)):
            answered = answers[i] if answers else self.node.answer(message, cache, "model" in sums)
            if isinstance(answered, Message):
                replies.append(answered)
                continue
            try:
                self._check(answered)
                keep_back(answered.records, entries(answered.metrics), answered.config, totals, sums)
            except InvalidArrays as error:
                replies.append(self.node.error(INVALID, str(error), message))
                continue
            replies.append(last := self.node.reply(answered))
        return totals, last, replies

    def all(self, groups: Sequence[Sequence[Message]], cache: Cache) -> Iterator[list[Message]]:
        """Answer groups as `one` does, their clients abreast where that is asked for and pays."""
        for some in self.portions(groups):
            messages = [message for group in some for message in group]
            sums = self.sums(messages)
            answers = self.abreast(messages, cache, "model" in sums)
            if not answers or not sums:
                for group in some:
                    mine, answers = answers[: len(group)], answers[len(group) :]
                    yield self.one(group, [cache] * len(group), mine)
                continue
            look_through(rows := [row for answer in answers if (row := _row_in(answer)) is not None])
            added = []
            for group in some:
                mine, answers = answers[: len(group)], answers[len(group) :]
                added.append(self._added(group, [cache] * len(group), mine, sums))
            for row in rows:
                row.finite = False  # they are overwritten next
            settle([total for totals, _, _ in added for total in totals.values()])
            for totals, last, replies in added:
                if last is not None:
                    hand_over(last, totals)
                yield replies

    def portions(self, groups: Sequence[Sequence[Message]]) -> Iterator[Sequence[Sequence[Message]]]:
        """Groups whose clients may be awake at once; one group at a time where they take turns anyway."""
        some: list[Sequence[Message]] = []
        most = self.node.desk.room.awake(self.node.workspace) if self.node.vectorized else 0
        lent = bool(most and groups and "model" in self.sums(groups[0]))
        names: Counter[str] = Counter()
        for group in groups:
            more = Counter(map(self._architecture, group)) if lent else Counter()
            if some and (sum(map(len, some)) + len(group) > most or not self._fit(names + more)):
                yield some
                some, names = [], Counter()
            some.append(group)
            names += more
        if some:
            yield some

    def _fit(self, counts: Mapping[str, int]) -> bool:
        """Whether all who may sit have a seat at once: the models of those before others are copied, not lent."""
        desk, workspace = self.node.desk, self.node.workspace
        return not any(2 <= desk.room.seats(workspace, name) < count for name, count in counts.items())

    def each(self, messages: Sequence[Message], cache: Cache) -> Iterator[Message]:
        """Answer messages one by one, nothing summed; their clients abreast where that is asked for and pays."""
        if answers := self.abreast(messages, cache):
            yield from map(self.node.reply, answers)
            return
        for message in messages:
            yield self.node.handle(message, cache)

    def abreast(self, messages: Sequence[Message], cache: Cache, lends: bool = False) -> list[Answered | Message]:
        """Answer messages, clients abreast where that pays; [] where they had better take turns.

        If the caller is done with the models' arrays before the next messages, they may be lent, not copied.
        """
        kind = messages[0].metadata.message_type
        if not self.node.vectorized or (kind.startswith("evaluate") and not self.node.digests):
            return []
        with contextlib.suppress(Refused):  # then every message is refused
            self.node.hyper_of(config_in(messages[0].content, "run") or {})
        names = list(map(self._architecture, messages))
        room = {name: self._seats(name, kind) for name in set(names)}
        if max(room.values()) < 2:
            return []
        return self._seated(messages, names, room, cache, lends)

    def _architecture(self, message: Message) -> str:
        return self.node.workspace.scenario.architectures[self.node.client_of(message)]

    def _seats(self, architecture: str, kind: str) -> int:
        """How many clients of an architecture may be awake at once; 0 where none of its trainings gains by it."""
        desk, workspace = self.node.desk, self.node.workspace
        silent = workspace.device.type == "cpu" and desk.trials.silent(architecture, kind)
        return 0 if silent or desk.trials.declined(architecture) else desk.room.seats(workspace, architecture)

    def _seated(
        self, messages: Sequence[Message], names: Sequence[str], room: dict[str, int], cache: Cache, lends: bool
    ) -> list[Answered | Message]:
        answers: dict[int, Answered | Message] = {}
        todo = list(range(len(messages)))
        while todo:
            taken, left, later = [], dict(room), []
            for i in todo:
                name = names[i]
                if room[name] < 2:
                    answers[i] = self.node.answer(messages[i], cache)
                elif left[name]:
                    left[name] -= 1
                    taken.append(i)
                else:
                    later.append(i)
            jobs = [(names[i], partial(self.node.answer, messages[i], cache, lends and not later)) for i in taken]
            answers |= zip(taken, self.node.desk.run(lambda: self.node.workspace, jobs), strict=True)
            for name in {names[i] for i in taken}:
                self.node.desk.trials.heard(name, messages[0].metadata.message_type, name in self.node.desk.heard)
            todo = later
        return [answers[i] for i in range(len(messages))]

    def _check(self, answered: Answered) -> None:
        """Check what a client shared as the server would: what is summed here, it never sees."""
        node, phase = self.node, answered.phase
        check_share(
            node.entry.server, phase.hyper, node.workspace, answered.who, phase.name,
            answered.records, entries(answered.metrics),
        )  # fmt: skip


def _row_in(answer: Answered | Message) -> Row | None:
    """The model in an answer, if it is a row of many."""
    model = None if isinstance(answer, Message) else answer.records.get("model")
    return model if isinstance(model, Row) else None
