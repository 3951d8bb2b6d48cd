"""One client of a small federation, awake outside any round, for tests of a client half."""

from __future__ import annotations

import math
from typing import Any

import torch

from fedfuse.config import registry
from fedfuse.core.build import build_strategy
from fedfuse.core.client import FusionClient
from fedfuse.core.strategy import FusionStrategy
from fedfuse.wire.knowledge import Item
from fedfuse.wire.records import Arrays
from tests.federations import TINY, federation, scenario_of

PLAIN = ("train.momentum=0", "train.batch_size=1000")  # plain SGD on all examples at once: steps are epochs


def server(name: str, *overrides: str) -> FusionStrategy:
    """A server half that has published version 0."""
    _, scenario = scenario_of((*TINY, f"strategy={name}", *overrides))
    built = build_strategy(registry.entry(name), scenario)
    built.ensure_begun()
    return built


def wake(
    built: FusionStrategy, client: int = 0, state: dict[str, Any] | None = None, **knowledge: Arrays
) -> FusionClient:
    """A client that has received what the server published, or the topics given instead."""
    entry, names = registry.entry(built.name), built.scenario.architectures
    model = built.workspace.fresh(names[client])
    awake = entry.client(
        hyper=built.hyper,
        model=model,
        workspace=built.workspace,
        client=client,
        state=state or {},
        round=1,
        phase="train",
    )
    known = {topic: item for (topic, _), item in built.board.items.items()}
    known |= {topic: Item(arrays, 0) for topic, arrays in knowledge.items()}
    awake.begin("receive")
    awake.receive(known)
    awake.begin("train")
    return awake


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
