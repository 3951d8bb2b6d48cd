"""Several data sets of the same classes as one, each a domain: the source data set is the group."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np

from fedfuse.config.schema import DataConfig
from fedfuse.data.build import channel_statistics, options
from fedfuse.data.dataset import Dataset, Examples
from fedfuse.data.inflate import check_room, room_of
from fedfuse.data.pixels import reshape
from fedfuse.errors import UserError


def read(config: DataConfig, root: Path | None) -> Dataset:
    """Join `data.extra.sources`, at most `data.extra.per_source` training examples each.

    Images take the largest shape among the sources (RGB where one is RGB), or `data.extra.shape`.

    Raises
    ------
    UserError
        Where sources differ in classes or cannot be brought to one shape.
    """
    from fedfuse.data.load import load

    extra = options(config, {"sources": None, "shape": None, "per_source": None})
    sources = [str(name) for name in extra["sources"] or []]
    if len(sources) < 2 or "mixed" in sources:
        raise UserError(f"data.extra.sources={sources}: expected two or more data sets, e.g. [mnist,usps]")
    parts = []
    for name in sources:
        one = dataclasses.replace(
            config,
            name=name,
            root=None,
            layout="builtin",
            extra={},
            limit=extra["per_source"],
            test_limit=None,
        )
        if config.root is not None:
            one.root = str(Path(config.root) / name)
        parts.append(load(one))
    first = parts[0]
    for part in parts:
        if part.classes != first.classes or part.provided is not None:
            raise UserError(f"data.extra.sources: {part.name} has other classes than {first.name}")
        if part.kind != first.kind or (part.kind != "image" and part.shape != first.shape):
            raise UserError(f"data.extra.sources: {part.name} has inputs of another kind than {first.name}")
    shape = tuple(int(side) for side in extra["shape"] or np.max([part.shape for part in parts], axis=0))

    if first.kind == "image":
        images = [split.inputs for part in parts for split in (part.train, part.test) if split is not None]
        taken, most = sum(map(len, images)) * math.prod(shape), room_of(sum(array.nbytes for array in images))
        check_room(f"data.extra.shape={list(shape)}", taken, most)

    def joined(split: str) -> Examples | None:
        pieces = [(index, getattr(part, split)) for index, part in enumerate(parts)]
        present = [(index, piece) for index, piece in pieces if piece is not None]
        if not present:
            return None
        return Examples(
            np.concatenate(
                [reshape(piece.inputs, shape) if first.kind == "image" else piece.inputs for _, piece in present]
            ),
            np.concatenate([piece.targets for _, piece in present]),
            np.concatenate([np.full(len(piece), index) for index, piece in present]),
        )

    train = joined("train")
    assert train is not None
    mean, std = channel_statistics(train.inputs) if first.kind == "image" else (None, None)
    return Dataset(
        config.name, train, joined("test"), first.classes, first.kind, mean, std, tuple(sources), pad=first.pad,
        vocabulary=first.vocabulary,
    )  # fmt: skip
