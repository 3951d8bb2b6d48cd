"""Which setting KnFu's open choices should default to: selected on the clients' validation split, never on test.

    python experiments/knfu_default/study.py run       # resumable: the same command goes on where it stopped
    python experiments/knfu_default/study.py table     # prints README.md's tables from results.csv

Every run is the public command; this file lists the runs and reads what they left.
"""

from __future__ import annotations

import csv
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).parent
RUNS = Path("runs/knfu_default")
RESULTS = HERE / "results.csv"
COMMON = [
    "data=digits", "data.validation=0.2", "evaluate.validation=true", "evaluate.every=10", "partition=dirichlet",
    "partition.alpha=0.3,0.1", "clients=10", "rounds=10", "train.epochs=5", "runtime=inline", "runtime.parallel=2",
    "seed=0,1,2",
]  # fmt: skip
EFFORT = "5,20"  # epochs over the transfer set a round, alike for all that distil; FedMD also 1
MIXED = ["strategy.fuse_space=prob,logit", f"strategy.finetune_epochs={EFFORT}"]
BLOCKS = {
    "local": ["strategy=local"],
    "fedmd": ["strategy=fedmd", "strategy.digest_epochs=1,5,20", "strategy.digest_batch=64"],
    "dsfl": ["strategy=dsfl", f"strategy.distill_epochs={EFFORT}", "strategy.distill_batch=64"],
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


def run() -> int:
    """Carry out the blocks, then collect their final figures."""
    for name, words in BLOCKS.items():
        command = [sys.executable, "-m", "fedfuse.cli", "compare", *words, *COMMON, f"out={RUNS / name}"]
        print("fedfuse", " ".join(command[3:]), flush=True)
        if code := subprocess.call(command, stdout=subprocess.DEVNULL):
            return code
    return collect()


def collect() -> int:
    """Write `results.csv`: one line a run."""
    import polars as pl

    from fedfuse.results.run_data import find

    runs, skipped = find([RUNS / name for name in BLOCKS])
    for line in skipped:
        print(f"skipped: {line}")
    rows = []
    for one in runs:
        h = one.config["strategy"]
        same = [f"similarity/{i}/{i}" for i in range(10)]
        alone = one.metrics.filter((pl.col("round") == 10) & pl.col("metric").is_in(same)).collect()["value"]
        rows.append((
            one.strategy, h.get("distance", ""), h.get("beta", ""), h.get("fuse_space", ""),
            h.get(EPOCHS.get(one.strategy, ""), 0), one.config["partition"]["alpha"], one.seed,
            *(f"{one.final[f'accuracy/{key}']:.6f}" for key in ("validation", "personal", "global")),
            f"{alone.mean():.4f}" if len(alone) else "",
        ))  # fmt: skip
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(FIELDS)
        writer.writerows(sorted(rows, key=lambda row: tuple(map(str, row[:7]))))
    return table()


def table() -> int:
    """Print the settings in the order of their mean validation accuracy, with 95 % t intervals over seeds."""
    from fedfuse.results.statistics import mean_interval

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
                interval = mean_interval(found[setting][alpha, metric])
                cells.append(f"{interval.mean:.1f} ± {interval.high - interval.mean:.1f}")
            weights = found[setting].get((alpha, "self"))
            cells.append(f"{mean(weights):.2f}" if weights else "–")
        print("| " + " | ".join(cells) + " |")
    return 0


if __name__ == "__main__":
    sys.exit({"table": table, "collect": collect}.get((sys.argv[1:] or [""])[0], run)())
