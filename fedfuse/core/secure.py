"""`secure=on`: of which records the server gets sums only, how these are quantised, and how many clients they need."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from fedfuse.config.schema import SecureConfig
from fedfuse.core.shares import declared
from fedfuse.errors import UserError
from fedfuse.wire.fixed_point import BITS

if TYPE_CHECKING:
    from fedfuse.core.strategy import FusionStrategy

EXAMPLES = "num-examples"


def parties(config: SecureConfig, cohort: int) -> tuple[int, int]:
    """Neighbours that a client shares secrets with, itself included, and how many of them give a secret back."""
    shares = cohort if config.num_shares is None else min(cohort, config.num_shares | 1)  # as many on either side
    asked = config.reconstruction_threshold
    return shares, max(2, math.ceil(round(asked * shares, 9)) if asked <= 1 else int(asked))


def plan_of(strategy: FusionStrategy, clients: Collection[int]) -> dict[str, Any]:
    """What a phase's messages say of its secure sums; nothing if there are none."""
    config, scenario = strategy.scenario.config.secure, strategy.scenario
    names = [name for name in sorted(declared(strategy, strategy.phase)) if name in strategy.sums]
    if not config.on or not names:
        return {}
    shares, threshold = parties(config, len(clients))
    most = {EXAMPLES: max(1, *(scenario.examples(client) for client in range(scenario.clients))), **_bounds(strategy)}
    heaviest = {name: float(most[weight] if (weight := strategy.sums[name]) else 1) for name in names}
    about = {"clip": config.clipping_range, "levels": config.quantization_range, "heaviest": heaviest}
    return {**about, "shares": shares, "threshold": threshold}


def _bounds(strategy: FusionStrategy) -> dict[str, float]:
    """The largest values of the metrics that a strategy declares, where there are any."""
    return {metric: most for metric, (_, most) in strategy.metrics.items() if 0 < most < math.inf}


def check_secure(strategy: FusionStrategy) -> None:
    """Refuse what secure sums cannot be had with.

    Raises
    ------
    UserError
        Naming the key and what is allowed.
    """
    config, scenario = strategy.scenario.config.secure, strategy.scenario
    if scenario.config.privacy.by_client:
        raise UserError(
            "secure=on: privacy.level=client bounds each update by C, and rounding moves it beyond; allowed is off"
        )
    for name, weight in strategy.sums.items():
        if weight not in (None, EXAMPLES, *_bounds(strategy)):
            raise UserError(f"secure=on: {name} is weighed by {weight}, whose largest value `metrics` does not say")
    cohort = scenario.cohort_size
    shares, threshold = parties(config, cohort)
    asked = f"secure.reconstruction_threshold={config.reconstruction_threshold:g}"
    if threshold > shares:
        raise UserError(f"{asked}: {threshold} of {shares} clients; a round has {cohort} (clients, participation)")
    if 2 * threshold <= shares:
        raise UserError(f"{asked}: {threshold} of {shares} clients; allowed is more than half of them")
    if scenario.clients * config.quantization_range > 2**BITS:
        raise UserError(f"secure.quantization_range={config.quantization_range}: with {scenario.clients} clients "
                        f"allowed is at most {2**BITS // scenario.clients}")  # fmt: skip


def secure_notes(strategy: FusionStrategy, deployed: bool) -> list[str]:
    """What a secure run says of itself."""
    config, phases = strategy.scenario.config.secure, (*strategy.setup, *strategy.phases(1))
    least = parties(config, strategy.scenario.cohort_size)[1]
    summed = ", ".join(sorted(strategy.sums))
    seen = sorted({name for phase in phases for name in declared(strategy, phase)} - set(strategy.sums))
    how = f"of {summed} the server got sums over a round's clients, {least} at least, and nothing else"
    if not deployed:
        how = f"{summed} quantised as in a deployment, where masks hide all but sums; of {least} clients at least"
    said = [f"secure: {how}"]
    if seen:
        said.append(f"secure: these records are still seen by the server: {', '.join(seen)}")
    return said
