"""Ray itself: started once a process on this machine, or joined where it runs; ended without a trace."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from fedfuse.compat.quiet import QUIET
from fedfuse.compat.ray_start import lean_start, private_options
from fedfuse.errors import TRACEBACK, UserError, WorldError

log = logging.getLogger("fedfuse")
_PREFIX = "fedfuse-ray-"
before_end: list[Callable[[], None]] = []  # what holds actors gives them up first
_own: list[Path] = []  # the directory of the Ray that this process started


def connect(workers: int, address: str | None = None, memory: int | None = None) -> None:
    """Start Ray on this machine, or join a cluster, once a process.

    Parameters
    ----------
    workers : int
        Actors that shall run at once.
    address : str, optional
        Cluster to join (`auto`, or `host:port`).
    memory : int, optional
        Bytes of the object store; default Ray's own choice.

    Raises
    ------
    UserError
        If there is no cluster at the address.
    WorldError
        If Ray does not start here, as on a machine that is far too busy.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", QUIET["RAY_USAGE_STATS_ENABLED"])
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"log_to_driver": bool(os.environ.get(TRACEBACK)), "logging_level": "ERROR"}
    listening = signal.getsignal(signal.SIGTERM)
    if address is not None:
        try:
            ray.init(address=address, **options)
        except ConnectionError as error:
            raise UserError(f"runtime.address={address}: no Ray cluster answers there ({error})") from error
        _end_by_python(listening)
        return
    # thread limits reach the actors before they import anything
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))
    folder = _directory()
    if memory is not None:
        options["object_store_memory"] = max(memory, 80 * 2**20)  # Ray starts with no less
    options |= private_options(folder)
    atexit.register(disconnect)
    # a busy machine may need more than the half minute that Ray grants itself
    first: str | None = None
    told_all = bool(os.environ.get(TRACEBACK))  # what workers print comes by one of the helpers
    for lean in (False,) if told_all else (True, True, False):
        if first is not None and not lean:
            log.warning("fedfuse: Ray did not start without its helpers (%s); starting it with them", first)
        try:
            with lean_start() if lean else contextlib.nullcontext():
                ray.init(num_cpus=workers, include_dashboard=False, address="local", **options)
            _end_by_python(listening)
            return
        except Exception as error:  # Ray raises a bare one where it takes more than half a minute
            ray.shutdown()
            told = (str(error).strip().splitlines() or [type(error).__name__])[0]
            first = first or told
            if not lean:
                raise WorldError(f"Ray did not start on this machine: {told} The same command goes on.") from error


def _end_by_python(listening: Any) -> None:
    """Leave SIGTERM to Python: Ray's C++ half, asked first, prints a stack and may abort over it.

    Who was `listening` before Ray began goes on; where nobody was, Ray's handler in Python exits.
    """
    handler = listening if callable(listening) else signal.getsignal(signal.SIGTERM)
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def own_folder() -> Path | None:
    """The folder of the Ray that this process started, which only its user may enter and which ends with it."""
    return _own[-1] if _own else None


def cause(error: BaseException) -> str:
    """What an error is, in one line: its class and its last line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[-1][:200]}" if text else type(error).__name__


LAST_WORDS = 2.0  # seconds: what workers print comes by Ray's log monitor, which looks a few times a second


def disconnect() -> None:
    """End what `connect` started, its sockets and logs included."""
    for forget in before_end:
        forget()
    if ray.is_initialized():
        if os.environ.get(TRACEBACK):
            time.sleep(LAST_WORDS)
        ray.shutdown()
    while _own:
        shutil.rmtree(_own.pop(), ignore_errors=True)


def _directory() -> Path:
    """A short path of our own for sockets and logs (Unix sockets allow 107 characters); sweep those of the dead."""
    root = Path(tempfile.gettempdir())
    if len(str(root)) > 30:
        root = Path("/tmp")
    for old in root.glob(f"{_PREFIX}*"):
        owner = old.name.removeprefix(_PREFIX)
        with contextlib.suppress(OSError):
            if owner.isdigit() and old.stat().st_uid == os.getuid() and not Path(f"/proc/{owner}").exists():
                shutil.rmtree(old, ignore_errors=True)  # its driver was killed
    folder = root / f"{_PREFIX}{os.getpid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.lstat().st_uid != os.getuid():  # who owns it could put sockets of their own in place of ours
        raise WorldError(f"{folder} belongs to somebody else; remove it, or set TMPDIR to a folder of your own")
    _own.append(folder)
    return folder
