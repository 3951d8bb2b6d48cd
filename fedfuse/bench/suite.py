"""The command `fedfuse bench`: workloads against their limits and rivals, interleaved in one run."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedfuse.bench import footprint
from fedfuse.bench.contestants import COHORT, WORKLOADS
from fedfuse.compat.quiet import QUIET
from fedfuse.errors import UserError, nearest

USAGE = """\
fedfuse bench [WORKLOAD[@CLIENTS] …] [--against SIDE,…] [--rounds N] [--out DIR]

Workloads: noop (123 kB), noop-large (6.65 MB), logistic, mlp, cnn: 50 clients a round, 50 examples each, batch 10.
  fedmd, dsfl, knfu: a distillation round in which all clients take part: 1,000 rows, CNNs of their own (fedmd@20)
  fedmd-mlp, knfu-mlp: the same with MLPs of three architectures
  fed-sb: all clients fine-tune stories260K by adapters, 50 texts of 32 tokens each (fed-sb@20)
  flat: noop with 100, 1,000, 10,000, 100,000 and 1,000,000 clients, which take turns
  startup, cohort-memory, state-memory: whole commands; see `fedfuse.bench.footprint`
  default: all, at the sizes of docs/performance.md
Sides: fedfuse (Ray), inline, either with runtime.vectorize=auto (abreast, inline-abreast), plain (a torch loop, one
  thread), cores (that loop on every core at once), flower (its
  simulator), guest (the same Flower app on FedFuse's engine), pfl (pfl-research, two processes; needs
  `pip install pfl==0.6.0`)
