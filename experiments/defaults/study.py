"""Do open defaults stand where clients' validation examples would put them? Test figures are shown, never selected on.

    python experiments/defaults/study.py run [STRATEGY …]    # resumable: the same command goes on where it stopped
    python experiments/defaults/study.py commands            # the same as `fedfuse compare` commands, one a line
    python experiments/defaults/study.py table               # prints README.md's tables from results.csv

Every run is the public command. A setting is what one key of a strategy is set to, the others at their defaults.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from fedfuse.experiments.frame import Part, main, records, spread, write

HERE = Path(__file__).parent
RUNS = Path("runs/defaults")
RESULTS = HERE / "results.csv"
COMMON = (
    "data=digits", "data.validation=0.2", "evaluate.validation=true", "evaluate.every=10", "partition=dirichlet",
    "partition.alpha=0.3,0.1", "clients=10", "rounds=10", "train.epochs=5", "runtime=inline", "runtime.parallel=2",
    "seed=0,1,2",
)  # fmt: skip
SETTINGS: dict[str, dict[str, str]] = {
    "local": {},
    "fedavg": {},
    "fedproto": {"lam": "0.1,1,10"},
    "regmean": {"a": "0.5,0.9,1"},
    "fedhkd": {"threshold": "0,0.05,0.25"},
    "task_arithmetic": {"lam": "0.05,0.1,null,0.2,0.3"},
    "twin_merging": {"keep": "0,0.1,0.2,0.5,1"},
}
BESIDE = {"regmean": ("strategy.lam=1",)}  # its default when the study ran
FIELDS = ("strategy", "key", "value", "alpha", "seed", "validation", "personal", "global")
METRICS = FIELDS[5:]


def parts(words: Sequence[str]) -> list[Part]:
    """One sweep of each key, by the strategies that words name."""
    return [
        Part(
            "compare",
            (f"strategy={name}", *([f"strategy.{key}={values}"] if key else []), *BESIDE.get(name, ()), *COMMON),
            RUNS / f"{name}-{key}",
        )
        for name in words or SETTINGS
        for key, values in (SETTINGS[name] or {"": ""}).items()
    ]


def collect() -> None:
    """Write `results.csv`: one line a run."""
    rows = []
    for part, one in records(parts(())):
        if one.summary is None:
            continue  # it goes on
        key = part.out.name.partition("-")[2]
        figures = [f"{one.final[f'accuracy/{metric}']:.6f}" for metric in METRICS]
        value = one.config["strategy"][key] if key else ""
        rows.append((one.strategy, key, value, one.config["partition"]["alpha"], one.seed, *figures))
    write(RESULTS, FIELDS, rows)


def table() -> None:
    """Print each key's settings by mean validation accuracy, with 95 % t intervals over seeds."""
    from fedfuse.config import registry

    found: dict[tuple[str, str, str], dict[tuple[str, str], list[float]]] = defaultdict(lambda: defaultdict(list))
    with RESULTS.open() as file:
        for row in csv.DictReader(file):
            for metric in METRICS:
                found[row["strategy"], row["key"], row["value"]][metric, row["alpha"]].append(100 * float(row[metric]))

    def mean(setting: tuple[str, str, str]) -> float:
        both = [one for (metric, _), values in found[setting].items() if metric == "validation" for one in values]
        return sum(both) / len(both)

    print("| strategy | key | value | validation % | α = 0.3: personal | global | α = 0.1: personal | global |")
    print("|---" * 8 + "|")
    for setting in sorted(found, key=lambda s: (*s[:2], -mean(s))):
        name, key, value = setting
        default = str(getattr(registry.entry(name).hyper(), key)) if key else ""
        shown = ("null" if value in ("", "None") and key else value) + (
            " (default)" if key and same(default, value) else ""
        )
        cells = [name, key, shown, f"{mean(setting):.1f}"]
        for alpha in ("0.3", "0.1"):
            for metric in ("personal", "global"):
                cells.append(spread(found[setting][metric, alpha]))
        print("| " + " | ".join(cells) + " |")


def same(default: str, value: str) -> bool:
    """Whether a value read from the file is the default."""
    return value in (default, "") if default == "None" else value not in ("", "None") and float(default) == float(value)


if __name__ == "__main__":
    main(parts, collect, table)
