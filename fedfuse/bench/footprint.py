"""What whole commands cost: seconds to the end of the first round, and memory as cohorts and client state grow.

`fedfuse bench startup cohort-memory state-memory` measures; figures join the others in bench.json.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fedfuse.errors import WorldError

MIB = 2**20
LOGISTIC = (
    "strategy=fedavg", "data=digits", "model=custom", "model.build=fedfuse.bench.contestants:linear", "clients=100",
    "participation=0.5", "partition=iid", "train.epochs=1", "train.batch_size=10", "rounds=1",
)  # fmt: skip
BUDGET = 1000  # MiB, for 2,000 clients of three architectures with 1.0 to 1.1 MB of weights of their own
STATEFUL = (
    "strategy=local", "data=mnist", "model.pool=[mlp_wide@0.6,mlp@2.3,lenet@2.4]", "clients=2000", "partition=prior",
    "partition.examples=20", "participation=1", "train.epochs=1", "train.batch_size=10", "rounds=2",
    "evaluate.every=2", "data.test_limit=20", f"runtime.memory={BUDGET}",
)  # fmt: skip


def _fedfuse(words: Iterable[str], out: str) -> list[str]:
    return [sys.executable, "-m", "fedfuse.cli", "run", *words, f"out={out}"]


def _until(command: list[str], reached: Callable[[str], bool]) -> float:
    """Seconds from a command's start to the first line of its output that `reached` is true of; then it is ended.

    Raises
    ------
    WorldError
        If there is no such line.
    """
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        process.stdin.write("1\n")  # contestants play as many rounds as a line says
        process.stdin.flush()
        seconds = next((time.perf_counter() - started for line in process.stdout if reached(line)), None)
        process.stdin.close()
        process.stdout.read()
    if seconds is None:
        raise WorldError(f"startup: no round was played by {' '.join(command[1:])}")
    return seconds


def startup(times: int = 3) -> dict[str, Any]:
    """Seconds from the command to the end of round 1 of logistic regression, 50 of 100 clients; partition cached.

    Returns
    -------
    dict
        Per side (ray, inline, flower): seconds, and their median. Sides take turns; a first turn warms the caches.
    """
    flower = [sys.executable, "-m", "fedfuse.bench.play", "flower", "logistic", "100"]
    found: dict[str, list[float]] = {"ray": [], "inline": [], "flower": []}
    with tempfile.TemporaryDirectory(prefix="fedfuse-bench-") as folder:
        for i in range(times + 1):
            for side, seconds in found.items():
                words = (*LOGISTIC, f"runtime={side}")
                command = flower if side == "flower" else _fedfuse(words, f"{folder}/{side}{i}")
                mark = "seconds" if side == "flower" else " 1/1 "
                seconds.append(_until(command, lambda line, mark=mark: mark in line))  # type: ignore[misc]
    return {side: {"seconds": s[1:], "median": statistics.median(s[1:])} for side, s in found.items()}


def cohort_memory() -> dict[str, Any]:
    """Peak resident memory (MiB) of a driver whose cohorts of 100 and 1,000 clients share 6.65 MB each.

    Both hear of 2,000 clients, so that both have had time to touch as much of the object store as they will.

    Returns
    -------
    dict
        Per cohort: the peak with the store's pages, which the workers share (`peak`), and without (`own`).
    """
    return {str(cohort): _peak(cohort) for cohort in (100, 1000)}


def _peak(cohort: int) -> dict[str, float]:
    command = [sys.executable, "-m", "fedfuse.bench.footprint", str(cohort)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(zip(("peak", "own"), map(float, done.stdout.split()[-2:]), strict=True))


def _drive(cohort: int) -> None:
    """Play rounds in this process and print its peaks."""
    from fedfuse.bench import contestants

    play = contestants.fedfuse_side(contestants.WORKLOADS["noop-large"], cohort, "ray", cohort)
    own = 0.0
    for _ in range(2000 // cohort):
        play()
        own = max(own, _status("RssAnon"))
    print(_status("VmHWM"), own)


def _status(key: str) -> float:
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) / 1024


def state_memory() -> dict[str, Any]:
    """Peak of the sum of PSS (the object store's mapped pages with it) over all processes of a run, in MiB.

    Returns
    -------
    dict
        `peak` with 2,000 clients, `base` with 20, their difference `grows`, and the `budget` it must keep.
    """
    base, _, _ = _stateful("clients=20")
    peak, seconds, state = _stateful()
    grows = {"grows": peak - base, "budget": BUDGET}
    return {"peak": peak, "base": base, **grows, "seconds": seconds, "on disk": state}


def _stateful(*more: str) -> tuple[float, float, float]:
    """Peak (MiB), seconds, and MiB that the run directory takes in the end."""
    with tempfile.TemporaryDirectory(prefix="fedfuse-bench-") as folder:
        words = [word for word in STATEFUL if not any(word.split("=")[0] == m.split("=")[0] for m in more)]
        process = subprocess.Popen(_fedfuse([*words, *more], f"{folder}/run"), stdout=subprocess.DEVNULL)
        seen: list[float] = [0.0]
        watch = threading.Thread(target=_watch, args=(process, seen))
        started = time.perf_counter()
        watch.start()
        code = process.wait()
        watch.join()
        if code:
            raise WorldError(f"state-memory: the run ended with {code}")
        kept = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file()) / MIB
        return max(seen), time.perf_counter() - started, kept


def _watch(process: subprocess.Popen[Any], seen: list[float]) -> None:
    while process.poll() is None:
        seen.append(sum(map(_pss, family(process.pid))))
        time.sleep(0.5)


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                parents[int(entry)] = int(Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:  # it ended meanwhile
                continue
    found = [pid]
    for one in found:  # grows while it is walked
        found += [child for child, parent in parents.items() if parent == one]
    return found


def _pss(pid: int) -> float:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0.0
    return int(text.split("Pss:")[1].split()[0]) / 1024 if "Pss:" in text else 0.0


MEASURES: dict[str, Callable[[], dict[str, Any]]] = {
    "startup": startup,
    "cohort-memory": cohort_memory,
    "state-memory": state_memory,
}

if __name__ == "__main__":
    _drive(int(sys.argv[1]))
