"""More rounds for a run that has ended: its rows go back among the rounds', and its configuration says more rounds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import polars as pl

from fedfuse.config.files import checked, read_text, replaced, write_text
from fedfuse.config.schema import Config
from fedfuse.core.strategy import FusionStrategy
from fedfuse.errors import UserError, one_line
from fedfuse.results.run_data import load
from fedfuse.runs.checkpoint import NEWEST, changed
from fedfuse.runs.configuration import as_yaml, load_config
from fedfuse.wire.client_store import read_tree

KEPT = "further.json"  # in `checkpoint/`: the numbers of rounds that a run ended with before it went on


def ended_at(checkpoint: Path) -> list[int]:
    """The numbers of rounds that a run ended with before it went on; empty for most runs."""
    file = checkpoint / KEPT
    return [int(n) for n in json.loads(read_text(file, 1 << 16))] if file.exists() else []


def check_further(path: Path, config: Config, rounds: int) -> None:
    """Refuse to give a run more rounds where it would not go on as it went.

    Raises
    ------
    UserError
        If it was not to have fewer, was stopped early, or its noise was meant for fewer.
    """
    if rounds < config.rounds:
        raise UserError(f"rounds={rounds}: {path} was to have {config.rounds}; allowed is that or more")
    if config.runtime.name == "flower":
        raise UserError(f"rounds={rounds}: {path} ran under runtime=flower, whose nodes are gone; run it anew")
    privacy = config.privacy
    if privacy.on and privacy.noise is None and privacy.trainings is None:
        raise UserError(
            f"rounds={rounds}: the noise of {path} was made for {config.rounds} rounds by privacy.epsilon="
            f"{privacy.epsilon}; only privacy.trainings or privacy.noise leaves room for more"
        )
    stopped = (load(path).summary or {}).get("stopped") if (path / "summary.json").exists() else ""
    if stopped:
        raise UserError(f"rounds={rounds}: {path} was stopped early ({stopped}); it does not go on")


def goes_on(path: Path, config: Config) -> bool:
    """Whether a directory holds the same run with fewer rounds."""
    if config.overwrite or not (path / "config.yaml").exists():
        return False
    began = load_config(path)
    return began.rounds < config.rounds and not changed(as_yaml(began), as_yaml(config), ("rounds",))


def make_room(path: Path, config: Config, rounds: int) -> Config:
    """Let a run have more rounds; whoever is killed in here finds the run as it was, or as it shall be.

    Returns
    -------
    Config
        The run's configuration with that many rounds.
    """
    check_further(path, config, rounds)
    checkpoint, before = path / "checkpoint", ended_at(path / "checkpoint")
    if (path / "summary.json").exists():
        done = (load(path).summary or {})["rounds_done"]
        (checkpoint / "rows").mkdir(exist_ok=True)
        kinds = ("metrics", "traffic", "timing", *(["schedule"] if (path / "schedule.parquet").exists() else []))
        for kind in kinds:
            rows = pl.read_parquet(path / f"{kind}.parquet", glob=False)
            rows = _unsettled(rows, checkpoint / NEWEST) if kind == "traffic" else rows
            with replaced(checkpoint / "rows" / f"{kind}-{done:06d}.parquet", durable=True) as partial:
                rows.write_parquet(partial)
        before = sorted({*before, done})
    write_text(checkpoint / KEPT, json.dumps(sorted({*before, config.rounds})))
    (path / "summary.json").unlink(missing_ok=True)
    config = replace(config, rounds=rounds)
    write_text(path / "config.yaml", as_yaml(config))
    return config


def _unsettled(rows: pl.DataFrame, newest: Path) -> pl.DataFrame:
    """Traffic without what the end of the run charged to evaluation, because no training was to need it any more."""
    try:
        pending = json.loads(read_tree(checked(newest))[0]["plain"])["traffic"]["pending"]
    except Exception as error:
        raise UserError(f"{newest}: cannot be read ({one_line(error)}); the run does not go on") from error
    columns = ("round", "client", "direction", "message", "record", "bytes")
    charged = [(r, c, "down", "evaluate", topic, size) for c, topic, _, pieces in pending for r, size in pieces]
    schema = {name: rows.schema[name] for name in columns}
    return rows.join(pl.DataFrame(charged, schema=schema, orient="row"), on=columns, how="anti", maintain_order="left")


def planned(strategy: FusionStrategy) -> str:
    """What of a strategy, or of the loss it distils with, follows `rounds`; empty if nothing does."""
    from fedfuse.train.losses import chosen
    from fedfuse.train.objective import Loss

    if said := strategy.planned():
        return said
    loss = chosen(strategy.scenario.config.loss)
    moves = type(loss).after_step is not Loss.after_step
    return f"loss={strategy.scenario.config.loss.name} follows the share of rounds done" if moves else ""


def told(strategy: FusionStrategy, before: list[int]) -> list[str]:
    """What whoever reads the result of a run that went on has to know."""
    before = [n for n in before if n < strategy.scenario.config.rounds]
    if not before:
        return []
    line = f"went on after round {' and '.join(map(str, before))}"
    if what := planned(strategy):
        line += f"; {what}, so that this is not the run that {strategy.scenario.config.rounds} rounds at once give"
    return [line]
