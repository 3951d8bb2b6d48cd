"""What a run says of itself once it is over: `summary.json`, its figures and its notes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from fedfuse.core import client_level
from fedfuse.core.abreast_notes import vectorized_notes
from fedfuse.core.attacks import attack_notes
from fedfuse.core.defended import defence_notes
from fedfuse.core.evaluation import fallen, panel_notes
from fedfuse.core.fit import remarks
from fedfuse.core.labels import LEFT, exhausted
from fedfuse.core.loop import Federation
from fedfuse.core.secure import secure_notes
from fedfuse.core.silence import CONSTANT, KEPT, UNDEFINED, beside_state, constant, kept, undefined, unheard
from fedfuse.results.run_data import FORMAT
from fedfuse.runs.further import ended_at, told
from fedfuse.runs.own_code import code_notes
from fedfuse.train.privacy import private_notes


def summary(
    federation: Federation, path: Path, seconds: Mapping[str, float], fallen_back: str, deployed: bool
) -> dict[str, Any]:
    """The content of `summary.json`.

    Parameters
    ----------
    federation : Federation
        After its last round.
    path : Path
        Its directory, with `metrics.parquet` in it.
    seconds : dict
        `startup` and `rounds`.
    fallen_back : str
        What was wrong with the newest checkpoint, if the one before it was used.
    deployed : bool
        Whether clients are real sites.
    """
    strategy, config, clock = federation.strategy, federation.scenario.config, federation.clock
    dataset = federation.scenario.data.dataset
    tokens = dataset.kind == "tokens" and dataset.train.texts is None  # else a row is a text: `fit` sees to it
    keys = ("accuracy/global", "accuracy/personal", "accuracy/personal_worst10", "loss/train")
    final = {**dict.fromkeys(keys, math.nan), **federation.headline}
    best = {}
    for key in ("accuracy/global", "accuracy/personal"):
        values = [h[key] for h in federation.history if h.get(key) == h.get(key) and key in h]
        best[key] = max(values, default=math.nan)
    total = seconds["startup"] + seconds["rounds"]
    costs = _figures(path, "epsilon") if config.privacy.by_example else []
    spent = [value for *_, value in costs if value == value]
    return {
        "format": FORMAT,
        "run_id": strategy.run_id,
        "strategy": strategy.name,
        "data": config.data.name,
        "seed": config.seed,
        "clients": federation.scenario.clients,
        "rounds": federation.rounds,
        "rounds_done": federation.done,
        "stopped": federation.stop,
        "final": _numbers(final),
        "best": _numbers(best),
        "global_of": "server" if strategy.server_models() else "clients",  # whose models `accuracy/global` scores
        "traffic": strategy.outbox.traffic.summary(),
        "failures": dict(strategy.inbox.failures),
        "trained": dict(strategy.inbox.trained),
        "cohort_complete": not strategy.inbox.ever_left_out,
        "seconds": {"startup": seconds["startup"], "rounds": seconds["rounds"], "total": total},
        "digest": federation.digest,
        "digest_missing": federation.digest_missing,
        **({} if clock is None else {"schedule_digest": clock.book.chain, "virtual_s": clock.seconds}),
        **({} if clock is None else {"clock": clock.book.summary(clock.now)}),
        **({"dp": "deployed" if deployed else "simulated"} if config.privacy.on else {}),
        "notes": [
            *federation.scenario.data.notes,
            *([fallen_back] if fallen_back else ()),
            *unheard(strategy),
            *beside_state(strategy),
            *undefined(_figures(path, UNDEFINED), federation.scenario.clients),
            *constant(
                _figures(path, CONSTANT),
                len(federation.scenario.panel),
                federation.done,
                strategy.distils,
                _of_one_class(path),
            ),
            *panel_notes(strategy),
            *fallen(strategy, _figures(path, "loss/global"), federation.done),
            *kept(_figures(path, KEPT), federation.done),
            *exhausted(_figures(path, LEFT), federation.scenario.clients),
            *remarks(strategy),
            *vectorized_notes(config, strategy.inbox.apart),
            *strategy.notes(),
            *told(strategy, ended_at(path / "checkpoint")),
            *code_notes(path),
            *(f"{strategy.name}: {what} of private examples leave the clients" for what in strategy.discloses),
            *(private_notes(strategy.made_from, deployed, tokens, spent) if config.privacy.by_example else ()),
            *(client_level.notes(strategy) if config.privacy.by_client else ()),
            *(secure_notes(strategy, deployed) if config.secure.on else ()),
            *(attack_notes(federation.scenario) if config.attack.on else ()),
            *(defence_notes(strategy) if config.defence.on else ()),
        ],
    }


def _figures(path: Path, ending: str) -> list[Any]:
    """Rows of the figures whose names end so."""
    rows = pl.scan_parquet(path / "metrics.parquet", glob=False)
    return rows.filter(pl.col("metric").str.ends_with(ending)).collect().rows()


def _of_one_class(path: Path) -> list[int]:
    """Clients whose training examples all have one label; none where labels are not told."""
    rows = pl.scan_parquet(path / "partition.parquet", glob=False)
    held = rows.filter((pl.col("split") == "train") & (pl.col("label") != "")).group_by("client")
    return list(held.agg(pl.len().alias("labels")).filter(pl.col("labels") == 1).collect()["client"])


def _numbers(values: dict[str, float]) -> dict[str, float | None]:
    return {k: (None if v != v else v) for k, v in values.items()}
