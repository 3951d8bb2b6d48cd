"""Two tokenisers, one federation: stories260K (512 tokens) and a small byte-level model on Shakespeare's roles.

    python experiments/tokenisers/study.py run [--quick]     # resumable: the same command goes on where it stopped
    python experiments/tokenisers/study.py table             # prints README.md's tables from results.csv

Four clients, the four roles that say most (16,000 characters of each): clients 0 and 2 have stories260K and its
tokeniser, clients 1 and 3 a byte-level Llama of 27,000 parameters with random weights. 128 rows of 64 bytes are public.
Five rounds, k = 16, seeds 0, 1, 2. `local`: each alone. `fedmkt` at α = 1: each alone, and trained on the public text.
α = 0.9 (the paper's and the default) and 0.5: and taught by whoever knows a row best, by next bytes or (`edit`) by the
paper's map of tokens, the default. `gold`, `uld`, `xtoken`: α = 0.5, groups of tokens in two vocabularies. `knfu`:
mixed by perplexity, no labels. These four have one seed, 0. `--quick` is one seed and one round, into a folder of its
own: it says that the commands work.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results.csv"
SHARED = Path(os.environ.get("FEDFUSE_DATA", "../shared/data"))
ROLES, LETTERS = 4, 16_000
ARMS = {
    "local": ["strategy=local"],
    "fedmkt 0.5": ["strategy=fedmkt", "strategy.alpha=0.5", "strategy.mapping=byte"],
    "fedmkt 1": ["strategy=fedmkt", "strategy.alpha=1", "strategy.mapping=byte"],
    "fedmkt 0.9": ["strategy=fedmkt", "strategy.alpha=0.9", "strategy.mapping=byte"],
    "fedmkt 0.5 edit": ["strategy=fedmkt", "strategy.alpha=0.5", "strategy.mapping=edit"],
    **{
        f"fedmkt 0.5 {loss}": ["strategy=fedmkt", "strategy.alpha=0.5", "strategy.mapping=groups", f"loss={loss}"]
        for loss in ("gold", "uld", "xtoken")
    },
    "knfu": ["strategy=knfu", "strategy.distance=perplexity", "strategy.fuse_space=prob", "strategy.finetune_epochs=1"],
}
COMMON = [
    "data=text", "data.groups=role", "data.inputs=lines", "data.extra.tokenizer=bytes", "data.extra.length=65",
    "partition=natural", "transfer.size=128", "model.pool=[causal_lm@stories,causal_lm]", "rounds=5",
    "train.pool=[adamw@0.001,adamw@0.01]", "train.epochs=1", "evaluate.every=5", "runtime=inline", "seed=0,1,2",
]  # fmt: skip
FEW = ("fedmkt 0.5 gold", "fedmkt 0.5 uld", "fedmkt 0.5 xtoken", "knfu")
ONE_SEED = 0
QUICK = {"rounds": "1", "seed": "0"}
FIELDS = ("arm", "seed", "client", "split", "bits_per_byte", "up_bytes", "down_bytes")
T95 = 4.303  # two degrees of freedom


def folder(quick: bool) -> Path:
    """Where the runs lie."""
    return Path("runs/tokenisers-quick" if quick else "runs/tokenisers")


def prepare(where: Path) -> Path:
    """Write the roles that say most, cut to the same size."""
    with gzip.open(SHARED / "tiny_shakespeare" / "roles.jsonl.gz", "rt", encoding="utf-8") as file:
        roles = sorted(map(json.loads, file), key=lambda role: -sum(map(len, role["lines"])))[:ROLES]
    where.mkdir(parents=True, exist_ok=True)
    path = where / "roles.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for role in roles:
            said, lines = 0, []
            for line in role["lines"]:
                if said < LETTERS:
                    lines.append(line)
                    said += len(line)
            file.write(json.dumps({"role": role["role"], "lines": lines}) + "\n")
    return path


def run(quick: bool) -> int:
    """Carry out all runs, then collect their figures."""
    where = folder(quick)
    words = [*COMMON, f"data.root={prepare(where)}", f"model.paths.stories={SHARED.parent / 'models/stories260K'}"]
    if quick:
        words = [f"{k}={QUICK.get(k, v)}" for k, _, v in (word.partition("=") for word in words)]
    for name, arm in ARMS.items():
        own = [f"seed={ONE_SEED}" if word.startswith("seed=") and name in FEW else word for word in words]
        out = where / name.replace(" ", "_")
        print("fedfuse compare", *arm, *own, flush=True)
        command = [sys.executable, "-m", "fedfuse.cli", "compare", *arm, *own, f"out={out}"]
        if code := subprocess.call(command, stdout=subprocess.DEVNULL):
            return code
    return collect(quick)


def collect(quick: bool) -> int:
    """Write `results.csv` (quick: beside the runs), one line a client and test set, and print the tables."""
    import polars as pl

    from fedfuse.results.run_data import find

    runs, skipped = find([folder(quick)])
    for line in skipped:
        print(f"skipped: {line}")
    rows = []
    for one in runs:
        summary, hyper = one.summary or {}, one.config["strategy"]
        mapping = hyper.get("mapping")
        how = {"groups": f" {one.config['loss']['name']}", "edit": " edit"}.get(mapping, "")
        arm = one.config["strategy"]["name"] if mapping is None else f"fedmkt {hyper['alpha']:g}{how}"
        last = (pl.col("round") == one.rounds_done) & (pl.col("scope") == "client")
        found = one.metrics.filter(last & (pl.col("metric") == "bits_per_byte")).collect()
        for row in found.iter_rows(named=True):
            traffic = summary["traffic"]
            rows.append((arm, one.config["seed"], row["client"], row["split"], f"{row['value']:.5f}",
                         traffic["up_bytes"], traffic["down_bytes"]))  # fmt: skip
    path = folder(quick) / "results.csv" if quick else RESULTS
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(FIELDS)
        writer.writerows(sorted(rows))
    return table(path)


def interval(values: list[float]) -> str:
    """Mean and half-width of the 95 % t interval over three seeds."""
    mean = sum(values) / len(values)
    if len(values) != 3:
        return f"{mean:.3f}"
    deviation = (sum((value - mean) ** 2 for value in values) / 2) ** 0.5
    return f"{mean:.3f} ± {T95 * deviation / 3**0.5:.3f}"


def table(path: Path = RESULTS) -> int:
    """Bits per byte by kind of model and test set, paired gains, and what all clients sent and got in a run."""
    found: dict[tuple[str, str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    sent: dict[str, dict[int, tuple[float, float]]] = defaultdict(dict)
    with path.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            kind = "bytes" if int(row["client"]) % 2 else "stories260K"
            found[row["arm"], kind, row["split"]][int(row["seed"])].append(float(row["bits_per_byte"]))
            sent[row["arm"]][int(row["seed"])] = int(row["up_bytes"]) / 1e6, int(row["down_bytes"]) / 1e6

    def by_seed(arm: str, kind: str, split: str) -> dict[int, float]:
        return {seed: sum(values) / len(values) for seed, values in sorted(found[arm, kind, split].items())}

    def gain(arm: str, over: str, kind: str, split: str) -> str:
        mine, other = by_seed(arm, kind, split), by_seed(over, kind, split)
        both = [other[seed] - mine[seed] for seed in mine if seed in other]
        return interval(both) if both and arm not in ("local", over) else ""

    print("| arm | model | test | bits per byte | gain over local | gain over fedmkt 1 | up, down MB |")
    print("|---|---|---|---|---|---|---|")
    for kind in ("stories260K", "bytes"):
        for split in ("global", "personal"):
            for arm in (arm for arm in ARMS if arm in sent):
                values = list(by_seed(arm, kind, split).values())
                up, down = (sum(one[i] for one in sent[arm].values()) / len(sent[arm]) for i in (0, 1))
                cells = interval(values), gain(arm, "local", kind, split), gain(arm, "fedmkt 1", kind, split)
                print(f"| {arm} | {kind} | {split} | {' | '.join(cells)} | {up:.1f}, {down:.1f} |")
    return 0


if __name__ == "__main__":
    what, quick = sys.argv[1:2], "--quick" in sys.argv
    sys.exit(run(quick) if what == ["run"] else table() if what == ["table"] else print(__doc__) or 2)
