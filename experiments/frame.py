"""What studies have in common: a list of public commands, carried out one after another or elsewhere, then collected.

python experiments/<study>/study.py commands [PART …]   # prints them, one a line, to be run anywhere in any order
python experiments/<study>/study.py run [PART …]        # carries out what is not there yet, then collects
python experiments/<study>/study.py collect             # reads what the commands left into results.csv
python experiments/<study>/study.py table               # prints README.md's tables from results.csv
"""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedfuse.results.run_data import RunRecord


@dataclass(frozen=True)
class Part:
    """One public command, and the folder where it leaves its runs.

    Attributes
    ----------
    verb : {"run", "compare"}
    words : tuple of str
    out : Path
        From where the study is started.
    """

    verb: str
    words: tuple[str, ...]
    out: Path

    @property
    def command(self) -> str:
        """As one types it."""
        return " ".join(["fedfuse", self.verb, *map(quoted, self.words), f"out={self.out}"])

    @property
    def done(self) -> bool:
        """Whether there is nothing left to do; a sweep finds out by itself."""
        return self.verb == "run" and (self.out / "summary.json").exists()

    def carry_out(self) -> int:
        """Run it; an interrupted run goes on after its last complete round, as a sweep does by itself.

        The code that such a run names is the study's own, which is why it may be run.
        """
        if self.done:
            return 0
        goes_on = self.verb == "run" and (self.out / "checkpoint").exists()
        asked = ["resume", str(self.out), "--allow-code"] if goes_on else [self.verb, *self.words, f"out={self.out}"]
        print(f"fedfuse resume {self.out}" if goes_on else self.command, flush=True)
        return subprocess.call([sys.executable, "-m", "fedfuse.cli", *asked], stdout=subprocess.DEVNULL)


def quoted(word: str) -> str:
    """A word as a shell takes it."""
    return f'"{word}"' if set(word) & set(" ?'[]{}*;&|<>()") else word


def records(parts: Iterable[Part]) -> Iterator[tuple[Part, RunRecord]]:
    """What the parts that were run left, run by run; says what cannot be read."""
    from fedfuse.results.run_data import find

    for part in parts:
        found, skipped = find([part.out]) if part.out.exists() else ([], [])
        for line in skipped:
            print(f"skipped: {line}", file=sys.stderr)
        for one in found:
            yield part, one


def write(results: Path, fields: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write one line a run, in an order that does not depend on who ran first."""
    with results.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(fields)
        writer.writerows(sorted([str(cell) for cell in row] for row in rows))


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean and half-width of the 95 % t interval over seeds."""
    from fedfuse.results.statistics import mean_interval

    one = mean_interval(list(values))
    return f"{one.mean:.{digits}f}" + (f" ± {one.high - one.mean:.{digits}f}" if one.high is not None else "")


def main(
    parts: Callable[[Sequence[str]], Sequence[Part]], collect: Callable[[], object], table: Callable[[], object]
) -> None:
    """What `study.py` does with its words.

    Parameters
    ----------
    parts : callable
        The parts that words name; of no word, all.
    collect, table : callable
        Read what all parts left into results.csv; print the tables.
    """
    verb, *names = sys.argv[1:] or ["run"]
    if verb == "commands":
        print("\n".join(part.command for part in parts(names)))
    elif verb == "table":
        table()
    elif verb in ("run", "collect"):
        for part in parts(names) if verb == "run" else ():
            if code := part.carry_out():
                sys.exit(code)
        collect()
        table()
    else:
        sys.exit(f"{verb!r}: commands, run, collect or table")
