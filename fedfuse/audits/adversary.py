"""What a curious server has, and nothing else: the messages, what it published itself, the public rows.

An attack is handed an `Adversary` and then message after message. Private examples are not merely out of bounds: they
are not there (`Withheld`), and reaching for them raises. The truth comes in where an attack's guesses are scored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedfuse.config.registry import Entry
from fedfuse.core.attacks import distributions, soft_labels
from fedfuse.core.client import FusionClient, transfer_rows
from fedfuse.core.scenario import Scenario
from fedfuse.core.shares import Records
from fedfuse.core.workspace import Workspace
from fedfuse.data import FederatedData
from fedfuse.wire.knowledge import Item
from fedfuse.wire.records import layout_of


class Overreach(RuntimeError):
    """An attack reached for what its adversary has not."""


class Sent(NamedTuple):
    """What one client sent after training, and what the server had published to it by then."""

    round: int
    client: int
    records: Records
    known: Mapping[str, Item]


class Answer(NamedTuple):
    """A client's soft labels (logits, or distributions where all rows are) of the candidates, in their order."""

    round: int
    client: int
    rows: Tensor


class Candidates(NamedTuple):
    """Examples of which the adversary asks whether a client trained on them; it knows their labels.

    `of[k]` are the rows in question about client k, members and others shuffled.
    """

    x: Tensor
    y: Tensor
    of: Mapping[int, Tensor]


class Withheld(FederatedData):
    """A federation's data as its server has them: sizes and the public rows."""

    def split(self, client: int, name: str) -> Any:
        """Raise: nobody's examples are here."""
        raise Overreach(f"client {client}'s {name} examples: the adversary sees messages alone")

    def test_tensors(self) -> Any:
        """Raise: what scores a run is none of the adversary's knowledge."""
        raise Overreach("the global test set: the adversary sees messages alone")


def withheld(scenario: Scenario) -> Scenario:
    """The scenario without any private example."""
    data, nobody = scenario.data, np.empty(0, dtype=np.int64)
    bare = replace(data.dataset, train=data.dataset.train.take(nobody), test=None)
    return replace(scenario, data=Withheld(bare, nobody, data.offsets, data.transfer, data.notes))


class Adversary:
    """A curious server.

    Parameters
    ----------
    entry : Entry
        The strategy, whose code it runs.
    scenario : Scenario
        With or without private examples: they are dropped.
    candidates : Candidates, optional
        For questions of membership.
    """

    def __init__(self, entry: Entry, scenario: Scenario, candidates: Candidates | None = None) -> None:
        self.entry, self.scenario, self.candidates = entry, self._of(scenario), candidates
        self.hyper = scenario.config.strategy
        self.workspace = Workspace(self.scenario, self._equip)

    def _of(self, scenario: Scenario) -> Scenario:
        """The scenario as this adversary has it."""
        return withheld(scenario)

    def _equip(self, model: Any, build: Any) -> Any:
        return self.entry.client.equip(model, self.hyper, build)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.scenario.classes

    def public(self, round: int) -> Tensor:
        """The public rows that a round's soft labels stand on."""
        rows = transfer_rows(self.scenario, getattr(self.hyper, "subset", None), round)
        return self.workspace.transfer(rows)[0]

    def soft(self, sent: Sent) -> Tensor | None:
        """The soft labels of a message, one row each public row; None where it has none."""
        model = self.workspace.layout(self.scenario.architectures[sent.client])
        for arrays in sent.records.values():
            for name in soft_labels(layout_of(arrays), model, self.classes):
                return arrays[name]
        return None

    def counts(self, sent: Sent) -> Tensor | None:
        """Examples of each class, where a message says them."""
        for arrays in sent.records.values():
            for value in arrays.values():
                if value.shape == (self.classes,) and value.dtype == torch.int64:
                    return value
        return None

    def outputs(self, sent: Sent, x: Tensor) -> Tensor | None:
        """Logits of the model that a message amounts to; None where it is no model."""
        half = self.after(sent)
        if half is None:
            return None
        with torch.no_grad():
            return half.predict(x)

    def after(self, sent: Sent) -> FusionClient | None:
        """The client's own half as a message tells of it; None where it amounts to no model.

        A record named like a topic is that topic's value, moved by its client: the client's model is what a client
        receives that finds it in the topic's place.
        """
        moved = {name: arrays for name, arrays in sent.records.items() if name in sent.known}
        if not moved or self.entry.client.personal:
            return None
        known = {name: Item(moved.get(name, item.arrays), item.version) for name, item in sent.known.items()}
        half = self._half(sent)
        half.receive(known)
        return half

    def before(self, sent: Sent) -> FusionClient:
        """The half of a client that has received what was published to it, and has not trained."""
        half = self._half(sent)
        half.receive(sent.known)
        return half

    def _half(self, sent: Sent) -> FusionClient:
        model = self.workspace.fresh(self.scenario.architectures[sent.client])
        return self.entry.client(
            hyper=self.hyper, model=model, workspace=self.workspace, client=sent.client, state={}, round=sent.round,
            phase="train",
        )  # fmt: skip


def probabilities(rows: Tensor) -> Tensor:
    """Soft labels as distributions in float64: as they are, or by softmax."""
    return rows.double() if distributions(rows) else rows.double().softmax(-1)


def log_odds(rows: Tensor, y: Tensor) -> Tensor:
    """φ = log p_y − log(1 − p_y) of each row, in float64; of logits without ever forming 1 − p."""
    given = distributions(rows)
    logs = rows.double().clamp_min(1e-12).log() if given else rows.double()
    own = logs.gather(-1, y[:, None])[:, 0]
    rest = logs.scatter(-1, y[:, None], float("-inf")).logsumexp(-1)
    return own - rest
