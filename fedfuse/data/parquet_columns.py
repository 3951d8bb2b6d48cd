"""Columns of a parquet file, of which no more is decoded than there is room for: pages of few bytes have many rows."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedfuse.data.inflate import check_room, room
from fedfuse.data.locations import reason_of
from fedfuse.errors import UserError

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.parquet import ParquetFile

ROWS = 2**16  # decoded at once, at most
TEXT = 64  # bytes that Python takes for the shortest text


def schema(path: Path) -> pyarrow.Schema:
    """What columns a file has.

    Raises
    ------
    UserError
        If it is no parquet file.
    """
    with _opened(path) as file:
        return file.schema_arrow


def columns(path: Path, names: Sequence[str]) -> dict[str, np.ndarray | list[Any]]:
    """Columns by name: numbers, and lists of numbers, as an array with a row each; all else as a list.

    Raises
    ------
    UserError
        If they are damaged, empty, not such values, or take more than there is room for.
    """
    parts: dict[str, list[Any]] = {name: [] for name in names}
    taken, most = 0, room(path)
    try:
        with _opened(path) as file:
            for group, rows in _steps(file, path, names, most):
                for batch in file.iter_batches(rows, [group], list(parts)):
                    for name in parts:
                        found = _values(batch.column(name), f"{path}: column {name!r}")
                        taken += found.nbytes if isinstance(found, np.ndarray) else sum(map(_size, found))
                        parts[name].append(found)
                    check_room(path, taken, most)
    except (OSError, ValueError, KeyError) as error:  # Arrow's own are among them
        raise _unreadable(path, error) from None
    return {name: joined(found, f"{path}: column {name!r}") for name, found in parts.items()}


def joined(parts: Sequence[Any], where: str) -> np.ndarray | list[Any]:
    """Parts of a column as one.

    Raises
    ------
    UserError
        If there is no row, or lists differ in length.
    """
    if not sum(map(len, parts)):
        raise UserError(f"{where} is empty; expected one value per example")
    if not all(isinstance(part, np.ndarray) for part in parts):
        return [value for part in parts for value in part]
    if len({part.shape[1:] for part in parts}) > 1:
        raise UserError(f"{where}: expected text, numbers or lists of numbers of one length")
    return np.concatenate(parts)


def _opened(path: Path) -> ParquetFile:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} cannot be read ({reason_of(error)}); expected a parquet file")


def _steps(file: ParquetFile, path: Path, names: Sequence[str], most: int) -> Iterator[tuple[int, int]]:
    """Groups of rows, and how many rows of each are decoded at once.

    What numbers take is known before. A text is no longer than its group's pages; yet each row may be the same one.
    """
    about, taken = file.metadata, 0
    for group in range(about.num_row_groups):
        longest = 1
        for i in range(about.num_columns):
            column, kind = about.row_group(group).column(i), about.schema.column(i)
            if not any(f"{kind.path}.".startswith(f"{name}.") for name in names):
                continue
            if kind.physical_type != "BYTE_ARRAY":
                taken += column.num_values * max(8, kind.length or 0)
            elif kind.max_repetition_level:
                raise UserError(f"{path}: column {kind.path!r}: expected text, numbers or lists of numbers")
            else:
                taken += column.num_values * TEXT
                longest += column.total_uncompressed_size
        check_room(path, taken, most)
        yield group, max(1, min(ROWS, most // longest))


def _values(column: pyarrow.Array, where: str) -> np.ndarray | list[Any]:
    import pyarrow
    from pyarrow import compute, types

    while isinstance(column, pyarrow.ExtensionArray):
        column = column.storage
    shape, damaged = [len(column)], False
    if types.is_struct(column.type):
        damaged = any(types.is_nested(field.type) for field in column.type)
    elif types.is_nested(column.type):
        while types.is_list(column.type) or types.is_large_list(column.type) or types.is_fixed_size_list(column.type):
            lengths = compute.list_value_length(column).unique()
            if column.null_count or len(lengths) != 1:
                break
            shape.append(lengths[0].as_py())
            column = column.flatten()
        damaged = not _numeric(column.type)
    if damaged or (_numeric(column.type) and column.null_count):
        raise UserError(f"{where}: expected text, numbers or lists of numbers of one length, none missing")
    if not _numeric(column.type):
        return column.to_pylist()
    found = column.to_numpy(zero_copy_only=False).reshape(shape)
    return found.astype(np.int64) if found.dtype.kind in "iu" else found


def _numeric(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    return types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)


def _size(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else ()
    return sys.getsizeof(value) + sum(map(sys.getsizeof, inner))
