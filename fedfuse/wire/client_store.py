"""Client state on disk: transactional, outside Flower's `Context.state`, the last two versions of each client."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from fedfuse.wire.knowledge import Stale
from fedfuse.wire.records import Arrays, flatten, unflatten

INITIAL = "0"  # the tag of a client that has committed nothing yet


def write_tree(path: Path, tree: dict[str, Any], **notes: str) -> None:
    """Write nested tensors and plain values as one safetensors file, atomically."""
    flat, rest = flatten(tree)
    write_arrays(path, {f"/{k}": v for k, v in flat.items()}, tree=json.dumps(rest), **notes)  # no name is reserved so


def write_arrays(path: Path, arrays: Arrays, **notes: str) -> None:
    """Write tensors as one safetensors file, atomically.

    Raises
    ------
    OSError
        If the disk is full or not writable.
    """
    with replaced(path) as partial:
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in arrays.items()}, partial, metadata=notes)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Give a place to write to, which takes the file's name if all went well and is gone if not.

    Raises
    ------
    OSError
        If the disk is full or not writable, also where safetensors and polars say so only in words.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
        raise


def read_tree(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Read back what `write_tree` wrote, and its notes."""
    flat: Arrays = {}
    with safe_open(path, framework="pt") as file:
        notes = file.metadata() or {}
        for name in file.keys():  # noqa: SIM118 - not a dict
            flat[name[1:]] = file.get_tensor(name)
    return unflatten(flat, json.loads(notes.pop("tree", "{}"))), notes


def _round(tag: str) -> str:
    return tag.split(".")[0]


def is_full(error: BaseException) -> bool:
    """Whether a disk, not a client, is why something failed: full, over quota or read-only."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class ClientStore:
    """States of many clients in one directory, one file a version.

    A state is found by the tag the server believes in, so a retry, a rejected or lost reply, or a crash starts
    from committed state. `save` keeps the version it started from and drops older ones. Clients whose state is
    empty leave no file.

    Parameters
    ----------
    directory : Path
        Created if missing.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)

    def _folder(self, client: int) -> Path:
        return self.directory / f"{client % 256:02x}" / str(client)

    def load(self, client: int, tag: str) -> dict[str, Any]:
        """Return the state of a client under a tag; empty for the initial tag.

        Raises
        ------
        Stale
            If there is no such version: the client cannot go back that far.
        """
        if tag == INITIAL:
            return {}
        path = self._folder(client) / f"{tag}.state"
        if not path.exists():
            raise Stale(f"client {client}: state {tag} is not here")
        return read_tree(path)[0]

    def save(self, client: int, tag: str, state: dict[str, Any], previous: str) -> None:
        """Write a new version beside the one it started from, then drop all others but what a crash may need.

        The server commits whole rounds: while the phases of one go on, the state from before it is kept too.
        """
        folder = self._folder(client)
        folder.mkdir(parents=True, exist_ok=True)
        write_tree(folder / f"{tag}.state", state)
        within = _round(previous) == _round(tag)
        for old in folder.glob("*.state"):
            if old.stem not in (tag, previous) and not (within and _round(old.stem) != _round(tag)):
                old.unlink(missing_ok=True)

    def stage(self, client: int, key: str, state: dict[str, Any]) -> None:
        """Remember, without committing, the state after taking in knowledge (so nothing is distilled twice)."""
        folder = self._folder(client)
        folder.mkdir(parents=True, exist_ok=True)
        write_tree(folder / "staged", state, key=key)

    def staged(self, client: int, key: str) -> dict[str, Any] | None:
        """Return the remembered state if it was made from the same start and the same knowledge."""
        path = self._folder(client) / "staged"
        if not path.exists():
            return None
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
        return read_tree(path)[0]

    def settle(self, client: int, tag: str) -> None:
        """Drop what only an unfinished run needs: all but the state under a tag."""
        for path in self._folder(client).glob("*"):
            if path.name != f"{tag}.state":
                path.unlink(missing_ok=True)
