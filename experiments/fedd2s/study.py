"""FedD2S-style layer dropping on CIFAR-10: personal accuracy, and how evenly it is spread over clients.

    python experiments/fedd2s/study.py run [--quick]     # resumable: the same command goes on where it stopped
    python experiments/fedd2s/study.py table             # prints README.md's table from results.csv
    python experiments/fedd2s/study.py figure            # draws accuracy.svg from it

CIFAR-10, 3,000 training examples, 10 clients, Dirichlet 0.1 and 0.5, cnn, 12 rounds of 2 epochs; local, fedper, fedmd
(500 transfer rows, which the others do not use) and fedd2s at τ = 3 (its default), 6 and 100 (no layer is dropped);
seeds 0, 1, 2. `--quick` is one seed, two rounds and 800 examples, into a folder of its own: it says that the commands
work, and nothing else.
"""

from __future__ import annotations

import csv
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results.csv"
COMMON = [
    "strategy=local,fedper,fedmd,fedd2s", "strategy.tau=3,6,100", "data=cifar10", "data.limit=3000",
    "data.test_limit=1000",
    "transfer.size=500", "clients=10", "partition=dirichlet", "partition.alpha=0.1,0.5", "model=cnn", "rounds=12",
    "train.epochs=2", "evaluate.every=12", "runtime=inline", "runtime.parallel=2", "seed=0,1,2",
]  # fmt: skip
QUICK = {"data.limit": "800", "transfer.size": "100", "rounds": "2", "evaluate.every": "2", "seed": "0"}
FIELDS = ("strategy", "tau", "alpha", "seed", "trained", "personal", "worst10", "deviation", "up_bytes", "down_bytes")


def folder(quick: bool) -> Path:
    """Where the runs lie."""
    return Path("runs/fedd2s-quick" if quick else "runs/fedd2s")


def run(quick: bool) -> int:
    """Carry out all runs, then collect their figures."""
    words = list(COMMON)
    if quick:
        words = [f"{k}={QUICK.get(k, v)}" for k, _, v in (word.partition("=") for word in words)]
    print("fedfuse compare", *words, flush=True)
    command = [sys.executable, "-m", "fedfuse.cli", "compare", *words, f"out={folder(quick)}"]
    return subprocess.call(command, stdout=subprocess.DEVNULL) or collect(quick)


def collect(quick: bool) -> int:
    """Write `results.csv` (quick: beside the runs), one line a run, and print the table."""
    import polars as pl

    from fedfuse.results.run_data import find

    runs, skipped = find([folder(quick)])
    for line in skipped:
        print(f"skipped: {line}")
    rows = []
    for one in runs:
        last = (pl.col("round") == one.rounds_done) & (pl.col("scope") == "client") & (pl.col("split") == "personal")
        each = one.metrics.filter(last & (pl.col("metric") == "accuracy")).collect()["value"].drop_nans()
        summary = one.summary or {}
        final, traffic = summary["final"], summary["traffic"]
        final.setdefault("accuracy/personal_trained", final["accuracy/personal"])  # nothing is learnt after training
        rows.append((
            one.strategy, one.config["strategy"].get("tau", ""), one.config["partition"]["alpha"], one.seed,
            *(f"{100 * final[f'accuracy/{key}']:.3f}" for key in ("personal_trained", "personal", "personal_worst10")),
            f"{100 * float(each.std(ddof=0)):.3f}", traffic["up_bytes"], traffic["down_bytes"],
        ))  # fmt: skip
    where = folder(quick) / "results.csv" if quick else RESULTS
    with where.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(FIELDS)
        writer.writerows(sorted(rows, key=lambda row: tuple(map(str, row[:4]))))
    return table(where)


def table(where: Path = RESULTS) -> int:
    """Print means over seeds ± the 95 % t interval.

    Deviation is that of personal accuracy over a run's clients. "As trained" is personal accuracy before a round's
    lesson is digested; the other figures, and the report's, are after it.
    """
    from fedfuse.results.statistics import mean_interval

    found: dict[tuple[str, str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with where.open() as file:
        for row in csv.DictReader(file):
            for key in FIELDS[4:]:
                found[row["alpha"], row["strategy"], row["tau"]][key].append(float(row[key]))
    heads = ["α", "strategy", "τ", "personal, as trained %", "personal %", "worst tenth %", "deviation over clients"]
    print("| " + " | ".join([*heads, "up MB", "down MB"]) + " |")
    print("|---" * 9 + "|")
    for (alpha, strategy, tau), values in sorted(found.items()):
        cells = [alpha, strategy, tau or "–"]
        for key in FIELDS[4:8]:
            one = mean_interval(values[key])
            cells.append(f"{one.mean:.1f}" + (f" ± {one.high - one.mean:.1f}" if len(values[key]) > 1 else ""))
        cells += [f"{sum(values[key]) / len(values[key]) / 1e6:.2f}" for key in FIELDS[8:]]
        print("| " + " | ".join(cells) + " |")
    return 0


def figure() -> int:
    """Draw personal accuracy as trained, and of the worst tenth."""
    from fedfuse.experiments.frame import drawn

    panels: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with RESULTS.open() as file:
        for row in sorted(csv.DictReader(file), key=lambda row: (row["strategy"], float(row["tau"] or 0))):
            name = row["strategy"] + (f", τ = {row['tau']}" if row["tau"] else "")
            for key, said in (("trained", "personal"), ("worst10", "worst client")):
                panels[f"{said}, α = {row['alpha']}"][name].append(float(row[key]))
    drawn(HERE / "accuracy.svg", dict(sorted(panels.items())), "accuracy, %", wide=3.0)
    return 0


if __name__ == "__main__":
    words = sys.argv[1:]
    shown = {"table": table, "figure": figure}.get(words[0] if words else "")
    sys.exit(shown() if shown else run("--quick" in words))
