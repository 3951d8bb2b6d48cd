"""A run played again with somebody curious in it, who notes what reaches him; a server may ask what it was not to.

Neither changes a bit of what is played: random states are put back, and answers come from copies.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from flwr.app import Message

from fedfuse.audits.adversary import Answer, Sent
from fedfuse.audits.curious import Received
from fedfuse.config.registry import Entry
from fedfuse.core.attacks import soft_labels
from fedfuse.core.client import FusionClient
from fedfuse.core.scenario import Scenario
from fedfuse.core.shares import Records
from fedfuse.core.strategy import FusionStrategy
from fedfuse.core.workspace import Workspace
from fedfuse.data.dataset import Examples
from fedfuse.engines.grid import LocalGrid
from fedfuse.train import work
from fedfuse.wire.knowledge import Cache, address_of
from fedfuse.wire.records import arrays_in, layout_of, tensors


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Put Python's, NumPy's and torch's random states back, and count no work: a virtual clock would run by it."""
    plain, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(), work.counting(False):
        yield
    random.setstate(plain)
    np.random.set_state(arrays)


class Answers:
    """Answers that are on their way: each reaches the server with the reply it was made beside, or not at all.

    Parameters
    ----------
    listeners : sequence
        Each has `answered(answer)`.
    """

    def __init__(self, listeners: Sequence[Any] = ()) -> None:
        self.listeners = listeners
        self._waiting: dict[tuple[int, int], Answer] = {}

    def answered(self, answer: Answer) -> None:
        """Keep an answer until its client's reply is there."""
        self._waiting[answer.round, answer.client] = answer

    def arrived(self, round: int, client: int) -> None:
        """A client's reply is there."""
        answer = self._waiting.pop((round, client), None)
        for listener in self.listeners if answer is not None else ():
            listener.answered(answer)


class Listening:
    """A grid that tells what is sent, and whose server tells what reaches it.

    Replies are told as the server takes them in; what a virtual clock loses, or brings too late, is none of them.

    Parameters
    ----------
    grid : LocalGrid
    strategy : FusionStrategy
    listeners : sequence
        Each has `see(sent)`: what comes after training.
    curious : dict of int to object
        By client, who is told of what it is sent and of what it sends itself, `take(message)`.
    answers : Answers, optional
    """

    def __init__(
        self,
        grid: LocalGrid,
        strategy: FusionStrategy,
        listeners: Sequence[Any],
        curious: Mapping[int, Any] | None = None,
        answers: Answers | None = None,
    ) -> None:
        self.grid, self.strategy, self.listeners = grid, strategy, listeners
        self.curious, self.answers = curious or {}, answers or Answers()
        self._aggregate = strategy.aggregate_train
        strategy.aggregate_train = self._heard  # type: ignore[method-assign,assignment]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.grid, name)

    def send_and_receive(self, messages: Iterable[Message], **options: Any) -> Iterator[Message]:
        """Pass on, and tell the curious among those who are sent something."""
        messages, known = list(messages), Cache(self.strategy.board.items)
        for message in messages:
            self._deliver(message.metadata.dst_node_id - 1, known)
        yield from self.grid.send_and_receive(messages, **options)

    def _heard(self, round: int, replies: Iterable[Message]) -> Any:
        return self._aggregate(round, self._told(replies, Cache(self.strategy.board.items)))

    def _told(self, replies: Iterable[Message], known: Cache) -> Iterator[Message]:
        trained = self.strategy.outbox.request.phase == "train"
        for reply in replies:
            if trained and reply.has_content():
                with undisturbed():
                    self._tell(reply, known)
            yield reply

    def _tell(self, reply: Message, known: Cache) -> None:
        strategy = self.strategy
        client = strategy.outbox.client_of(reply)
        records: Records = {}
        for name, content in arrays_in(reply.content).items():
            arrays = {key: value.clone() for key, value in tensors(content).items()}
            records["model" if name == "arrays" else name] = arrays
        published = known.for_client(client, strategy.scenario.architectures[client], strategy.topics)
        sent = Sent(strategy.round, client, records, published)
        for listener in self.listeners:
            listener.see(sent)
        if client in self.curious:
            self.curious[client].take(sent)
        self.answers.arrived(strategy.round, client)

    def _deliver(self, client: int, known: Cache) -> None:
        strategy = self.strategy
        if client in self.curious:
            held = known.for_client(client, strategy.scenario.architectures[client], strategy.topics)
            alone = frozenset(topic for topic in held if known.get((topic, address_of(client))) is held[topic])
            self.curious[client].take(Received(strategy.round, client, held, alone))


def asking(entry: Entry, scenario: Scenario, examples: Examples, rounds: Collection[int], answers: Answers) -> Entry:
    """A strategy whose clients also say, in some rounds, what they would of other public rows.

    The clients' own code answers, `share`, over a transfer set that is the examples; nothing of it stays.

    Parameters
    ----------
    answers : Answers
        Where they are left.
    """
    transfer = replace(scenario.config.transfer, subset=None, size=len(examples))
    asked = replace(
        scenario,
        config=replace(scenario.config, transfer=transfer),
        data=replace(scenario.data, transfer=examples),
    )
    elsewhere: list[Workspace] = []

    class Answering(entry.client):  # type: ignore[name-defined,misc]
        def share(self) -> Records:
            records: Records = super().share()
            if self.round in rounds:
                with undisturbed():
                    self._answer()
            return records

        def _answer(self) -> None:
            half: FusionClient = self
            own, state, hyper = half.workspace, half.state, half.hyper
            model = own.layout(self.architecture)
            self.state = copy.deepcopy(state)
            if getattr(hyper, "subset", None) is not None:
                self.hyper = replace(hyper, subset=None)
            if not elsewhere:
                elsewhere.append(Workspace(asked, device=own.device))
            self.workspace = elsewhere[0]
            try:
                said = super().share()
            finally:
                self.workspace, self.state, self.hyper = own, state, hyper
            for arrays in said.values():
                for name in soft_labels(layout_of(arrays), model, self.classes):
                    rows = arrays[name].detach().cpu().clone()
                    answers.answered(Answer(self.round, self.client, rows))
                    return

    return entry._replace(client=Answering)
