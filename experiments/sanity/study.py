"""Does every strategy, as it comes, do what its paper says? No default passes by accident.

    python experiments/sanity/study.py run         # defaults, on both sets; resumable: the same command goes on
    python experiments/sanity/study.py tuned       # train.lr searched alike for all, on MNIST with three architectures
    python experiments/sanity/study.py collect     # reads runs/sanity, or another directory, into results.json
    python experiments/sanity/study.py check       # reads results.json; says what does not hold, exit 1 if anything
    python experiments/sanity/study.py table       # writes README.md's tables from results.json

Every run is the public command; `expected.py` says what each strategy has to reach, in words and numbers.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from expected import EASY, EXPECTED, LEFT_OUT, TEXTS, Expected

from fedfuse.config import registry

HERE = Path(__file__).parent
RUNS = Path("runs/sanity")
RESULTS = HERE / "results.json"
SEEDS = "0,1,2"
COMMON = [
    "clients=10", "partition=dirichlet", "train.epochs=5", f"seed={SEEDS}", "runtime=inline", "runtime.parallel=2",
]  # fmt: skip
TUNED = [
    "data=mnist", "data.limit=600", "data.test_limit=600", "data.validation=0.2", "partition.alpha=0.3", "rounds=6",
    "search.trials=5", "train.lr=choice(0.003,0.01,0.03,0.1,0.3)", *COMMON,
]  # fmt: skip
COMMANDS = {
    "digits": ["data=digits", "partition.alpha=0.3", "rounds=10", "evaluate.every=100", *COMMON],
    "mnist": [
        "data=mnist", "data.limit=1000", "data.test_limit=1000", "model=mlp", "partition.alpha=0.1", "rounds=10",
        "evaluate.every=100", *COMMON,
    ],
    "tuned-pool": [*TUNED, "model.pool=[mlp,mlp_small,cnn]", "model.feature_dim=64"],
    "tuned-mlp": [*TUNED, "model=mlp"],
}  # fmt: skip
TITLES = {
    "digits": "Digits, at defaults",
    "mnist": "MNIST under strong skew, at defaults",
    "tuned-pool": "MNIST, tuned alike, three architectures",
    "tuned-mlp": "MNIST, tuned alike, one architecture",
}
METRICS = ("accuracy/global", "accuracy/personal", "accuracy/personal_worst10")


def compared(table: str) -> list[str]:
    """The strategies of a table: all of images; tuned, those that mix architectures apart from those that average."""
    names = sorted(set(registry.listed()) - set(TEXTS) - set(LEFT_OUT.get(table, {})))
    if not table.startswith("tuned"):
        return names
    mixes = table == "tuned-pool"
    return [name for name in names if name == "local" or registry.entry(name).server.heterogeneous == mixes]


def command(table: str, names: str) -> list[str]:
    """The words of `fedfuse compare`."""
    return [f"strategy={names}", *COMMANDS[table]]


def run(tables: tuple[str, ...] = ("digits", "mnist")) -> int:
    """Carry out all runs of some tables, then collect their final figures and check them."""
    for data in tables:
        words = command(data, ",".join(compared(data)))
        print("fedfuse compare", *words, flush=True)
        line = [sys.executable, "-m", "fedfuse.cli", "compare", *words, f"out={RUNS / data}"]
        if code := subprocess.call(line, stdout=subprocess.DEVNULL):
            return code
    return collect(RUNS)


def collect(root: Path) -> int:
    """Put what was run into `results.json`, by table, strategy and seed, then write README's tables and check.

    A strategy of which not all seeds ended keeps the rows that it had.
    """
    from fedfuse.results.run_data import find

    found: dict[str, Any] = read() if RESULTS.exists() else {}
    for data in COMMANDS:
        if not (root / data).exists():
            continue
        runs, skipped = find([root / data])
        for line in skipped:
            print(f"skipped: {line}")
        new: dict[str, dict[str, Any]] = {}
        for one in sorted(runs, key=lambda run: (run.strategy, run.seed)):
            if (summary := one.summary) is None:
                continue
            new.setdefault(one.strategy, {})[str(one.seed)] = {
                **{metric: round(one.final[metric], 6) for metric in METRICS},
                "up_bytes": summary["traffic"]["up_bytes"],
                "down_bytes": summary["traffic"]["down_bytes"],
                "seconds": round(summary["seconds"]["rounds"], 2),
                "notes": summary["notes"],
                **({"lr": one.config["train"]["lr"]} if data.startswith("tuned") else {}),
            }
        whole = {name: figures for name, figures in new.items() if ",".join(figures) == SEEDS}
        found[data] = dict(sorted({**found.get(data, {}), **whole}.items()))
    RESULTS.write_text(json.dumps(found, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")
    table()
    return check()


def read() -> dict[str, dict[str, dict[str, Any]]]:
    """The figures kept beside this file."""
    found: dict[str, dict[str, dict[str, Any]]] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return found


def faults(data: str, found: dict[str, dict[str, Any]], name: str) -> list[str]:
    """What a strategy does not hold of what is expected of it."""
    from fedfuse.results.statistics import mean_interval

    want, out = EXPECTED[name], []
    for metric, least in zip(METRICS, want.least(data), strict=False):
        mean = mean_interval([one[metric] for one in found[name].values()]).mean
        if not mean >= least:
            out.append(f"{metric} {100 * mean:.1f} %, expected at least {100 * least:.0f} %")
    if not want.like_local(data) and not differs(found, name):
        out.append("no figure differs from local training's beyond its interval")
    out += sorted({note for one in found[name].values() for note in one["notes"] if "next to nothing" in note})
    return out


def differs(found: dict[str, dict[str, Any]], name: str) -> bool:
    """Whether any figure differs from local training's beyond its 95 % t interval, paired by seed."""
    from fedfuse.results.statistics import mean_interval

    gains = [[one[m] - found["local"][seed][m] for seed, one in found[name].items()] for m in METRICS]
    return any(one.low > 0 or one.high < 0 for one in map(mean_interval, gains))


