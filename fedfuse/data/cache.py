"""The user's cache directory: decoded data sets and partition indices, paid for once.

Where somebody else says what is asked of the data, `few` keeps the last things only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from fedfuse.data.dataset import PARTS, Dataset, Examples

FORMAT = 4  # part of every key: old entries are never misread
APART = ("train", "test", "provided", "content")  # of a data set: arrays, and what is made of it when it is read
LAST = 32  # arrays of a kind (partitions, noise: small ones) that are kept at a site

_few: ContextVar[bool] = ContextVar("few", default=False)


def cache_directory() -> Path:
    """Return `$FEDFUSE_CACHE`, else `~/.cache/fedfuse`; not created here."""
    named = os.environ.get("FEDFUSE_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "fedfuse"


def key_of(*parts: object) -> str:
    """Return a file name that depends on `parts` alone."""
    text = json.dumps([FORMAT, *parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def stamps(paths: Iterable[Path]) -> list[list[object]]:
    """What files are known by, as a part of a key: place, size and the time of their last change."""
    return [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]


@contextlib.contextmanager
def few(wanted: bool) -> Iterator[None]:
    """Keep one data set of each root, and few arrays, while this lasts, apart from the user's own.

    For sites: a server may ask for the same data in ever other ways.
    """
    token = _few.set(wanted)
    try:
        yield
    finally:
        _few.reset(token)


def _folder(kind: str) -> Path:
    return cache_directory() / "site" / kind if _few.get() else cache_directory() / kind


def _leave(folder: Path, count: int) -> None:
    """Delete all but the youngest entries."""
    entries = [(entry.stat().st_mtime, entry) for entry in folder.iterdir()]
    for _, entry in sorted(entries, reverse=True)[count:]:
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def stored_dataset(key: str, root: Path, build: Callable[[], Dataset]) -> Dataset:
    """Return the data set kept under `key`, memory-mapped; build and keep it where there is none.

    A cache that cannot be written is not an error: the built data set is returned from memory.

    Parameters
    ----------
    root : Path
        Where its files lie: of each root, a site keeps one data set.
    """
    folder = _folder("decoded") / (key_of(str(root.resolve())) if _few.get() else "") / key
    with contextlib.suppress(OSError, ValueError, KeyError, EOFError, TypeError):
        return _open(folder)
    dataset = build()
    with contextlib.suppress(OSError):
        folder.parent.mkdir(parents=True, exist_ok=True)
        if _few.get():
            _leave(folder.parent, 0)  # what a killed process left half made, too; what is open stays readable
        staging = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=folder.parent))
        try:
            _write(dataset, staging)
            if folder.exists():  # an entry that could not be read
                shutil.rmtree(folder, ignore_errors=True)
            # Whole directory at once: a reader, or a second writer, never sees half an entry.
            staging.rename(folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return _open(folder)
    return dataset


def _write(dataset: Dataset, folder: Path) -> None:
    for split, examples in (("train", dataset.train), ("test", dataset.test)):
        if examples is not None:
            for part in PARTS:
                array = getattr(examples, part)
                if array is not None:
                    np.save(folder / f"{split}_{part}.npy", array, allow_pickle=False)
    meta = {field.name: getattr(dataset, field.name) for field in fields(dataset) if field.name not in APART}
    (folder / "meta.json").write_text(json.dumps(meta))


def _open(folder: Path) -> Dataset:
    meta = json.loads((folder / "meta.json").read_text())

    def examples(split: str) -> Examples | None:
        arrays = {}
        for part in PARTS:
            path = folder / f"{split}_{part}.npy"
            if path.exists():
                arrays[part] = np.load(path, mmap_mode="r", allow_pickle=False)
        return Examples(**arrays) if arrays else None

    train = examples("train")
    if train is None:
        raise KeyError("train")
    about: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in meta.items()}
    return Dataset(train=train, test=examples("test"), **about)


def stored_arrays(kind: str, key: str) -> dict[str, np.ndarray] | None:
    """Return the arrays kept under `kind`/`key`, or None where there are none that can be read."""
    try:
        with np.load(_folder(kind) / f"{key}.npz", allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception:  # a damaged entry is as good as none: it is computed again
        return None


def store_arrays(kind: str, key: str, arrays: dict[str, np.ndarray]) -> None:
    """Keep `arrays` under `kind`/`key`, atomically; a cache that cannot be written is left alone."""
    folder = _folder(kind)
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, staging = tempfile.mkstemp(suffix=".npz", dir=folder)
        try:
            with os.fdopen(descriptor, "wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
            Path(staging).replace(folder / f"{key}.npz")
            if _few.get():
                _leave(folder, LAST)
        finally:
            Path(staging).unlink(missing_ok=True)
