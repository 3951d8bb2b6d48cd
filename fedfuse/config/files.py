"""Files: read as if somebody else had made them (no link, regular, not too large), written whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from fedfuse.errors import UserError

# libyaml's where it was built in: a tenth of the time
DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
TEXT = 64 * 2**20  # bytes of a JSON or YAML file of ours at most; a summary has a few thousand
TABLE = 4 * 2**30  # bytes of a table of rows at most


def opened(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open a regular file and return its descriptor: no link is followed, and a pipe or device is not waited for.

    Raises
    ------
    UserError
        If it is not a regular file.
    OSError
        If it is not there or may not be opened.
    """
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if path.is_symlink():
            raise UserError(f"{path}: is a link; links are not followed here") from error
        if path.is_dir():
            raise UserError(f"{path}: is a folder, not a file") from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UserError(f"{path}: is no regular file")
    return handle


def checked(path: Path, most: int = TABLE) -> Path:
    """Return a path that may be handed to a reader of its own.

    Raises
    ------
    UserError
        If it is not a regular file, or larger than `most` bytes.
    """
    handle = opened(path)
    try:
        size = os.fstat(handle).st_size
    finally:
        os.close(handle)
    if size > most:
        raise UserError(f"{path}: {size} bytes; at most {most} are read")
    return path


def read(path: Path, most: int = TEXT) -> bytes:
    """Read a regular file of at most `most` bytes.

    Raises
    ------
    UserError
        If it is not a regular file, or larger.
    OSError
        If it cannot be read.
    """
    with os.fdopen(opened(path), "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise UserError(f"{path}: more than {most} bytes; at most that many are read")
    return content


def read_text(path: Path, most: int = TEXT) -> str:
    """`read`, as UTF-8."""
    return read(path, most).decode("utf-8")


def synced(path: Path) -> None:
    """Bring a file, or the names in a directory, to the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replaced(path: Path, durable: bool = False) -> Iterator[Path]:
    """Give a place to write to, which takes the file's name if all went well and is gone if not.

    Parameters
    ----------
    path : Path
    durable : bool
        Bring the content to the disk before it takes the name, and the name before this returns.

    Raises
    ------
    OSError
        If the disk is full or not writable, also where safetensors and polars say so only in words.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        if durable:
            synced(partial)
        os.replace(partial, path)
        if durable:
            synced(path.parent)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
        raise


def is_full(error: BaseException) -> bool:
    """Whether a disk, not a client, is why something failed: full, over quota or read-only."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def write_text(path: Path, text: str) -> None:
    """Write a file atomically; once this returns, it has survived a loss of power."""
    with replaced(path, durable=True) as partial:
        partial.write_text(text, encoding="utf-8")
