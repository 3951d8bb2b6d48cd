"""CSV with a header: a column of texts or numbers, and one of labels; also tab-separated, compressed or not."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from fedfuse.config.schema import DataConfig
from fedfuse.data.dataset import Dataset
from fedfuse.data.inflate import check_room, gunzipped, room
from fedfuse.data.read_jsonl import read_rows
from fedfuse.errors import UserError

SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz")


def read(config: DataConfig, root: Path) -> Dataset:
    """Return the data set of `*.csv` or `*.tsv`; text becomes hashed word counts (`data.extra.text`).

    `data.inputs=*` takes all columns but those of labels and groups, `data.inputs=[a,b]` some; they must hold numbers.

    Raises
    ------
    UserError
        Where a file, a row or a column is missing or damaged.
    """
    return read_rows(config, root, SUFFIXES, rows)


def rows(path: Path) -> list[dict[str, Any]]:
    """Read one row per example; a column of which every value is a number holds numbers."""
    try:
        content = gunzipped(path) if path.suffix == ".gz" else path.open("rb")
        with io.TextIOWrapper(content, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, "excel-tab" if ".tsv" in path.suffixes else "excel", strict=True)
            header = next(reader, [])
            if len(header) == 1 and ";" in header[0]:
                held = header[0][:40]
                raise UserError(
                    f"{path}: the header holds {held!r}; save the file with commas (or tabs, as .tsv), no ';'"
                )
            found, taken, most = [], 0, room(path) if path.suffix == ".gz" else 2**63
            for cells in reader:
                taken += 64 + 16 * len(cells)  # a list, a place for each cell in it and in its column
                check_room(path, taken, most)
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise UserError(
                        f"{path}: line {reader.line_num} has {len(cells)} columns, the header {len(header)}; "
                        f"put text with commas into quotes"
                    )
                found.append(cells)
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num} is no CSV ({error})") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); expected CSV in UTF-8") from None
    if not found:
        raise UserError(f"{path} is empty; expected a header and one example per line")
    columns = [_typed(column) for column in zip(*found, strict=True)]
    return [dict(zip(header, values, strict=True)) for values in zip(*columns, strict=True)]


def _typed(column: tuple[str, ...]) -> list[Any]:
    for kind in (int, float):
        try:
            return [kind(value) for value in column]
        except ValueError:
            pass
    return [value or None for value in column]  # an empty cell is a missing value
