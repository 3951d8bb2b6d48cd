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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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


def drawn(
    where: Path, panels: Mapping[str, Mapping[str, Sequence[float]]], said: str, zero: bool = False, wide: float = 3.4
) -> None:
    """Draw means with 95 % t intervals over seeds, a panel beside another.

    Parameters
    ----------
    where : Path
        An SVG file.
    panels : mapping
        Of a title to a mapping of a row's name to its values by seed; rows from the top, as they come.
    said : str
        What the values are.
    zero : bool
        Draw a line at 0: the values are differences.
    wide : float
        Inches of a panel.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": where.parent.name, "font.size": 8}
    import matplotlib.pyplot as plt

    from fedfuse.results.statistics import mean_interval

    rows = max(map(len, panels.values()))
    plot, axes = plt.subplots(1, len(panels), figsize=(wide * len(panels), 0.9 + 0.24 * rows), squeeze=False)
    for axis, (title, found) in zip(axes[0], panels.items(), strict=True):
        spreads = [mean_interval(list(values)) for values in found.values()]
        halves = [0.0 if one.half_width is None else one.half_width for one in spreads]
        axis.errorbar([one.mean for one in spreads], range(len(found)), xerr=halves, fmt="o", ms=4, capsize=2, lw=1)
        axis.set_yticks(range(len(found)), found)
        axis.invert_yaxis()
        axis.set(title=title, xlabel=said)
        axis.grid(axis="x", lw=0.3)
        if zero:
            axis.axvline(0, color="black", lw=0.8)
    plot.tight_layout()
    plot.savefig(where, metadata={"Date": None})
    plt.close(plot)


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
