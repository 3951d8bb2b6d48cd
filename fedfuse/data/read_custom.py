"""The user's own data set, made by their function on their own machine."""

from __future__ import annotations

from pathlib import Path

from fedfuse.config.dotted import resolve
from fedfuse.config.schema import DataConfig
from fedfuse.data.dataset import Dataset
from fedfuse.errors import UserError


def read(config: DataConfig, root: Path | None) -> Dataset:
    """Call `data.load=pkg.mod:fn` with `data.extra` as keyword arguments.

    Raises
    ------
    UserError
        Where there is no such function, or it returns anything but a `fedfuse.data.Dataset`.
    """
    if not config.load:
        raise UserError("data.load=None; expected pkg.mod:fn returning a fedfuse.data.Dataset")
    path = config.load
    function = resolve(path, "data.load")
    dataset = function(**dict(config.extra or {}))
    if not isinstance(dataset, Dataset):
        raise UserError(f"data.load={path} returned {type(dataset).__name__}; expected a fedfuse.data.Dataset")
    return dataset
