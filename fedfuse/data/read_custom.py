"""The user's own data set, made by their function on their own machine."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from fedfuse.config import DataConfig
from fedfuse.data.dataset import Dataset
from fedfuse.errors import UserError


def read(config: DataConfig, root: Path | None) -> Dataset:
    """Call `data.load=pkg.mod:fn` with `data.extra` as keyword arguments.

    Raises
    ------
    UserError
        Where there is no such function, or it returns anything but a `fedfuse.data.Dataset`.
    """
    path = config.load or ""
    module, _, name = path.partition(":")
    if not module or not name:
        raise UserError(f"data.load={config.load!r}; expected pkg.mod:fn returning a fedfuse.data.Dataset")
    function = getattr(_imported(module, path), name, None)
    if not callable(function):
        raise UserError(f"data.load={path}: {module} has no function {name!r}")
    dataset = function(**dict(config.extra or {}))
    if not isinstance(dataset, Dataset):
        raise UserError(f"data.load={path} returned {type(dataset).__name__}; expected a fedfuse.data.Dataset")
    return dataset


def _imported(module: str, path: str) -> object:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0] or not error.name:
            raise UserError(f"data.load={path}: {error}") from None
    # A command started in the user's project does not have that directory on its path; they expect it.
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"data.load={path}: {error}; looked on the Python path and in {here}") from None
    finally:
        sys.path.remove(here)
