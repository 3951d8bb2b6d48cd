"""Does buffering hurt distillation less or more than it hurts weight averaging? Time to a target, and bytes.

    python experiments/virtual_clock/study.py OUT [--small]

100 clients whose devices span two orders of magnitude and who are away half of the time; every strategy gets the same
virtual time under `sync` and under `fedbuff`, three seeds. FedBuff itself is `fedavg` under `schedule=fedbuff`. What is
finished is not run again, what was interrupted goes on. Writes `results.csv` and `figure.svg` beside this file
(`--small`: into OUT).
"""

from __future__ import annotations

import csv
import math
import statistics
import sys
from pathlib import Path

import polars as pl

STRATEGIES = ("fedavg", "fedprox", "fedmd", "knfu", "fedproto")
SCHEDULES = {
    "sync": ("schedule=sync",),
    "buffered": ("schedule=fedbuff", "schedule.buffer=10"),
}
WORLD = (
    "clock=devices", "clock.spread=1.5", "clock.gflops=2", "clock.availability=markov", "clock.on_s=900",
    "clock.off_s=900", "clock.jitter=0.2", "evaluate.validation=false",
)  # fmt: skip
WHOLE = (
    "data=mnist", "data.limit=20000", "partition=dirichlet", "partition.alpha=0.3", "clients=100", "participation=0.3",
    "model=cnn", "transfer.size=500", "train.epochs=2", "until.seconds=1800", "evaluate.seconds=60", "seed=0,1,2",
)  # fmt: skip
SMALL = (
    "data=digits", "partition=dirichlet", "partition.alpha=0.5", "partition.min_size=5", "clients=20",
    "participation=0.5", "model=mlp_small", "transfer.size=60", "until.seconds=6", "evaluate.seconds=0.5", "seed=0,1",
    "clock.on_s=20", "clock.off_s=20", "clock.period_s=2000", "runtime=inline",
)  # fmt: skip
SHARE = 0.9  # of the best last value of all, the target


def run(out: Path, small: bool) -> None:
    """Run or go on with the sweeps, one a schedule, and the report of all."""
    from fedfuse.results.report import report
    from fedfuse.runs.sweep import sweep

    for name, words in SCHEDULES.items():
        base = (*WORLD, *(SMALL if small else WHOLE))
        if small and name == "buffered":
            words = (*words[:-1], "schedule.buffer=4")
        sweep([f"strategy={','.join(STRATEGIES)}", *base, *words, f"out={out / name}"])
    report([out / name for name in SCHEDULES], out)


def measured(out: Path) -> list[dict[str, object]]:
    """One line a strategy and schedule: time and bytes to the target, and what was for nothing."""
    from fedfuse.results.measures import gather
    from fedfuse.results.run_data import find

    metric, runs = "accuracy/personal", {name: find([out / name])[0] for name in SCHEDULES}
    all_of = {(name, run.strategy, run.seed): gather(run) for name, found in runs.items() for run in found}
    best = max(one.curves[metric][1][-1] for one in all_of.values())
    target, lines = math.floor(100 * SHARE * best) / 100, []
    for name in SCHEDULES:
        for strategy in STRATEGIES:
            group = [one for (n, s, _), one in sorted(all_of.items()) if (n, s) == (name, strategy)]
            lines.append({"schedule": name, "strategy": strategy, "target": target, **_line(group, metric, target)})
    return lines


def _line(group: list, metric: str, target: float) -> dict[str, object]:
    times, moved, finals, stale, wasted = [], [], [], [], []
    for one in group:
        rounds, values = one.curves[metric]
        finals.append(float(values[-1]))
        above = [i for i, value in enumerate(values) if value >= target]
        if above:
            at = int(rounds[above[0]])
            times.append(float(one.virtual_seconds[at]))
            moved.append(float(one.cumulative_bytes[at]) / 1e6)
        rows = pl.read_parquet(one.run.dir / "schedule.parquet")
        good = rows.filter(pl.col("outcome") == "arrived")
        stale.append(float((good["round"] - good["since"]).mean() or 0.0))
        wasted.append(1 - good.height / max(rows.height, 1))
    mean = statistics.fmean
    return {
        "runs": len(group), "reached": len(times), "virtual_s": mean(times) if times else "",
        "megabytes": mean(moved) if moved else "", "final": mean(finals), "final_low": min(finals),
        "final_high": max(finals), "staleness": mean(stale), "wasted_flights": mean(wasted),
    }  # fmt: skip


def draw(out: Path, path: Path) -> None:
    """Personal accuracy over virtual time: sync dashed, buffered solid; mean over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    from fedfuse.results.measures import gather
    from fedfuse.results.run_data import find

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name in SCHEDULES:
        found = [gather(run) for run in find([out / name])[0]]
        for k, strategy in enumerate(STRATEGIES):
            curves = [one for one in found if one.run.strategy == strategy and "accuracy/personal" in one.curves]
            if not curves:
                continue
            end = min(one.virtual_seconds[-1] for one in curves)
            grid = np.linspace(0, end, 60)[1:]
            lines = [
                np.interp(
                    grid, one.virtual_seconds[one.curves["accuracy/personal"][0]], one.curves["accuracy/personal"][1]
                )
                for one in curves
            ]
            style = "-" if name == "buffered" else "--"
            label = strategy if name == "buffered" else None
            axes.plot(grid, 100 * np.mean(lines, axis=0), style, color=f"C{k}", label=label, lw=1.4)
    axes.set_xlabel("virtual seconds")
    axes.set_ylabel("personal accuracy (%)")
    axes.legend(fontsize=8, title="solid: buffered, dashed: sync", title_fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def main(words: list[str]) -> int:
    small = "--small" in words
    places = [word for word in words if not word.startswith("--")]
    if len(places) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    out = Path(places[0])
    run(out, small)
    beside = out if small else Path(__file__).parent
    lines = measured(out)
    with (beside / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    draw(out, beside / "figure.svg")
    for line in lines:
        print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in line.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
