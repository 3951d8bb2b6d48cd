"""Files of data: what they would take in memory is looked at before any of it is taken.

A file of a megabyte can say that it holds a gigabyte. What files inflate to, or are decoded to, is limited to 64 MiB
and a hundred times their own size, and to half of the memory that is free; `$FEDFUSE_INFLATED` sets another limit, in
bytes.
"""

from __future__ import annotations

import gzip
import io
import math
import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from fedfuse.errors import UserError

INFLATED = "FEDFUSE_INFLATED"  # environment: bytes that one file may inflate to
SMALL, RATIO = 64 * 2**20, 100  # any file may take so many bytes, and so many for each of its own
HEADER = 2**16 + 64  # bytes: the header of an array of plain numbers is far shorter


def room(*paths: Path) -> int:
    """Bytes that files, together, may inflate to; see `room_of`."""
    return room_of(sum(path.stat().st_size for path in paths))


def room_of(size: int) -> int:
    """Bytes that may be made of `size` bytes.

    Raises
    ------
    UserError
        If `$FEDFUSE_INFLATED` is no number.
    """
    told = os.environ.get(INFLATED, "")
    if told:
        if not told.isdecimal():
            raise UserError(f"{INFLATED}={told}: a whole number of bytes is needed")
        return int(told)
    return min(SMALL + RATIO * size, _free() // 2)


def _free() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return 2**63


def check_room(where: object, size: int, most: int) -> None:
    """Refuse data that take more than they may.

    Raises
    ------
    UserError
        Naming both sizes, in bytes.
    """
    if size > most:
        raise UserError(f"{where}: would inflate to {size} bytes or more; allowed are {most} (set {INFLATED} for more)")


@contextmanager
def archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an `.npz` whose members, and the arrays that their headers declare, fit in the room they have.

    Raises
    ------
    UserError
        If they do not, or are packed as NumPy packs nothing.
    """
    with zipfile.ZipFile(path) as opened:
        most = room(path)
        members = opened.infolist()
        check_room(path, sum(member.file_size for member in members), most)
        for member in members:
            # other ways of packing inflate a whole piece at once, whatever size the directory of the archive says
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise UserError(f"{path}: {member.filename!r} is packed in a way that no .npz is")
            with opened.open(member) as file:
                declared = _declared(path, member.filename, file.read(HEADER))
            if declared > member.file_size:
                raise UserError(
                    f"{path}: {member.filename!r} declares {declared} bytes and holds {member.file_size}; damaged"
                )
        yield opened


def _declared(path: Path, name: str, head: bytes) -> int:
    """Bytes of the array that a member begins with; 0 if it is none, which its reader will say."""
    file = io.BytesIO(head)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        version = np.lib.format.read_magic(file)
        if version not in readers:  # NumPy reads 3.0 too, and writes it for no array of plain numbers or text
            raise UserError(f"{path}: {name!r} is of npy format {version[0]}.{version[1]}; allowed: 1.0, 2.0")
        shape, _, dtype = readers[version](file)
    except (ValueError, EOFError):
        return 0
    # an object array's values lie behind the header as a pickle
    if dtype.hasobject:
        return 0
    # an item without bytes is still an item, and a row without items a row: labels are made for each
    return max(math.prod(shape) * max(1, dtype.itemsize), shape[0] if shape else 0)


class Counted(io.RawIOBase):
    """The content of a gzip file, which ends in a `UserError` where it is larger than it may be.

    Parameters
    ----------
    path : Path
    """

    def __init__(self, path: Path) -> None:
        self.path, self.most, self.taken = path, room(path), 0
        self.file = gzip.GzipFile(path)

    def readable(self) -> bool:
        """See `io.IOBase`."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """See `io.RawIOBase`."""
        try:
            part = self.file.read1(len(buffer))
        except zlib.error as error:  # what else is wrong with a gzip file is an OSError already
            raise gzip.BadGzipFile(str(error)) from error
        self.taken += len(part)
        check_room(self.path, self.taken, self.most)
        buffer[: len(part)] = part
        return len(part)

    def close(self) -> None:
        """See `io.IOBase`."""
        self.file.close()
        super().close()


def gunzipped(path: Path) -> io.BufferedReader:
    """Open a gzip file, to read no more of it than there is room for."""
    return io.BufferedReader(Counted(path))
