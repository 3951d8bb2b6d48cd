"""Data that a Python program holds already: arrays, tensors, or a torch `Dataset`, as a `fedfuse.data.Dataset`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedfuse.config.schema import DataConfig
from fedfuse.data.build import Table, assemble
from fedfuse.data.dataset import Dataset
from fedfuse.errors import UserError, in_words

WANTED = "expected (x, y), (x, y, x_test, y_test), a torch Dataset of (x, y), or {'train': …, 'test': …} of these"


def dataset(value: Any, test_fraction: float = 0.2) -> Dataset:
    """Make a data set.

    Parameters
    ----------
    value
        `(x, y)` or `(x, y, x_test, y_test)` of arrays or tensors; a torch `Dataset` whose items are `(x, y)`, x being
        an array, a tensor or a PIL image; a mapping with `train` and perhaps `test`; a `fedfuse.data.Dataset` as it is.
    test_fraction : float
        What is cut off as the global test set where there is none.

    Raises
    ------
    UserError
        For anything else, and for items that differ in shape.
    """
    if isinstance(value, Dataset):
        return value
    train, test = value, None
    if isinstance(value, Mapping):
        if "train" not in value or set(value) - {"train", "test"}:
            raise UserError(f"data: got a mapping of {', '.join(map(str, value))}; {WANTED}")
        train, test = value["train"], value.get("test")
    elif isinstance(value, tuple) and len(value) == 4:
        train, test = value[:2], value[2:]
    config = DataConfig(name="python", layout="custom", test_fraction=test_fraction)
    return assemble(config, _table(train), None if test is None else _table(test))


def _table(value: Any) -> Table:
    if isinstance(value, tuple) and len(value) == 2:
        if any(hasattr(one, "__getitem__") and not _holds_values(one) for one in value):
            kinds = ", ".join(type(one).__name__ for one in value)
            raise UserError(f"data: got ({kinds}), whose x and y are no arrays; {WANTED}")
        return Table(_array(value[0]), _array(value[1]))
    if not (hasattr(value, "__getitem__") and hasattr(value, "__len__")):
        raise UserError(f"data: got {type(value).__name__}; {WANTED}")
    inputs, labels = [], []
    for i in range(len(value)):
        try:
            item = value[i]
        except Exception as error:  # a user's own code
            raise UserError(f"data: item {i} cannot be had: {in_words(error)}") from error
        if not (isinstance(item, tuple | list) and len(item) == 2):
            raise UserError(f"data: item {i} is {type(item).__name__}; {WANTED}")
        inputs.append(_array(item[0]))
        labels.append(_array(item[1]))
    if not inputs:
        raise UserError(f"data: {type(value).__name__} holds no item; {WANTED}")
    if unread := [i for i, one in enumerate(inputs) if one.dtype.kind not in "iufb"]:
        raise UserError(f"data: item {unread[0]} holds {inputs[unread[0]].dtype} inputs; numbers are needed")
    if len(shapes := {one.shape for one in inputs}) > 1:
        first, second = sorted(shapes)[:2]
        raise UserError(f"data: items of shapes {first} and {second}; all of one shape are needed")
    return Table(np.stack(inputs), np.stack(labels))


def _holds_values(value: Any) -> bool:
    """Whether NumPy makes an array of it, or it is a plain list; a data set of examples is neither."""
    return hasattr(value, "__array__") or isinstance(value, list | tuple)


def _array(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    try:
        array = np.asarray(value)
    except ValueError as error:  # rows of different lengths
        raise UserError(f"data: {type(value).__name__} is no array: {in_words(error)}") from error
    return array.astype(np.float32) if array.dtype.kind == "f" else array
