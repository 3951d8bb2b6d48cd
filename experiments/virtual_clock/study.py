"""Does buffering hurt distillation less or more than it hurts weight averaging? Time to a target, bytes, and why.

    python experiments/virtual_clock/study.py OUT [--small] [--only-results]

100 clients whose devices span three orders of magnitude and who are away half of the time. Every strategy runs under
`sync` and under `fedbuff` with 10 and with 40 clients at work: more at work, more versions go by while one of them
works, and nothing else changes. FedBuff itself is `fedavg` there. What is finished is not run again, what was
interrupted goes on, and seeds come one after the other, so that a part of it is three arms of some seeds.
Writes `results.csv`, `contrasts.csv` and `figure.svg` beside this file (`--small`: into OUT).
"""

from __future__ import annotations

import csv
import math
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl

STRATEGIES = ("fedavg", "fedprox", "fedmd", "knfu", "fedproto")
ARMS = {  # those who do less in a second get more of them: all must have done enough to be compared at equal work
    "sync": ("schedule=sync", "until.seconds=960", "evaluate.seconds=80"),
    "buffered 10": (
        "schedule=fedbuff", "schedule.buffer=10", "schedule.concurrency=10", "until.seconds=320", "evaluate.seconds=40",
    ),
    "buffered 40": (
        "schedule=fedbuff", "schedule.buffer=10", "schedule.concurrency=40", "until.seconds=80", "evaluate.seconds=10",
    ),
}  # fmt: skip
WORLD = (
    "clock=devices", "clock.spread=1.5", "clock.gflops=0.02", "clock.availability=markov", "clock.on_s=300",
    "clock.off_s=300", "clock.jitter=0.2", "runtime=inline",
)  # fmt: skip
WHOLE = (
    "data=mnist", "data.limit=6000", "data.test_limit=500", "partition=dirichlet", "partition.alpha=0.3",
    "partition.min_size=10", "clients=100", "participation=0.3", "model=mlp", "transfer.size=100", "train.epochs=2",
    "distil.epochs=3", "distil.batch_size=25", "distil.optimizer=sgd",
)  # fmt: skip
SMALL = (
    "data=digits", "partition=dirichlet", "partition.alpha=0.5", "partition.min_size=5", "clients=20",
    "participation=0.5", "model=mlp_small", "transfer.size=60",
    "clock.gflops=0.5", "clock.on_s=20", "clock.off_s=20", "clock.period_s=2000",
)  # fmt: skip
SEEDS, FEW_SEEDS = (0, 1, 2), (0,)
METRICS = ("accuracy/personal", "accuracy/global")
SHARE = 0.95  # of what `sync` has at the end, a strategy's own target
TWO_SIDED = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776}  # 97.5 % quantiles of t, by degrees of freedom

Curve = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # virtual seconds, arrivals, megabytes, value


def place(out: Path, arm: str, seed: int) -> Path:
    """Where a sweep lies."""
    return out / f"{arm.replace(' ', '_')}-{seed}"


def run(out: Path, small: bool) -> None:
    """Run or go on with the sweeps, one an arm and seed."""
    from fedfuse.runs.sweep import sweep

    for seed in FEW_SEEDS if small else SEEDS:
        for arm, words in ARMS.items():
            base = (*WORLD, *(SMALL if small else WHOLE), *(_smaller(words) if small else words), f"seed={seed}")
            sweep([f"strategy={','.join(STRATEGIES)}", *base, f"out={place(out, arm, seed)}"])


def _smaller(words: tuple[str, ...]) -> tuple[str, ...]:
    """The words of an arm for twenty clients and a few seconds."""
    few = {
        "schedule.buffer=10": "schedule.buffer=4", "schedule.concurrency=10": "schedule.concurrency=4",
        "schedule.concurrency=40": "schedule.concurrency=9", "until.seconds=960": "until.seconds=6",
        "until.seconds=320": "until.seconds=4", "until.seconds=80": "until.seconds=2",
        "evaluate.seconds=80": "evaluate.seconds=2", "evaluate.seconds=40": "evaluate.seconds=1",
        "evaluate.seconds=10": "evaluate.seconds=1",
    }  # fmt: skip
    return tuple(few.get(word, word) for word in words)


