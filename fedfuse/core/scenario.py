"""What every strategy sees alike: the data and its split, each client's architecture, training settings, the seed."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from fedfuse import models
from fedfuse.compat.torch_draws import first_of_permutation
from fedfuse.config.idle import idle
from fedfuse.config.schema import Config, TrainConfig
from fedfuse.data import FederatedData, prepare
from fedfuse.data.transfer import cut_transfer
from fedfuse.errors import UserError
from fedfuse.seeding import generator


@dataclass(frozen=True)
class Scenario:
    """One experiment without its strategy; plain data, sent to every worker once.

    Equal scenarios make a comparison fair: partitions, initial weights, transfer set and client samples depend
    on nothing else.
    """

    config: Config
    data: FederatedData
    architectures: tuple[str, ...]  # of client i

    @property
    def clients(self) -> int:
        """Number of clients."""
        return len(self.architectures)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.data.dataset.classes)

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.config.seed

    def span(self, moment: int) -> tuple[float, float]:
        """Shares of the run's rounds done before and after round `moment`, within [0, 1]."""
        before, after = ((moment - back) / self.config.rounds for back in (1, 0))
        return min(max(before, 0.0), 1.0), min(max(after, 0.0), 1.0)

    def rows_of(self, subset: int | None) -> int:
        """Rows of the transfer set a lesson stands on: the user's `transfer.subset`, else the strategy's, else all."""
        if subset is not None and subset < 0:
            raise UserError(f"a subset of {subset} rows of the transfer set: allowed are 1 or more, or None (all)")
        total = 0 if self.data.transfer is None else len(self.data.transfer)
        return min(total, self.config.transfer.subset or subset or total)

    def sampled(self, round: int) -> list[int]:
        """The clients drawn for a round, in order; alike for every strategy."""
        if self.cohort_size == self.clients:
            return list(range(self.clients))
        draw = generator(self.seed, "cohort", round)
        return sorted(first_of_permutation(self.clients, self.cohort_size, draw))

    def order(self, round: int) -> list[int]:
        """All clients in the order in which a round draws them."""
        if self.cohort_size == self.clients:
            return list(range(self.clients))
        draw = generator(self.seed, "cohort", round)
        return torch.randperm(self.clients, generator=draw).tolist()

    @cached_property
    def liars(self) -> frozenset[int]:
        """Clients that lie (`attack=`): those that are named, else drawn by the seed; nobody without an attack."""
        attack = self.config.attack
        if not attack.on:
            return frozenset()
        if attack.clients:
            return frozenset(attack.clients)
        count = max(1, int(self.clients * attack.fraction + 0.5))
        return frozenset(torch.randperm(self.clients, generator=generator(self.seed, "liars"))[:count].tolist())

    @cached_property
    def panel(self) -> Collection[int]:
        """Clients whose own models are scored on the global test, where the server has none (`evaluate.panel`)."""
        count = self.config.evaluate.panel
        if count is None or count >= self.clients:
            return range(self.clients)
        return frozenset(first_of_permutation(self.clients, count, generator(self.seed, "panel")))

    def scored_by(self, client: int, splits: tuple[str, ...]) -> tuple[str, ...]:
        """Of the sets that an evaluation scores, those that a client does."""
        return splits if client in self.panel else tuple(split for split in splits if split != "global")

    @property
    def cohort_size(self) -> int:
        """Clients drawn for a round: `participation` of them, halves up (0.25 of 10 is 3), at least one."""
        return max(1, int(self.clients * self.config.participation + 0.5))

    def training(self, client: int) -> TrainConfig:
        """A client's training settings: `train.*`, with the optimiser that `train.pool` deals it."""
        train = self.config.train
        if not train.pool:
            return train
        name, at, rate = train.pool[client % len(train.pool)].partition("@")
        return replace(train, optimizer=name, lr=float(rate) if at else train.lr, pool=None)

    def examples(self, client: int) -> int:
        """Training examples of a client."""
        offsets = self.data.offsets  # asked several times a client: by `item`, which is five times as quick
        return int(offsets.item(client, 1)) - int(offsets.item(client, 0))


def prepare_scenario(config: Config, data: FederatedData | None = None) -> Scenario:
    """Load the data (if it is not there), deal it to clients and choose their architectures."""
    if data is None:
        data = prepare(config.data, config.partition, config.transfer, config.clients, config.seed)
    if unheard := idle(config):  # of a preset, or from before a group's word was changed: what is typed is refused
        data = replace(data, notes=(*data.notes, *unheard.values()))
    dataset = data.dataset
    names = models.architectures(config.model, dataset.kind_said, dataset.shape, data.clients, dataset.next_token)
    return settled(Scenario(config, data, tuple(names)))


def settled(scenario: Scenario) -> Scenario:
    """Whole numbers that nobody called tokens are features, unless a client's model reads tokens."""
    data, config = scenario.data, scenario.config
    if not data.dataset.unsaid or any(
        models.reads_tokens(name, data.dataset.shape, scenario.classes, config.model)
        for name in sorted(set(scenario.architectures))
    ):
        return scenario
    found = data.as_features()
    if found.transfer is not None and config.transfer.source == "noise":  # of features it is normal, whatever they are
        cut = replace(config.transfer, size=len(found.transfer))
        found = replace(found, transfer=cut_transfer(cut, found.dataset, config.seed)[0])
    return replace(scenario, data=found)


def counted(number: int, what: str = "client") -> str:
    """A number of clients, or of something else, in words."""
    return f"1 {what}" if number == 1 else f"{number} {what}s"
