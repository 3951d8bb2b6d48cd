"""Hugging Face parquet: encoded images, lists of numbers, plain columns or text, with a label column."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedfuse.config.schema import DataConfig
from fedfuse.data.build import Table, assemble, options
from fedfuse.data.cache import key_of, stored_dataset
from fedfuse.data.columns import INPUTS, TARGETS, TEXT_OPTIONS, column_inputs, column_of, pad_of
from fedfuse.data.dataset import Dataset
from fedfuse.data.inflate import room, too_large
from fedfuse.data.locations import reason_of, split_files
from fedfuse.data.pixels import decode
from fedfuse.errors import UserError

if TYPE_CHECKING:
    import pyarrow


def read(config: DataConfig, root: Path) -> Dataset:
    """Return the data set of a directory of parquet files.

    Files named train and test are the splits; where no name says so, each file is a domain (its group).
    Decoded arrays are kept in the user's cache and memory-mapped from there.

    Raises
    ------
    UserError
        Where a file or column is missing or damaged.
    """
    extra = options(config, {"size": None, "train": None, "test": None, **TEXT_OPTIONS})
    files = split_files(root, config.name, (".parquet",), extra)
    used = [path for paths in files.values() for path in paths]
    key = key_of(
        "parquet",
        [config.name, config.inputs, config.targets, config.groups, config.test_fraction, extra],
        [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in used],
    )
    return stored_dataset(key, root, lambda: _build(config, files, extra))


def _build(config: DataConfig, files: dict[str, list[Path]], extra: dict[str, Any]) -> Dataset:
    domains = files["other"] if len(files["other"]) > 1 and not config.groups else []
    train, classes = _table(config, files["train"] or files["other"], extra, domains)
    test = _table(config, files["test"], extra, [])[0] if files["test"] else None
    return assemble(config, train, test, classes, [path.stem for path in domains] or None)


def _open(path: Path) -> pyarrow.Table:
    import pyarrow
    import pyarrow.parquet

    try:
        about = pyarrow.parquet.read_metadata(path)
        # what its pages hold, and a byte a value: a column of a million equal values is a page of a few
        size = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
        if (size := max(size, about.num_rows * about.num_columns)) > (most := room(path)):
            raise too_large(path, size, most)
        return pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read ({reason_of(error)}); expected a parquet file") from None


def _table(
    config: DataConfig, paths: list[Path], extra: dict[str, Any], domains: list[Path]
) -> tuple[Table, list[str] | None]:
    values: list[Any] = []
    labels, groups = [], []
    classes = None
    encoded = False
    for path in paths:
        table = _open(path)
        present = table.column_names
        target = column_of(config.targets, TARGETS, present, "targets", path)
        if config.inputs and "," in config.inputs:
            columns = [name.strip() for name in config.inputs.split(",")]
            for name in columns:
                column_of(name, (), present, "inputs", path)
            rows = np.stack([table[name].to_numpy() for name in columns], axis=1).astype(np.float32).tolist()
        else:
            rows = table[column_of(config.inputs, INPUTS, present, "inputs", path)].to_pylist()
        if rows and isinstance(rows[0], dict) and rows[0].get("bytes") is not None:
            rows, encoded = [row["bytes"] for row in rows], True
        elif rows and isinstance(rows[0], bytes):
            encoded = True
        values.extend(rows)
        labels.append(table[target].to_numpy())
        classes = classes or _class_names(table, target)
        if config.groups:
            groups.append(table[column_of(config.groups, (), present, "groups", path)].to_numpy())
        elif domains:
            groups.append(np.full(len(rows), domains.index(path), dtype=np.int64))
    where = f"data={config.name}"
    most = room(*paths)
    inputs = decode(values, extra["size"], where, most) if encoded else column_inputs(values, extra, where, most)
    pad = pad_of(extra) if isinstance(values[0], str) else None
    return Table(inputs, np.concatenate(labels), np.concatenate(groups) if groups else None, pad), classes


def _class_names(table: pyarrow.Table, target: str) -> list[str] | None:
    """Read the names that `datasets` keeps in the schema for a ClassLabel column."""
    try:
        described = json.loads((table.schema.metadata or {})[b"huggingface"])
        found = described["info"]["features"][target]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in found] if isinstance(found, list) else None
