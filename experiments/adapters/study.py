"""Federated adapters compared: every block is the public command; this file lists, collects and plots.

    python experiments/adapters/prepare.py                 # models and 20 Newsgroups, once
    python experiments/adapters/study.py sst2              # (a); also: trec
    python experiments/adapters/study.py newsgroups        # (b) a smoke comparison
    python experiments/adapters/study.py shakespeare       # (c)
    python experiments/adapters/study.py private           # (d)
    python experiments/adapters/study.py collect           # metrics.csv beside this file, one row a run
    python experiments/adapters/study.py table             # README.md's tables from it; also: figure, ratio

Each is resumable: the same command goes on where it stopped. Learning rates were chosen by `study.py tune TASK` and
`rates TASK`: every arm at each of `RATES`, over the study's own length, on seed 100 (used nowhere else) and the IID
split, scored on a fifth of the clients' examples that it did not train on. README.md says what was cut to fit.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from fedfuse.runs.sweep import sweep

HERE = Path(__file__).parent
RUNS = Path("runs/adapters")
RATES = "0.0003,0.001,0.003,0.01,0.03,0.1"  # tried by `tune` for every arm of every task

# Adapted: the 6 matrices of MiniLM's last layer (last_layer.py). (strategy, rank): numbers sent up a round, head apart
ARMS = {
    ("fedit", 8): 55_296, ("fedex_lora", 8): 55_296, ("ffa_lora", 8): 27_648, ("fed_sb", 8): 384,  # equal rank
    ("ffa_lora", 16): 55_296, ("fed_sb", 96): 55_296,  # equal budget: with fedit and fedex_lora of rank 8
}  # fmt: skip
EQUAL = [("fedit", 8), ("fedex_lora", 8), ("ffa_lora", 16), ("fed_sb", 96)]
# Shakespeare: all 35 matrices of stories260K; 46,240 numbers for LoRA of rank 8
LM_ARMS = {
    ("fedit", 8): 46_240, ("fedex_lora", 8): 46_240, ("ffa_lora", 8): 24_000, ("fed_sb", 8): 2_240,  # equal rank
    ("fedit", 4): 23_120, ("fedex_lora", 4): 23_120, ("fed_sb", 26): 23_660,  # equal budget, with ffa_lora of rank 8
}  # fmt: skip
CHOSEN = {  # by `rates`
    "sst2": {
        ("fedit", 8): 3e-4, ("fedex_lora", 8): 1e-3, ("ffa_lora", 8): 3e-3, ("fed_sb", 8): 1e-2,
        ("ffa_lora", 16): 3e-3, ("fed_sb", 96): 3e-3,
    },
    "trec": {
        ("fedit", 8): 3e-3, ("fedex_lora", 8): 3e-3, ("ffa_lora", 8): 1e-2, ("fed_sb", 8): 3e-2,
        ("ffa_lora", 16): 1e-2, ("fed_sb", 96): 1e-2,
    },
    "newsgroups": {("fedit", 8): 3e-3, ("fedex_lora", 8): 3e-3, ("ffa_lora", 16): 1e-2, ("fed_sb", 96): 3e-3},
    "shakespeare": {
        ("fedit", 8): 3e-3, ("fedex_lora", 8): 3e-3, ("ffa_lora", 8): 3e-3, ("fed_sb", 8): 1e-2, ("fedit", 4): 3e-3,
        ("fedex_lora", 4): 1e-2, ("fed_sb", 26): 3e-3,
    },
}  # fmt: skip

COMMON = [
    "data.personal_test=0", "data.validation=0", "transfer.size=4", "train.epochs=1", "train.optimizer=adamw",
    "runtime=inline",
]  # fmt: skip
TEXT = [*COMMON, "data=custom", "data.load=last_layer:texts", "model=custom", "model.build=last_layer:Last"]
IID, SKEWED = ["partition=iid"], ["partition=dirichlet", "partition.alpha=0.3", "partition.min_size=2"]
STORIES = Path(os.environ.get("FEDFUSE_DATA", "../shared/data")).parent / "models" / "stories260K"
TUNING = ["seed=100", "data.limit=null", "data.validation=0.2", "evaluate.validation=true", "evaluate.every=20"]


def texts(name: str, test: int) -> list[str]:
    """20 clients with 1,284 sentences between them, 4 a round."""
    return [
        *TEXT, f"data.extra.name={name}", "data.extra.length=24", "data.extra.limit=1604",
        f"data.extra.test_limit={test}", "clients=20", "data.limit=1284", "participation=0.2", "rounds=20",
        "evaluate.every=5", "train.batch_size=8",
    ]  # fmt: skip


TASKS = {
    "sst2": texts("sst2", 872),
    "trec": texts("trec", 500),
    # RAVAN's 20 clients, 3 a round; their 50 local steps cut to 6, T5-base to MiniLM's last layer
    "newsgroups": [
        *TEXT, "data.extra.name=newsgroups", "data.extra.length=48", "data.extra.limit=1004",
        "data.extra.test_limit=400", "clients=20", "participation=0.15", "rounds=20", "evaluate.every=5",
        "train.batch_size=8",
    ],
    "shakespeare": [
        *COMMON, "data=tiny_shakespeare", f"data.extra.tokenizer={STORIES}", "data.extra.length=32",
        "data.extra.roles=20", "data.extra.least=20", "partition=natural", "model=causal_lm", f"model.path={STORIES}",
        "data.limit=1280", "data.test_limit=200", "participation=0.2", "rounds=15", "evaluate.every=5",
        "train.batch_size=16",
    ],
}  # fmt: skip


def arms(out: str, words: list[str], rates: Mapping[tuple[str, int], float | str]) -> None:
    """Run the methods on one task."""
    for (name, rank), rate in rates.items():
        own = [f"strategy={name}", f"strategy.rank={rank}", f"train.lr={rate}", f"out={RUNS / out / f'{name}-{rank}'}"]
        sweep([*words, *own])


def tune(task: str) -> None:
    """Every arm at every rate."""
    split = ["data.limit=1600"] if task == "shakespeare" else IID
    methods = {"newsgroups": EQUAL, "shakespeare": LM_ARMS}.get(task, ARMS)
    arms(f"tune/{task}", [*TASKS[task], *TUNING, *split], dict.fromkeys(methods, RATES))


def rates(task: str) -> None:
    """Print validation accuracy by arm and rate."""
    import polars as pl

    from fedfuse.results.run_data import find

    rows = []
    for run in find([RUNS / "tune" / task])[0]:
        if run.summary is not None:
            told = run.metrics.filter(metric="accuracy/validation").sort("round").collect()["value"].to_list()
            arm = run.dir.relative_to(RUNS / "tune" / task).parts[0]
            rows.append((arm, f"{run.config['train']['lr']:g}", 100 * told[-1]))
    frame = pl.DataFrame(rows, ["arm", "rate", "accuracy"], orient="row").sort("arm", pl.col("rate").cast(float))
    with pl.Config(tbl_formatting="ASCII_MARKDOWN", tbl_hide_column_data_types=True, float_precision=1):
        print(task, frame.pivot("rate", index="arm", values="accuracy"))


def compare(task: str) -> None:
    """Every arm at its own rate."""
    seeds = "seed=0,1,2" if task in ("sst2", "shakespeare") else "seed=0"
    if task == "shakespeare":
        arms("shakespeare-roles", [*TASKS[task], seeds], CHOSEN[task])
        return
    for label, split in (("iid", IID), ("dirichlet", SKEWED)):
        arms(f"{task}-{label}", [*TASKS[task], *split, seeds], CHOSEN[task])


def private() -> None:
    """One round, as the released private script plays; SGD at 0.5 and clip 1 for all, not tuned; N ≈ 2,000, δ = 1/N."""
    words = [
        *TEXT, "data.extra.name=sst2", "data.extra.length=24", "data.extra.limit=6004", "data.extra.test_limit=872",
        "clients=3", "rounds=1", "train.epochs=2", "train.batch_size=64", "train.optimizer=sgd", "train.momentum=0",
    ]  # fmt: skip
    fixed = dict.fromkeys([("ffa_lora", 8), ("fed_sb", 8), ("fed_sb", 32)], 0.5)
    for budget in ("3", "1", "8", "null"):
        arms(f"private-{budget}", [*words, *IID, f"privacy.epsilon={budget}", "seed=0"], fixed)


# --- what came out -----------------------------------------------------------------------------------------


def collect() -> None:
    """Write `metrics.csv`: one row per run; runs that are not here keep their rows."""
    import polars as pl

    from fedfuse.results.run_data import find

    rows = []
    for run in find([RUNS])[0]:
        place = run.dir.relative_to(RUNS).parts
        if run.summary is None or place[0].startswith(("tune", "improves", "memory", "zz")):
            continue
        told = run.metrics.filter(pl.col("metric").is_in(["loss/global", "epsilon"])).collect()
        last = told.filter(metric="loss/global").sort("round")["value"].to_list()
        spent = told.filter(metric="epsilon")["value"].max()
        traffic, accuracy = run.summary["traffic"], run.summary["final"]["accuracy/global"]
        asked = run.traffic.filter(pl.col("message") == "train", pl.col("direction") == "up").collect()
        messages = len(asked.select("round", "client").unique())  # client-rounds
        row = [place[0], run.strategy, run.config["strategy"]["rank"], run.seed, run.config["train"]["lr"]]
        row += [accuracy, last[-1] if last else None, spent, messages, run.summary["rounds"]]
        rows.append([*row, traffic["up_bytes"], traffic["down_bytes"], traffic["setup_bytes"]])
    names = ["study", "strategy", "rank", "seed", "lr", "accuracy", "loss", "epsilon", "client_rounds", "rounds"]
    names += ["up", "down", "setup"]
    kept = pl.read_csv(HERE / "metrics.csv", infer_schema_length=None)
    found = pl.DataFrame(rows, schema=names, orient="row", infer_schema_length=None).cast(dict(kept.schema))
    kept = kept.join(found, on=names[:4], how="anti")
    pl.concat([kept, found]).sort(names[:4]).write_csv(HERE / "metrics.csv")


def table() -> None:
    """Print README.md's tables: mean ± standard deviation over seeds, bytes of a client's round (IID)."""
    import polars as pl

    frame = pl.read_csv(HERE / "metrics.csv").with_columns(
        *((pl.col(way) / pl.col("client_rounds") / 1e3).alias(f"kB {way}") for way in ("up", "down"))
    )

    def told(column: pl.Series, digits: int) -> str:
        spread = f" ± {column.std():.{digits}f}" if len(column) > 1 else ""
        return f"{column.mean():.{digits}f}{spread}"

    for task in ("sst2", "trec", "newsgroups"):
        names = ["method, rank", "IID, accuracy %", "Dirichlet 0.3, accuracy %", "seeds", "kB up", "kB down"]
        names += ["RAVAN's row for T5-base, IID / Dirichlet"] * (task == "newsgroups")
        print(f"\n{task}\n\n| {' | '.join(names)} |\n{'|---' * len(names)}|")
        mine = frame.filter(pl.col("study").str.starts_with(task))
        for (name, rank), part in sorted(mine.group_by("strategy", "rank")):
            iid, skewed = (part.filter(study=f"{task}-{split}") for split in ("iid", "dirichlet"))
            cells = [f"{name} {rank}", told(100 * iid["accuracy"], 1), told(100 * skewed["accuracy"], 1), str(len(iid))]
            cells += [f"{iid[way].mean():.2f}" for way in ("kB up", "kB down")]
            print(f"| {' | '.join(cells + [RAVAN[name]] * (task == 'newsgroups'))} |")
    print("\nshakespeare\n\n| method, rank | test loss | seeds | kB up | kB down |\n|---|---|---|---|---|")
    for (name, rank), part in sorted(frame.filter(study="shakespeare-roles").group_by("strategy", "rank")):
        up, down = (f"{part[way].mean():.2f}" for way in ("kB up", "kB down"))
        print(f"| {name} {rank} | {told(part['loss'], 3)} | {len(part)} | {up} | {down} |")
    print("\nprivate\n\n| ε | method, rank | accuracy % | ε spent |\n|---|---|---|---|")
    for row in frame.filter(pl.col("study").str.starts_with("private")).sort("study", "strategy").iter_rows(named=True):
        asked = row["study"].removeprefix("private-").replace("null", "none")
        spent = "–" if row["epsilon"] is None else f"{row['epsilon']:.3f}"
        print(f"| {asked} | {row['strategy']} {row['rank']} | {100 * row['accuracy']:.1f} | {spent} |")


# RAVAN (2025), 20 Newsgroups, its table for T5-base: accuracy %, IID / Dirichlet 0.3
RAVAN = {
    "fed_sb": "67.15 / 63.10", "fedex_lora": "69.04 / 62.52", "fedit": "69.07 / 61.98", "ffa_lora": "68.11 / 62.36",
}  # fmt: skip


def figure() -> None:
    """Draw performance over bytes: filled by a client's round, hollow what the basis costs a client once."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import polars as pl

    frame = pl.read_csv(HERE / "metrics.csv")
    panels = [name for name in PANELS if frame.filter(study=name).height]
    grid, axes = plt.subplots(1, len(panels), figsize=(3.8 * len(panels), 3.4), squeeze=False)
    colours = dict(zip(sorted(set(frame["strategy"])), ("#4269d0", "#efb118", "#ff725c", "#3ca951"), strict=False))
    for axis, study in zip(axes[0], panels, strict=True):
        metric = "loss" if PANELS[study] == "loss" else "accuracy"
        for (name, rank), part in sorted(frame.filter(study=study).group_by("strategy", "rank")):
            values = part[metric] * (1 if metric == "loss" else 100)
            size = ((part["up"] + part["down"]) / part["client_rounds"]).mean() / 1e3
            style = {"marker": MARKERS[rank], "color": colours[name], "linestyle": "none", "markersize": 5}
            axis.errorbar(size, values.mean(), values.std() or 0, capsize=2, label=f"{name} {rank}", **style)
            if name == "fed_sb":
                once = part["setup"].mean() / CLIENTS / 1e3
                axis.plot(once, values.mean(), markerfacecolor="none", **style)
        axis.set_xscale("log")
        axis.set_title(study, fontsize=9)
        axis.set_xlabel("kB up and down, a client's round", fontsize=8)
        axis.set_ylabel("test loss" if metric == "loss" else "test accuracy, %", fontsize=8)
        axis.legend(fontsize=6, title="strategy, rank", title_fontsize=6)
    grid.tight_layout()
    grid.savefig(HERE / "pareto.svg")


