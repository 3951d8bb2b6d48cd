"""Which setting KnFu's open choices should default to: selected on the clients' validation split, never on test.

    python experiments/knfu_default/study.py run [BLOCK …]   # resumable: the same command goes on where it stopped
    python experiments/knfu_default/study.py commands        # the same as `fedfuse compare` commands, one a line
    python experiments/knfu_default/study.py table           # prints README.md's tables from results.csv

Every run is the public command; this file lists the runs and reads what they left.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from fedfuse.experiments.frame import Part, main, records, spread, write

HERE = Path(__file__).parent
RUNS = Path("runs/knfu_default")
RESULTS = HERE / "results.csv"
COMMON = (
    "data=digits", "data.validation=0.2", "evaluate.validation=true", "evaluate.every=10", "partition=dirichlet",
    "partition.alpha=0.3,0.1", "clients=10", "rounds=10", "train.epochs=5", "runtime=inline", "runtime.parallel=2",
    "seed=0,1,2",
)  # fmt: skip
EFFORT = "5,20"  # epochs over the transfer set a round, alike for all that distil; FedMD also 1
SGD = "distil.optimizer=sgd"  # as KnFu distils; both have Adam of their own since
MIXED = ["strategy.fuse_space=prob,logit", f"strategy.finetune_epochs={EFFORT}"]
BLOCKS = {
    "local": ["strategy=local"],
    "fedmd": ["strategy=fedmd", "strategy.digest_epochs=1,5,20", "strategy.digest_batch=64", SGD],
    "dsfl": ["strategy=dsfl", f"strategy.distill_epochs={EFFORT}", "strategy.distill_batch=64", SGD],
    "js": ["strategy=knfu", "strategy.distance=js", "strategy.beta=1,10,30", *MIXED],
    "kl": ["strategy=knfu", "strategy.distance=kl_nm", "strategy.beta=1,10", *MIXED],
}
EPOCHS = {"knfu": "finetune_epochs", "fedmd": "digest_epochs", "dsfl": "distill_epochs"}
FIELDS = (
    "strategy",
    "distance",
    "beta",
    "space",
    "epochs",
    "alpha",
    "seed",
    "validation",
    "personal",
    "global",
    "self",
)


def parts(words: Sequence[str]) -> list[Part]:
    """One sweep of each block that words name."""
    return [Part("compare", (*BLOCKS[name], *COMMON), RUNS / name) for name in words or BLOCKS]


def collect() -> None:
    """Write `results.csv`: one line a run."""
    import polars as pl

    rows = []
    for _, one in records(parts(())):
        h = one.config["strategy"]
        same = [f"similarity/{i}/{i}" for i in range(10)]
        alone = one.metrics.filter((pl.col("round") == 10) & pl.col("metric").is_in(same)).collect()["value"]
        rows.append((
            one.strategy, h.get("distance", ""), h.get("beta", ""), h.get("fuse_space", ""),
            h.get(EPOCHS.get(one.strategy, ""), 0), one.config["partition"]["alpha"], one.seed,
            *(f"{one.final[f'accuracy/{key}']:.6f}" for key in ("validation", "personal", "global")),
            f"{alone.mean():.4f}" if len(alone) else "",
        ))  # fmt: skip
    write(RESULTS, FIELDS, rows)


def table() -> None:
    """Print the settings in the order of their mean validation accuracy, with 95 % t intervals over seeds."""
    found: dict[tuple[str, ...], dict[tuple[str, str], list[float]]] = defaultdict(lambda: defaultdict(list))
    with RESULTS.open() as file:
        for row in csv.DictReader(file):
            for metric in ("validation", "personal", "global"):
                setting = tuple(row[key] for key in FIELDS[:5])
                found[setting][row["alpha"], metric].append(100 * float(row[metric]))
            if row["self"]:
                found[setting][row["alpha"], "self"].append(float(row["self"]))

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    def score(setting: tuple[str, ...]) -> float:
        return mean([mean(found[setting][alpha, "validation"]) for alpha in ("0.3", "0.1")])

    print("| strategy | d | β | mixed | epochs | validation % | α = 0.3: personal | global | self | α = 0.1: personal |"
          " global | self |")  # fmt: skip
    print("|---" * 12 + "|")
    for setting in sorted(found, key=score, reverse=True):
        cells = [*setting, f"{score(setting):.1f}"]
        for alpha in ("0.3", "0.1"):
            for metric in ("personal", "global"):
                cells.append(spread(found[setting][alpha, metric]))
            weights = found[setting].get((alpha, "self"))
            cells.append(f"{mean(weights):.2f}" if weights else "–")
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(parts, collect, table)
