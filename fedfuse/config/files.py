"""Files that somebody else may have made: opened without following links, read only if regular and not too large."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from fedfuse.errors import UserError

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
