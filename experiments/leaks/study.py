"""What does each kind of shared knowledge cost in privacy and robustness for the accuracy it buys?

    python experiments/leaks/study.py run [--cifar10]   # resumable: the same command goes on where it stopped
    python experiments/leaks/study.py figure            # draws cost.svg from results.parquet beside this file
    python experiments/leaks/study.py table             # prints the tables of README.md

Every block is the public command `fedfuse compare`; this file lists them, collects and draws. Leaks: ten clients of 200
MNIST digits each (100 to train on), class priors from Dir(1), an MLP, five rounds of five epochs, audited by `ldia` and
by `coop_lira` (soft labels) or `fedmia` (weights, adapters); without privacy and at ε = 8. Liars: the same with 100
digits, three epochs and no audit; 10 to 40 % lie, about soft labels by `fdla`, else by `sign_flip`, and each defence
reckons with as many as there are. Three seeds. CIFAR-10, with five times the examples and a CNN: what leaks without
privacy, and 40 % liars against two rules.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RUNS = Path("runs/leaks")
SHARED = {
    "local": "nothing", "fedavg": "weights", "fed_sb": "adapters (R)", "fedproto": "class means",
    "fedmd": "logits", "dsfl": "soft labels", "knfu": "soft labels",
}  # fmt: skip
SIZE = [
    "model=mlp", "clients=10", "partition=prior", "partition.alpha=1", "data.test_limit=1000", "rounds=5",
    "train.batch_size=16", "train.lr=0.02", "evaluate.every=5", "transfer.size=200", "runtime=inline",
    "strategy.fed_sb.init=random_orthonormal", "strategy.fed_sb.rank=32", "seed=0,1,2",
]  # fmt: skip
LEAKS = [*SIZE, "partition.examples=200", "data.personal_test=0.4", "train.epochs=5", "distil.epochs=10",
         "distil.optimizer=sgd", "audit=ldia,coop_lira,fedmia"]  # fmt: skip
LIARS = [*SIZE, "data=mnist", "partition.examples=100", "train.epochs=3", "distil.epochs=5",
         "distil.optimizer=sgd"]  # fmt: skip
RULES = {
    0.0: "off,median,geometric_median,trimmed_mean,multi_krum,cronus,expguard",
    0.1: "off,median,cronus",
    0.2: "off,median,geometric_median,trimmed_mean,multi_krum,cronus,expguard",
    0.3: "off,median,cronus",
    0.4: "off,median,geometric_median,trimmed_mean,cronus,expguard",  # multi-Krum needs 2·4 + 3 clients
}


def without_fed_sb(words: list[str]) -> list[str]:
    """Words of a sweep in which fed_sb is not."""
    return [word for word in words if not word.startswith("strategy.fed_sb.")]


def blocks(cifar10: bool) -> dict[str, list[str]]:
    """Every sweep of the study by name."""
    everyone, private = "strategy=" + ",".join(SHARED), "strategy=local,fedavg,fed_sb,fedmd,dsfl,knfu"
    out = {
        "mnist": ["data=mnist", everyone, *LEAKS],
        "mnist-private": ["data=mnist", private, "privacy.epsilon=8", *LEAKS],
    }
    for share, rules in RULES.items():
        lies = [f"attack.fraction={share}"] if share else []
        reckoned = [f"defence.fraction={share or 0.2}", f"defence={rules}"]
        kinds = {"fdla": "fedmd,dsfl", "sign_flip": "fedavg,fedproto,fed_sb"}
        for attack, names in kinds.items():
            told = [f"attack={attack}", *lies] if share else []
            words = LIARS if "fed_sb" in names else without_fed_sb(LIARS)
            if "fedmd" not in names:
                words = [word for word in words if not word.startswith("distil.")]
            out[f"liars-{share:g}-{attack}"] = [f"strategy={names}", *told, *reckoned, *words]
        told = ["attack=fdla", *lies] if share else []
        out[f"liars-{share:g}-knfu"] = ["strategy=knfu", *told, *without_fed_sb(LIARS)]  # its fuse is no mean
    if cifar10:
        harder = {"model=mlp": "model=cnn", "data=mnist": "data=cifar10"}
        words = [harder.get(word, word.replace("examples=200", "examples=1000")) for word in LEAKS]
        out["cifar10"] = ["data=cifar10", everyone, *words]
        words = [harder.get(word, word.replace("examples=100", "examples=500")) for word in without_fed_sb(LIARS)]
        for attack, name in (("fdla", "fedmd"), ("sign_flip", "fedavg")):
            mine = [word for word in words if name == "fedmd" or not word.startswith("distil.")]
            for share in (0.0, 0.4):
                told = [f"attack={attack}", f"attack.fraction={share}"] if share else []
                rules = [f"defence.fraction={share or 0.2}", "defence=off,median,cronus"]
                out[f"cifar10-liars-{share:g}-{attack}"] = [f"strategy={name}", *told, *rules, *mine]
    return out


def run(cifar10: bool) -> int:
    """Carry out the blocks, then collect their final figures."""
    for name, words in blocks(cifar10).items():
        command = [sys.executable, "-m", "fedfuse.cli", "compare", *words, f"out={RUNS / name}"]
        print("fedfuse", " ".join(command[3:]), flush=True)
        if code := subprocess.call(command):
            return code
    return collect()


def collect() -> int:
    """Write `results.parquet`: one row for each run and figure; blocks that were not run here keep their rows."""
    import polars as pl

    from fedfuse.results.run_data import find

    rows = []
    there = sorted(path.name for path in RUNS.iterdir() if path.is_dir())
    for name in there:
        runs, skipped = find([RUNS / name])
        for line in skipped:
            print(f"skipped: {line}")
        for one in runs:
            config = one.config
            attack, epsilon = config["attack"], config["privacy"]["epsilon"]
            share = attack["fraction"] if attack["name"] != "off" else 0.0
            key = (name, one.strategy, one.seed, epsilon, attack["name"], share, config["defence"]["name"])
            found = {k: v for k, v in one.final.items() if k.startswith("accuracy/")}
            traffic = (one.summary or {})["traffic"]
            found["bytes"] = float(traffic["up_bytes"] + traffic["down_bytes"])
            found |= _leaks(one.dir / "audit.parquet")
            rows += [(*key, metric, value) for metric, value in found.items()]
    columns = ["block", "strategy", "seed", "epsilon", "attack", "fraction", "defence", "metric", "value"]
    frame = pl.DataFrame(rows, schema=columns, orient="row", infer_schema_length=None)
    kept = pl.read_parquet(HERE / "results.parquet").filter(~pl.col("block").is_in(there))
    frame = pl.concat([kept, frame.cast(dict(kept.schema))])
    frame.sort(columns[:8]).write_parquet(HERE / "results.parquet")
    return figure()


def _leaks(path: Path) -> dict[str, float]:
    """A run's figures of the last round, over all clients: of either attack on membership under one name."""
    import polars as pl

    if not path.exists():
        return {}
    rows = pl.read_parquet(path).filter(client=-1)
    last = rows.filter(pl.col("round") == rows["round"].max())
    out = {}
    for metric, at, called in (
        ("tv", None, "ldia/tv"), ("tv/blind", None, "ldia/blind"), ("auc", None, "lira/auc"), ("tpr", 0.01, "lira/tpr"),
    ):  # fmt: skip
        found = last.filter(pl.col("metric") == metric, pl.col("at").is_null() if at is None else pl.col("at") == at)
        if len(found) and found["value"][0] is not None:
            out[called] = float(found["value"][0])
    return out


