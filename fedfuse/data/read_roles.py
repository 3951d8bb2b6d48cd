"""Plays by speaking role: `roles.jsonl.gz`, one role a line with its `lines`, as windows of tokens to model."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedfuse.config.schema import DataConfig
from fedfuse.data.build import cut_test, options
from fedfuse.data.dataset import Dataset, Examples
from fedfuse.data.read_jsonl import lines
from fedfuse.data.tokenize import Bytes, tokenizer_of, windows
from fedfuse.errors import UserError

OPTIONS = {"tokenizer": None, "length": 64, "roles": None, "least": 5}


def read(config: DataConfig, root: Path) -> Dataset:
    """Return the roles as natural clients of a next-token task; a role's windows never mix with another's.

    `data.extra`: `tokenizer` (a model directory, or `bytes`; needed), `length` (tokens a window), `least` (windows a
    role must have), `roles` (keep that many with the most to say; null: all).

    Raises
    ------
    UserError
        Where the file is missing or damaged, or no role has enough to say.
    """
    extra = options(config, OPTIONS)
    if not extra["tokenizer"]:
        raise UserError(f"data={config.name} needs data.extra.tokenizer=<directory of the model>, or bytes")
    length, least = int(extra["length"]), max(1, int(extra["least"]))
    if length < 2:
        raise UserError(f"data.extra.length={length}: a next token needs at least 2")
    path = root if root.is_file() else root / "roles.jsonl.gz"
    if not path.is_file():
        raise UserError(f"data={config.name}: no roles.jsonl.gz under {root}")
    tokenizer = tokenizer_of(str(extra["tokenizer"]))
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for number, row in enumerate(lines(path), start=1):
        if not isinstance(row.get("role"), str) or not isinstance(row.get("lines"), list):
            raise UserError(f"{path}: line {number} has no role with lines")
        spoken = windows(tokenizer, (str(line) for line in row["lines"]), length)
        if len(spoken[0]) >= least:
            found[row["role"]] = spoken
    if not found:
        raise UserError(f"data={config.name}: no role has {least} windows of {length} tokens; lower data.extra.least")
    names = sorted(found, key=lambda name: (-len(found[name][0]), name))[: extra["roles"]]
    inputs, byte_counts = (np.concatenate([found[name][part] for name in names]) for part in (0, 1))
    groups = np.concatenate([np.full(len(found[name][0]), i) for i, name in enumerate(names)])
    whole = Examples(inputs, np.zeros(len(groups), dtype=np.int64), groups, byte_counts=byte_counts)
    train, test = cut_test(config, whole) if config.test_fraction > 0 else (whole, None)
    return Dataset(
        name=config.name,
        train=train,
        test=test,
        classes=tokenizer.names,
        kind="tokens",
        group_names=tuple(names),
        next_token=True,
        pad=tokenizer.pad,
        utf8=isinstance(tokenizer, Bytes),
    )
