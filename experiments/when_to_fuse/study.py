"""When does fusing knowledge beat training alone? Every block is the public command; this file only lists and plots.

    python experiments/when_to_fuse/study.py run [--quick]     # resumable: the same command goes on where it stopped
    python experiments/when_to_fuse/study.py figure            # draws the figure from metrics.parquet beside this file
    python experiments/when_to_fuse/study.py table             # prints the gains as README.md has them

Blocks: MNIST, 10 clients, `partition=prior` with 50 and 200 examples a client × α ∈ {0.1, 1, 100}, and the clustered
partition (3 groups, α = 0.1) at the same sizes; local, fedavg, fedmd, dsfl, fedproto, knfu; 6 rounds of five
local epochs and, where something is distilled, 20 epochs on 200 transfer rows at every place; evaluated twice on
personal test sets and on 2,000 examples of the official test split; seeds 0, 1, 2. CIFAR-10: 200 examples ×
α ∈ {0.1, 100}, local, fedavg, fedmd, knfu. Blocks not run here keep their rows in metrics.parquet.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
METRICS = ("accuracy/personal", "accuracy/global")
FUSING = ("fedavg", "fedmd", "dsfl", "fedproto", "knfu")
RUNS = Path("runs/when_to_fuse")
COMMON = [
    "clients=10", "rounds=6", "evaluate.every=3", "data.test_limit=2000", "transfer.size=200", "train.epochs=5",
    "train.batch_size=16", "train.lr=0.02", "distil.epochs=20", "distil.optimizer=sgd",
]  # fmt: skip
BLOCKS = {
    "mnist-prior": [
        "data=mnist", "model=cnn", "partition=prior", "partition.examples=50,200", "partition.alpha=0.1,1,100",
        "strategy=local,fedavg,fedmd,dsfl,fedproto,knfu", "seed=0,1,2",
    ],
    "mnist-clustered": [
        "data=mnist", "model=cnn", "partition=clustered", "partition.examples=50,200", "partition.alpha=0.1",
        "strategy=local,fedavg,fedmd,dsfl,fedproto,knfu", "seed=0,1,2",
    ],
    "cifar10-prior": [
        "data=cifar10", "model=cnn", "partition=prior", "partition.examples=200", "partition.alpha=0.1,100",
        "strategy=local,fedavg,fedmd,knfu", "seed=0,1,2",
    ],
}  # fmt: skip


def run(quick: bool) -> int:
    """Carry out the blocks, then collect their final figures."""
    for name, words in BLOCKS.items():
        if quick:
            words = [w.replace("seed=0,1,2", "seed=0").replace("50,200", "50") for w in words]
        command = [sys.executable, "-m", "fedfuse.cli", "compare", *words, *COMMON, f"out={RUNS / name}"]
        print("fedfuse", " ".join(command[3:]), flush=True)
        if code := subprocess.call(command):
            return code
    return collect()


def collect() -> int:
    """Write `metrics.parquet`: one row per run and figure."""
    import polars as pl

    from fedfuse.results.run_data import find

    rows = []
    there = [name for name in BLOCKS if (RUNS / name).exists()]
    for name in there:
        runs, skipped = find([RUNS / name])
        for line in skipped:
            print(f"skipped: {line}")
        for one in runs:
            for metric, value in one.final.items():
                part = one.config["partition"]
                rows.append((name, one.strategy, one.seed, part["examples"], part["alpha"], metric, value))
    columns = ["block", "strategy", "seed", "examples", "alpha", "metric", "value"]
    kept = pl.read_parquet(HERE / "metrics.parquet").filter(~pl.col("block").is_in(there))
    found = pl.DataFrame(rows, schema=columns, orient="row").cast(dict(kept.schema))
    pl.concat([kept, found]).sort(columns[:6]).write_parquet(HERE / "metrics.parquet")
    return figure()


def gains(part: Any, name: str, metric: str) -> list[float]:
    """Points a strategy has over local training, seed by seed, in one cell of the study."""
    part = part.filter(metric=metric)
    alone = dict(part.filter(strategy="local").select("seed", "value").iter_rows())
    found = part.filter(strategy=name).sort("seed").select("seed", "value").iter_rows()
    return [100 * (value - alone[seed]) for seed, value in found if seed in alone]


def table() -> int:
    """Print gains over local training with their 95 % t intervals over seeds; those that leave out 0 in bold."""
    import polars as pl

    from fedfuse.results.statistics import mean_interval

    frame = pl.read_parquet(HERE / "metrics.parquet")
    for metric in METRICS:
        print(
            f"\n**{metric.split('/')[1]}**\n\n| data, partition | α | examples | local % | " + " | ".join(FUSING) + " |"
        )
        print("|---" * (4 + len(FUSING)) + "|")
        for (block, alpha, size), part in sorted(frame.group_by("block", "alpha", "examples")):
            alone = 100 * part.filter(strategy="local", metric=metric)["value"].mean()
            cells = []
            for name in FUSING:
                if not (found := gains(part, name, metric)):
                    cells.append("–")
                    continue
                interval = mean_interval(found)
                text = f"{interval.mean:+.1f} ± {interval.high - interval.mean:.1f}"
                cells.append(f"**{text}**" if interval.low > 0 or interval.high < 0 else text)
            print(f"| {block.replace('-', ', ')} | {alpha:g} | {size} | {alone:.1f} | " + " | ".join(cells) + " |")
    return 0


def figure() -> int:
    """Draw the gain over local training, with 95 % t intervals over seeds, paired by seed."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"
    import matplotlib.pyplot as plt
    import polars as pl

    from fedfuse.results.statistics import mean_interval

    frame = pl.read_parquet(HERE / "metrics.parquet")
    panels = sorted({(r["block"], r["alpha"]) for r in frame.iter_rows(named=True)})
    grid, axes = plt.subplots(
        2, len(panels), figsize=(2.6 * len(panels), 5.6), sharex=True, sharey="row", squeeze=False
    )
    for column, (block, alpha) in enumerate(panels):
        for line, metric in enumerate(METRICS):
            axis = axes[line][column]
            part = frame.filter(block=block, alpha=alpha)
            for i, name in enumerate(FUSING):
                sizes, middle, half = [], [], []
                for size in sorted(set(part["examples"])):
                    if found := gains(part.filter(examples=size), name, metric):
                        interval = mean_interval(found)
                        sizes.append(size * 1.06 ** (i - 2))
                        middle.append(interval.mean)
                        half.append(interval.high - interval.mean if len(found) > 1 else 0.0)
                style = {"marker": "o", "markersize": 3, "linewidth": 1, "capsize": 2}
                axis.errorbar(sizes, middle, half, label=name, color=f"C{i}", **style)
            axis.axhline(0, color="black", linewidth=0.8)
            axis.set_xscale("log")
            axis.set_xticks(sorted(set(part["examples"])))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_locator(plt.NullLocator())
            axis.set_yscale("symlog", linthresh=10)  # gains of a few points beside losses of forty
            axis.set_yticks([-50, -20, -10, -5, 0, 5, 10, 20, 50], minor=False)
            axis.yaxis.set_major_formatter("{x:g}")
            if line == 0:
                axis.set_title(f"{block}\nα = {alpha:g}", fontsize=9)
            if column == 0:
                axis.set_ylabel(f"{metric.split('/')[1]}: points over local", fontsize=9)
            if line == 1:
                axis.set_xlabel("examples a client", fontsize=9)
    axes[0][-1].legend(fontsize=7)
    grid.tight_layout()
    grid.savefig(HERE / "gain.svg")
    grid.savefig(RUNS / "gain.png", dpi=110) if RUNS.exists() else None
    return 0


if __name__ == "__main__":
    words = sys.argv[1:]
    shown = {"figure": figure, "table": table, "collect": collect}.get(words[0] if words else "")
    sys.exit(shown() if shown else run("--quick" in words))
