"""The server half of a registered strategy over a scenario, checked against it."""

from __future__ import annotations

import uuid
from typing import Any

from fedfuse.config.registry import Entry
from fedfuse.core.fit import check_fit
from fedfuse.core.scenario import Scenario
from fedfuse.core.silence import check_halves
from fedfuse.core.strategy import FusionStrategy
from fedfuse.core.workspace import Workspace


def build_strategy(entry: Entry, scenario: Scenario, device: str = "cpu") -> FusionStrategy:
    """The server half over a scenario, checked against it."""
    hyper = scenario.config.strategy

    def equip(model: Any, build: Any) -> Any:
        return entry.client.equip(model, hyper, build)

    needs = entry.server.transfer in ("server", "both")
    strategy = entry.server(hyper, Workspace(scenario, equip, device, transfer=needs))
    strategy.name = entry.name
    strategy.run_id = uuid.uuid4().hex
    check_halves(entry, strategy)
    check_fit(strategy, entry)
    return strategy
