"""Differential privacy of whole clients: each one's update is clipped, and the server adds noise to their sum.

DP-FedAvg (McMahan et al., "Learning Differentially Private Recurrent Language Models", ICLR 2018, arXiv 1710.06963).
With w what the server published, Δ_k = w_k − w over all that is shared, and m clients in the round's cohort:

    client k:  Δ_k ← Δ_k · min(1, C / ‖Δ_k‖₂)
    server:    w̄ = w + (Σ_k Δ_k + N(0, σ²C²·I)) / m

Every client weighs alike and m is the planned cohort's size, so that one client moves the sum by C at most, and
nothing else; neighbours differ by one client whose update is replaced by zero. A round is a Gaussian release of
noise multiplier σ; ε is what the rounds add up to by Opacus's accountant, for a client that is drawn in each of them:
no amplification by sampling is claimed, since cohorts have a fixed size. The server is trusted: it sees the updates.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch

from fedfuse.compat.torch_norms import BATCH_NORMS
from fedfuse.core.shares import Share, Shares
from fedfuse.errors import UserError
from fedfuse.train.accounting import History, epsilon, joined, noise_for
from fedfuse.train.entropy import Source, gaussian
from fedfuse.train.privacy import delta_of, own_entropy
from fedfuse.wire.records import Arrays
from fedfuse.wire.sums import Sum

if TYPE_CHECKING:
    from fedfuse.core.strategy import FusionStrategy


def check(strategy: FusionStrategy) -> None:
    """Refuse a strategy of which one clipped and noised sum is not all that the server learns.

    Raises
    ------
    UserError
        Naming what else there is.
    """
    who = f"privacy.level=client: strategy={strategy.name}"
    summed, shared = set(strategy.sums), set(strategy.records)
    if len(summed) != 1 or shared != summed:
        other = f"shares {', '.join(sorted(shared)) or 'nothing'}"
        raise UserError(f"{who} {other}, of which not one sum is all that it needs; allowed are those that average one")
    (name,), clients = summed, strategy.scenario.clients
    topic = strategy.topics.get(name)
    if topic is None or topic.kind != "state":
        raise UserError(f"{who} sums {name!r}, which is no update of anything published; allowed are averages of that")
    if strategy.setup or strategy.phases(1) != ("train",):
        raise UserError(f"{who} asks clients in more phases than one; allowed are those that train, and no more")
    workspace, spec = strategy.workspace, strategy.records[name]
    travels = spec(workspace.scope(0, strategy.hyper)) if spec is not None else {}
    for module_name, module in workspace.model(strategy.architecture).named_modules():
        if isinstance(module, BATCH_NORMS) and f"{module_name}.running_mean" in travels:
            raise UserError(
                f"privacy.level=client with model={strategy.architecture}: {module_name} is a BatchNorm, whose "
                "statistics no noise may be added to; allowed are models without it (GroupNorm, LayerNorm)"
            )
    delta = strategy.scenario.config.privacy.delta
    if delta is not None and delta * clients > 1:
        raise UserError(f"privacy.delta={delta}: privacy.level=client has {clients} clients; allowed is at most 1/N")


def clipped(arrays: Arrays, anchor: Mapping[str, torch.Tensor], clip: float) -> tuple[Arrays, float]:
    """w + Δ·min(1, C/‖Δ‖), Δ = arrays − w over all arrays together, and ‖Δ‖ before."""
    moved = {name: value.detach().double() - anchor[name].to(value.device).double() for name, value in arrays.items()}
    norm = math.sqrt(sum(float(change.square().sum()) for change in moved.values()))
    if norm <= clip:
        return arrays, norm
    kept = {name: anchor[name].to(change.device).double() + change * (clip / norm) for name, change in moved.items()}
    return {name: value.to(arrays[name].dtype) for name, value in kept.items()}, norm


class Noised(Shares):
    """A round's shares of which only the noised sum can be had: Σ wᵢ·xᵢ is m·w + Σ Δ + noise, and Σ wᵢ is m."""

    def __init__(self, stream: Iterator[Share], sums: Mapping[str, Sum], strategy: FusionStrategy) -> None:
        super().__init__(stream, sums)
        self._strategy, self._clients = strategy, len(strategy.outbox.awaited)
        self._released: Arrays | None = None

    def __iter__(self) -> Iterator[Share]:
        raise UserError(
            f"privacy.level=client: strategy={self._strategy.name} looks at each client's share, which the noise on "
            "their sum does not cover"
        )

    def total(self, record: str) -> tuple[Arrays, float]:
        """m·w + Σ Δ + noise in float64, and m; the noise is drawn once a round."""
        if self._released is None:
            total, weights = super().total(record)
            anchor = {name: value.double() for name, value in self._strategy.published(record).items() if name in total}
            moved = {name: value - weights * anchor[name] for name, value in total.items()}
            noise = release(self._strategy, moved)
            self._released = {n: self._clients * anchor[n] + moved[n] + noise[n] for n in moved}
        return self._released, float(self._clients)

    def mean(self, record: str) -> Arrays:
        """The anchor w and (Σ Δ + noise)/m on it, in the dtype of what clients sent."""
        total, clients = self.total(record)
        return {name: (value / clients).to(self._sums[record].dtypes[name]) for name, value in total.items()}


