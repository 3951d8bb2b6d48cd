"""What a round's evaluation says: the clients' scores in one line, and the server's models on the global test set."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from fedfuse.core.moments import BESIDE, MOMENTS
from fedfuse.core.silence import CONSTANT, UNDEFINED
from fedfuse.core.strategy import FusionStrategy
from fedfuse.train.scores import scored
from fedfuse.wire.records import Arrays

OF_TEXTS = ("bits_per_byte", "exact_match")  # what only texts have
Row = tuple[int, str, int, str, str, float]  # round, scope, client, split, metric, value


def splits_of(strategy: FusionStrategy) -> tuple[str, ...]:
    """The sets that clients score: their own test, the global one if the server has no model, validation if asked."""
    config, splits = strategy.scenario.config, ["personal"]
    if strategy.scenario.data.dataset.test is not None and not strategy.server_models():
        splits.append("global")
    if config.stop.on or config.evaluate.validation:
        splits.append("validation")
    return tuple(splits)


def panel_notes(strategy: FusionStrategy) -> list[str]:
    """Say whose models `evaluate.panel` has scored on the global test, and where it chose nobody."""
    scenario = strategy.scenario
    count = scenario.config.evaluate.panel
    if count is None or scenario.data.dataset.test is None:
        return []
    if strategy.server_models():
        return [f"evaluate.panel={count} does nothing here: accuracy/global is of the server's model"]
    return [
        f"accuracy/global is the mean over the models of {len(scenario.panel)} of {scenario.clients} clients, "
        "drawn once (evaluate.panel)"
    ]


def of_clients(scored: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The clients' scores in one line.

    Returns
    -------
    dict
        accuracy/personal (mean over clients), accuracy/personal_worst10 (mean of the lowest ⌈N/10⌉), and the
        clients' means on the global test set; NaN where nobody has such a score. Of texts, bits_per_byte and
        exact_match on both sets too. Where clients have two models, accuracy/personal_received or
        accuracy/personal_trained too: the mean at the moment that was not asked for.
    """
    scored = list(scored)

    def values(key: str) -> list[float]:
        found = (m[key] for m in scored if key in m)
        return [float(v) for v in found if v == v]

    personal = sorted(values("personal/accuracy"))
    worst = personal[: math.ceil(len(personal) / 10)]
    out = {
        "accuracy/global": _mean(values("global/accuracy_macro")),
        "accuracy/global_plain": _mean(values("global/accuracy")),
        "accuracy/personal": _mean(personal),
        "accuracy/personal_worst10": _mean(worst),
        **{
            f"{key}/{split}": _mean(found)
            for key in OF_TEXTS
            for split in ("global", "personal")
            if (found := values(f"{split}/{key}"))
        },
    }
    for moment in MOMENTS:
        if beside := values(f"{BESIDE}_{moment}"):
            out[f"accuracy/personal_{moment}"] = _mean(beside)
    if validation := values("validation/accuracy"):
        out["accuracy/validation"] = _mean(validation)
    return out


def of_server(
    strategy: FusionStrategy, models: Mapping[str, tuple[str, Arrays]], round: int
) -> tuple[dict[str, float], list[Row]]:
    """Server models on the global test set, the strategy's headline or weighted by clients; and rows of each."""
    workspace, names = strategy.workspace, strategy.scenario.architectures
    byte_count = strategy.scenario.data.byte_count("global")
    total: dict[str, float] = {}
    rows: list[Row] = []
    weights = 0
    for name, (architecture, arrays) in models.items():
        model = (workspace.bare if strategy.bare else workspace.loaded)(architecture, arrays)
        x, y = workspace.texts.read(architecture, "test")
        found = scored(partial(_predict, strategy, model), x, y, strategy.classes, byte_count)
        if strategy.headline is not None:
            count = int(name == strategy.headline)
        else:
            count = sum(a == architecture for a in names) if len(models) > 1 else len(names)
        weights += count
        for key in ("accuracy_macro", "accuracy", *(key for key in OF_TEXTS if key in found)):
            total[key] = total.get(key, 0.0) + count * found[key]
        for said in (UNDEFINED, CONSTANT):
            if said in found:
                rows.append((round, "server", -1, "global", f"{name}/{said}", found[said]))
        if "perplexity" in found:
            for key in ("loss", "perplexity"):
                rows.append((round, "server", -1, "global", f"{key}/global", found[key]))
        if len(models) > 1:
            rows.append((round, "server", -1, "global", f"accuracy/global/{name}", found["accuracy_macro"]))
    headline = {
        "accuracy/global": total["accuracy_macro"] / weights,
        "accuracy/global_plain": total["accuracy"] / weights,
        **{f"{key}/global": total[key] / weights for key in OF_TEXTS if key in total},
    }
    return headline, rows


def fallen(strategy: FusionStrategy, losses: Iterable[Sequence[Any]], last: int) -> list[str]:
    """Say whether a pretrained model predicts the global test's texts worse than before anybody trained it.

    Parameters
    ----------
    losses : iterable
        Rows of `loss/global` as `metrics.parquet` has them.
    last : int
        The last round.
    """
    config, models = strategy.scenario.config.model, strategy.server_models()
    now = [value for round, _, _, split, _, value, *_ in losses if (round, split) == (last, "global")]
    fuses = type(strategy).predict is not FusionStrategy.predict  # what predicts is more than a network
    if len(now) != 1 or len(models) != 1 or fuses or not (config.path or config.checkpoint):
        return []
    ((architecture, _),) = models.values()
    start = strategy.workspace.initial(architecture)
    model = (strategy.workspace.bare if strategy.bare else strategy.workspace.loaded)(architecture, start)
    x, y = strategy.workspace.texts.read(architecture, "test")
    before = scored(partial(_predict, strategy, model), x, y, strategy.classes)["loss"]
    if not now[0] > before:
        return []
    return [
        f"the server's model predicts the global test worse than the one it started from: a loss of {now[0]:.2f}, and "
        f"of {before:.2f} before training: a smaller train.lr, or step of the server, may help"
    ]


def _predict(strategy: FusionStrategy, model: nn.Module, x: Tensor) -> Tensor:
    return strategy.predict(model, x, strategy.scenario.config.evaluate.batch_size)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
