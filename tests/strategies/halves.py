"""The two halves of a strategy, awake without a round: for closed-form tests of one rule at a time."""

from __future__ import annotations

from collections.abc import Mapping
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
from tests.federations import TINY, scenario_of


def server(name: str, *overrides: str, round: int = 1, base: tuple[str, ...] = TINY) -> FusionStrategy:
    """The server half, begun, in some round."""
    _, scenario = scenario_of((*base, f"strategy={name}", *overrides))
    strategy = build_strategy(registry.entry(name), scenario)
    strategy.ensure_begun()
    strategy.round = round
    strategy.messages(range(scenario.clients), "train", {})
    return strategy


def client(name: str, *overrides: str, who: int = 0, round: int = 1, base: tuple[str, ...] = TINY) -> FusionClient:
    """The client half with an empty state and initial weights."""
    config, scenario = scenario_of((*base, f"strategy={name}", *overrides))
    entry = registry.entry(name)
    workspace = Workspace(scenario, lambda model, build: entry.client.equip(model, config.strategy, build))
    model = workspace.fresh(scenario.architectures[who])
    return entry.client(
        hyper=config.strategy, model=model, workspace=workspace, client=who, state={}, round=round, phase="train"
    )


def shares(strategy: FusionStrategy, *contents: Mapping[str, Arrays], examples: int = 10) -> Shares:
    """What clients 0, 1, … shared."""
    sums = {name: Sum() for name in strategy.sums}
    made = []
    for i, content in enumerate(contents):
        records = dict(content)
        for name, total in sums.items():
            total.add(i // 8, records.pop(name), float(examples) if strategy.sums[name] else 1.0)
        made.append(Share(i, records, {"num-examples": examples}))
    return Shares(iter(made), sums)


def take(half: FusionClient, topic: str, version: int = 1, **arrays: Any) -> None:
    """Let a client receive one topic."""
    half.version = version
    half.begin("receive")
    half.receive({topic: Item(arrays, version)})
    half.begin("train")


def random_labels(n: int, classes: int, seed: int = 0, sharp: float = 2.0) -> torch.Tensor:
    """Random probabilities (n × C), float64."""
    draw = torch.Generator().manual_seed(seed)
    return (sharp * torch.randn(n, classes, generator=draw, dtype=torch.float64)).softmax(1)
