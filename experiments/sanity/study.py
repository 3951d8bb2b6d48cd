"""Does every strategy, as it comes, do what its paper says? No default passes by accident.

    python experiments/sanity/study.py run       # resumable: the same command goes on where it stopped
    python experiments/sanity/study.py check     # reads results.json; says what does not hold, exit 1 if anything
    python experiments/sanity/study.py table     # writes README.md's tables from results.json

Every run is the public command; `EXPECTED` says what each strategy has to reach, in words and numbers.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from fedfuse.config import registry

HERE = Path(__file__).parent
RUNS = Path("runs/sanity")
RESULTS = HERE / "results.json"
CHANCE = 0.1
COMMON = [
    "clients=10", "rounds=10", "partition=dirichlet", "train.epochs=5", "evaluate.every=100", "seed=0,1,2",
    "runtime=inline", "runtime.parallel=2",
]  # fmt: skip
COMMANDS = {
    "digits": ["data=digits", "partition.alpha=0.3", *COMMON],
    "mnist": ["data=mnist", "data.limit=1000", "data.test_limit=1000", "model=mlp", "partition.alpha=0.1", *COMMON],
}
HARDER = "mnist"
TEXTS = ("fedmkt", "proxy_tuning")  # of language models: experiments/tokenisers
METRICS = ("accuracy/global", "accuracy/personal", "accuracy/personal_worst10")


class Expected(NamedTuple):
    """What a strategy has to reach on digits, means over seeds; and why it may be as local training is, if it may.

    On the harder set, where most clients hold two or three classes, it is a floor for all alike: twice chance
    on the global set for whom digits ask 40 %, above chance for the others, and twice chance on personal test sets;
    `harder_as_local` says why a strategy may there be as local training is that on digits may not.
    """

    words: str
    least_global: float
    least_personal: float
    as_local: str = ""
    harder_as_local: str = ""

    def least(self, data: str) -> tuple[float, float]:
        """Floors of the global and the personal accuracy on a set."""
        if data != HARDER:
            return self.least_global, self.least_personal
        return (2 * CHANCE if self.least_global >= 4 * CHANCE else 1.1 * CHANCE), 2 * CHANCE

    def like_local(self, data: str) -> str:
        """Why no figure need differ from local training's on a set; empty where one has to."""
        return self.as_local or (self.harder_as_local if data == HARDER else "")


AVERAGE = Expected("one averaged model knows all classes: near pooled training on the global set", 0.85, 0.8)
MERGED = Expected("one merged model knows all classes, round after round", 0.8, 0.8)
ROBUST = Expected("a robust rule gives up some accuracy for it, and is far above chance", 3 * CHANCE, 3 * CHANCE)
ADAPTIVE = Expected("an adaptive server optimiser, untuned: far above chance", 3 * CHANCE, 3 * CHANCE)
PERSONAL = Expected("a personal part keeps own classes, and the rest is learnt together", 2 * CHANCE, 0.85)
TAUGHT = Expected("clients taught on the transfer set know classes they do not hold", 0.7, 0.75)
STUDENT = Expected("the server's student learns what all clients know", 4 * CHANCE, 0.7)
ADAPTER = Expected("a few trained numbers on a frozen random network: above twice chance", 2 * CHANCE, 2 * CHANCE)
EXPECTED: dict[str, Expected] = {
    "centralized": Expected("the upper bound: all data at one place", 0.9, 0.9),
    "local": Expected("the lower bound: own classes only", 2 * CHANCE, 0.8, "it is local training"),
    **dict.fromkeys(("fedavg", "fedprox", "fednova", "scaffold", "feddyn", "moon"), AVERAGE),
    **dict.fromkeys(("fedgen", "feddf", "fedftg", "fedhkd"), AVERAGE),
    **dict.fromkeys(("flwr_fedavg", "flwr_fedprox", "flwr_fedavgm"), AVERAGE),
    **dict.fromkeys(("flwr_fedmedian", "flwr_fedtrimmedavg", "flwr_krum", "flwr_multikrum", "flwr_bulyan"), ROBUST),
    **dict.fromkeys(("flwr_fedadagrad", "flwr_fedadam", "flwr_fedyogi", "flwr_qfedavg"), ADAPTIVE),
    **dict.fromkeys(("ditto", "fedper", "fedrep"), PERSONAL),
    "fd": PERSONAL._replace(
        words="class means of logits travel: own classes are told apart better",
        harder_as_local="nobody is taught a class that it lacks, and who holds two or three has little to tell apart",
    ),
    **dict.fromkeys(("regmean", "fisher", "task_arithmetic", "ties", "sce", "dare"), MERGED),
    "twin_merging": MERGED._replace(words="merged weights, and a sparse vector of one's own", least_personal=0.85),
    "fedbn": AVERAGE._replace(words="without a norm in the model it is FedAvg"),
    **dict.fromkeys(("knfu", "fedmd"), TAUGHT),
    "ktpfl": PERSONAL._replace(words="personal mixtures at T = 10: a gentle pull towards the others"),
    "comet": PERSONAL._replace(words="a cluster's mean as regulariser of local training"),
    "cofed": PERSONAL._replace(words="pseudo-labels of own classes, voted once half-way"),
    "selectivefd": PERSONAL._replace(
        words="few clients speak of few rows, so little is taught, and nothing wrong",
        harder_as_local="where clients hold two or three classes how many rows anybody speaks of differs as widely "
        "between seeds as what they gain (13 points on the global set, ± 16)",
    ),
    **dict.fromkeys(("dsfl", "cfd", "scarlet", "fedet"), STUDENT),
    "gaussian_heads": Expected("the pooled data's linear discriminant on random features, in one round", 0.88, 0.88),
    "fedov": STUDENT._replace(words="who knows a row teaches the student: all classes", least_global=0.7),
    **dict.fromkeys(("dense", "coboosting"), STUDENT._replace(
        words="a student taught on generated inputs alone knows all classes", least_global=0.7, least_personal=0.7
    )),
    **dict.fromkeys(("fml", "fedkd"), Expected(
        "the common network knows all classes; a client's own goes on as in local training", 0.7, 0.85
    )),
    "fedproto": PERSONAL._replace(as_local="class means alone travel: nobody is taught a class that it lacks"),
    "fedd2s": PERSONAL._replace(
        words="class distributions of shallow layers alone: local training, a little helped",
        as_local="nobody is taught a class that it lacks",
    ),
    "fedka": AVERAGE._replace(words="averaged, and aligned to a target that is of the same kind here"),
    "kafal": Expected("a tenth of the labels, then three twentieths, five rounds each: far above chance", 0.3, 0.3),
    "fednano": Expected("adapters before a frozen random language model: above twice chance", 2 * CHANCE, 2 * CHANCE),
    "fedgkt": Expected(
        "the server's tail sees everybody's features: own classes are known", 2 * CHANCE, 0.8,
        harder_as_local="a client is scored by its own extractor and head, which never see a class that it lacks",
    ),
    **dict.fromkeys(
        ("fedit", "ffa_lora", "fedex_lora", "flora", "flexlora", "hetlora", "rolora", "fedsvd", "fed_sb"),
        ADAPTER,
    ),
    "fedsa_lora": ADAPTER._replace(as_local="A alone travels; B and the head, which tell classes apart, stay at home"),
}  # fmt: skip