class Played:
    """One finished run: its curves over time, arrivals and bytes, and what was for nothing."""

    def __init__(self, found: object) -> None:
        from fedfuse.results.measures import gather

        one = gather(found)  # type: ignore[arg-type]
        self.strategy, self.seed = one.run.strategy, one.run.seed
        rows = pl.read_parquet(one.run.dir / "schedule.parquet")
        good = rows.filter(pl.col("outcome") == "arrived")
        ended = good.group_by("round").len().sort("round")
        counts = np.zeros(one.run.rounds_done + 1)
        counts[ended["round"].to_numpy()] = ended["len"].to_numpy()
        arrivals, moved = counts.cumsum(), np.asarray(one.cumulative_bytes) / 1e6
        self.curves: dict[str, Curve] = {
            name: (np.asarray(one.virtual_seconds)[at], arrivals[at], moved[at], 100 * values)
            for name, (at, values) in one.curves.items()
            if name in METRICS
        }
        self.staleness = float((good["round"] - good["since"]).mean() or 0.0)
        self.wasted = 1 - good.height / max(rows.height, 1)
        per_client = good.group_by("client").len()["len"].to_numpy()
        self.heard = len(per_client)  # clients that ever arrived

    def at(self, metric: str, axis: int, where: float) -> float:
        """The metric's value at a moment (axis 0) or after so many arrivals (axis 1), between evaluations a line."""
        curve = self.curves[metric]
        return float(np.interp(where, curve[axis], curve[3]))

    def first(self, metric: str, target: float) -> tuple[float, float] | None:
        """Virtual seconds and megabytes at the first evaluation that meets a target."""
        seconds, _, moved, values = self.curves[metric]
        above = np.flatnonzero(values >= target)
        return (float(seconds[above[0]]), float(moved[above[0]])) if len(above) else None


def gathered(out: Path) -> dict[tuple[str, str, int], Played]:
    """All finished runs, by arm, strategy and seed."""
    from fedfuse.results.run_data import find

    found = {}
    for arm in ARMS:
        for seed in SEEDS:
            if (path := place(out, arm, seed)).exists():
                for one in (run for run in find([path])[0] if run.status == "finished"):
                    found[arm, one.strategy, one.seed] = Played(one)
    return found


def mean_and_half(values: list[float]) -> tuple[float, float]:
    """A mean and half of its 95 % t interval over seeds; NaN where one seed is all there is."""
    n = len(values)
    half = TWO_SIDED[n - 1] * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return statistics.fmean(values), half


def results(found: Mapping[tuple[str, str, int], Played]) -> list[dict[str, object]]:
    """One line a strategy and arm: what it ends with, time and bytes to the strategy's own target, what was wasted."""
    lines, metric = [], METRICS[0]
    for strategy in STRATEGIES:
        ends = [one.curves[metric][3][-1] for (arm, name, _), one in found.items() if (arm, name) == ("sync", strategy)]
        target = SHARE * statistics.fmean(ends)
        for arm in ARMS:
            group = [one for (a, name, _), one in sorted(found.items()) if (a, name) == (arm, strategy)]
            if not group:
                continue
            line: dict[str, object] = {"strategy": strategy, "arm": arm, "seeds": len(group)}
            for name in METRICS:
                if all(name in one.curves for one in group):
                    mean, half = mean_and_half([one.curves[name][3][-1] for one in group])
                    line |= {name.split("/")[1]: mean, f"{name.split('/')[1]}_half": half}
            met = [reached for one in group if (reached := one.first(metric, target))]
            line |= {
                "target": target,
                "reached": len(met),
                "target_s": statistics.fmean(s for s, _ in met) if met else math.nan,
                "target_mb": statistics.fmean(mb for _, mb in met) if met else math.nan,
                "arrivals": statistics.fmean(float(one.curves[metric][1][-1]) for one in group),
                "staleness": statistics.fmean(one.staleness for one in group),
                "wasted": statistics.fmean(one.wasted for one in group),
                "heard": statistics.fmean(one.heard for one in group),
            }
            lines.append(line)
    return lines