def delta_at(strategy: FusionStrategy) -> float:
    """δ: the user's, else far below one over the number of clients."""
    told = strategy.scenario.config.privacy.delta
    return delta_of(strategy.scenario.clients) if told is None else told


def history_of(strategy: FusionStrategy) -> History:
    """The releases so far: noise multiplier, 1, rounds."""
    return tuple((n, q, s) for n, q, s in json.loads(strategy.state.get("privacy", {}).get("history", "[]")))


def release(strategy: FusionStrategy, like: Mapping[str, torch.Tensor]) -> Arrays:
    """Enter a round's release in the budget, tell ε, and draw its noise, of deviation σ·C.

    Raises
    ------
    UserError
        If the budget does not last.
    """
    config, delta = strategy.scenario.config, delta_at(strategy)
    privacy, kept = config.privacy, strategy.state.setdefault("privacy", {"noise": 0.0, "history": "[]"})
    if not kept["noise"]:
        if privacy.noise is not None:
            kept["noise"] = privacy.noise
        else:
            assert privacy.epsilon is not None
            kept["noise"] = noise_for(privacy.epsilon, delta, ((1.0, privacy.trainings or config.rounds),))
    noise = float(kept["noise"])
    after = joined(history_of(strategy), ((noise, 1.0, 1),))
    cost = epsilon(after, delta)
    if privacy.epsilon is not None and cost > privacy.epsilon:
        raise UserError(
            f"privacy.epsilon={privacy.epsilon:g} is spent: {cost:.3g} with this round; "
            "plan for more by privacy.trainings"
        )
    kept["history"] = json.dumps(after)
    for name, value in (("epsilon", cost), ("delta", delta), ("noise", noise)):
        strategy.log(name, value)
    source: Source = own_entropy() if strategy.deployed else strategy.generator("client-level noise")
    return {name: gaussian(value, noise * privacy.clip, source) for name, value in like.items()}


def notes(strategy: FusionStrategy) -> list[str]:
    """What a run that is private by client says of itself, ε at last."""
    history = history_of(strategy)
    rounds = sum(steps for *_, steps in history)
    noise = "of its own entropy" if strategy.deployed else "seeded, so that whoever knows the seed can take it off"
    said = [
        "dp: by client: updates are clipped and summed, and the server, which is trusted, adds noise to the sum, "
        f"{noise}; clients weigh alike; what the run writes down of single clients is not covered",
    ]
    if history:
        delta = delta_at(strategy)
        said.append(f"dp: epsilon {epsilon(history, delta):.4g} at delta {delta:.3g}, by client, after {rounds} rounds")
    return said