def _mean(frame: Any, scale: float = 100, digits: int = 1) -> str:
    """Mean over seeds ± half of Student's 95 % interval."""
    from fedfuse.results.statistics import mean_interval

    values = [scale * value for value in frame["value"].to_list()]
    if not values:
        return "–"
    found = mean_interval(values)
    half = "" if found.half_width is None else f" ± {found.half_width:.{digits}f}"
    return f"{found.mean:.{digits}f}{half}"


def table() -> int:
    """Print what leaks, and what liars do, as README.md has it."""
    import polars as pl

    frame = pl.read_parquet(HERE / "results.parquet")
    heads = ["data", "shared", "strategy", "ε", "personal %", "global %", "MB", "LDIA error (blind)", "AUC"]
    print("| " + " | ".join([*heads, "TPR at 1 % FPR, %"]) + " |\n" + "|---" * 10 + "|")
    for block in [one for one in ("mnist", "mnist-private", "cifar10") if one in set(frame["block"])]:
        for name, shared in SHARED.items():
            part = frame.filter(block=block, strategy=name)
            if not len(part):
                continue
            cell = {m: part.filter(metric=m) for m in sorted(set(part["metric"]))}
            none = part.head(0)
            accuracy = [_mean(cell[f"accuracy/{kind}"]) for kind in ("personal", "global")]
            error = _mean(cell.get("ldia/tv", none), 1, 2)
            blind = _mean(cell["ldia/blind"].select(pl.col("value").mean()), 1, 2) if "ldia/blind" in cell else "–"
            size = _mean(cell["bytes"].select(pl.col("value").mean()), 1e-6)
            epsilon = "∞" if (spent := part["epsilon"][0]) is None else f"{spent:g}"
            print(
                f"| {block.partition('-')[0]} | {shared} | {name} | {epsilon} | {' | '.join(accuracy)} | {size} | "
                f"{error} ({blind}) | {_mean(cell.get('lira/auc', none), 1, 3)} | {_mean(cell.get('lira/tpr', none))} |"
            )
    for data, prefix in (("MNIST", "liars"), ("CIFAR-10", "cifar10-liars")):
        liars = frame.filter(pl.col("block").str.starts_with(prefix))
        rules = [rule for rule in RULES[0.0].split(",") if rule in set(liars["defence"])]
        print(f"\n| {data} | lie | liars | " + " | ".join(rules) + " |\n|---" + "|---" * (2 + len(rules)) + "|")
        for name in SHARED:
            for share, attack in sorted(set(liars.filter(strategy=name).select("fraction", "attack").iter_rows())):
                metric = "accuracy/personal_honest" if share else "accuracy/personal"
                part = liars.filter(strategy=name, fraction=share, attack=attack, metric=metric)
                cells = " | ".join(_mean(part.filter(defence=rule)) for rule in rules)
                print(f"| {name} | {attack} | {share:.0%} | {cells} |")
    return 0