Each side is a process of its own; sides take turns. A turn is a round, or as many as fill a second: a run's rounds
follow each other, and who has waited for others begins with cold caches. The first two turns warm up. N turns are
played, by default at least 5, and up to 25 while they take less than two minutes. A ratio is the median over turns of
what two sides took in the same one. guest, flower and pfl take turns with fedfuse and abreast by themselves, when the
others are done: what they leave running between their turns would slow the others down.
Writes bench.json and bench.svg into --out (default: bench/).
"""
SIDES = ("fedfuse", "abreast", "inline", "inline-abreast", "plain", "cores", "guest", "flower", "pfl")
RIVALS = ("guest", "flower", "pfl")
DEFAULT = (
    "noop@1000", "noop@10000", "noop-large@1000", "logistic@1000", "mlp@1000", "cnn@1000", "fedmd-mlp@20",
    "knfu-mlp@20", "fed-sb@20", "flat", "startup", "cohort-memory", "state-memory",
)  # fmt: skip
WARM = 2
TURN = 1.0  # seconds that a turn lasts at least
LEAST, MOST, ENOUGH = 5, 25, 120.0  # turns at least and at most, and seconds after which no more than the least


class Side:
    """One contestant's process."""

    def __init__(self, side: str, workload: str, clients: int, folder: Path) -> None:
        self.name, self.seconds, self.failed = side, [], ""  # type: str, list[float], str
        command = [sys.executable, "-m"]
        if side == "pfl":
            command += [
                "torch.distributed.run",
                "--nproc_per_node",
                "2",
                "--master_port",
                str(29500 + os.getpid() % 1000),
                "-m",
            ]
        command += ["fedfuse.bench.play", side, workload, str(clients)]
        environment = {**os.environ, **QUIET, "OMP_NUM_THREADS": "1", "FLWR_HOME": str(folder)}
        self.log = open(folder / f"{side}.log", "w+")  # noqa: SIM115 - closed in end()
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment,
            start_new_session=True,
        )  # fmt: skip
        self._wait("ready")

    def _wait(self, word: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(word):
                return line
        self.log.seek(0)
        said = [line for line in self.log.read().splitlines() if line.strip()]
        self.failed = said[-1][:200] if said else f"ended with {self.process.poll()}"
        return ""

    def turn(self) -> None:
        """Play one turn: the first is one round."""
        if self.failed:
            return
        try:
            assert self.process.stdin is not None
            rounds = math.ceil(TURN / self.seconds[-1]) if self.seconds else 1
            self.process.stdin.write(f"{rounds}\n")
            self.process.stdin.flush()
        except OSError as error:
            self.failed = str(error)
            return
        if line := self._wait("seconds"):
            self.seconds.append(float(line.split()[1]))

    def end(self) -> None:
        """End it: its input closes."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.log.close()

    @property
    def median(self) -> float:
        """Seconds of a round, median of the warm turns."""
        return statistics.median(self.seconds[WARM:]) if len(self.seconds) > WARM else float("nan")

    def over(self, other: Side) -> float:
        """What it took over what another took in the same turn, median: the machine has slow minutes and fast ones."""
        pairs = list(zip(self.seconds[WARM:], other.seconds[WARM:], strict=False))
        return statistics.median(mine / yours for mine, yours in pairs) if pairs else float("nan")


def contest(name: str, clients: int, sides: Sequence[str], rounds: int | None) -> dict[str, Any]:
    """Let sides take turns on one workload: ours with the limits, then once more with the rivals.

    Returns
    -------
    dict
        workload, clients, and `sides`: of each its warm turns (`rounds`: seconds of one round), milliseconds per client
        (median) and ratio, or why it failed; `rivals`: the same of the second time, ours with them.
    """
    rivals = [side for side in sides if side in RIVALS]
    ours = [side for side in sides if side in ("fedfuse", "abreast")]
    apart = rivals and len(ours) + len(rivals) < len(sides)  # else there is nobody whom they slow down
    found: dict[str, Any] = {"workload": name, "clients": clients}
    found["sides"] = in_turns(name, clients, [side for side in sides if not apart or side not in RIVALS], rounds)
    if apart:
        found["rivals"] = in_turns(name, clients, [*ours, *rivals], rounds)
        found["sides"] |= {side: found["rivals"][side] for side in rivals}
    return found


def in_turns(name: str, clients: int, sides: Sequence[str], rounds: int | None) -> dict[str, Any]:
    """What each of the sides took that played in turns."""
    with tempfile.TemporaryDirectory(prefix="fedfuse-bench-") as folder:
        playing = [Side(side, name, clients, Path(folder)) for side in sides]
        take_turns(playing, rounds)
    found: dict[str, Any] = {}
    cohort = WORKLOADS[name].cohort(clients)
    for side in playing:
        if side.failed:
            found[side.name] = {"failed": side.failed}
            continue
        found[side.name] = {"rounds": side.seconds[WARM:], "ms_per_client": side.median / cohort * 1e3}
        if not playing[0].failed:
            found[side.name]["ratio"] = side.over(playing[0])
    return found


def take_turns(playing: Sequence[Side], rounds: int | None = None) -> None:
    """Let sides play in turns, and end them; without a number of turns, as many as time allows."""
    started = time.perf_counter()
    try:
        for played in range(WARM + (rounds or MOST)):
            if rounds is None and played >= LEAST + WARM and time.perf_counter() - started > ENOUGH:
                break
            for side in playing:
                side.turn()
    finally:
        for side in playing:
            side.end()


def flat() -> dict[str, Any]:
    """A no-op client's cost with ever more clients registered, all sizes in turn: whether it grows.

    Returns
    -------
    dict
        ms_per_client by clients, and ratio: medians over turns of what a size took over what 100 took.
    """
    sizes = (100, 1000, 10000, 100000, 1000000)
    with tempfile.TemporaryDirectory(prefix="fedfuse-bench-") as folder:
        playing = [Side("fedfuse", "noop", clients, Path(folder)) for clients in sizes]
        take_turns(playing)
    if failed := [side.failed for side in playing if side.failed]:
        return {"failed": failed[0]}
    return {
        "ms_per_client": {n: side.median / COHORT * 1e3 for n, side in zip(sizes, playing, strict=True)},
        "ratio": {n: side.over(playing[0]) for n, side in zip(sizes, playing, strict=True)},
    }


MEASURES = {"flat": flat, **footprint.MEASURES}


def sides_of(workload: str, clients: int, chosen: Sequence[str]) -> list[str]:
    """The sides that can play: Flower's simulator does not reach 100,000 nodes, pfl only trains; ours distil."""
    out = []
    for side in chosen:
        if side == "flower" and clients > 10000:
            continue
        if WORKLOADS[workload].strategy != "fedavg" and side not in (
            "fedfuse",
            "abreast",
            "inline",
            "inline-abreast",
            "plain",
        ):
            continue
        if side == "pfl" and (not WORKLOADS[workload].trains or find_spec("pfl") is None):
            continue
        out.append(side)
    return out


def machine() -> dict[str, Any]:
    """What figures depend on."""
    from importlib.metadata import version

    load = os.getloadavg()
    return {
        "cores": len(os.sched_getaffinity(0)),
        "load_before": load[0],
        "platform": platform.platform(),
        "versions": {name: version(name) for name in ("torch", "ray", "flwr")},
        "date": time.strftime("%Y-%m-%d"),
    }


def _job(word: str) -> tuple[str, int]:
    """A workload and its number of clients, as `name` or `name@count`."""
    name, _, count = word.partition("@")
    if name not in WORKLOADS:
        raise UserError(f"{name}: no such workload; {nearest(name, [*WORKLOADS, *MEASURES])}")
    least = WORKLOADS[name].cohort(20)
    if count and (not count.isdecimal() or int(count) < least):
        raise UserError(f"{word}: at least {least} clients are needed")
    return name, int(count or (1000 if least == COHORT else least))


def command(argv: Sequence[str]) -> int:
    """Run the suite; 0 done.

    Raises
    ------
    UserError
        For an unknown workload, side or option.
    """
    words, chosen, out, picked = list(argv), list(SIDES), Path("bench"), []
    rounds: int | None = None
    if any(word in ("-h", "--help") for word in words):
        print(USAGE, end="")
        return 0
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if name in ("--against", "--rounds", "--out"):
            value = value if equals else words.pop(0) if words else ""
            if name == "--out":
                out = Path(value)
            elif name == "--against":
                chosen = ["fedfuse", *(side for side in value.split(",") if side != "fedfuse")]
            elif value.isdecimal() and int(value) >= 1:
                rounds = int(value)
            else:
                raise UserError(f"--rounds={value}: a number of at least 1 is needed")
        elif word.startswith("-"):
            raise UserError(f"{name}: no such option; allowed: --against, --rounds, --out")
        else:
            picked.append(word)
    if unknown := [side for side in chosen if side not in SIDES]:
        raise UserError(f"--against={unknown[0]}: unknown; {nearest(unknown[0], SIDES)}")
    measures = [word for word in picked or DEFAULT if word in MEASURES]
    jobs = [_job(word) for word in picked or DEFAULT if word not in MEASURES]
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": machine(), "cohort": COHORT, "contests": []}
    print(f"{'ms per client':<18}" + "".join(f"{side:>10}" for side in chosen))
    for name, clients in jobs:
        result = contest(name, clients, sides_of(name, clients, chosen), rounds)
        results["contests"].append(result)
        print(f"{name + '@' + str(clients):<18}" + "".join(f"{_cell(result, side):>10}" for side in chosen), flush=True)
        print(f"{'  × fedfuse':<18}" + "".join(f"{_ratio(result, side):>10}" for side in chosen), flush=True)
        (out / "bench.json").write_text(json.dumps(results, indent=1))
    for name in measures:
        results[name] = MEASURES[name]()
        print(f"{name}: {json.dumps(results[name])}", flush=True)
        (out / "bench.json").write_text(json.dumps(results, indent=1))
    if jobs:
        plot(results, chosen, out / "bench.svg")
    print(f"written: {out}")
    return 0


def _cell(result: dict[str, Any], side: str) -> str:
    found = result["sides"].get(side)
    if found is None:
        return "–"
    return f"{found['ms_per_client']:.3g}" if "ms_per_client" in found else "failed"


def _ratio(result: dict[str, Any], side: str) -> str:
    ratio = result["sides"].get(side, {}).get("ratio")
    return "" if ratio is None else f"{ratio:.2f}"


def plot(results: dict[str, Any], sides: Sequence[str], path: Path) -> None:
    """Draw milliseconds per client, one group of bars a workload, on a logarithmic scale."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    contests = results["contests"]
    figure, axes = plt.subplots(figsize=(2 + 1.2 * len(contests), 4), layout="constrained")
    width = 0.8 / len(sides)
    for k, side in enumerate(sides):
        values = [c["sides"].get(side, {}).get("ms_per_client", float("nan")) for c in contests]
        axes.bar([i + k * width for i in range(len(contests))], values, width, label=side)
    axes.set_yscale("log")
    axes.set_ylabel("ms per client (median round / clients of a round)")
    axes.set_xticks([i + 0.4 - width / 2 for i in range(len(contests))])
    axes.set_xticklabels([f"{c['workload']}\n{c['clients']:,} clients" for c in contests], fontsize=8)
    axes.legend(fontsize=8)
    figure.savefig(path)
    plt.close(figure)