def wanting() -> dict[str, list[str]]:
    """What does not hold, by table."""
    whole = read()
    out: dict[str, list[str]] = {}
    for data in COMMANDS:
        found = whole.get(data, {})
        lines = [f"{name}: say in expected.py what it has to reach" for name in compared(data) if name not in EXPECTED]
        for name in sorted(set(found) & set(EXPECTED)):
            lines += [f"{name}: {line}" for line in faults(data, found, name)]
        out[data] = [*lines, *(f"{name}: not run" for name in compared(data) if name not in found)]
    return out


def check() -> int:
    """Print what does not hold."""
    whole, lines = read(), wanting()
    for data, said in lines.items():
        print(*(f"{data}: {line}" for line in said), sep="\n", end="\n" if said else "")
        left = LEFT_OUT.get(data, {})
        print(f"{data}: {len(whole.get(data, {}))} strategies" + (f", left out: {' '.join(left)}" if left else ""))
    bad = sum(map(len, lines.values()))
    print(f"{bad} faults")
    return 1 if bad else 0


def table() -> int:
    """Write one line a strategy into README.md, best on the global set first, and what is and is not reached."""
    readme = HERE / "README.md"
    parts = readme.read_text(encoding="utf-8").split("<!-- table -->")
    whole, out = read(), []
    for data, title in TITLES.items():
        shown = " ".join(f'"{word}"' if set(word) & set("([") else word for word in command(data, "NAME"))
        out.append(f"\n\n## {title}\n\n    fedfuse compare {shown}\n\n" + "\n".join(rows(whole.get(data, {}))))
        out.append(left_out(data))
    out.append("\n\n## What is expected\n\n" + "\n".join(expectations()))
    lines = [f"- {data}: {line}" for data, said in wanting().items() for line in said]
    out.append("\n\n## What does not hold\n\n" + ("\n".join(lines) or "Nothing: every floor is reached."))
    readme.write_text("<!-- table -->".join([parts[0], "".join(out) + "\n\n", parts[2]]), encoding="utf-8")
    return 0


def left_out(data: str) -> str:
    """A line of the strategies that a table lacks, by reason; empty where it has all."""
    reasons: dict[str, list[str]] = {}
    for name, why in LEFT_OUT.get(data, {}).items():
        reasons.setdefault(why, []).append(f"`{name}`")
    said = "; ".join(f"{', '.join(names)} ({why})" for why, names in reasons.items())
    return f"\n\nLeft out: {said}." if said else ""


def expectations() -> list[str]:
    """One line for all strategies of which the same is expected, with its floors on digits."""
    groups: dict[Expected, list[str]] = {}
    for name, want in EXPECTED.items():
        groups.setdefault(want, []).append(f"`{name}`")
    return [
        f"- {', '.join(names)}: {want.words} ({100 * want.least_global:.3g} / {100 * want.least_personal:.3g})"
        f"{f'; may be as local training is: {want.as_local}' if want.as_local else ''}"
        f"{f'; may be so on other sets than {EASY}: {want.harder_as_local}' if want.harder_as_local else ''}"
        for want, names in groups.items()
    ]


def rows(found: dict[str, dict[str, Any]]) -> list[str]:
    """A table in Markdown."""
    from fedfuse.results.statistics import mean_interval

    def cell(name: str, metric: str) -> str:
        one = mean_interval([100 * figures[metric] for figures in found[name].values()])
        return f"{one.mean:.1f} ± {one.high - one.mean:.1f}"

    def mean(name: str, key: str) -> float:
        return sum(figures[key] for figures in found[name].values()) / len(found[name])

    searched = any("lr" in figures for seeds in found.values() for figures in seeds.values())
    out = ["| strategy | paper | global % | personal % | worst tenth % | up MB | down MB | s |" + " lr |" * searched]
    out.append("|---" * (8 + searched) + "|")
    for name in sorted(found, key=lambda n: mean(n, METRICS[0]), reverse=True):
        moved = [f"{mean(name, key) / 1e6:.3g}" for key in ("up_bytes", "down_bytes")]
        cells = [linked(name), cited(name), *(cell(name, metric) for metric in METRICS), *moved]
        cells.append(f"{mean(name, 'seconds'):.1f}")
        out.append("| " + " | ".join([*cells, *([f"{mean(name, 'lr'):.3f}"] if searched else [])]) + " |")
    return out


def linked(name: str) -> str:
    """A strategy's name, linked to its file; Flower's own rules are all in one."""
    file = Path(str(sys.modules[registry.entry(name).server.__module__].__file__)).name
    own = HERE.parent.parent / "strategies" / file
    return f"[{name}](../../strategies/{file})" if own.exists() else name


def cited(name: str) -> str:
    """Its paper, linked where arXiv has it."""
    paper = registry.entry(name).paper
    number = re.search(r"\d{4}\.\d{5}", paper)
    return f"[{paper.partition(',')[0]}](https://arxiv.org/abs/{number[0]})" if number else paper


if __name__ == "__main__":
    verb, *words = sys.argv[1:] or ["run"]
    verbs = {
        "run": run, "tuned": lambda: run(("tuned-pool", "tuned-mlp")), "check": check, "table": table,
        "collect": lambda: collect(Path(*words) if words else RUNS),
    }  # fmt: skip
    sys.exit(verbs[verb]() if verb in verbs else f"{verb!r}: {', '.join(verbs)}")
