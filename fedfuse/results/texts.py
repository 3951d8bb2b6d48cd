"""Language models on the report page: bits per byte, exact matches, and what they answered."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fedfuse.config.files import read_text
from fedfuse.errors import UserError, printable
from fedfuse.results.run_data import SAMPLES, RunRecord
from fedfuse.results.sections import Table, columns, number, word
from fedfuse.results.setting import Group
from fedfuse.results.statistics import mean_interval
from fedfuse.results.table import TEXTS, decimal

FIGURES = {
    **TEXTS,
    "exact_match/global": "exact match % global",
    "exact_match/personal": "exact match % personal",
}
MOST = 24  # answers shown
LONGEST = 400  # characters of one


def scores(groups: Sequence[Group]) -> Table | None:
    """Return what texts cost after the last round, mean and half-width of the 95 % interval; None without texts."""
    shown = [name for name in FIGURES if any(name in run.final for one in groups for run in one.runs)]
    if not shown:
        return None
    lines = []
    for one in groups:
        cells = [word(one.label), number(len(one.runs), str(len(one.runs)))]
        for name in shown:
            scale = 100 if name.startswith("exact") else 1
            found = mean_interval([scale * run.final.get(name, math.nan) for run in one.runs])
            cells.append(number(found.mean, decimal(found)))
        lines.append(tuple(cells))
    note = (
        "Bits per byte: the loss of all predicted tokens over the UTF-8 bytes that they stand for, which no tokenizer "
        "changes; less is better. Exact match: answers that greedy generation would give word for word."
    )
    return Table("Texts", columns(":strategy", "n", *(FIGURES[name] for name in shown)), tuple(lines), note, "texts")


def answers(runs: Sequence[RunRecord], places: Mapping[Path, str]) -> Table | None:
    """Return what the models answered after their first and their last evaluated round; None where none did."""
    lines = []
    for run in runs:
        named = {file.stem.removeprefix("round-"): file for file in (run.dir / SAMPLES).glob("round-*.jsonl")}
        rounds = sorted(name for name in named if name.isdecimal())
        for name in dict.fromkeys([*rounds[:1], *rounds[-1:]]):
            round = int(name)
            for row in _rows(named[name]):
                cells = (word(printable(str(row.get(part, "")), LONGEST)) for part in ("prompt", "wanted", "said"))
                lines.append((word(places[run.dir]), number(round, str(round)), *cells))
    if not lines:
        return None
    note = f"{len(lines) - MOST} more are in the run directories." if len(lines) > MOST else ""
    heads = columns(":run", "round", ":prompt", ":wanted", ":said")
    return Table("What models answered", heads, tuple(lines[:MOST]), note, "answers")


def _rows(file: Path) -> Iterator[Mapping[str, object]]:
    try:
        found = [json.loads(line) for line in read_text(file).splitlines() if line.strip()]
    except (ValueError, OSError, RecursionError, UserError):  # a stranger's
        return
    yield from (row for row in found if isinstance(row, dict))
