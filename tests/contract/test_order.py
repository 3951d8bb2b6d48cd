"""The order of dicts: a sum over one has other bits in another order, so it is the same wherever they have been."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fedfuse import FusionClient, FusionStrategy, Item, Metrics, Records, Shares, Topic
from fedfuse.config.registry import NoHyper
from fedfuse.core.loop import Callback
from fedfuse.engines.worker import packed, unpacked
from tests.differences import assert_same
from tests.federations import federation, play
from tests.ledger import enter


def several() -> dict[str, torch.Tensor]:
    """Arrays whose names no sorting leaves as they are."""
    return {name: torch.ones(2) for name in ("z", "8", "10", "b/w", "9", "a")}


def orders(tree: Mapping[str, Any]) -> list[str]:
    """The keys of nested dicts, in their order."""
    return [f"{k}: {' '.join(orders(v))}" if isinstance(v, Mapping) else k for k, v in tree.items()]


class OrderedClient(FusionClient):
    """Notes the order of what it is given; its private state is part of the digest."""

    def receive(self, knowledge: Mapping[str, Item]) -> None:
        super().receive(knowledge)
        self.state["received"] = [text for item in knowledge.values() for text in orders(item.arrays)]

    def fit(self) -> Metrics:
        self.state["woken"] = orders(self.state)
        self.state |= {"y": torch.ones(1), "x": 1, "nested": {**several(), "plain": 1, "more": several()}}
        return self.train()

    def share(self) -> Records:
        return {"summed": several(), "model": self.weights(), "alone": several()}


class Ordered(FusionStrategy):
    """Notes the order of what it is given and has."""

    topics = {**FusionStrategy.topics, "several": Topic("state"), "lesson": Topic("lesson")}
    records = {**FusionStrategy.records, "alone": None, "summed": None}
    sums = {"summed": None}

    def begin(self) -> None:
        super().begin()
        self.publish("several", several())

    def fuse(self, shares: Shares) -> None:
        had = [*orders(self.state), *orders(self.published("several")), *orders(self.model)]
        for share in shares:
            had += orders(share.records)
            self.publish("lesson", several(), to=share.client)
            model = share.records["model"]
        self.state |= {"had": had, "y": torch.ones(1), "x": 1, "nested": {**several(), "plain": 1, "more": several()}}
        self.publish("several", shares.mean("summed"))
        self.publish("model", model)


class Crash(Callback):
    """Ends the process's work after a round was committed."""

    def round(self, federation: Any) -> None:
        if federation.done == 1:
            raise KeyboardInterrupt


@pytest.fixture
def ordered(monkeypatch: pytest.MonkeyPatch) -> str:
    return enter(monkeypatch, Ordered, OrderedClient, NoHyper, "ordered")


def test_a_resumed_run_has_the_order_of_an_undisturbed_one(ordered: str, tmp_path: Path) -> None:
    undisturbed = play(ordered, "rounds=3")
    where = tmp_path / "run"
    with (
        federation(ordered, "rounds=3", path=where, callbacks=(Crash(),)) as (built, _),
        pytest.raises(KeyboardInterrupt),
    ):
        built.run()
    resumed = play(ordered, "rounds=3", path=where)
    assert orders(resumed.strategy.state) == orders(undisturbed.strategy.state)
    assert resumed.strategy.state["had"] == undisturbed.strategy.state["had"]
    assert_same(undisturbed, resumed)


@pytest.mark.parametrize("how", [{"grid": "serial"}, {"grid": "ray"}, {"reverse": True}], ids=str)
def test_every_runtime_has_the_same_order(ordered: str, how: dict[str, Any], request: pytest.FixtureRequest) -> None:
    if how.get("grid") == "ray":
        request.getfixturevalue("ray_session")
    one, other = play(ordered), play(ordered, **how)
    assert other.strategy.state["had"] == one.strategy.state["had"]
    assert_same(one, other)


def test_secure_sums_have_the_senders_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tests.deploy.network import Network, run, seats, tiny

    monkeypatch.setattr("fedfuse.network.exchange.POLL", 0.01)
    built, _ = run(tiny("fedavg", "secure=on", "clients=4"), Network(seats(tmp_path, 4)), tmp_path / "run")
    model = built.strategy
    assert list(model.model) == list(model.workspace.initial(model.architecture)) != sorted(model.model)


def test_state_carried_to_a_worker_keeps_its_order() -> None:
    tree = {"y": torch.ones(1), "x": 1, "nested": {**several(), "plain": [1], "more": several(), "none": {}}}
    assert orders(unpacked(pickle.loads(pickle.dumps(packed(tree))))) == orders(tree)
    short = unpacked(pickle.loads(pickle.dumps(packed({"a": torch.full((2,), 0.5, dtype=torch.bfloat16)}))))["a"]
    assert (short.dtype, short.tolist()) == (torch.bfloat16, [0.5, 0.5])
