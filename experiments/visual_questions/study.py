"""Small visual questions: what merging by Fisher information is worth against FedAvg, FedProx and local adapters.

    python experiments/visual_questions/study.py run [fisher fedavg fedprox local] [seed=0]   # resumable
    python experiments/visual_questions/study.py commands    # the same as `fedfuse run` commands, one a line
    python experiments/visual_questions/study.py table       # prints README.md's tables from results.csv

The encoder is the published ResNet-20 of CIFAR-10 and the server's language model stories260K, both frozen; all that is
trained are the adapters (`strategy=fednano`). The task is `task.py`'s. $FEDFUSE_DATA has `cifar10`, and `../models`
beside it the two models.
"""

from __future__ import annotations

import csv
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from fedfuse.experiments.frame import Part, main, records, spread, write

HERE = Path(__file__).parent
RUNS, RESULTS = Path("runs/visual_questions"), HERE / "results.csv"
MODELS = Path(os.environ.get("FEDFUSE_DATA", "../shared/data")).parent / "models"
COMMON = (
    "strategy=fednano", "strategy.question=null", f"strategy.language={MODELS / 'stories260K'}", "strategy.tokens=4",
    "data=custom", "data.load=fedfuse.experiments.visual_questions.task:load", "data.extra.limit=1600",
    "data.extra.test_limit=400", "model=resnet20_bn", f"model.checkpoint={MODELS}/resnet_cifar10/resnet20-12fca82f.th",
    "model.checkpoint_head=false", "transfer.size=0", "clients=8", "partition=dirichlet", "partition.alpha=0.5",
    "partition.min_size=20", "rounds=6", "train.epochs=2", "evaluate.every=6", "runtime=inline",
)  # fmt: skip
VARIANTS = {
    "fisher": ("strategy.merge=fisher",),
    "fedavg": ("strategy.merge=fedavg",),
    "fedprox": ("strategy.merge=fedavg", "strategy.mu=0.1"),
    "local": ("strategy.merge=local",),
}
SEEDS = (0, 1, 2)
FIELDS = ("variant", "seed", "global", "global_what", "global_is", "personal", "personal_what", "personal_is",
          "up_bytes", "down_bytes", "seconds")  # fmt: skip


def parts(words: Sequence[str]) -> list[Part]:
    """One run of each variant and seed; words name variants, and `seed=<n>`."""
    seeds = [int(word.removeprefix("seed=")) for word in words if word.startswith("seed=")] or SEEDS
    names = [word for word in words if not word.startswith("seed=")] or VARIANTS
    return [
        Part("run", (*COMMON, *VARIANTS[name], f"seed={seed}"), RUNS / f"{name}-{seed}")
        for name in names
        for seed in seeds
    ]


def collect() -> None:
    """Write the results: one line a run that is done."""
    import polars as pl

    rows = []
    for part, one in records(part for part in parts(()) if part.done):
        last = one.metrics.filter(pl.col("round") == pl.col("round").max()).collect()
        figures = []
        for split in ("global", "personal"):
            for metric in ("accuracy", "accuracy_of_10", "accuracy_of_2"):
                some = last.filter((pl.col("split") == split) & (pl.col("metric") == metric))
                if split == "global" and metric == "accuracy":
                    figures.append(one.final["accuracy/global_plain"])
                else:
                    figures.append(some.filter(pl.col("scope") == "client")["value"].drop_nans().mean())
        traffic = (one.summary or {})["traffic"]
        rows.append((
            part.out.name.rpartition("-")[0], one.seed, *(f"{value:.6f}" for value in figures), traffic["up_bytes"],
            traffic["down_bytes"], f"{(one.summary or {})['seconds']['rounds']:.1f}",
        ))  # fmt: skip
    write(RESULTS, FIELDS, rows)


def table() -> None:
    """Print accuracies with 95 % t intervals over seeds, bytes; then differences to Fisher merging by seed."""
    from fedfuse.results.statistics import paired

    found: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    with RESULTS.open() as file:
        for row in csv.DictReader(file):
            for key in FIELDS[2:]:
                found[row["variant"]][key][row["seed"]] = float(row[key]) * (100 if key in FIELDS[2:8] else 1e-6)
    print("| adapters | global % | what | yes or no | personal % | what | yes or no | up MB | down MB |")
    print("|---" * 9 + "|")
    for name in VARIANTS:
        if name in found:
            cells = [spread(list(found[name][key].values())) for key in FIELDS[2:8]]
            moved = [f"{sum(found[name][key].values()) / len(found[name][key]):.1f}" for key in FIELDS[8:10]]
            print("| " + " | ".join([name, *cells, *moved]) + " |")
    print("\n| difference | on | points | p (paired t) |\n|---|---|---|---|")
    for name in VARIANTS:
        for key in ("global", "personal"):
            ours, theirs = found["fisher"][key], found[name][key]
            if name != "fisher" and len(ours) > 1 and ours.keys() == theirs.keys():
                told = paired(dict(ours), dict(theirs))
                half = told.difference.high - told.difference.mean if told.difference.high is not None else 0.0
                print(f"| fisher − {name} | {key} | {told.difference.mean:+.1f} ± {half:.1f} | {told.t_p:.3f} |")


if __name__ == "__main__":
    main(parts, collect, table)
