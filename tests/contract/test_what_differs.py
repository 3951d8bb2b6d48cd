"""The contract tests tell what was different first, and refuse what is no number: tried on wrong strategies."""

from __future__ import annotations

import random

import pytest
import torch

from fedfuse.config import registry
from fedfuse.core.client import FusionClient
from fedfuse.core.strategy import FusionStrategy
from fedfuse.wire.knowledge import Topic
from fedfuse.wire.records import arrays
from tests.differences import assert_same
from tests.federations import play


class Lesson(FusionStrategy):
    topics = {"hint": Topic("lesson", arrays(p=("classes",)))}
    records = {"hint": arrays(p=("classes",), q=("classes",))}

    def fuse(self, shares):
        self.publish("hint", {"p": torch.stack([share.records["hint"]["p"] for share in shares]).mean(0)})


class Careful(FusionClient):
    personal = True

    def receive(self, knowledge):
        pass

    def noise(self):
        return 0.0

    def share(self):
        p = self.predict(self.x).softmax(1).mean(0).cpu()
        return {"hint": {"p": p, "q": p + self.noise()}}


class Careless(Careful):
    """In round 2, client 1 draws from a generator that no seed reaches."""

    def noise(self):
        return random.SystemRandom().random() if (self.round, self.client) == (2, 1) else 0.0


class Broken(Careful):
    def fit(self):
        return {**super().fit(), "loss": float("nan")}


@pytest.fixture
def registered():
    names = []

    def register(client):
        name = f"wrong_{client.__name__.lower()}"
        registry.strategy(name, client=client, paper="none")(type("Server", (Lesson,), {}))
        names.append(name)
        return name

    yield register
    for name in names:
        registry.registered.pop(name)


def test_the_first_difference_is_named(registered) -> None:
    name = registered(Careless)
    one, other = play(name), play(name)
    assert one.steps != other.steps
    other.federation.digest = "0" * 64  # nothing private came of it
    with pytest.raises(AssertionError, match=r"round 2, phase train: client 1, record 'hint', array 'q'$"):
        assert_same(one, other)


def test_equal_runs_are_equal_in_every_step(registered) -> None:
    name = registered(Careful)
    one, other = play(name), play(name, grid="serial")
    assert_same(one, other)
    assert one.steps == other.steps
    assert {step[1] for step in one.steps} == {"train", "fuse", "evaluate"}


def test_a_loss_that_is_no_number_is_told(registered) -> None:
    (told,) = [note for note in play(registered(Broken)).notes if note.startswith("not a number")]
    assert told.startswith("not a number: training loss of 3 of 3 clients, first in round 1")
