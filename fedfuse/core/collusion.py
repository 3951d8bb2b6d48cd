"""Liars that know the round's honest soft labels and tell one lie (`attack.knows=honest`, `attack=hips`).

So the papers define them (arXiv 2402.12265). Nobody in a real federation knows that much unless the server leaks, so it
is the most that such liars can do. The lie is told where the shares meet, before any rule and any sum:

    lma, cpa   of the honest clients' mean, in the place of the liar's own
    hips       hiding in plain sight: per row the honest client's own prediction that gives least to the class which the
               honest mean finds likeliest. It lies within the honest clients' convex hull, where no rule tells it apart
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedfuse.core.attacks import cpa, distributions, lma, soft_labels
from fedfuse.core.shares import Share
from fedfuse.errors import UserError
from fedfuse.wire.group_sums import add_up
from fedfuse.wire.records import Arrays, layout_of
from fedfuse.wire.sums import Sum

if TYPE_CHECKING:
    from fedfuse.core.strategy import FusionStrategy


def hips(honest: Tensor) -> Tensor:
    """Per row, of the clients' predictions (n × b × C) the one that gives least to their mean's likeliest class."""
    likeliest = honest.mean(0).argmax(-1)
    given = honest if distributions(honest) else honest.softmax(-1)
    worst = given.gather(-1, likeliest.expand(len(honest), -1)[..., None])[..., 0].argmin(0)
    return honest[worst, torch.arange(honest.shape[1], device=honest.device)]


LIES = {"hips": hips, "lma": lambda honest: lma(honest.mean(0)), "cpa": lambda honest: cpa(honest.mean(0))}


def agreed(stream: Iterator[Share], strategy: FusionStrategy) -> Iterator[Share]:
    """The shares of a phase, those of liars with the lie in place of their soft labels; all wait for the last."""
    scenario = strategy.scenario
    taken = list(stream)
    honest = [share for share in taken if share.client not in scenario.liars]
    told: dict[tuple[str, str, tuple[int, ...]], Tensor | None] = {}

    def lie(record: str, name: str, own: Tensor) -> Tensor:
        key = (record, name, tuple(own.shape))
        if key not in told:
            rows = [share.records[record][name] for share in honest if record in share.records]
            alike = [one.double() for one in rows if one.shape == own.shape]
            told[key] = LIES[scenario.config.attack.name](torch.stack(alike)).to(own.dtype) if alike else None
        found = told[key]
        return own if found is None else found.clone()

    for share in taken:
        if share.client in scenario.liars:
            model = strategy.workspace.layout(scenario.architectures[share.client])
            records = {}
            for record, arrays in share.records.items():
                names = soft_labels(layout_of(arrays), model, scenario.classes)
                lies: Arrays = {name: lie(record, name, arrays[name]) for name in names if len(arrays[name])}
                records[record] = arrays | lies
            share = replace(share, records=records)
        yield share


def added(stream: Iterator[Share], strategy: FusionStrategy, totals: dict[str, Sum]) -> Iterator[Share]:
    """The same without what only enters `totals`, which is added up here: at the nodes nobody had lied yet."""
    for share in stream:
        records = dict(share.records)
        add_up(records, share.metrics, share.group, totals, strategy.sums, share.weight)
        yield replace(share, records=records)


def check_collusion(strategy: FusionStrategy) -> None:
    """Refuse liars that could not know the others' shares.

    Raises
    ------
    UserError
    """
    config = strategy.scenario.config
    word = f"attack={config.attack.name}" + ("" if config.attack.name == "hips" else " attack.knows=honest")
    if config.secure.on:
        raise UserError(f"{word}: with secure=on nobody sees what the honest share; allowed is off")
    if config.privacy.by_client:
        raise UserError(f"{word}: with privacy.level=client shares are clipped before they meet; allowed is example")
    if config.schedule.name in ("semiasync", "fedbuff", "fedasync"):
        raise UserError(
            f"{word}: with schedule={config.schedule.name} shares of a round do not meet; allowed are sync, deadline, "
            "overcommit"
        )
