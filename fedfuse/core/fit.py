"""What fits what: a strategy that cannot run on an experiment is refused in words, before anything is written."""

from __future__ import annotations

from fedfuse.core.strategy import FusionStrategy
from fedfuse.errors import UserError
from fedfuse.train import privacy
from fedfuse.train.losses import chosen


def check_fit(strategy: FusionStrategy, personal: bool) -> None:
    """Refuse, in words, a strategy that cannot run on this experiment.

    Raises
    ------
    UserError
        Naming what does not fit and what would.
    """
    scenario = strategy.scenario
    pool = sorted(set(scenario.architectures))
    if not strategy.heterogeneous and len(pool) > 1:
        raise UserError(
            f"strategy={strategy.name} averages weights and needs one architecture, model.pool has {', '.join(pool)}; "
            f"use model=<name>, or a strategy that exchanges knowledge instead of weights"
        )
    if strategy.transfer != "none" and scenario.data.transfer is None:
        raise UserError(
            f"strategy={strategy.name} needs a transfer set and data={scenario.config.data.name} brings none; "
            f"name one: transfer.source=noise or a data set"
        )
    if strategy.transfer != "none" and scenario.data.transfer is not None:
        rows = len(scenario.data.transfer)
        asked = {"transfer.subset": scenario.config.transfer.subset}
        asked["strategy.subset"] = getattr(strategy.hyper, "subset", None)
        for key, size in asked.items():
            if size is not None and size > rows:
                raise UserError(f"{key}={size}: the transfer set has {rows} examples; allowed is at most that")
    if scenario.config.train.optimizer_state == "keep" and not personal:
        raise UserError(
            f"train.optimizer_state=keep: strategy={strategy.name} keeps no private model; allowed there: fresh"
        )
    if scenario.config.privacy.on:
        _check_private(strategy, pool)
    objective = chosen(scenario.config.loss)  # refuses one that cannot be built
    if objective.needs_labels and strategy.transfer != "none" and not scenario.config.transfer.labelled:
        raise UserError(
            f"loss={scenario.config.loss.name} needs labels, and strategy={strategy.name} distils on an unlabelled "
            f"transfer set: set transfer.labelled=true, or choose another loss"
        )
    for name in pool:  # refuses one that cannot be built, instead of leaving out its clients
        model = strategy.residents.model(name)
        if strategy.needs_features and not hasattr(model, "features"):
            raise UserError(
                f"strategy={strategy.name} needs models with features(x), head(z), feature_dim; {name} has none"
            )
    if strategy.same_features:
        sizes = {name: int(strategy.residents.model(name).feature_dim) for name in pool}  # type: ignore[arg-type]
        if len(set(sizes.values())) > 1:
            told = ", ".join(f"{name} has {size}" for name, size in sizes.items())
            raise UserError(
                f"strategy={strategy.name} compares features across clients, which must be of one size; {told}: "
                f"set model.feature_dim={min(sizes.values())}"
            )


def remarks(strategy: FusionStrategy) -> list[str]:
    """What a user has to know of an experiment that can run, and might not do what is expected."""
    scenario, said = strategy.scenario, []
    asked = scenario.config.distil
    given = [key for key in ("epochs", "steps", "batch_size", "lr", "optimizer") if getattr(asked, key) is not None]
    if given and not strategy.distils:
        said.append(f"strategy={strategy.name} distils no transfer set: distil.{given[0]} changes nothing")
    if strategy.distils and scenario.data.transfer is not None:
        rows = strategy.rows_distilled
        if rows < FEW * scenario.classes:
            said.append(
                f"strategy={strategy.name} distils {rows} rows a round for {scenario.classes} classes, which is few: "
                f"transfer.size and transfer.subset say how many there are, distil.steps how often they are used"
            )
    return said


FEW = 10  # rows a class


def _check_private(strategy: FusionStrategy, pool: list[str]) -> None:
    if strategy.pooled:
        raise UserError(f"privacy: strategy={strategy.name} joins all examples at one client; there N is nobody's own")
    if strategy.discloses:
        what = ", ".join(strategy.discloses)
        raise UserError(f"privacy: strategy={strategy.name} lets {what} of private examples leave the clients")
    scenario, delta = strategy.scenario, strategy.scenario.config.privacy.delta
    most = max(range(scenario.clients), key=scenario.examples)
    if delta is not None and delta * scenario.examples(most) > 1:
        raise UserError(f"privacy.delta={delta}: client {most} has {scenario.examples(most)} examples; allowed is 1/N")
    for name in pool:
        privacy.check(strategy.residents.model(name), name)