def figure() -> int:
    """Draw leakage against accuracy against bytes, and accuracy under liars."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "leaks", "font.size": 8}
    import matplotlib.pyplot as plt
    import polars as pl

    frame = pl.read_parquet(HERE / "results.parquet")
    drawn, axes = plt.subplots(1, 3, figsize=(11, 4.0))
    mean = frame.group_by("block", "strategy", "attack", "fraction", "defence", "metric").agg(pl.col("value").mean())
    for axis, metric, said in (
        (axes[0], "ldia/tv", "error of the guessed class prior (TV)"),
        (axes[1], "lira/tpr", "members found at 1 % false alarms"),
    ):
        for i, name in enumerate(SHARED):
            points = []
            for block in ("mnist", "mnist-private", "cifar10"):
                part = mean.filter(block=block, strategy=name)
                found = dict(part.select("metric", "value").iter_rows())
                if metric in found:
                    size = 12 + 25 * max(0.0, _log(found["bytes"]))
                    axis.scatter(
                        100 * found["accuracy/personal"], found[metric], s=size, color=f"C{i}",
                        alpha=0.35 if block == "mnist-private" else 0.9, label=name if block == "mnist" else None,
                        marker="s" if block == "cifar10" else "o", linewidth=0,
                    )  # fmt: skip
                if metric in found and block != "cifar10":
                    points.append((100 * found["accuracy/personal"], found[metric]))
            if len(points) == 2:
                axis.plot(*zip(*points, strict=True), color=f"C{i}", lw=0.6, ls=":")
        axis.set_xlabel("personal accuracy %")
        axis.set_ylabel(said)
    said = "pale: ε = 8; squares: CIFAR-10; size: log of bytes"
    handles, labels = axes[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="lower center", ncol=len(SHARED), fontsize=7, title=said, title_fontsize=7)
    axes[1].axhline(0.01, color="black", lw=0.6, ls="--")
    for i, name in enumerate(SHARED):
        part = mean.filter(pl.col("block").str.contains("liars-[0-9.]+-(fdla|sign_flip|knfu)"), strategy=name)
        for rule, style in (("off", "-"), ("cronus", "--")):
            metric = pl.when(pl.col("fraction") > 0).then(pl.lit("accuracy/personal_honest"))
            line = part.filter(pl.col("metric") == metric.otherwise(pl.lit("accuracy/personal")), defence=rule)
            line = line.sort("fraction")
            if len(line):
                axes[2].plot(
                    100 * line["fraction"], 100 * line["value"], style, color=f"C{i}", marker="o", ms=2.5, lw=1
                )
    axes[2].set_xlabel("clients that lie % (dashed: Cronus)")
    axes[2].set_ylabel("personal accuracy of the honest %")
    drawn.tight_layout(rect=(0, 0.11, 1, 1))
    drawn.savefig(HERE / "cost.svg", metadata={"Date": None})
    return 0


def _log(size: float) -> float:
    import math

    return math.log10(max(size, 1.0) / 1e5)


if __name__ == "__main__":
    words = sys.argv[1:]
    shown = {"figure": figure, "table": table, "collect": collect}.get(words[0] if words else "")
    sys.exit(shown() if shown else run("--cifar10" in words))
