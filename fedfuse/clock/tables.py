"""CSV tables of a user's devices and intervals: a header, then numbers; every mistake names its line."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedfuse.config.files import read_text
from fedfuse.errors import UserError, one_line

MOST = 1 << 28  # bytes


def numbers(path: Path, needed: Sequence[str], optional: Sequence[str] = ()) -> Iterator[tuple[int, dict[str, float]]]:
    """Each row of a table with its line, as numbers by column; an empty cell of an optional column is left out.

    Raises
    ------
    UserError
        If the file cannot be read, a column is missing or unknown, or a cell is no number.
    """
    try:
        reader = csv.DictReader(io.StringIO(read_text(path, MOST)), skipinitialspace=True)
        columns = list(reader.fieldnames or ())
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)})") from error
    known = (*needed, *optional)
    if missing := [name for name in needed if name not in columns]:
        raise UserError(f"{path}: has no column {missing[0]}; needed are {', '.join(needed)}")
    if unknown := [name for name in columns if name not in known]:
        raise UserError(f"{path}: unknown column {one_line(unknown[0], 40)!r}; allowed are {', '.join(known)}")
    for row in reader:
        yield reader.line_num, _read(path, reader.line_num, row, set(optional))


def _read(path: Path, line: int, row: dict[str, str | None], optional: set[str]) -> dict[str, float]:
    out = {}
    for name, text in row.items():
        if name in optional and not (text or "").strip():
            continue
        try:
            value = float(text or "")
        except (TypeError, ValueError):
            raise UserError(f"{path}, line {line}: {name}={one_line(text or '', 40)!r}; a number is needed") from None
        if value != value:
            raise UserError(f"{path}, line {line}: {name}=nan; a number is needed")
        out[name] = value
    if (client := out["client"]) < 0 or client % 1:
        raise UserError(f"{path}, line {line}: client={client:g}; allowed are whole numbers from 0")
    return out
