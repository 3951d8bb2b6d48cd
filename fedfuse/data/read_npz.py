"""NumPy archives: one per split, one with both splits, or one per domain."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from fedfuse.config.schema import DataConfig
from fedfuse.data.build import Table, assemble, one_a_row, options
from fedfuse.data.columns import TARGETS, check_apart, column_of
from fedfuse.data.dataset import Dataset
from fedfuse.data.inflate import archive
from fedfuse.data.locations import reason_of, split_files
from fedfuse.errors import UserError

INPUTS = ("inputs", "x", "X", "data", "features", "images", "x_train")


def read(config: DataConfig, root: Path) -> Dataset:
    """Return the data set of an `.npz` file or a directory of them.

    Known forms: `train.npz` and `test.npz`; one archive with `x_train, y_train, x_test, y_test`; one archive;
    several archives, each a domain. `data.inputs`, `data.targets` and `data.groups` name the arrays.

    Raises
    ------
    UserError
        Where a file or an array is missing or damaged, or would need pickle.
    """
    extra = options(config, {"train": None, "test": None})
    files = split_files(root, config.name, (".npz",), extra)
    if files["train"]:
        train = _stack([_table(config, load(path), path) for path in files["train"]])
        test = _stack([_table(config, load(path), path) for path in files["test"]]) if files["test"] else None
        return assemble(config, train, test)
    paths = files["other"]
    if len(paths) == 1:
        arrays = load(paths[0])
        if config.inputs is None and "x_train" in arrays and "x_test" in arrays:
            splits = [Table(arrays[f"x_{name}"], _labels(arrays, f"y_{name}", paths[0])) for name in ("train", "test")]
            return assemble(config, splits[0], splits[1])
        return assemble(config, _table(config, arrays, paths[0]))
    tables = []
    for index, path in enumerate(paths):
        table = _table(config, load(path), path)
        if table.groups is None:
            table.groups = np.full(len(table.labels), index, dtype=np.int64)
        tables.append(table)
    return assemble(config, _stack(tables), None, None, None if config.groups else [path.stem for path in paths])


def load(path: Path) -> dict[str, np.ndarray]:
    """Read every array of an archive; nothing in it is ever unpickled, nor larger than there is room for."""
    try:
        with archive(path), np.load(path, allow_pickle=False) as arrays:
            return {name: _plain(arrays, name) for name in arrays.files}
    except (
        OSError,
        ValueError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
        AttributeError,
        MemoryError,
    ) as error:
        raise UserError(f"{path} cannot be read ({reason_of(error)}); expected an .npz of plain arrays") from None


def _plain(arrays: Any, name: str) -> np.ndarray:
    try:
        return arrays[name]
    except ValueError as error:
        if "Object arrays" not in str(error):
            raise
        raise ValueError(f"array {name!r} is of dtype object; save names with .astype(str)") from None


def _labels(arrays: dict[str, np.ndarray], name: str, path: Path) -> np.ndarray:
    if name not in arrays:
        raise UserError(f"{path}: no array {name!r}; it holds {', '.join(arrays)}")
    try:
        return one_a_row(arrays[name])
    except ValueError as error:
        raise UserError(f"{path}: array {name!r}: {error}") from None


def _table(config: DataConfig, arrays: dict[str, np.ndarray], path: Path) -> Table:
    present = list(arrays)
    inputs = arrays[column_of(config.inputs, INPUTS, present, "inputs", path)]
    target = column_of(config.targets, TARGETS, present, "targets", path)
    check_apart(config, target, path)
    labels = _labels(arrays, target, path)
    groups = None
    if config.groups:
        groups = arrays[column_of(config.groups, (), present, "groups", path)].reshape(-1)
    if len(inputs) != len(labels) or (groups is not None and len(groups) != len(labels)):
        raise UserError(f"{path}: {len(inputs)} inputs but {len(labels)} labels; expected as many of each")
    return Table(inputs, labels, groups)


def _stack(tables: list[Table]) -> Table:
    if len({table.inputs.shape[1:] for table in tables}) > 1:
        raise UserError(f"inputs of several shapes: {', '.join(str(table.inputs.shape[1:]) for table in tables)}")
    groups = [table.groups for table in tables if table.groups is not None]
    return Table(
        np.concatenate([table.inputs for table in tables]),
        np.concatenate([table.labels for table in tables]),
        np.concatenate(groups) if groups else None,
    )
