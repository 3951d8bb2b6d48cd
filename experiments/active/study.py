"""Which labels are worth asking for? KAFAL's score and losses against chance, entropy and the core-set, over labels.

    python experiments/active/study.py run [--quick]     # resumable: the same command goes on where it stopped
    python experiments/active/study.py table             # prints README.md's tables from results.csv
    python experiments/active/study.py figure            # draws accuracy.svg from results.csv

MNIST of 3,000 training examples, 10 clients, Dirichlet 0.1 (the paper's skew), a tenth labelled at first and a
twentieth more in each of 5 cycles (the paper's shares), 6 rounds of 10 epochs a cycle from the initial weights, seeds
0 to 4; global accuracy on 2,000 examples of the official test split at each cycle's end, the last round and not the
best. Block `labels`: four ways to ask, with KCFU. Block `plain`: the same by chance and by KSAS with plain
cross-entropy, which is FedAvg on the labelled part. Block `all`: FedAvg with all labels. Nothing is tuned.
`--quick` is a try-out of two cycles and one seed in a directory of its own; it leaves results.csv alone.
"""

from __future__ import annotations

import csv
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).parent
RUNS = Path("runs/active")
RESULTS = HERE / "results.csv"
FIELDS = ("update", "acquisition", "seed", "round", "labels", "global", "personal")
CYCLE, CYCLES = 6, 5
COMMON = [
    "strategy=kafal", "data=mnist", "data.limit=3000", "data.test_limit=2000", "clients=10", "partition=dirichlet",
    "partition.alpha=0.1", "model=mlp", "train.epochs=10", f"labels.rounds={CYCLE}", f"evaluate.every={CYCLE}",
    "runtime=inline", "runtime.parallel=2",
]  # fmt: skip
BLOCKS = {
    "labels": ["strategy.acquisition=ksas,random,entropy,coreset", f"rounds={CYCLE * CYCLES}", "seed=0,1,2,3,4"],
    "plain": [
        "strategy.acquisition=ksas,random", "strategy.update=fedavg", f"rounds={CYCLE * CYCLES}", "seed=0,1,2,3,4",
    ],
    "all": ["strategy.acquisition=random", "strategy.update=fedavg", "labels.initial=1", f"rounds={CYCLE}",
            "seed=0,1,2,3,4"],
}  # fmt: skip
QUICK = {
    "labels.rounds": "2",
    "evaluate.every": "2",
    "rounds": "4",
    "seed": "0",
    "data.limit": "1000",
    "train.epochs": "1",
}
Row = tuple[str, str, int, int, int, float, float]


def run(quick: bool) -> int:
    """Carry out the blocks, then collect their figures."""
    for name, words in BLOCKS.items():
        words = [*words, *COMMON]
        if quick:
            keys = [word.split("=")[0] for word in words]
            words = [f"{key}={QUICK[key]}" if key in QUICK else w for key, w in zip(keys, words, strict=True)]
        command = [sys.executable, "-m", "fedfuse.cli", "compare", *words, f"out={place(quick) / name}"]
        print("fedfuse", " ".join(command[3:]), flush=True)
        if code := subprocess.call(command, stdout=subprocess.DEVNULL):
            return code
    rows = collected(quick)
    if quick:
        return table(rows)
    with RESULTS.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([FIELDS, *rows])
    figure()
    return table(rows)


def place(quick: bool) -> Path:
    """Where the runs lie."""
    return RUNS.with_name("active-quick") if quick else RUNS


def collected(quick: bool) -> list[Row]:
    """A row for each run and cycle: how many labels the clients trained on, and the accuracies then."""
    import polars as pl

    from fedfuse.results.run_data import find

    runs, skipped = find([place(quick) / name for name in BLOCKS])
    for line in skipped:
        print(f"skipped: {line}")
    rows: list[Row] = []
    for one in runs:
        frame, h = one.metrics.collect(), one.config["strategy"]
        known = frame.filter(metric="labelled").group_by("round").agg(pl.col("value").sum())
        labels = {int(round): int(value) for round, value in known.iter_rows()}
        found = {
            name: dict(frame.filter(metric=f"accuracy/{name}").select("round", "value").iter_rows())
            for name in ("global", "personal")
        }
        said = ("all labels" if one.config["labels"]["initial"] == 1 else h["update"]), h["acquisition"]
        for round, value in sorted(found["global"].items()):
            rows.append((*said, one.seed, round, labels[round], round_off(value), round_off(found["personal"][round])))
    return sorted(rows)