PANELS = {"sst2-iid": "accuracy", "sst2-dirichlet": "accuracy", "shakespeare-roles": "loss"}
MARKERS = {4: "v", 8: "o", 16: "s", 26: "D", 96: "P"}
CLIENTS = 20  # of both


def ratio() -> None:
    """Print the counterpart of the paper's 230×, from measured bytes: counted their way, and counting everything."""
    import polars as pl

    frame = pl.read_csv(HERE / "metrics.csv").filter(seed=0)
    for study, big, small in (("sst2-iid", 8, 8), ("sst2-iid", 8, 96), ("shakespeare-roles", 8, 8)):
        part = {(r["strategy"], r["rank"]): r for r in frame.filter(study=study).iter_rows(named=True)}
        ours, one, theirs = part["fed_sb", small], part["fedit", big], part["fedex_lora", big]
        clients = ours["client_rounds"] / ours["rounds"]
        stacked = clients * one["up"] / one["client_rounds"]  # C payloads of LoRA, as the paper counts FedEx
        alone = ours["up"] / ours["client_rounds"]
        total = {name: r["up"] + r["down"] + r["setup"] for name, r in (("sb", ours), ("it", one), ("ex", theirs))}
        print(f"{study}, Fed-SB r={small} against r={big}, {clients:g} clients a round, {ours['rounds']} rounds:")
        print(f"  the paper's way, C LoRA payloads over one R (head in both): {stacked / alone:.1f}")
        print(f"  all measured bytes, FedEx-LoRA over Fed-SB: {total['ex'] / total['sb']:.1f}", end="; ")
        print(f"FedIT over Fed-SB: {total['it'] / total['sb']:.1f}")


if __name__ == "__main__":
    what, *task = sys.argv[1:]
    if what in TASKS:
        what, task = "compare", [what]
    {f.__name__: f for f in (tune, rates, compare, private, collect, table, figure, ratio)}[what](*task)
