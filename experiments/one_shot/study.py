"""What does one round of communication buy, and which of two conflicting published figures holds in shape here?

    python experiments/one_shot/study.py run [mnist] [--quick]   # resumable: the same command goes on where it stopped
    python experiments/one_shot/study.py table                   # prints README.md's tables from results.csv
    python experiments/one_shot/study.py figure                  # draws accuracy.svg from it

Blocks: digits (mlp), and on request MNIST (cnn, 6,000 training examples); 10 clients, Dirichlet 0.1 and 0.5, seeds
0 to 5; one round of 50 local epochs. Everybody has the same partitions, initial weights and transfer set; who distils
on it (fedov, feddf) takes 100 epochs. `local` is the floor. DENSE's authors report 22.44 % for it and Co-Boosting's
authors 8.88 % (Tiny-ImageNet, α = 0.1): the second table is coboosting − dense by seed, at equal generator effort.
"""

from __future__ import annotations

import csv
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).parent
RUNS = Path("runs/one_shot")
RESULTS = HERE / "results.csv"
COMMON = [
    "clients=10", "rounds=1", "partition=dirichlet", "partition.alpha=0.1,0.5", "partition.min_size=5",
    "train.epochs=50", "distil.epochs=100", "runtime=inline", "runtime.parallel=2", "seed=0,1,2,3,4,5",
]  # fmt: skip
DATA = {
    "digits": ["data=digits", "model=mlp"],
    "mnist": ["data=mnist", "data.limit=6000", "data.test_limit=2000", "model=cnn", "transfer.size=600"],
}
# apart, since each has keys of its own: what --quick makes shorter
BLOCKS = {
    "plain": (["strategy=local,fedavg,feddf,gaussian_heads,fedov,fedftg"], []),
    "inverting": (["strategy=dense,coboosting"], ["strategy.epochs=3", "strategy.generator_steps=5"]),
}
QUICK = {"seed=0,1,2,3,4,5": "seed=0,1", "train.epochs=50": "train.epochs=5", "distil.epochs=100": "distil.epochs=5"}
FIELDS = ("data", "alpha", "strategy", "seed", "global", "personal", "up_bytes", "down_bytes", "seconds")


def run(data: str, quick: bool) -> int:
    """Carry out the blocks of one data set, then collect all there is."""
    where = RUNS.with_name("one_shot_quick") if quick else RUNS
    for name, (words, shorter) in BLOCKS.items():
        common = [QUICK.get(word, word) for word in COMMON] if quick else COMMON
        words = [*words, *DATA[data], *common, *(shorter if quick else [])]
        command = [sys.executable, "-m", "fedfuse.cli", "compare", *words, f"out={where / data / name}"]
        print("fedfuse", " ".join(command[3:]), flush=True)
        if code := subprocess.call(command, stdout=subprocess.DEVNULL):
            return code
    return collect(where, where / "results.csv" if quick else RESULTS)


def collect(where: Path, results: Path) -> int:
    """Write the results: one line a run."""
    from fedfuse.results.run_data import find

    rows = []
    for data in DATA:
        found = [where / data / name for name in BLOCKS if (where / data / name).exists()]
        runs, skipped = find(found) if found else ([], [])
        for line in skipped:
            print(f"skipped: {line}")
        for one in runs:
            summary = one.summary or {}
            traffic = summary["traffic"]
            rows.append((
                data, one.config["partition"]["alpha"], one.strategy, one.seed,
                *(f"{one.final[f'accuracy/{key}']:.6f}" for key in ("global", "personal")),
                traffic["up_bytes"], traffic["down_bytes"] + traffic["evaluate_down_bytes"],
                f"{summary['seconds']['rounds']:.1f}",
            ))  # fmt: skip
    with results.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(FIELDS)
        writer.writerows(sorted(rows))
    return table(results)


def table(results: Path) -> int:
    """Print accuracies with 95 % t intervals over seeds, bytes and seconds; then paired differences."""
    from fedfuse.results.statistics import mean_interval, paired

    values: dict[tuple[str, str, str], dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    with results.open() as file:
        for row in csv.DictReader(file):
            for key in FIELDS[4:]:
                values[row["data"], row["alpha"], row["strategy"]][key][row["seed"]] = float(row[key])

    def spread(seeds: dict[str, float]) -> str:
        one = mean_interval([100 * v for v in seeds.values()])
        return f"{one.mean:.1f}" + (f" ± {one.high - one.mean:.1f}" if one.high is not None else "")

    def mean(seeds: dict[str, float]) -> float:
        return sum(seeds.values()) / len(seeds)

    print("| data | α | strategy | global % | personal % | up MB | down MB | seconds |")
    print("|---" * 8 + "|")
    for setting in sorted(values, key=lambda s: (s[0], s[1], -mean(values[s]["global"]))):
        one = values[setting]
        moved = [f"{mean(one[key]) / 1e6:.2f}" for key in ("up_bytes", "down_bytes")]
        cells = [*setting, spread(one["global"]), spread(one["personal"]), *moved, f"{mean(one['seconds']):.1f}"]
        print("| " + " | ".join(cells) + " |")
    print("\n| data | α | difference on the global set | points | p (paired t) |\n|---|---|---|---|---|")
    for data, alpha in sorted({s[:2] for s in values}):
        for first, second in (("coboosting", "dense"), ("dense", "fedavg"), ("fedov", "feddf"), ("fedftg", "fedavg")):
            ours, theirs = (values[data, alpha, name]["global"] for name in (first, second))
            if ours and theirs:
                told = paired({**ours}, {**theirs})
                half = f" ± {100 * (told.difference.high - told.difference.mean):.1f}" if told.difference.high else ""
                difference = f"{100 * told.difference.mean:+.1f}{half}"
                print(f"| {data} | {alpha} | {first} − {second} | {difference} | {told.t_p:.3f} |")
    return 0


def figure() -> int:
    """Draw the accuracy on the global set, best first."""
    from fedfuse.experiments.frame import drawn

    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with RESULTS.open() as file:
        for row in csv.DictReader(file):
            found[f"{row['data']}, α = {row['alpha']}"][row["strategy"]].append(100 * float(row["global"]))
    ranked = {title: dict(sorted(rows.items(), key=lambda row: -sum(row[1]))) for title, rows in sorted(found.items())}
    drawn(HERE / "accuracy.svg", ranked, "accuracy on the global test set, %")
    return 0


if __name__ == "__main__":
    words = sys.argv[1:]
    if words[:1] == ["table"]:
        sys.exit(table(RESULTS))
    if words[:1] == ["figure"]:
        sys.exit(figure())
    sys.exit(run("mnist" if "mnist" in words else "digits", "--quick" in words))
