"""Hugging Face parquet: encoded images, lists of numbers, plain columns or text, with a label column."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

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
from fedfuse.data.inflate import room
from fedfuse.data.locations import split_files
from fedfuse.data.parquet_columns import columns, joined, schema
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
        stamps(used),
    )
    return stored_dataset(key, root, lambda: _build(config, files, extra))


def _build(config: DataConfig, files: dict[str, list[Path]], extra: dict[str, Any]) -> Dataset:
    domains = files["other"] if len(files["other"]) > 1 and not config.groups else []
    train, classes = _table(config, files["train"] or files["other"], extra, domains)
    test = _table(config, files["test"], extra, [])[0] if files["test"] else None
    return assemble(config, train, test, classes, [path.stem for path in domains] or None)


def _table(
    config: DataConfig, paths: list[Path], extra: dict[str, Any], domains: list[Path]
) -> tuple[Table, list[str] | None]:
    parts: list[Any] = []
    labels, groups = [], []
    classes = None
    encoded = False
    where = f"data={config.name}"
    for path in paths:
        about = schema(path)
        present = list(about.names)
        target = column_of(config.targets, TARGETS, present, "targets", path)
        check_apart(config, target, path)
        together = several(config, present, path)
        names = together or [column_of(config.inputs, INPUTS, present, "inputs", path)]
        group = [column_of(config.groups, (), present, "groups", path)] if config.groups else []
        found = columns(path, [*names, target, *group])
        rows: Any = found[names[0]]
        if together:
            rows = np.stack([_number(found[name], name, path) for name in names], axis=1)
        elif isinstance(rows[0], dict) and rows[0].get("bytes") is not None:
            rows, encoded = [row["bytes"] for row in rows], True
        elif isinstance(rows[0], bytes):
            encoded = True
        parts.append(rows)
        labels.append(labels_of(found[target], path))
        classes = classes or _class_names(about, target)
        if group:
            groups.append(labels_of(found[group[0]], path))
        elif domains:
            groups.append(np.full(len(rows), domains.index(path), dtype=np.int64))
    values, most = joined(parts, where), room(*paths)
    notes: tuple[str, ...] = ()
    if encoded:
        inputs = decode(list(values), extra["size"], where, most)
    else:
        inputs, notes = column_inputs(values, extra, where, most)
    pad, vocabulary = tokens_of(extra) if isinstance(values[0], str) else (None, None)
    whose = np.concatenate(groups) if groups else None
    return Table(inputs, np.concatenate(labels), whose, pad, vocabulary, notes), classes


def _number(found: Any, name: str, path: Path) -> np.ndarray:
    if not isinstance(found, np.ndarray) or found.ndim > 1:
        raise UserError(f"{path}: data.inputs: column {name!r} holds no numbers; among several, each must")
    return found.astype(np.float32)


def _class_names(about: pyarrow.Schema, target: str) -> list[str] | None:
    """Read the names that `datasets` keeps in the schema for a ClassLabel column."""
    try:
        described = json.loads((about.metadata or {})[b"huggingface"])
        found = described["info"]["features"][target]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in found] if isinstance(found, list) else None
