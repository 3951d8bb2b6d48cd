"""Groups of messages at one node: what is only summed is added up there, and clients sit abreast where that pays."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial

from flwr.app import Message, RecordDict

from fedfuse.core.node import Node
from fedfuse.core.shares import INVALID, Records, check_share
from fedfuse.errors import Refused
from fedfuse.wire.group_sums import Sums, empty_totals, hand_over, keep_back, wanted
from fedfuse.wire.knowledge import Cache
from fedfuse.wire.records import InvalidArrays, arrays_in, config_in, entries, tensors
from fedfuse.wire.rows import Row, look_through, row_of
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
        self, messages: Sequence[Message], caches: Sequence[Cache], answers: Sequence[Message] = ()
    ) -> list[Message]:
        """Answer a group of messages in client order, adding up what the strategy only needs the sum of.

        The arrays of summed records leave with the group's last valid member; every reply says their bytes. `answers`
        are replies that are there already.
        """
        sums = self._sums(messages)
        if not sums:
            return list(answers) or [self.node.handle(m, cache) for m, cache in zip(messages, caches, strict=True)]
        totals, last, replies = self._added(messages, caches, answers, sums)
        if last is not None:
            hand_over(last, totals)
        return replies

    def _sums(self, messages: Sequence[Message]) -> Sums:
        """What a group's messages ask for the sums of."""
        return {} if messages[0].metadata.message_type.startswith("evaluate") else wanted(messages[0])

    def _added(
        self, messages: Sequence[Message], caches: Sequence[Cache], answers: Sequence[Message], sums: Sums
    ) -> tuple[dict[str, Sum], Message | None, list[Message]]:
        """A group's sums, its last valid reply, and all of its replies, without what is summed."""
        totals = empty_totals(sums, config_in(messages[0].content, "run") or {})
        last: Message | None = None
        replies = []
        for i, (message, cache) in enumerate(zip(messages, caches, strict=True)):
            reply = answers[i] if answers else self.node.handle(message, cache, "model" in sums)
            if not reply.has_error():
                try:
                    keep_back(reply, self._checked(reply), totals, sums)
                    last = reply
                except InvalidArrays as error:
                    reply = self.node.error(INVALID, self.node.client_of(message), str(error), message)
            replies.append(reply)
        return totals, last, replies

    def all(self, groups: Sequence[Sequence[Message]], cache: Cache) -> Iterator[list[Message]]:
        """Answer groups as `one` does, their clients abreast where that is asked for and pays."""
        for some in self.portions(groups):
            messages = [message for group in some for message in group]
            sums = self._sums(messages)
            answers = self.abreast(messages, cache, "model" in sums)
            if not answers or not sums:
                for group in some:
                    mine, answers = answers[: len(group)], answers[len(group) :]
                    yield self.one(group, [cache] * len(group), mine)
                continue
            look_through(rows := [row for reply in answers if (row := _row_in(reply)) is not None])
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
        for group in groups:
            if some and sum(map(len, some)) + len(group) > most:
                yield some
                some = []
            some.append(group)
        if some:
            yield some

    def abreast(self, messages: Sequence[Message], cache: Cache, lends: bool = False) -> list[Message]:
        """Answer messages, clients abreast where that pays; [] where they had better take turns.

        If the caller is done with the replies' arrays before the next messages, they may be lent, not copied.
        """
        kind = messages[0].metadata.message_type
        if not self.node.vectorized or (kind.startswith("evaluate") and not self.node.digests):
            return []
        with contextlib.suppress(Refused):  # then every message is refused
            self.node.hyper_of(config_in(messages[0].content, "run") or {})
        names = [self.node.workspace.scenario.architectures[self.node.client_of(message)] for message in messages]
        room = {name: self._seats(name) for name in set(names)}
        if max(room.values()) < 2:
            return []
        return self._seated(messages, names, room, cache, lends)

    def _seats(self, architecture: str) -> int:
        """How many clients of an architecture may be awake at once; 0 where none of its trainings gains by it."""
        desk = self.node.desk
        return 0 if desk.trials.declined(architecture) else desk.room.seats(self.node.workspace, architecture)

    def _seated(
        self, messages: Sequence[Message], names: Sequence[str], room: dict[str, int], cache: Cache, lends: bool
    ) -> list[Message]:
        answers: dict[int, Message] = {}
        todo = list(range(len(messages)))
        while todo:
            taken, left, later = [], dict(room), []
            for i in todo:
                name = names[i]
                if room[name] < 2:
                    answers[i] = self.node.handle(messages[i], cache)
                elif left[name]:
                    left[name] -= 1
                    taken.append(i)
                else:
                    later.append(i)
            jobs = [(names[i], partial(self.node.handle, messages[i], cache, lends and not later)) for i in taken]
            answers |= zip(taken, self.node.desk.run(lambda: self.node.workspace, jobs), strict=True)
            todo = later
        return [answers[i] for i in range(len(messages))]

    def _checked(self, reply: Message) -> Records:
        """A reply's records, checked as the server would: what is summed here, it never sees."""
        content: RecordDict = reply.content
        config, metrics = entries(content["config"]), entries(content["metrics"])  # type: ignore[arg-type]
        records: Records = {}
        for name, value in arrays_in(content).items():
            row = row_of(value)
            records["model" if name == "arrays" else name] = tensors(value) if row is None else row
        hyper = self.node.hyper
        check_share(
            self.node.entry.server, hyper, self.node.workspace, config["client"], config["phase"], records, metrics
        )
        return records


def _row_in(reply: Message) -> Row | None:
    """The model in a reply, if it is a row of many."""
    found = None if reply.has_error() else entries(reply.content).get("arrays")
    return None if found is None else row_of(found)
