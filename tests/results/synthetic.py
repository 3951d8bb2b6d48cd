"""Make run directories that look like real ones, of any size: `python tests/results/synthetic.py DIR`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml

SKILL = {"local": 0.55, "fedavg": 0.70, "fedprox": 0.71, "fedmd": 0.74, "knfu": 0.80}


def write_run(
    directory: Path,
    strategy: str = "fedavg",
    seed: int = 0,
    *,
    rounds: int = 5,
    clients: int = 4,
    classes: int = 10,
    done: int | None = None,
    similarity: bool = False,
    always: bool = False,
    config: dict[str, Any] | None = None,
    hyper: dict[str, Any] | None = None,
    skill: float | None = None,
    environment: dict[str, Any] | None = None,
    trained: dict[str, int] | None = None,
) -> Path:
    """Write one run; with `done` below `rounds` it is left as an interrupted run leaves it."""
    random = np.random.default_rng([seed, len(strategy), sum(map(ord, strategy))])
    last = rounds if done is None else done
    ceiling = SKILL.get(strategy, 0.65) if skill is None else skill
    directory.mkdir(parents=True, exist_ok=True)
    resolved: dict[str, Any] = {
        "strategy": {"name": strategy, **(hyper or {})},
        "data": {"name": "digits", "root": None, "limit": None},
        "partition": {"name": "dirichlet", "alpha": 0.3},
        "model": {"name": "mlp", "pool": None},
        "train": {"epochs": 1, "lr": 0.05},
        "runtime": {"name": "inline", "workers": 1},
        "clients": clients,
        "rounds": rounds,
        "participation": 1.0,
        "seed": seed,
    }
    for key, value in (config or {}).items():
        if isinstance(value, dict) and isinstance(resolved.get(key), dict):
            resolved[key] |= value
        else:
            resolved[key] = value
    (directory / "config.yaml").write_text(yaml.safe_dump(resolved, allow_unicode=True), encoding="utf-8")
    machine = {"python": "3.11", "torch": "2.13.0", "cpu": "synthetic", "cores": 2} | (environment or {})
    (directory / "environment.json").write_text(json.dumps(machine), encoding="utf-8")

    rates = 1 - np.exp(-np.arange(1, last + 1) / max(2.0, rounds / 5))
    luck = random.normal(0, 0.012)
    level = 0.1 + (ceiling + luck - 0.1) * rates + random.normal(0, 0.006, last)
    offsets = random.normal(0, 0.08, clients)
    own = np.clip(level[:, None] + 0.04 + (offsets - offsets.mean())[None, :], 0, 1)
    metrics = _metrics(level, own, random)
    if similarity:
        metrics = pl.concat([metrics, _similarity(last, clients, random, always)])
    traffic = _traffic(strategy, last, clients, random)
    timing = _timing(last, random)
    deal = np.random.default_rng(seed)  # strategies share partitions
    counts = deal.multinomial(100, deal.dirichlet([0.3] * classes, size=clients))
    partition = pl.DataFrame(
        {
            "client": np.repeat(np.arange(clients), classes * 2),
            "split": np.tile(np.repeat(["train", "personal"], classes), clients),
            "label": np.tile(np.arange(classes), clients * 2),
            "examples": np.concatenate([counts, counts // 5], axis=1).ravel(),
        }
    )
    partition.write_parquet(directory / "partition.parquet")
    frames = {"metrics": metrics, "traffic": traffic, "timing": timing}
    if done is not None:
        rows = directory / "checkpoint" / "rows"
        rows.mkdir(parents=True)
        for name, frame in frames.items():
            for number in range(1, last + 1):
                frame.filter(pl.col("round") == number).write_parquet(rows / f"{name}-{number:06d}.parquet")
        state = {"round": last, "rounds": rounds, "run_id": directory.name}
        (directory / "checkpoint" / "round.json").write_text(json.dumps(state))
        (directory / "lock").touch()
        return directory
    for name, frame in frames.items():
        frame.write_parquet(directory / f"{name}.parquet")
    up = int(traffic.filter(direction="up", message="train")["bytes"].sum())
    down = int(traffic.filter(direction="down", message="train")["bytes"].sum())
    final = _headline(level[-1], own[-1]) | {"loss/train": float(-np.log(max(level[-1], 1e-3)))}
    summary = {
        "format": 1,
        "run_id": directory.name,
        "strategy": strategy,
        "data": "digits",
        "seed": seed,
        "clients": clients,
        "rounds": rounds,
        "rounds_done": last,
        "final": final,
        "best": {"accuracy/global": float(level.max()), "accuracy/personal": float(own.mean(axis=1).max())},
        "traffic": {"up_bytes": up, "down_bytes": down, "down_unique_bytes": down // clients},
        "failures": {"replies": 0, "rejected": 0, "retried": 0},
        "cohort_complete": True,
        **({} if trained is None else {"trained": trained}),
        "seconds": {"startup": 1.0, "rounds": float(last), "total": float(last + 1)},
        "digest": "0" * 64,
        "digest_missing": [],
    }
    (directory / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return directory


def write_sweep(
    root: Path, strategies: list[str], seeds: int, similar: tuple[str, ...] = ("knfu",), **more: Any
) -> Path:
    """Write strategies × seeds runs below `root`."""
    for strategy in strategies:
        for seed in range(seeds):
            write_run(root / f"{strategy}-{seed}", strategy, seed, similarity=strategy in similar, **more)
    return root


def _headline(level: float, own: np.ndarray) -> dict[str, float]:
    worst = np.sort(own)[: -(-len(own) // 10)]
    return {
        "accuracy/global": float(level),
        "accuracy/global_plain": float(level),
        "accuracy/personal": float(own.mean()),
        "accuracy/personal_worst10": float(worst.mean()),
    }


def _metrics(level: np.ndarray, own: np.ndarray, random: np.random.Generator) -> pl.DataFrame:
    rounds, clients = own.shape
    numbers = np.arange(1, rounds + 1)
    parts = []
    loss = -np.log(np.clip(own, 1e-3, None))
    kinds = {("personal", "accuracy"): own, ("personal", "accuracy_macro"): own, ("personal", "loss"): loss}
    kinds |= {("train", "loss"): loss, ("train", "steps"): np.ones_like(own)}
    for (split, metric), values in kinds.items():
        parts.append(
            pl.DataFrame(
                {
                    "round": np.repeat(numbers, clients),
                    "scope": ["client"] * own.size,
                    "client": np.tile(np.arange(clients), rounds),
                    "split": [split] * own.size,
                    "metric": [metric] * own.size,
                    "value": values.ravel(),
                }
            )
        )
    server = [
        {
            "round": int(number),
            "scope": "server",
            "client": -1,
            "split": "global",
            "metric": name,
            "value": value,
        }
        for number in numbers
        for name, value in (
            _headline(level[number - 1], own[number - 1])
            | {"loss/train": float(2.3 - 2 * level[number - 1] + random.normal(0, 0.02))}
        ).items()
    ]
    return pl.concat([*parts, pl.DataFrame(server)])


def _similarity(rounds: int, clients: int, random: np.random.Generator, always: bool) -> pl.DataFrame:
    same = (np.arange(clients)[:, None] % 2 == np.arange(clients)[None, :] % 2).astype(float)
    parts = []
    for number in sorted({1, max(1, rounds // 2), rounds}) if not always else range(1, rounds + 1):
        trust = number / rounds
        matrix = trust * same + (1 - trust) / 2 + random.normal(0, 0.03, same.shape)
        i, j = np.indices(same.shape)
        parts.append(
            pl.DataFrame(
                {
                    "round": np.full(same.size, number),
                    "scope": ["matrix"] * same.size,
                    "client": np.full(same.size, -1),
                    "split": [""] * same.size,
                    "metric": [f"similarity/{a}/{b}" for a, b in zip(i.ravel(), j.ravel(), strict=True)],
                    "value": matrix.ravel(),
                }
            )
        )
    return pl.concat(parts)


def _traffic(strategy: str, rounds: int, clients: int, random: np.random.Generator) -> pl.DataFrame:
    size = {"local": 0, "knfu": 40_000, "fedmd": 40_000}.get(strategy, 492_000)
    count = rounds * clients
    frames = []
    for direction, message, each in (("up", "train", size), ("down", "train", size), ("up", "evaluate", 64)):
        frames.append(
            pl.DataFrame(
                {
                    "round": np.repeat(np.arange(1, rounds + 1), clients),
                    "client": np.tile(np.arange(clients), rounds),
                    "direction": [direction] * count,
                    "message": [message] * count,
                    "record": ["model"] * count,
                    "bytes": np.full(count, each),
                }
            )
        )
    return pl.concat(frames)


def _timing(rounds: int, random: np.random.Generator) -> pl.DataFrame:
    what = {"train": 0.6, "evaluate": 0.2, "fuse": 0.1, "checkpoint": 0.1}
    names = list(what)
    return pl.DataFrame(
        {
            "round": np.repeat(np.arange(1, rounds + 1), len(names)),
            "scope": ["server"] * rounds * len(names),
            "what": names * rounds,
            "seconds": (np.array([what[n] for n in names])[None, :] * random.uniform(0.9, 1.1, (rounds, 1))).ravel(),
        }
    )


if __name__ == "__main__":  # the full size of the performance promise: 200 runs, 100 rounds, 100 clients
    target = Path(sys.argv[1])
    names = [*SKILL, "dsfl", "fedproto", "scaffold", "ditto", "comet"]
    write_sweep(target, names, 20, ("knfu", "comet"), rounds=100, clients=100, always=True)
