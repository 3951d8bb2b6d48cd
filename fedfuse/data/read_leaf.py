"""LEAF's JSON: `train/*.json` and `test/*.json` with `users` and `user_data`, splits as given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from fedfuse.config.schema import DataConfig
from fedfuse.data.build import options
from fedfuse.data.dataset import Dataset
from fedfuse.data.read_pfllib import provided_dataset
from fedfuse.errors import UserError

Rows = dict[str, tuple[list[Any], list[Any]]]


def read(config: DataConfig, root: Path) -> Dataset:
    """Return the users' data, splits as given.

    The test rows of users without training rows (LEAF's split by user) are the global test. Numbers are used
    as given (`data.extra.shape=[1,28,28]` folds FEMNIST's vectors into images); strings of one length
    (Shakespeare) become character tokens, their labels character classes.

    Raises
    ------
    UserError
        Where a file is missing or damaged, or rows are neither numbers nor strings of one length.
    """
    extra = options(config, {"shape": None})
    base = root / "data" if (root / "data" / "train").is_dir() else root
    train, test = _users(base / "train"), _users(base / "test")
    names = sorted(train)
    rows = [*train.values(), *test.values()]
    letters = _letters(rows)
    spelled = sorted({str(label) for _, labels in rows for label in labels}) if letters else None

    def pair(users: Rows, name: str) -> tuple[np.ndarray, np.ndarray]:
        inputs, labels = users.get(name, ([], []))
        if len(inputs) != len(labels):
            raise UserError(f"data={config.name}: user {name} has {len(inputs)} inputs but {len(labels)} labels")
        try:
            if letters is not None and spelled is not None:
                tokens = [[letters[letter] for letter in text] for text in inputs]
                return np.array(tokens, dtype=np.int64), np.array([spelled.index(str(label)) for label in labels], int)
            array = np.asarray(inputs, dtype=np.float32)
            ids = np.asarray(labels, dtype=np.int64)
        except (ValueError, TypeError, KeyError):
            raise UserError(
                f"data={config.name}: user {name} has neither numbers nor strings of one length as inputs"
            ) from None
        if extra["shape"] and len(array):
            try:
                array = array.reshape(len(array), *(int(side) for side in extra["shape"]))
            except ValueError:
                raise UserError(f"data.extra.shape={extra['shape']}: inputs have shape {array.shape[1:]}") from None
        return array, ids

    splits = [(pair(train, name), pair(test, name)) for name in names]
    others = [pair(test, name) for name in sorted(set(test) - set(train))]
    held = None
    if others:
        held = (np.concatenate([inputs for inputs, _ in others]), np.concatenate([ids for _, ids in others]))
    return provided_dataset(config, names, splits, len(spelled or ()), held)


def _users(folder: Path) -> Rows:
    files = sorted(path for path in folder.glob("*.json") if path.is_file())
    if not files:
        raise UserError(f"no *.json under {folder}; expected LEAF's users and user_data")
    users: Rows = {}
    for path in files:
        try:
            content = json.loads(path.read_text(encoding="utf-8-sig"))
            for name in content["users"]:
                held = content["user_data"][name]
                users[str(name)] = (list(held["x"]), list(held["y"]))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"{path} cannot be read ({type(error).__name__}: {error}); expected LEAF's users and user_data"
            ) from None
    return users


def _letters(rows: list[tuple[list[Any], list[Any]]]) -> dict[str, int] | None:
    """Number the characters, sorted, if inputs are strings."""
    texts = [text for inputs, _ in rows for text in inputs]
    if not texts or not all(isinstance(text, str) for text in texts):
        return None
    return {letter: index for index, letter in enumerate(sorted(set("".join(texts))))}