def contrasts(found: Mapping[tuple[str, str, int], Played]) -> list[dict[str, object]]:
    """What buffering gives at equal time, and what it takes at equal work: differences paired by seed.

    `per time` compares at the end of the shorter of the two. `per share` compares after as many arrivals as the slower
    of the two has had at its end: no credit for making more of the time. 40 and 10 at work differ in staleness alone.
    """
    pairs = {
        "10 − sync, per time": ("buffered 10", "sync", 0),
        "40 − sync, per time": ("buffered 40", "sync", 0),
        "10 − sync, per share": ("buffered 10", "sync", 1),
        "40 − sync, per share": ("buffered 40", "sync", 1),
        "40 − 10, per share": ("buffered 40", "buffered 10", 1),
    }
    lines = []
    for metric in METRICS:
        for strategy in STRATEGIES:
            for said, (one, other, axis) in pairs.items():
                gaps = []
                for seed in SEEDS:
                    a, b = found.get((one, strategy, seed)), found.get((other, strategy, seed))
                    if a is None or b is None or metric not in a.curves or metric not in b.curves:
                        continue
                    end = min(a.curves[metric][axis][-1], b.curves[metric][axis][-1])
                    gaps.append(a.at(metric, axis, end) - b.at(metric, axis, end))
                if gaps:
                    mean, half = mean_and_half(gaps)
                    lines.append(
                        {"metric": metric, "strategy": strategy, "contrast": said, "seeds": len(gaps)}
                        | {"difference": mean, "half": half}
                    )
    return lines


def draw(found: Mapping[tuple[str, str, int], Played], path: Path) -> None:
    """Personal accuracy over virtual time, and over shares that arrived; mean over seeds, band from least to most."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams |= {"svg.hashsalt": "virtual clock", "svg.fonttype": "none"}
    figure, axes = plt.subplots(
        2, len(STRATEGIES), figsize=(2.3 * len(STRATEGIES), 4.6), sharey="col", layout="constrained"
    )
    for column, strategy in enumerate(STRATEGIES):
        for k, arm in enumerate(ARMS):
            group = [one for (a, name, _), one in sorted(found.items()) if (a, name) == (arm, strategy)]
            for row in (0, 1):
                if not group:
                    continue
                curves = [one.curves[METRICS[0]] for one in group]
                grid = np.linspace(max(c[row][0] for c in curves), min(c[row][-1] for c in curves), 60)
                values = [np.interp(grid, c[row], c[3]) for c in curves]
                axes[row, column].plot(grid, np.mean(values, axis=0), color=f"C{k}", label=arm, lw=1.4)
                axes[row, column].fill_between(
                    grid, np.min(values, axis=0), np.max(values, axis=0), color=f"C{k}", alpha=0.2, lw=0
                )
        axes[0, column].set_title(strategy, fontsize=10)
        axes[0, column].set_xlabel("virtual seconds", fontsize=8)
        axes[1, column].set_xlabel("shares arrived", fontsize=8)
        for row in (0, 1):
            axes[row, column].tick_params(labelsize=7)
            axes[row, column].grid(alpha=0.2)
    axes[0, 0].set_ylabel("personal accuracy (%)", fontsize=8)
    axes[1, 0].set_ylabel("personal accuracy (%)", fontsize=8)
    axes[0, 0].legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})


def write(path: Path, lines: list[dict[str, object]]) -> None:
    """A table, and the same on screen."""
    names = list(dict.fromkeys(key for line in lines for key in line))
    lines = [{k: _short(v) for k, v in line.items()} for line in lines]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    for line in lines:
        print(" ".join(f"{k}={v}" for k, v in line.items()))


def _short(value: object) -> object:
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else f"{value:.4g}"


def main(words: list[str]) -> int:
    """Run what is missing, and tell."""
    small = "--small" in words
    places = [word for word in words if not word.startswith("--")]
    if len(places) != 1 or any(w not in ("--small", "--only-results") for w in words if w.startswith("--")):
        print(__doc__, file=sys.stderr)
        return 2
    out = Path(places[0])
    if "--only-results" not in words:
        run(out, small)
    beside = out if small else Path(__file__).parent
    found = gathered(out)
    write(beside / "results.csv", results(found))
    write(beside / "contrasts.csv", contrasts(found))
    draw(found, beside / "figure.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
