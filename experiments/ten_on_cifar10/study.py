"""Ten strategies on CIFAR-10 under label skew: one command makes the runs, the table, the figure and the metrics here.

    python experiments/ten_on_cifar10/study.py           # resumable: the same command goes on where it stopped
    python experiments/ten_on_cifar10/study.py collect   # only collects what runs/ten_on_cifar10 holds

Sized for two busy cores within an hour (docs/ten_on_cifar10.md has the measured time): 2,000 training examples for ten
clients, Dirichlet α = 0.3, 6 rounds of one local epoch, 1,000 examples of the official test split, seeds 0 to 4.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
RUNS = Path("runs/ten_on_cifar10")
STRATEGIES = "local,fedavg,fedprox,scaffold,ditto,fedrep,fedmd,dsfl,feddf,knfu"
WORDS = [
    "seed=0,1,2,3,4", f"strategy={STRATEGIES}",
    "data=cifar10", "data.limit=2000", "data.test_limit=1000", "model=cnn", "partition=dirichlet",
    "partition.alpha=0.3", "partition.min_size=20", "clients=10", "rounds=6", "transfer.size=100", "evaluate.every=3",
    "train.epochs=1", "train.batch_size=16", "train.lr=0.02",
]  # fmt: skip
METRICS = ("accuracy/global", "accuracy/personal", "accuracy/personal_worst10")


def run() -> int:
    """Carry out the sweep, then collect."""
    command = [sys.executable, "-m", "fedfuse.cli", "compare", *WORDS, f"out={RUNS}"]
    print("fedfuse", " ".join(command[3:]), flush=True)
    return subprocess.call(command) or collect()


def collect() -> int:
    """Write `metrics.csv` (a row per run, round and figure; final rows hold bytes too), `table.md` and `figure.svg`."""
    import polars as pl

    from fedfuse.results.run_data import find
    from fedfuse.results.table import compare, to_markdown

    runs, skipped = find([RUNS])
    for line in skipped:
        print(f"skipped: {line}")
    done = [one for one in runs if one.summary]
    seeds = {one.seed for one in done if sum(other.seed == one.seed for other in done) == STRATEGIES.count(",") + 1}
    done = [one for one in done if one.seed in seeds]  # a seed that some strategies lack would favour others
    frames = []
    for one in done:
        curve = one.metrics.filter((pl.col("scope") == "server") & pl.col("metric").is_in(METRICS)).collect()
        moved = {way: (one.summary or {})["traffic"][f"{way}_bytes"] for way in ("up", "down")}
        seconds = (one.summary or {})["seconds"]["total"]
        about = [pl.lit(one.strategy).alias("strategy"), pl.lit(one.seed).alias("seed")]
        cost = [pl.lit(moved[way]).alias(f"{way}_bytes") for way in moved] + [pl.lit(seconds).alias("seconds")]
        frames.append(curve.select(*about, "round", "metric", pl.col("value").round(6), *cost))
    pl.concat(frames).sort("strategy", "seed", "round", "metric").write_csv(HERE / "metrics.csv")
    (HERE / "table.md").write_text(to_markdown(compare(done)), encoding="utf-8")
    return figure()


def figure() -> int:
    """Draw the accuracy after the last round on both test sets, a dot per seed, mean and 95 % t interval over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import polars as pl

    from fedfuse.results.statistics import mean_interval

    frame = pl.read_csv(HERE / "metrics.csv")
    last = frame.filter(pl.col("round") == pl.col("round").max())
    order = (
        last.filter(metric=METRICS[1]).group_by("strategy").agg(pl.mean("value")).sort("value")["strategy"].to_list()
    )
    plt.rcParams["svg.hashsalt"] = "fedfuse"  # the same figure from the same numbers
    drawn, axes = plt.subplots(1, 2, figsize=(8, 3.6), sharey=True)
    for axis, metric in zip(axes, METRICS, strict=False):
        for i, name in enumerate(order):
            values = 100 * last.filter(strategy=name, metric=metric)["value"].to_numpy()
            found = mean_interval(list(values))
            axis.plot(values, [i] * len(values), "o", markersize=3, color="0.65")
            axis.errorbar(found.mean, i, xerr=found.half_width, fmt="o", markersize=5, capsize=3, color="tab:blue")
        axis.set_xlabel(f"{metric.split('/')[1]} test accuracy, %")
        axis.grid(axis="x", color="0.9")
    axes[0].set_yticks(range(len(order)), order)
    axes[0].axvline(10, color="0.4", linewidth=0.8, linestyle="--")
    drawn.tight_layout()
    drawn.savefig(HERE / "figure.svg", metadata={"Date": None})
    drawn.savefig(RUNS / "figure.png", dpi=110) if RUNS.exists() else None
    return 0


if __name__ == "__main__":
    sys.exit(collect() if sys.argv[1:2] == ["collect"] else run())
