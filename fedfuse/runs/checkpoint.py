"""A run's checkpoint: what a round commits, as one tree of tensors and plain values, and back into a federation."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

from fedfuse.config.files import LOADER, checked, synced
from fedfuse.config.keys import leaves
from fedfuse.config.schema import without_gone
from fedfuse.core.loop import Federation
from fedfuse.core.waiting import listed, unlisted
from fedfuse.errors import UserError, one_line
from fedfuse.wire.client_store import read_tree, write_tree
from fedfuse.wire.knowledge import Address, Item, Parcel
from fedfuse.wire.traffic import Traffic

FORMAT = 1  # of the checkpoint alone
NEWEST, BEFORE = "state.safetensors", "state.before.safetensors"  # the last two commits


class Unreadable(UserError):
    """A checkpoint that its disk did not keep; the one before it may be there."""


def commit(federation: Federation, folder: Path, config: str, seconds: dict[str, float]) -> None:
    """Write a checkpoint that survives a loss of power, beside the one before it."""
    newest, partial = folder / NEWEST, folder / f".{BEFORE}"
    if newest.exists():  # both names, then the older is replaced: one of them is whole at every moment
        partial.unlink(missing_ok=True)
        try:
            os.link(newest, partial)
        except OSError:  # a file system without links
            shutil.copyfile(newest, partial)
        os.replace(partial, folder / BEFORE)
        partial.unlink(missing_ok=True)  # two names of one file: after a commit that failed, and replacing does nothing
        synced(folder)
    write_tree(newest, snapshot(federation, config, seconds), durable=True)


def recover(
    federation: Federation, folder: Path, config: str, free: tuple[str, ...] = ()
) -> tuple[dict[str, float] | None, str]:
    """Put a federation back to its last commit that can be read.

    Parameters
    ----------
    federation : Federation
    folder : Path
    config : str
        The resolved configuration as YAML.
    free : tuple of str
        Keys that may differ from those of the commit.

    Returns
    -------
    dict or None
        The seconds it had taken; None if nothing was ever committed.
    str
        What was wrong with the newest, if the one before it was used; else empty.

    Raises
    ------
    UserError
        If no commit can be read, or the last is of another format or configuration.
    """
    newest, before = folder / NEWEST, folder / BEFORE
    if not newest.exists() and not before.exists():
        return None, ""
    try:
        return restore(federation, newest, config, free), ""
    except Unreadable as error:
        if not before.exists():
            raise
        try:
            seconds = restore(federation, before, config, free)
        except Unreadable:
            raise error from None
        told = f"{newest} is torn; the run goes on from {BEFORE}, after round {federation.done}"
        return seconds, told


def snapshot(federation: Federation, config: str, seconds: dict[str, float]) -> dict[str, Any]:
    """Everything that a resumed run needs, as one tree."""
    strategy = federation.strategy
    board = {}
    for i, ((topic, to), item) in enumerate(strategy.board.items.items()):
        chain = strategy.board.chains.get((topic, to), [])
        board[str(i)] = {
            "about": json.dumps([topic, to, item.version, item.sha]),
            "value": listed(item.arrays),
            "chain": {
                str(j): {"about": json.dumps([p.version, p.since, p.sha]), "value": listed(p.arrays)}
                for j, p in enumerate(chain)
            },
        }
    plain = {
        "format": FORMAT,
        "config": config,
        "run_id": strategy.run_id,
        "done": federation.done,
        "evaluated": federation.evaluated,
        "set_up": federation.set_up,
        "stop": federation.stop,
        "headline": federation.headline,
        "digest": federation.digest,
        "digest_missing": federation.digest_missing,
        "tags": {str(c): tag for c, tag in strategy.outbox.tags.items()},
        "held": {str(c): [[t, to, v] for (t, to), v in held.items()] for c, held in strategy.outbox.held.items()},
        "traffic": strategy.outbox.traffic.saved(),
        "failures": strategy.inbox.failures,
        "trained": strategy.inbox.trained,
        "left_out": strategy.inbox.ever_left_out,
        "seconds": seconds,
    }
    tree = {
        "board": board,
        "state": strategy.state,
        "history": _columns(federation.history),
        "plain": json.dumps(plain),
    }
    return tree if federation.clock is None else {**tree, "clock": federation.clock.saved()}


def restore(federation: Federation, path: Path, config: str, free: tuple[str, ...] = ()) -> dict[str, float]:
    """Put a federation back to what `snapshot` wrote to a file; return the seconds it had taken.

    Raises
    ------
    UserError
        If the checkpoint is of another format or configuration, or cannot be read.
    """
    strategy = federation.strategy
    try:
        tree, _ = read_tree(checked(path))
        plain = json.loads(tree["plain"])
    except Exception as error:
        raise Unreadable(f"{path}: cannot be read ({one_line(error)}); the run cannot be resumed") from error
    if plain.get("format") != FORMAT:
        raise UserError(f"{path}: has format {plain.get('format')}, this fedfuse resumes format {FORMAT}")
    if different := changed(plain.get("config", ""), config, free):
        raise UserError(f"{path.parent.parent}/config.yaml: {different}; a run goes on with what it began with")
    items: dict[Address, Item] = {}
    chains: dict[Address, list[Parcel]] = {}
    for slot in tree.get("board", {}).values():
        topic, to, version, hashed = json.loads(slot["about"])
        items[topic, to] = Item(unlisted(slot["value"]), version, hashed)
        steps = sorted(slot.get("chain", {}).items(), key=lambda pair: int(pair[0]))
        chains[topic, to] = []
        for _, step in steps:
            reached, since, folded = json.loads(step["about"])
            chains[topic, to].append(Parcel(topic, to, reached, since, unlisted(step["value"]), folded))
    strategy.board.restore(items, chains)
    strategy.state = tree.get("state", {})
    strategy.begun = True
    strategy.run_id = plain["run_id"]
    strategy.outbox.tags = {int(c): tag for c, tag in plain["tags"].items()}
    strategy.outbox.held = {int(c): {(t, to): v for t, to, v in held} for c, held in plain["held"].items()}
    strategy.outbox.traffic = Traffic.restored(plain["traffic"])
    strategy.inbox.failures, strategy.inbox.ever_left_out = plain["failures"], plain["left_out"]
    strategy.inbox.trained |= plain.get("trained", {})
    strategy.round = plain["done"]
    if federation.clock is not None:
        federation.clock.restore(tree["clock"])
    for name in ("done", "evaluated", "set_up", "stop", "headline", "digest", "digest_missing"):
        setattr(federation, name, plain[name])
    # among the plain values: written before evaluations had columns
    federation.history = plain["history"] if "history" in plain else _entries(tree.get("history", {}))
    return plain["seconds"]


def _columns(history: list[dict[str, float]]) -> dict[str, dict[str, torch.Tensor]]:
    """Evaluations as columns of numbers: every commit holds them all, and thousands as text would outweigh a round."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for place, entry in enumerate(history):
        for key, value in entry.items():
            places, values = found.setdefault(key, ([], []))
            places.append(place)
            values.append(value)
    return {
        key: {"at": torch.tensor(places, dtype=torch.int32), "value": torch.tensor(values, dtype=torch.float64)}
        for key, (places, values) in found.items()
    }


def _entries(columns: dict[str, dict[str, torch.Tensor]]) -> list[dict[str, float]]:
    """Undo `_columns`."""
    pairs = [(key, column["at"].tolist(), column["value"].tolist()) for key, column in columns.items()]
    entries: list[dict[str, float]] = [{} for _ in range(max((at[-1] + 1 for _, at, _ in pairs), default=0))]
    for key, places, values in pairs:
        for place, value in zip(places, values, strict=True):
            entries[place][key] = value
    return entries


def changed(begun: str, now: str, also: tuple[str, ...] = ()) -> str:
    """Say which setting that can change a result differs from the one a run began with; empty if none does."""
    before, after = (dict(leaves(without_gone(yaml.load(text, Loader=LOADER) or {}))) for text in (begun, now))
    # where and how it runs, and what is said of a search, changes no bit
    free = ("out", "overwrite", "runtime.", "tracking.", "audit", "search.edges", *also)
    for key, value in before.items():
        if not key.startswith(free) and after.get(key) != value:
            inside = {name: found for name, found in after.items() if name.startswith(f"{key}.")}
            return f"says {key}={after.get(key, inside or None)}, the run began with {key}={value}"
    return ""
