"""Distillation objectives by name. Listing them costs nothing: torch comes with the first one built."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from fedfuse.config.catalogue import LOSSES
from fedfuse.errors import UserError, nearest

if TYPE_CHECKING:
    from fedfuse.config.schema import LossConfig
    from fedfuse.train.objective import Loss


def names() -> dict[str, str]:
    """Return the registered losses: name to one line."""
    return dict(LOSSES)


def loss(name: str, *, build: str | None = None, **options: Any) -> Loss:
    """Return a distillation objective.

    Parameters
    ----------
    name
        A registered name, `custom` with `build`, or a dotted path `pkg.mod:Class` itself.
    build
        Dotted path of a `torch.nn.Module`, on one's own machine only.
    **options
        The loss's options (its fields, such as `temperature` and `weight`); None stands for its default.
        For a dotted path, the keyword arguments of its class.

    Raises
    ------
    UserError
        If the name or an option is unknown, or a value is out of range.
    """
    options = {key: value for key, value in options.items() if value is not None}
    if build or ":" in name:
        from fedfuse.train.objective import Outside

        if build and name != "custom":
            raise UserError(f"loss.build={build} goes with loss=custom, not with loss={name}")
        return Outside(build or name, options)
    if name == "custom":
        raise UserError("loss=custom needs loss.build=pkg.mod:Class, a torch.nn.Module")
    if name not in LOSSES:
        raise UserError(f"loss={name!r} is not known: {nearest(name, [*LOSSES, 'custom'])}, or pkg.mod:Class")

    from fedfuse.train import divergences, relations, transformed, vocabularies

    kind: type[Loss] = {
        **divergences.LOSSES, **relations.LOSSES, **transformed.LOSSES, **vocabularies.LOSSES
    }[name]  # fmt: skip
    allowed = [field.name for field in dataclasses.fields(kind)]
    for key in options:
        if key not in allowed:
            raise UserError(f"loss={name} has no option {key!r}: {nearest(key, allowed)}")
    return kind(**options)


def chosen(config: LossConfig, default: str = "kl", **options: Any) -> Loss:
    """Return the objective that a run names by `loss=<name>`, else the strategy's own.

    Parameters
    ----------
    config
        The run's choice; a name of null leaves `default`, with the strategy's `options`.

    Raises
    ------
    UserError
        As `loss` does; for options that come without a name, which nothing would read.
    """
    if config.build is not None or config.name is not None:
        return loss(config.name or "custom", build=config.build, temperature=config.temperature, **config.options)
    lost = "temperature" if config.temperature is not None else next(iter(config.options), None)
    if lost is not None:
        raise UserError(f"loss.{lost}: each strategy's own loss has its own; it goes with loss=<name>, e.g. loss=kl")
    return loss(default, **options)


def __getattr__(name: str) -> Any:
    # Lets callers that have torch anyway import the class from here.
    if name == "Loss":
        from fedfuse.train.objective import Loss

        return Loss
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
