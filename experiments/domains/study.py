"""A domain that nobody has labels of: what each block of FedKA is worth there, leaving out one domain after another.

    python experiments/domains/study.py run [--quick]     # resumable: the same command goes on where it stopped
    python experiments/domains/study.py table             # prints README.md's tables from results.csv
    python experiments/domains/study.py figure            # draws gains.svg from it

Three corpora: digits (MNIST, USPS, MNIST-M; 600 training examples each), Office-Caltech10 (32×32), Amazon reviews
(counts of 1,000 hashed words). Each client is a domain, the target domain's train split the unlabelled transfer set,
its test split what is scored; nobody's labels of it are read. Twenty rounds of an epoch of Adam (the
authors' optimiser, at 0.001 for their 0.0003 and ten times their rounds); seeds 0, 1, 2; the last round is the result,
the best of five stands beside. `--quick` is one seed, one target, two rounds, 200 examples a domain, all blocks
and none, into folders of its own: it says that the commands work, and nothing else.
"""

from __future__ import annotations

import csv
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results.csv"
COMMON = ["strategy=fedka", "train.optimizer=adam", "train.lr=0.001", "partition=domain", "rounds=20",
          "train.epochs=1", "evaluate.every=4", "runtime=inline", "runtime.parallel=2", "seed=0,1,2"]  # fmt: skip
CORPORA = {
    "digits": ["data=mixed", "data.extra.per_source=600", "data.target=mnist,usps,mnist_m", "data.test_limit=2000",
               "model=cnn", "transfer.size=500"],
    "office": ["data=office_caltech10", "data.extra.size=32", "data.target=amazon,caltech10,dslr,webcam", "model=cnn"],
    "reviews": ["data=amazon_reviews", "data.extra.text=counts", "data.extra.buckets=1000",
                "data.target=books,dvd,electronics,kitchen", "model=mlp"],
}  # fmt: skip
BLOCKS = ("adversarial", "matching", "voting")
VARIANTS = {
    "none": BLOCKS,
    "all": (),
    "no adversarial": ("adversarial",),
    "no matching": ("matching",),
    "no voting": ("voting",),
}  # which blocks are off
PAPER = {"digits": 8.8, "office": 3.5, "reviews": 0.7}  # points over its baseline, from the paper's abstract
FIELDS = ("corpus", "variant", "target", "seed", "final", "best")


def run(quick: bool) -> int:
    """Carry out all runs, then collect their figures."""
    for corpus, words in CORPORA.items():
        for variant, off in VARIANTS.items():
            command = [*COMMON, *words, *(f"strategy.{block}=false" for block in off)]
            if quick:
                if variant not in ("none", "all"):
                    continue
                command = [w.partition(",")[0] if w.startswith("data.target=") else w for w in command]
                command = [
                    w
                    for w in command
                    if not w.startswith(("seed=", "rounds=", "transfer.size=", "data.extra.per_source"))
                ]
                least = ["data.extra.per_source=200"] if corpus == "digits" else ["data.limit=800"]
                command += ["seed=0", "rounds=2", *least]
            command += [f"out={folder(quick) / corpus / variant.replace(' ', '-')}"]
            print("fedfuse compare", *command, flush=True)
            code = subprocess.call([sys.executable, "-m", "fedfuse.cli", "compare", *command],
                                   stdout=subprocess.DEVNULL)  # fmt: skip
            if code:
                return code
    return collect(quick)


def folder(quick: bool) -> Path:
    """Where the runs lie."""
    return Path("runs/domains-quick" if quick else "runs/domains")


def collect(quick: bool) -> int:
    """Write `results.csv` (quick: beside the runs), one line a run, and print the tables."""
    from fedfuse.results.run_data import find

    rows = []
    for corpus in CORPORA:
        for variant in VARIANTS:
            where = folder(quick) / corpus / variant.replace(" ", "-")
            if not where.exists():
                continue
            runs, skipped = find([where])
            for line in skipped:
                print(f"skipped: {line}")
            for one in runs:
                last, best = (100 * (one.summary or {})[key]["accuracy/global"] for key in ("final", "best"))
                rows.append((corpus, variant, one.config["data"]["target"], one.seed, f"{last:.3f}", f"{best:.3f}"))
    where = folder(quick) / "results.csv" if quick else RESULTS
    with where.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(FIELDS)
        writer.writerows(sorted(rows, key=lambda row: tuple(map(str, row[:4]))))
    return table(where)


def table(where: Path = RESULTS) -> int:
    """Print accuracy on the target by corpus and variant, means over targets, ± the 95 % t interval over seeds.

    Gains are over `none`, paired by seed; a gain whose interval leaves out 0 is bold.
    """
    from fedfuse.results.statistics import mean_interval

    found: dict[tuple[str, str, str], dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    with where.open() as file:
        for row in csv.DictReader(file):
            for kind in ("final", "best"):
                found[row["corpus"], row["variant"], kind][row["seed"]][row["target"]] = float(row[kind])

    def by_seed(corpus: str, variant: str, kind: str) -> dict[str, float]:
        return {seed: sum(one.values()) / len(one) for seed, one in found[corpus, variant, kind].items()}

    def cell(values: list[float], sign: str = "") -> str:
        one = mean_interval(values)
        text = f"{one.mean:{sign}.1f}" + (f" ± {one.high - one.mean:.1f}" if len(values) > 1 else "")
        return f"**{text}**" if sign and len(values) > 1 and (one.low > 0 or one.high < 0) else text

    for corpus in CORPORA:
        targets = sorted({t for one in found[corpus, "none", "final"].values() for t in one})
        print(f"\n**{corpus}** (paper: +{PAPER[corpus]} points)\n")
        print("| blocks on | last round % | points over none | best round % | " + " | ".join(targets) + " |")
        print("|---" * (4 + len(targets)) + "|")
        base = by_seed(corpus, "none", "final")
        for variant in VARIANTS:
            last, best = (by_seed(corpus, variant, kind) for kind in ("final", "best"))
            if not last:
                continue
            gain = [last[seed] - base[seed] for seed in last if seed in base]
            each = [cell([one[t] for one in found[corpus, variant, "final"].values() if t in one]) for t in targets]
            cells = [variant, cell(list(last.values())), cell(gain, "+") if variant != "none" else "–",
                     cell(list(best.values())), *each]  # fmt: skip
            print("| " + " | ".join(cells) + " |")
    return 0


def figure() -> int:
    """Draw points over no block, means over targets, by seed; the paper's gain is in the title."""
    from fedfuse.experiments.frame import drawn

    found: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    with RESULTS.open() as file:
        for row in csv.DictReader(file):
            found[row["corpus"], row["variant"], row["seed"]].append(float(row["final"]))
    mean = {key: sum(values) / len(values) for key, values in found.items()}
    panels: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (corpus, variant, seed), value in mean.items():
        if variant != "none":
            title = f"{corpus} (paper: +{PAPER[corpus]})"
            panels[title][variant].append(value - mean[corpus, "none", seed])
    drawn(HERE / "gains.svg", panels, "points over none", zero=True)
    return 0


if __name__ == "__main__":
    words = sys.argv[1:]
    shown = {"table": table, "figure": figure}.get(words[0] if words else "")
    sys.exit(shown() if shown else run("--quick" in words))
