"""The two halves of a strategy, awake outside any round: for closed-form tests of one rule at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fedfuse.config import registry
from fedfuse.core.build import build_strategy
from fedfuse.core.client import FusionClient
from fedfuse.core.strategy import FusionStrategy, Share, Shares
from fedfuse.core.workspace import Workspace
from fedfuse.wire.knowledge import Item
from fedfuse.wire.records import Arrays
from fedfuse.wire.sums import Sum
from tests.federations import TINY, federation, scenario_of

PLAIN = ("train.momentum=0", "train.batch_size=1000")  # plain SGD on all examples at once: steps are epochs


def server(name: str, *overrides: str) -> FusionStrategy:
    """The server half in round 1: it has published its beginning, and everybody is asked to train."""
    _, scenario = scenario_of((*TINY, f"strategy={name}", *overrides))
    strategy = build_strategy(registry.entry(name), scenario)
    strategy.ensure_begun()
    strategy.round = 1
    strategy.messages(range(scenario.clients), "train", {})
    return strategy


def client(name: str, *overrides: str, round: int = 1) -> FusionClient:
    """The client half of client 0, with an empty state and initial weights, that has received nothing."""
    config, scenario = scenario_of((*TINY, f"strategy={name}", *overrides))
    equip = registry.entry(name).client.equip
    workspace = Workspace(scenario, lambda model, build: equip(model, config.strategy, build))
    return half(name, config.strategy, workspace, round=round)


def half(
    name: str, hyper: Any, workspace: Workspace, who: int = 0, state: dict[str, Any] | None = None, round: int = 1
) -> FusionClient:
    """A client half over a fresh model."""
    model = workspace.fresh(workspace.scenario.architectures[who])
    told = {"state": state or {}, "round": round, "phase": "train"}
    return registry.entry(name).client(hyper=hyper, model=model, workspace=workspace, client=who, **told)


def wake(built: FusionStrategy, who: int = 0, state: dict[str, Any] | None = None, **knowledge: Arrays) -> FusionClient:
    """A client that has received what the server published, or the topics given instead."""
    awake = half(built.name, built.hyper, built.workspace, who, state)
    known = {topic: item for (topic, _), item in built.board.items.items()}
    hear(awake, known | {topic: Item(arrays, 0) for topic, arrays in knowledge.items()})
    return awake


def take(half: FusionClient, topic: str, version: int = 1, **arrays: Any) -> None:
    """Let a client receive one topic."""
    half.version = version
    hear(half, {topic: Item(arrays, version)})


def hear(half: FusionClient, knowledge: Mapping[str, Item]) -> None:
    """Let a client receive, and make it ready to train."""
    half.begin("receive")
    half.receive(knowledge)
    half.begin("train")


def shares(strategy: FusionStrategy, *contents: Mapping[str, Arrays], examples: int | Sequence[int] = 10) -> Shares:
    """What clients 0, 1, … shared, as the platform would hand it to `fuse`."""
    counts = [examples] * len(contents) if isinstance(examples, int) else examples
    sums = {name: Sum() for name in strategy.sums}
    made = []
    for who, (content, count) in enumerate(zip(contents, counts, strict=True)):
        records = dict(content)
        for name, total in sums.items():
            total.add(who // 8, records.pop(name), float(count) if strategy.sums[name] else 1.0)
        made.append(Share(who, records, {"num-examples": count}))
    return Shares(iter(made), sums)


def random_labels(n: int, classes: int, seed: int = 0, sharp: float = 2.0) -> torch.Tensor:
    """Random probabilities (n × C), float64."""
    draw = torch.Generator().manual_seed(seed)
    return (sharp * torch.randn(n, classes, generator=draw, dtype=torch.float64)).softmax(1)


def featureless(shape: tuple[int, ...], classes: int) -> torch.nn.Module:
    """A model by dotted path without `features` and `head`."""
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(math.prod(shape), classes))


def gradients(client: FusionClient) -> Arrays:
    """Gradients of the mean cross-entropy over the client's examples, where its model stands."""
    client.model.zero_grad()
    torch.nn.functional.cross_entropy(client.model(client.x), client.y).backward()
    return {name: p.grad.clone() for name, p in client.model.named_parameters() if p.grad is not None}


def final_states(name: str, *overrides: str) -> tuple[FusionStrategy, list[dict[str, Any]]]:
    """The server half and every client's committed state after a run."""
    with federation(name, *overrides) as (built, directory):
        built.run()
        strategy = built.strategy
        tags = [strategy.outbox.tags.get(c, "0") for c in range(strategy.scenario.clients)]
        return strategy, [directory.clients.load(c, tag) for c, tag in enumerate(tags)]
