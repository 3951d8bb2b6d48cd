"""Client state on disk: transactional, outside Flower's `Context.state`, the last versions of each client."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fedfuse.config.files import replaced
from fedfuse.errors import Refused
from fedfuse.wire.knowledge import Stale
from fedfuse.wire.records import Arrays, flatten, leaves, plain_record, sha, unflatten

INITIAL = "0"  # the tag of a client that has committed nothing yet


class Torn(Exception):
    """A file does not hold what was written: its disk lost a part of it."""


_left: ContextVar[list[int] | None] = ContextVar("left", default=None)


@contextmanager
def room(left: int | None) -> Iterator[None]:
    """Let no more bytes of tensors be written while this lasts; None is no limit."""
    token = _left.set(None if left is None else [left])
    try:
        yield
    finally:
        _left.reset(token)


def write_tree(path: Path, tree: dict[str, Any], durable: bool = False, **notes: str) -> None:
    """Write nested tensors and plain values as one safetensors file, atomically.

    With `durable` it has survived a loss of power once this returns, and its content is hashed, so that `read_tree`
    knows it again.
    """
    flat, rest = flatten(tree)
    notes["tree"], notes["order"] = json.dumps(rest), json.dumps(list(leaves(tree)))  # safetensors sorts the names
    if durable:
        notes["sha"] = _sha(flat, notes["tree"] + notes["order"])
    write_arrays(path, {f"/{k}": v for k, v in flat.items()}, durable, notes)  # no name is reserved so


def write_arrays(path: Path, arrays: Arrays, durable: bool = False, notes: Mapping[str, str] | None = None) -> None:
    """Write tensors as one safetensors file, atomically.

    Raises
    ------
    OSError
        If the disk is full or not writable.
    Refused
        If there is no `room`.
    """
    if (left := _left.get()) is not None:
        left[0] -= sum(value.nbytes for value in arrays.values())
        if left[0] < 0:
            raise Refused("site policy: what this run would keep here is more than max_disk leaves room for")
    with replaced(path, durable) as partial:
        save_file(
            {k: v.detach().cpu().contiguous().clone() for k, v in arrays.items()}, partial, metadata=dict(notes or {})
        )


def _sha(flat: Arrays, rest: str) -> str:
    return sha({"flat": flat, **plain_record({"rest": rest})})


def read_tree(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Read back what `write_tree` wrote, in the order it had, and its notes.

    Raises
    ------
    Torn
        If it was written as durable and holds something else now.
    """
    flat: Arrays = {}
    with safe_open(path, framework="pt") as file:
        notes = file.metadata() or {}
        for name in file.keys():  # noqa: SIM118 - not a dict
            flat[name[1:]] = file.get_tensor(name)
    rest, order = notes.pop("tree", "{}"), notes.pop("order", "")  # "": written before the order was kept
    if (written := notes.pop("sha", None)) is not None and written != _sha(flat, rest + order):
        raise Torn(f"{path}: does not hold what was written")
    found = {**flat, **json.loads(rest)}
    return unflatten({path: found[path] for path in json.loads(order)} if order else found), notes


def _order(tag: str) -> tuple[int, ...]:
    """Round and phase of a tag."""
    return tuple(int(part) for part in tag.split(".") if part.isdecimal())


class ClientStore:
    """States of many clients in one directory, one file a version.

    A state is found by the tag the server believes in, so a retry, a rejected or lost reply, or a crash starts
    from committed state. `save` keeps the version it started from, and of the two rounds before the last, which a
    server that lost its newest checkpoint goes back to; older ones are dropped. Clients whose state is empty leave no
    file.

    Parameters
    ----------
    directory : Path
        Created if missing.
    durable : bool
        Bring every saved state to the disk before `save` returns (a deployed site promises it with its reply).
    """

    def __init__(self, directory: Path, durable: bool = False) -> None:
        self.directory, self.durable = Path(directory), durable
        self.directory.mkdir(parents=True, exist_ok=True)

    def _folder(self, client: int) -> Path:
        return self.directory / f"{client % 256:02x}" / str(client)

    def path(self, client: int, tag: str) -> Path:
        """Where a state lies."""
        return self._folder(client) / f"{tag}.state"

    def load(self, client: int, tag: str) -> dict[str, Any]:
        """Return the state of a client under a tag; empty for the initial tag.

        Raises
        ------
        Stale
            If there is no such version: the client cannot go back that far.
        """
        if tag == INITIAL:
            return {}
        path = self.path(client, tag)
        if not path.exists():
            raise Stale(f"state {tag} is not here")
        try:
            return read_tree(path)[0]
        except (Torn, SafetensorError) as error:
            raise Stale(f"state {tag} is here and torn") from error

    def save(self, client: int, tag: str, state: dict[str, Any], previous: str) -> None:
        """Write a new version beside the one it started from, then drop all others but what a crash may need.

        The server commits whole rounds, and may have to go back by one whose checkpoint was torn: the last states of
        the two rounds before this one are kept too.
        """
        folder = self._folder(client)
        folder.mkdir(parents=True, exist_ok=True)
        write_tree(folder / f"{tag}.state", state, self.durable)
        last: dict[int, tuple[tuple[int, ...], str]] = {}  # of each round before this one
        for old in folder.glob("*.state"):
            if (order := _order(old.stem)) and order[0] < _order(tag)[0]:
                last[order[0]] = max(last.get(order[0], (order, old.stem)), (order, old.stem))
        kept = {tag, previous, *(last[round][1] for round in sorted(last)[-2:])}
        for old in folder.glob("*.state"):
            if old.stem not in kept:
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

    def forget_staged(self) -> None:
        """Drop what evaluations computed ahead, of all clients: other code may compute it otherwise."""
        for path in self.directory.glob("*/*/staged"):
            path.unlink()

    def settle(self, client: int, tag: str) -> None:
        """Drop what only an unfinished run needs: all but the state under a tag."""
        for path in self._folder(client).glob("*"):
            if path.name != f"{tag}.state":
                path.unlink(missing_ok=True)
