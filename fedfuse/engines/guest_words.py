"""What the clients of `fedfuse flower` print and log, on the screen of whoever started it.

A worker writes into two files of its own, whatever the app prints with: Python, its loggers, a library in C. Between
them stands whose message it works on, so that each line can be told with its partition. The driver passes on what has
come whenever it takes answers in, and a few times a second besides: a client that trains for an hour is heard
meanwhile, and one that kills its process has had its last words.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
import threading
from pathlib import Path

MARK = re.compile(rb"\x1e(\d*)\n")  # whose words follow: the partition, or none: the app while it is loaded
STREAMS = ("out", "err")


def speak_into(path: str) -> None:
    """Let all that this process prints go into the files of one worker."""
    for number, stream in enumerate(STREAMS, start=1):
        file = os.open(f"{path}.{stream}", os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)


def begin(partition: int | None) -> None:
    """Say whose words follow."""
    for number, stream in enumerate((sys.stdout, sys.stderr), start=1):
        with contextlib.suppress(OSError, ValueError):  # an app may have closed it
            stream.flush()
        os.write(number, b"\x1e%s\n" % ("" if partition is None else str(partition)).encode())


class Words:
    """Passes on what workers have written.

    Parameters
    ----------
    folder : Path, optional
        Where the files lie; default one of its own.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="words-", dir=folder))
        self._heard: list[_Heard] = []
        self._lock = threading.Lock()

    def of_another(self) -> str:
        """Make the files of another worker."""
        with self._lock:
            path = str(self._folder / str(len(self._heard)))
            self._heard += [_Heard(f"{path}.{stream}", stream) for stream in STREAMS]
        return path

    def pass_on(self, to_the_end: bool = False) -> None:
        """Print the lines that have come; to the end: those that are not finished too."""
        with self._lock:
            for heard in self._heard:
                heard.pass_on(to_the_end)

    def close(self) -> None:
        """Print what is left, and remove the files."""
        self.pass_on(to_the_end=True)
        with self._lock:
            while self._heard:
                self._heard.pop().close()
            with contextlib.suppress(OSError):
                self._folder.rmdir()


class _Heard:
    """One file of one worker."""

    def __init__(self, path: str, stream: str) -> None:
        self._path, self._stream = path, stream
        self._file = open(path, "xb+", buffering=0)  # noqa: SIM115 (it is read until the run ends)
        self._left, self._who = b"", b""

    def pass_on(self, to_the_end: bool) -> None:
        found = self._left + (self._file.read() or b"")
        self._left = b""
        if not found:
            return
        lines: list[str] = []
        start = 0
        for mark in MARK.finditer(found):
            lines += self._told(found[start : mark.start()])
            self._who, start = mark[1], mark.end()
        rest = found[start:]
        if not to_the_end:
            whole, newline, self._left = rest.rpartition(b"\n")
            rest = whole + newline
        lines += self._told(rest)
        if lines:
            screen = sys.stdout if self._stream == "out" else sys.stderr
            with contextlib.suppress(OSError, ValueError):  # nobody reads any more
                screen.write("".join(lines))
                screen.flush()

    def _told(self, text: bytes) -> list[str]:
        who = f"partition {self._who.decode()}" if self._who else "ClientApp"
        lines = text.decode(errors="replace").split("\n")
        return [f"({who}) {line}\n" for line in (lines if lines[-1] else lines[:-1])]

    def close(self) -> None:
        self._file.close()
        with contextlib.suppress(OSError):
            os.unlink(self._path)
