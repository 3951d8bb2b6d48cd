"""How long, and with which optimiser, soft labels are trained on: the user's `distil.*` goes before a paper's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fedfuse.config.schema import DistilConfig, TrainConfig
from fedfuse.train.batch import sizes_of

RATES = {"sgd": 0.05, "adam": 0.001, "adamw": 0.001}  # where nobody names a rate for a chosen optimiser


@dataclass(frozen=True)
class Effort:
    """One distillation's effort.

    Parameters
    ----------
    epochs, batch_size
        Passes over the rows, and rows a step. Epochs of None: as many whole passes as make `steps`, at least one.
    lr, optimizer
        None: as in local training.
    """

    epochs: int | None
    batch_size: int
    lr: float | None = None
    optimizer: str | None = None
    steps: int = 0


def chosen(asked: DistilConfig, own: Effort, train: TrainConfig) -> tuple[TrainConfig, int]:
    """The optimiser's settings and the batch size: what the user asked for, else the strategy's own, else `train.*`."""
    name = asked.optimizer or own.optimizer or train.optimizer
    if asked.lr is not None:
        lr = asked.lr
    elif own.lr is not None and name == (own.optimizer or train.optimizer):
        lr = own.lr
    else:
        lr = train.lr if name == train.optimizer else RATES[name]
    return replace(train, optimizer=name, lr=lr, pool=None), asked.batch_size or own.batch_size


def happens(asked: DistilConfig, epochs: int) -> bool:
    """Whether there is any step where a strategy's own epochs are so many."""
    return bool(asked.steps if asked.steps is not None else epochs if asked.epochs is None else asked.epochs)


def plan(asked: DistilConfig, own: Effort, train: TrainConfig, rows: int, least: int = 2) -> dict[str, Any]:
    """Options of `fedfuse.train.training.train` for a distillation on so many rows.

    Parameters
    ----------
    asked
        `distil.*` of the run.
    own
        What the strategy does unless asked otherwise.
    train
        Settings of local training.
    rows
        Of the transfer set that are distilled.
    least
        Least rows in the last batch of an epoch.
    """
    config, batch_size = chosen(asked, own, train)
    options: dict[str, Any] = {"config": config, "batch_size": batch_size}
    each = max(1, len(sizes_of(rows, batch_size, least)))
    if asked.steps is None:
        paper = max(1, -(-own.steps // each)) if own.epochs is None else own.epochs
        return {**options, "epochs": paper if asked.epochs is None else asked.epochs}
    return {**options, "epochs": -(-asked.steps // each), "after_step": until(asked.steps)}


def until(steps: int) -> Callable[[int, int], bool]:
    """An `after_step` that ends a training after so many steps."""
    return lambda done, _: done >= steps
