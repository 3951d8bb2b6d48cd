"""What a curious client has: what it was sent, what it sent itself, its own examples, and the public rows.

Nobody else's messages or examples are there, and reaching for them raises (`Overreach`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedfuse.audits.adversary import Adversary, Candidates, Overreach, Sent, probabilities
from fedfuse.config.registry import Entry
from fedfuse.core.attacks import distributions, soft_labels
from fedfuse.core.client import FusionClient
from fedfuse.core.scenario import Scenario
from fedfuse.data import FederatedData
from fedfuse.data.dataset import Examples
from fedfuse.seeding import numpy_generator
from fedfuse.wire.knowledge import Item
from fedfuse.wire.records import layout_of

CURIOUS = 10  # clients that are curious in turn, at most


class Received(NamedTuple):
    """What one client holds once a message has reached it, and which topics were made for it alone."""

    round: int
    client: int
    known: Mapping[str, Item]
    alone: frozenset[str] = frozenset()


@dataclass(frozen=True)
class OwnExamples(FederatedData):
    """A federation's data as one of its clients has them: its own examples and the public rows."""

    client: int = -1

    def split(self, client: int, name: str) -> Examples:
        """The client's own examples; raise for another's."""
        if client != self.client:
            raise Overreach(f"client {client}'s {name} examples: the adversary is client {self.client}")
        return super().split(client, name)

    def test_tensors(self) -> None:
        """Raise: what scores a run is none of the adversary's knowledge."""
        raise Overreach("the global test set: the adversary sees its own messages and examples alone")


def own(scenario: Scenario, client: int) -> Scenario:
    """The scenario as one client has it."""
    data = scenario.data
    ends = data.offsets[client]
    offsets = np.zeros_like(data.offsets)
    offsets[client] = ends - ends[0]
    kept = replace(data.dataset, train=data.dataset.train.take(data.rows[ends[0] : ends[-1]]), test=None)
    rows = np.arange(ends[-1] - ends[0])
    return replace(scenario, data=OwnExamples(kept, rows, offsets, data.transfer, data.notes, client))


class CuriousClient(Adversary):
    """A curious client.

    Parameters
    ----------
    entry : Entry
        The strategy, whose code it runs.
    scenario : Scenario
        Anybody's: what the client has not is dropped.
    client : int
        Who is curious.
    candidates : Candidates, optional
        For questions of membership.
    means : collection of str
        Records of which the strategy publishes the mean, as its code says.
    """

    def __init__(
        self,
        entry: Entry,
        scenario: Scenario,
        client: int,
        candidates: Candidates | None = None,
        means: Collection[str] = (),
    ) -> None:
        self.client, self.means = client, frozenset(means)
        super().__init__(entry, scenario, candidates)
        self._shared: dict[int, Sent] = {}
        self.received: list[Received] = []  # a new one where something in it is new

    def _of(self, scenario: Scenario) -> Scenario:
        return own(scenario, self.client)

    def take(self, message: Sent | Received) -> None:
        """Keep a message of its own: what it sent, or what it was sent with something new in it.

        Raises
        ------
        Overreach
            For somebody else's.
        """
        if message.client != self.client:
            raise Overreach(f"client {message.client}'s message: the adversary is client {self.client}")
        if isinstance(message, Sent):
            self._shared[message.round] = message
        elif message.known and (not self.received or version(message) > version(self.received[-1])):
            self.received.append(message)

    @property
    def part(self) -> float:
        """What its own share counts for in a mean: 1/m of a round's m clients, since nobody tells it the weights."""
        return 1 / self.scenario.cohort_size

    def shared(self, round: int) -> Sent | None:
        """What it sent in a round; None if it did not take part."""
        return self._shared.get(round)

    def model_of_others(self, received: Received) -> Mapping[str, Item]:
        """What was published, its own share taken out of each mean: (θ − w·θ_k)/(1 − w)."""
        sent, known = self.shared(version(received)), dict(received.known)
        mine = {} if sent is None else sent.records
        for name in (mine.keys() & known.keys() & self.means) - received.alone:
            item = known[name]
            arrays = {key: self._without(x, mine[name].get(key)) for key, x in item.arrays.items()}
            known[name] = Item(arrays, item.version)
        return known

    def _without(self, x: Tensor, mine: Tensor | None) -> Tensor:
        if mine is None or mine.shape != x.shape or not x.is_floating_point() or self.part == 1:
            return x
        return ((x.double() - self.part * mine.double()) / (1 - self.part)).to(x.dtype)

    def labels(self, received: Received) -> Tensor | None:
        """The fused soft labels that it was sent, as they are; None where there are none."""
        found = self._published(received)
        return None if found is None else received.known[found[0]].arrays[found[1]]

    def labels_of_others(self, received: Received) -> Tensor | None:
        """Fused soft labels without its own: logits row by row, distributions clamped at 0 and divided by their sum."""
        found, sent = self._published(received), self.shared(version(received))
        if found is None:
            return None
        topic, name = found
        fused = received.known[topic].arrays[name]
        mine = None if sent is None or not sent.records.keys() <= self.means else self.soft(sent)
        if mine is None or mine.shape != fused.shape or topic in received.alone or self.part == 1:
            return fused
        if distributions(mine) != distributions(fused):
            return fused
        rest = self._without(fused, mine)
        if not distributions(fused):
            return rest
        rest = rest.double().clamp_min(1e-12)
        return rest / rest.sum(-1, keepdim=True)

    def _published(self, received: Received) -> tuple[str, str] | None:
        model = self.workspace.layout(self.scenario.architectures[self.client])
        for topic, item in received.known.items():
            for name in soft_labels(layout_of(item.arrays), model, self.classes):
                return topic, name
        return None

    def half(self, known: Mapping[str, Item]) -> FusionClient:
        """The strategy's client half of somebody who was sent this and has nothing of his own; initial without it."""
        sent = Sent(self.scenario.config.rounds, self.client, {}, known)
        return self.before(sent) if known else self._half(sent)

    def says(self, known: Mapping[str, Item], x: Tensor) -> Tensor | None:
        """Logits of the model that was published; None where clients keep models of their own."""
        if self.entry.client.personal:
            return None
        half = self.half(known)
        with torch.no_grad():
            return half.predict(x)

    def others_rows(self, received: Received) -> Tensor | None:
        """Distributions that the others are taken to give the public rows; None where nothing was sent that says."""
        rows = self.labels_of_others(received)
        if rows is None and self.scenario.data.transfer is not None:
            rows = self.says(self.model_of_others(received), self.workspace.tensors("transfer")[0])
        return None if rows is None else probabilities(rows)


def drawn(scenario: Scenario) -> list[int]:
    """Who is curious: all clients in turn, of more than `CURIOUS` so many, drawn by the seed."""
    order = numpy_generator(scenario.seed, "curious").permutation(scenario.clients)
    return sorted(order[:CURIOUS].tolist())


def version(received: Received) -> int:
    """The round whose fuse made the newest of what was sent."""
    return max(item.version for item in received.known.values())