def run() -> int:
    """Carry out all runs, then collect their final figures and check them."""
    for data, command in COMMANDS.items():
        words = ["strategy=" + ",".join(sorted(set(registry.listed()) - set(TEXTS))), *command]
        print("fedfuse compare", *words, flush=True)
        line = [sys.executable, "-m", "fedfuse.cli", "compare", *words, f"out={RUNS / data}"]
        if code := subprocess.call(line, stdout=subprocess.DEVNULL):
            return code
    return collect()


def collect() -> int:
    """Write `results.json`: by set, strategy and seed, figures, bytes, seconds and notes; and README's tables."""
    from fedfuse.results.run_data import find

    found: dict[str, Any] = read() if RESULTS.exists() else {}
    for data in COMMANDS:
        if not (RUNS / data).exists():
            continue
        runs, skipped = find([RUNS / data])
        for line in skipped:
            print(f"skipped: {line}")
        found[data] = {}
        for one in sorted(runs, key=lambda run: (run.strategy, run.seed)):
            summary = one.summary or {}
            found[data].setdefault(one.strategy, {})[str(one.seed)] = {
                **{metric: round(one.final[metric], 6) for metric in METRICS},
                "up_bytes": summary["traffic"]["up_bytes"],
                "down_bytes": summary["traffic"]["down_bytes"],
                "seconds": round(summary["seconds"]["rounds"], 2),
                "notes": summary["notes"],
            }
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


def check() -> int:
    """Print what does not hold."""
    whole, bad = read(), 0
    for data in COMMANDS:
        found = whole.get(data, {})
        for name in sorted(set(registry.listed()) - set(TEXTS) | set(EXPECTED)):
            if name not in EXPECTED:
                lines = ["say in EXPECTED what it has to reach"]
            else:
                lines = faults(data, found, name) if name in found else []
            for line in lines:
                print(f"{data}: {name}: {line}")
            bad += len(lines)
        missing = sorted(set(registry.listed()) - set(TEXTS) - set(found))
        print(f"{data}: {len(found)} strategies" + (f", not run: {' '.join(missing)}" if missing else ""))
        bad += len(missing)
    print(f"{bad} faults")
    return 1 if bad else 0


def table() -> int:
    """Write one line a strategy into README.md, best on the global set of digits first."""
    readme = HERE / "README.md"
    parts = readme.read_text(encoding="utf-8").split("<!-- table -->")
    lines = [f"\n\n## {data}\n\n" + "\n".join(rows(found)) for data, found in read().items()]
    lines.append("\n\n## What is expected\n\n" + "\n".join(expectations()))
    readme.write_text("<!-- table -->".join([parts[0], "".join(lines) + "\n\n", parts[2]]), encoding="utf-8")
    return 0


def expectations() -> list[str]:
    """One line for all strategies of which the same is expected, with its floors on digits."""
    groups: dict[Expected, list[str]] = {}
    for name, want in EXPECTED.items():
        groups.setdefault(want, []).append(f"`{name}`")
    return [
        f"- {want.words} (global at least {100 * want.least_global:.0f} %, personal {100 * want.least_personal:.0f} %)"
        f"{f'; may be as local training is: {want.as_local}' if want.as_local else ''}"
        f"{f'; may be so on {HARDER}: {want.harder_as_local}' if want.harder_as_local else ''}: {', '.join(names)}"
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

    out = ["| strategy | paper | global % | personal % | worst tenth % | up MB | down MB | s |"]
    out.append("|---" * 8 + "|")
    for name in sorted(found, key=lambda n: mean(n, METRICS[0]), reverse=True):
        moved = [f"{mean(name, key) / 1e6:.2f}" for key in ("up_bytes", "down_bytes")]
        cells = [linked(name), cited(name), *(cell(name, metric) for metric in METRICS), *moved]
        out.append("| " + " | ".join([*cells, f"{mean(name, 'seconds'):.1f}"]) + " |")
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
    verbs = {"run": run, "collect": collect, "check": check, "table": table}
    sys.exit(verbs.get((sys.argv[1:] or ["run"])[0], run)())