def round_off(value: float) -> float:
    """Six digits."""
    return float(f"{value:.6f}")


def read() -> list[Row]:
    """The figures kept beside this file."""
    with RESULTS.open(newline="") as file:
        return [
            (r["update"], r["acquisition"], int(r["seed"]), int(r["round"]), int(r["labels"]), float(r["global"]),
             float(r["personal"]))
            for r in csv.DictReader(file)
        ]  # fmt: skip


def curves(rows: list[Row]) -> dict[tuple[str, str], dict[int, dict[int, tuple[int, float]]]]:
    """By way of learning and asking, and round: seed to labels and global accuracy in %."""
    found: dict[tuple[str, str], dict[int, dict[int, tuple[int, float]]]] = defaultdict(lambda: defaultdict(dict))
    for update, acquisition, seed, round, labels, accuracy, _ in rows:
        found[update, acquisition][round][seed] = (labels, 100 * accuracy)
    return found


def table(rows: list[Row]) -> int:
    """Print accuracy by cycle, and the last cycle's and all cycles' mean gain over chance, paired by seed."""
    from fedfuse.results.statistics import mean_interval

    def cell(values: list[float], sign: str = "") -> str:
        if len(values) < 2:
            return f"{values[0]:{sign}.1f}" if values else "–"
        one = mean_interval(values)
        return f"{one.mean:{sign}.1f} ± {(one.high - one.low) / 2:.1f}"

    found = curves(rows)
    rounds = sorted({round for by_round in found.values() for round in by_round})
    sizes = [
        sorted({labels for (u, _), c in found.items() if u != "all labels" for labels, _ in c[r].values()})
        for r in rounds
    ]
    heads = [f"{low[0]} to {low[-1]} labels" if len(low) > 1 else f"{low[0]} labels" for low in sizes]
    print("| losses | asks by | " + " | ".join(heads) + " | over chance, last | over chance, mean of cycles |")
    print("|---" * (4 + len(rounds)) + "|")
    for (update, acquisition), by_round in sorted(found.items()):
        cells = [cell([value for _, value in by_round[r].values()]) if r in by_round else "–" for r in rounds]
        chance, gains = found.get((update, "random"), {}), []
        if acquisition != "random":
            seeds = sorted(by_round[rounds[-1]])
            each = {s: [by_round[r][s][1] - chance[r][s][1] for r in rounds[1:]] for s in seeds}  # the first is shared
            gains = [cell([each[s][-1] for s in seeds], "+"), cell([sum(each[s]) / len(each[s]) for s in seeds], "+")]
        print("| " + " | ".join([update, acquisition, *cells, *(gains or ["–", "–"])]) + " |")
    return 0


def figure() -> int:
    """Draw the accuracy over labels, with 95 % t intervals over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"
    matplotlib.rcParams["svg.hashsalt"] = "active"
    import matplotlib.pyplot as plt

    from fedfuse.results.statistics import mean_interval

    plot, axis = plt.subplots(figsize=(7, 4.2))
    for (update, acquisition), by_round in sorted(curves(read()).items()):
        spread = [mean_interval([value for _, value in seeds.values()]) for _, seeds in sorted(by_round.items())]
        means = [one.mean for one in spread]
        if update == "all labels":
            axis.axhline(means[-1], color="grey", linestyle=":", label="all labels (FedAvg)")
            continue
        labels = [sum(n for n, _ in seeds.values()) / len(seeds) for _, seeds in sorted(by_round.items())]
        (line,) = axis.plot(
            labels, means, "--" if update == "fedavg" else "-", marker="o", label=f"{acquisition}, {update}"
        )
        axis.fill_between(labels, [s.low for s in spread], [s.high for s in spread], color=line.get_color(), alpha=0.1)
    axis.set(xlabel="labels of all clients together", ylabel="global accuracy, %")
    axis.legend(fontsize=8)
    plot.tight_layout()
    plot.savefig(HERE / "accuracy.svg", metadata={"Date": None})
    return 0


if __name__ == "__main__":
    verb = (sys.argv[1:] or ["run"])[0]
    verbs = {"table": lambda: table(read()), "figure": figure}
    sys.exit(verbs[verb]() if verb in verbs else run("--quick" in sys.argv))
