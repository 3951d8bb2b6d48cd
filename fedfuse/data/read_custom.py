"""The user's own data set, made by their function on their own machine."""

from __future__ import annotations

from pathlib import Path

from fedfuse.config.dotted import resolve
from fedfuse.config.schema import DataConfig
from fedfuse.data.dataset import Dataset
from fedfuse.data.from_python import dataset as taken
from fedfuse.errors import UserError, in_words


def read(config: DataConfig, root: Path | None) -> Dataset:
    """Call `data.load=pkg.mod:fn` with `data.extra` as keyword arguments.

    Raises
    ------
    UserError
        Where there is no such function, or it returns neither a `Dataset` of FedFuse or torch nor arrays.
    """
    if not config.load:
        kinds = "(x, y), a torch Dataset or a fedfuse.data.Dataset"
        raise UserError(f"data=custom needs data.load=pkg.mod:fn, which returns {kinds}")
    path = config.load
    function = resolve(path, "data.load")
    extra = dict(config.extra or {})
    try:
        dataset = function(**extra)
    except UserError:
        raise
    except TypeError as error:
        if error.__traceback__ is not None and error.__traceback__.tb_next is None:  # the call itself, nothing inside
            told = ", ".join(f"data.extra.{name}" for name in extra) or "no data.extra"
            raise UserError(f"data.load={path} was called with {told}: {error}") from error
        raise UserError(f"data.load={path} failed: {in_words(error)}") from error
    except Exception as error:
        raise UserError(f"data.load={path} failed: {in_words(error)}") from error
    try:
        return taken(dataset, config.test_fraction)
    except UserError as error:
        told = str(error).removeprefix("data: ")
        raise UserError(f"data.load={path} returned {type(dataset).__name__}: {told}") from error
