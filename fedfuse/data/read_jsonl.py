"""JSON lines, compressed or not: one example per line, with numbers, lists of numbers or text as input."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedfuse.config.schema import DataConfig
from fedfuse.data.build import Table, assemble, options
from fedfuse.data.cache import key_of, stamps, stored_dataset
from fedfuse.data.columns import (
    INPUTS,
    TARGETS,
    TEXT_OPTIONS,
    check_apart,
    column_inputs,
    column_of,
    labels_of,
    several,
    tokens_of,
)
from fedfuse.data.dataset import Dataset
from fedfuse.data.inflate import check_room, gunzipped, room
from fedfuse.data.locations import reason_of, split_files
from fedfuse.errors import UserError


def read(config: DataConfig, root: Path) -> Dataset:
    """Return the data set of `*.jsonl` or `*.jsonl.gz`; text becomes hashed word counts (`data.extra.text`).

    `data.inputs=*` and `data.inputs=[a,b]` are as in CSV.

    Raises
    ------
    UserError
        Where a file, a line or a key is missing or damaged.
    """
    return read_rows(config, root, (".jsonl", ".jsonl.gz", ".json.gz"), lines)


def read_rows(
    config: DataConfig, root: Path, suffixes: tuple[str, ...], rows: Callable[[Path], list[dict[str, Any]]]
) -> Dataset:
    """Return the data set of files of rows, each a mapping of names to numbers, lists of numbers or text.

    Raises
    ------
    UserError
        Where a file, a row or a name is missing or damaged.
    """
    extra = options(config, {"train": None, "test": None, **TEXT_OPTIONS})
    files = split_files(root, config.name, suffixes, extra)

    def build() -> Dataset:
        train = _table(config, files["train"] or files["other"], extra, rows)
        test = _table(config, files["test"], extra, rows) if files["test"] else None
        return assemble(config, train, test)

    if not extra["tokenizer"]:
        return build()
    used = [path for paths in files.values() for path in paths]
    used += sorted(Path(str(extra["tokenizer"])).expanduser().glob("*tokenizer*.json"))
    key = key_of(
        suffixes[0][1:],
        [config.name, config.inputs, config.targets, config.groups, config.test_fraction, extra],
        stamps(used),
    )
    return stored_dataset(key, root, build)  # tokenised once


def lines(path: Path) -> list[dict[str, Any]]:
    """Read one object per line; empty lines are skipped."""
    rows, taken, most = [], 0, room(path) if path.suffix == ".gz" else 2**63
    try:
        content = gunzipped(path) if path.suffix == ".gz" else path.open("rb")
        with io.TextIOWrapper(content, encoding="utf-8-sig") as file:  # Windows' editors put a mark before a file
            for number, line in enumerate(file, start=1):
                # of two letters Python makes an object of 64 bytes, and a place of 8 for it
                taken += len(line) + 8 * line.count(",") + 64 * (line.count("[") + line.count("{"))
                check_room(path, taken, most)
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise UserError(f"{path}: line {number} is no JSON object")
                    rows.append(row)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); expected JSON lines") from None
    except (ValueError, RecursionError) as error:  # among them numbers, or lists in lists, longer than Python reads
        reason = error.msg if isinstance(error, json.JSONDecodeError) else reason_of(error)
        raise UserError(f"{path}: line {number} is not JSON ({reason}); expected one object per line") from None
    if not rows:
        raise UserError(f"{path} is empty; expected one JSON object per line")
    return rows


def _with_several(config: DataConfig, path: Path, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with a column `*` or `a,b`, where it is asked for; where no input can be guessed, say so."""
    names, asked = list(found[0]), str(config.inputs)
    taken = several(config, names, path)
    if not taken:
        return found
    if config.groups:  # before there is a column that no file has
        column_of(config.groups, (), names, "groups", path)
    unfit = {name: i for name in taken if (i := _no_number(found, name)) is not None}
    if unfit:
        name, i = next(iter(unfit.items()))
        fit = [other for other in taken if other not in unfit]
        rest = f", or take the others: data.inputs=[{','.join(fit)}]" if fit and len(fit) <= 8 else ""
        raise UserError(
            f"{path}: data.inputs={asked}: example {i + 1}, column {name!r}: {str(found[i].get(name) or '')[:40]!r} "
            f"is no number; fill it in, or drop the row or the column{rest}"
        )
    return [{**row, asked: [float(row[name]) for name in taken]} for row in found]


def _no_number(found: list[dict[str, Any]], name: str) -> int | None:
    """The first row whose value is no number; a text that would be one is, where another made its column text."""
    if all(isinstance(row.get(name), int | float) for row in found):
        return None
    return next((i for i, row in enumerate(found) if not _numeric(row.get(name))), 0)


def _numeric(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _table(
    config: DataConfig, paths: list[Path], extra: dict[str, Any], read: Callable[[Path], list[dict[str, Any]]]
) -> Table:
    values: list[Any] = []
    labels: list[Any] = []
    groups: list[Any] = []
    for path in paths:
        rows = _with_several(config, path, read(path))
        present = list(rows[0])
        names = {
            "inputs": column_of(config.inputs, INPUTS, present, "inputs", path),
            "targets": column_of(config.targets, TARGETS, present, "targets", path),
        }
        check_apart(config, names["targets"], path)
        if config.groups:
            names["groups"] = column_of(config.groups, (), present, "groups", path)
        columns = {"inputs": values, "targets": labels, "groups": groups}
        for number, row in enumerate(rows, start=1):
            for role, name in names.items():
                if row.get(name) is None:
                    raise UserError(f"{path}: example {number} has no {name!r}")
                columns[role].append(row[name])
    where = f"data={config.name}"
    inputs, notes = column_inputs(values, extra, where, room(*paths))
    pad, vocabulary = tokens_of(extra) if isinstance(values[0], str) else (None, None)
    return Table(inputs, labels_of(labels, where), labels_of(groups, where) if groups else None, pad, vocabulary, notes)
