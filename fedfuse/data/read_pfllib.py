"""PFLlib's and HtFLlib's folders: `train/<client>.npz` and `test/<client>.npz`, used as given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from fedfuse.config.schema import DataConfig
from fedfuse.data.build import kind_of, options
from fedfuse.data.dataset import Dataset, Examples, Provided
from fedfuse.data.inflate import check_room, room
from fedfuse.data.unpickle import read_client
from fedfuse.errors import UserError

CLASSES = 1_000_000  # a label of a billion takes ten bytes of a file, and a name for each below it


def read(config: DataConfig, root: Path) -> Dataset:
    """Return the clients' data; test files are personal tests, there is no validation or global test.

    Raises
    ------
    UserError
        Where a file is missing, damaged or refused.
    """
    options(config, {})
    files = (path for path in (root / "train").glob("*.npz") if path.is_file())
    names = sorted((path.stem for path in files), key=lambda name: (len(name), name))
    if not names:
        raise UserError(f"data={config.name}: no client under {root / 'train'}; expected train/0.npz, test/0.npz, …")
    paths = [(root / "train" / f"{name}.npz", root / "test" / f"{name}.npz") for name in names]
    splits, taken = [], 0
    most = room(*(path for pair in paths for path in pair if path.is_file()))  # each file has room of its own, too
    for train_path, test_path in paths:
        train = _pair(train_path)
        splits.append((train, _pair(test_path) if test_path.is_file() else (train[0][:0], train[1][:0])))
        taken += sum(array.nbytes for pair in splits[-1] for array in pair)
        check_room(root, taken, most)
    count = _class_count(root / "config.json")
    return provided_dataset(config, names, splits, count)


def _pair(path: Path) -> tuple[np.ndarray, np.ndarray]:
    found = read_client(path)
    inputs, labels = np.asarray(found["x"]), np.asarray(found["y"]).reshape(-1)
    if inputs.dtype.kind not in "fiub" or labels.dtype.kind not in "iuf":
        raise UserError(f"{path}: x is {inputs.dtype}, y is {labels.dtype}; expected numbers")
    if len(inputs) != len(labels):
        raise UserError(f"{path}: {len(inputs)} inputs but {len(labels)} labels")
    return inputs, labels


def _class_count(path: Path) -> int:
    try:
        return int(json.loads(path.read_text())["num_classes"]) if path.is_file() else 0
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return 0


def provided_dataset(
    config: DataConfig,
    names: list[str],
    splits: list[tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]],
    count: int = 0,
    test: tuple[np.ndarray, np.ndarray] | None = None,
) -> Dataset:
    """Join clients' (train, personal test) into one data set that remembers whose rows are whose.

    Parameters
    ----------
    count : int
        Number of classes that the data declares; more are taken where labels need them.
    test : (inputs, labels), optional
        A global test set that came with the data.
    """
    pieces: list[Any] = [piece for pair in splits for piece in pair]
    filled = [inputs for inputs, _ in pieces if len(inputs)]
    if not filled:
        raise UserError(f"data={config.name}: no client has an example")
    sizes = np.array([[len(train[1]), 0, len(personal[1])] for train, personal in splits])
    ends = np.cumsum(sizes.ravel()).reshape(sizes.shape)
    offsets = np.column_stack([ends[:, 0] - sizes[:, 0], ends]).astype(np.int64)
    if len({inputs.shape[1:] for inputs in filled}) != 1:
        raise UserError(f"data={config.name}: clients' inputs have several shapes; expected one")
    try:
        inputs, kind = kind_of(np.concatenate(filled))
        labels = np.concatenate([labels for _, labels in pieces]).astype(np.int64)
        # Each split's own conversion could disagree on layout, so the global test follows the clients' shape.
        held = None if test is None else Examples(kind_of(test[0])[0], test[1].astype(np.int64))
    except ValueError as error:
        raise UserError(f"data={config.name}: {error}") from None
    top = int(max(labels.max(), -1 if held is None else held.targets.max(initial=-1)))
    if (classes := max(count, top + 1)) > CLASSES:
        raise UserError(f"data={config.name}: {classes} classes; allowed are {CLASSES}")
    return Dataset(
        name=config.name,
        train=Examples(inputs, labels),
        test=held,
        classes=tuple(str(label) for label in range(classes)),
        kind=kind,
        provided=Provided(offsets, tuple(names)),
    )
