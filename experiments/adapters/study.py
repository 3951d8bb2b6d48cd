"""Federated adapters compared: every block is the public command; this file lists, collects and plots.

    python experiments/adapters/prepare.py                 # models and 20 Newsgroups, once
    python experiments/adapters/study.py sst2              # (a) also: trec
    python experiments/adapters/study.py newsgroups        # (b) a smoke comparison
    python experiments/adapters/study.py shakespeare       # (c)
    python experiments/adapters/study.py private           # (d)
    python experiments/adapters/study.py figure            # plot and text from metrics.csv beside this file

Each is resumable: the same command goes on where it stopped. Learning rates were chosen by `study.py tune`: on
seed 100 (used nowhere else), the IID split and three rounds, from `RATES`. README.md says what was cut to fit.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from fedfuse.sweep import sweep

HERE = Path(__file__).parent
RUNS = Path("runs/adapters")
RATES = (3e-3, 1e-2, 3e-2)

# Adapted: the 6 matrices of MiniLM's last layer (last_layer.py). (strategy, rank): numbers sent up a round, head apart
ARMS = {
    ("fedit", 8): 55_296, ("fedex_lora", 8): 55_296, ("ffa_lora", 8): 27_648, ("fed_sb", 8): 384,  # equal rank
    ("ffa_lora", 16): 55_296, ("fed_sb", 96): 55_296,  # equal budget: with fedit and fedex_lora of rank 8
}  # fmt: skip
RATE = {  # by `tune`: 120 steps, 872 test sentences
    ("fedit", 8): 3e-3, ("fedex_lora", 8): 3e-3, ("ffa_lora", 8): 3e-2, ("fed_sb", 8): 3e-2, ("ffa_lora", 16): 3e-2,
    ("fed_sb", 96): 1e-2,
}  # fmt: skip

COMMON = [
    "data.personal_test=0", "data.validation=0", "transfer.size=4", "train.optimizer=adamw", "runtime=inline",
]  # fmt: skip
TEXT = ["data=custom", "data.load=last_layer:texts", "model=custom", "model.build=last_layer:Last"]
SST2 = [
    "data.extra.name=sst2", "data.extra.length=24", "data.extra.limit=1604", "data.extra.test_limit=872", "clients=20",
    "data.limit=1284", "data.test_limit=436", "participation=0.2", "rounds=4", "evaluate.every=2", "train.batch_size=8",
]  # fmt: skip
IID, SKEWED = ["partition=iid"], ["partition=dirichlet", "partition.alpha=0.3", "partition.min_size=8"]


def arms(out: str, words: list[str], rates: dict[tuple[str, int], float] = RATE) -> None:
    """Run the methods on one task."""
    for (name, rank), rate in rates.items():
        own = [f"strategy={name}", f"strategy.rank={rank}", f"train.lr={rate}", f"out={RUNS / out / f'{name}-{rank}'}"]
        sweep([*words, *own])


def tune() -> None:
    """`fedex_lora` takes `fedit`'s rate and `ffa_lora` of rank 16 that of rank 8."""
    for rate in RATES:
        few = [arm for arm in ARMS if arm not in (("fedex_lora", 8), ("ffa_lora", 16))]
        words = [*COMMON, *TEXT, *SST2, *IID, "seed=100", "rounds=3", "data.limit=null", "data.test_limit=null"]
        arms(f"tune/{rate:g}", words, dict.fromkeys(few, rate))


def sst2() -> None:
    """All seeds of a kind before the next, so that what an early end leaves is balanced."""
    for seed in range(3):
        for label, split in (("iid", IID), ("dirichlet", SKEWED)):
            arms(f"sst2-{label}/{seed}", [*COMMON, *TEXT, *SST2, *split, f"seed={seed}"])


if __name__ == "__main__":
    os.nice(19)
    {"tune": tune, "sst2": sst2}[sys.argv[1]]()
