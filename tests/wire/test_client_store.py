"""Client state on disk: found by the tag the server believes in, whatever happened in between."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedfuse.config import files
from fedfuse.config.files import is_full
from fedfuse.wire import client_store as store_module
from fedfuse.wire.client_store import INITIAL, ClientStore, read_tree, write_arrays, write_tree
from fedfuse.wire.knowledge import Stale
from fedfuse.wire.records import flatten, plain_record, sha
from tests.wire.test_records import TREES, equal_trees

NAMES = st.text("aw.0/~_\\é ", max_size=5)


def state(value: float) -> dict:
    return {"model": {"body.0.weight": torch.full((3,), value)}, "rounds": int(value)}


@given(st.dictionaries(NAMES, TREES, max_size=4))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_state_trees_come_back_as_they_went(tmp_path: Path, tree) -> None:
    write_tree(tmp_path / "state", tree, key="note")
    again, notes = read_tree(tmp_path / "state")
    assert equal_trees(tree, again)
    assert notes == {"key": "note"}


def test_the_order_of_a_tree_is_kept_and_a_file_without_it_is_read(tmp_path: Path) -> None:
    tree = {"z": 1, "b": {str(i): torch.ones(i) for i in range(8, 12)} | {"k": 2}, "a": {}, "y": torch.ones(1)}
    write_tree(tmp_path / "state", tree, durable=True)
    again, _ = read_tree(tmp_path / "state")
    assert (list(again), list(again["b"])) == (["z", "b", "a", "y"], ["8", "9", "10", "11", "k"])
    flat, rest = flatten(tree)
    named, text = {f"/{k}": v for k, v in flat.items()}, json.dumps(rest)
    notes = {"tree": text, "sha": sha({"flat": flat, **plain_record({"rest": text})})}
    write_arrays(tmp_path / "old", named, notes=notes)  # as it was written before the order was kept
    old, _ = read_tree(tmp_path / "old")
    assert old == {key: old[key] for key in tree}
    assert {k: len(v) for k, v in old["b"].items() if k != "k"} == {"8": 8, "9": 9, "10": 10, "11": 11}


def test_views_and_shared_memory_are_kept_as_values(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tree = {"t": base.T, "row": base[1], "same": base, "again": base}
    write_tree(tmp_path / "state", tree)
    assert equal_trees(tree, read_tree(tmp_path / "state")[0])


@pytest.mark.parametrize("tree", [{"tree": torch.zeros(1)}, {"__metadata__": torch.zeros(1)}, {"key": 1, "tree": 2}])
def test_no_name_is_reserved(tmp_path: Path, tree) -> None:
    write_tree(tmp_path / "state", tree, key="k")
    again, notes = read_tree(tmp_path / "state")
    assert equal_trees(tree, again)
    assert notes == {"key": "k"}


def test_a_client_that_committed_nothing_is_empty(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    assert store.load(7, INITIAL) == {}
    assert list(tmp_path.iterdir()) == []


def test_a_state_and_those_of_the_two_rounds_before_it_are_kept(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    store.save(3, "1.1", state(1), INITIAL)
    store.save(3, "2.1", state(2), "1.1")
    assert store.load(3, "1.1")["rounds"] == 1  # the reply may still be lost
    assert store.load(3, "2.1")["rounds"] == 2
    store.save(3, "5.1", state(5), "2.1")
    assert store.load(3, "2.1")["rounds"] == 2
    assert store.load(3, "1.1")["rounds"] == 1  # the server may have lost its newest checkpoint
    store.save(3, "6.1", state(6), "5.1")
    with pytest.raises(Stale, match=r"^state 1\.1 is not here"):
        store.load(3, "1.1")


def test_a_rejected_state_is_forgotten(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    store.save(0, "1.1", state(1), INITIAL)
    store.save(0, "2.1", state(2), "1.1")  # the server never heard of it …
    store.save(0, "3.1", state(3), "1.1")  # … and names the older one again
    assert store.load(0, "1.1")["rounds"] == 1
    for tag, before in (("4.1", "3.1"), ("5.1", "4.1")):
        store.save(0, tag, state(4), before)
    with pytest.raises(Stale):
        store.load(0, "2.1")


def test_a_retry_writes_the_same_tag_again(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    store.save(0, "1.1", state(1), INITIAL)
    store.save(0, "2.1", state(2), "1.1")
    store.save(0, "2.1", state(9), "1.1")
    assert store.load(0, "2.1")["rounds"] == 9
    assert store.load(0, "1.1")["rounds"] == 1


def test_the_state_from_before_a_round_outlives_all_its_phases(tmp_path: Path) -> None:
    """A round commits at once: a server that dies in phase 3 comes back with the tag from before phase 1."""
    store = ClientStore(tmp_path)
    store.save(0, "4.1", state(4), INITIAL)
    store.save(0, "5.1", state(51), "4.1")
    store.save(0, "5.2", state(52), "5.1")
    store.save(0, "5.3", state(53), "5.2")
    assert store.load(0, "4.1")["rounds"] == 4
    assert store.load(0, "5.2")["rounds"] == 52
    store.save(0, "6.1", state(61), "5.3")
    assert store.load(0, "4.1")["rounds"] == 4  # for a server whose newest checkpoint was torn
    for gone in ("5.1", "5.2"):
        with pytest.raises(Stale):
            store.load(0, gone)
    store.save(0, "6.2", state(62), "6.1")
    assert store.load(0, "5.3")["rounds"] == 53


def test_clients_do_not_see_each_other(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    store.save(1, "1.1", state(1), INITIAL)
    store.save(257, "1.1", state(2), INITIAL)  # same folder of the 256
    assert store.load(1, "1.1")["rounds"] == 1
    assert store.load(257, "1.1")["rounds"] == 2


@pytest.mark.parametrize("where", ["save_file", "replace"])
def test_a_crash_while_writing_leaves_the_old_state(tmp_path: Path, monkeypatch, where: str) -> None:
    store = ClientStore(tmp_path)
    store.save(0, "1.1", state(1), INITIAL)
    store.save(0, "2.1", state(2), "1.1")

    def crash(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if where == "replace":
            patch.setattr(files.os, "replace", crash)
        else:
            patch.setattr(store_module, "save_file", crash)
        with pytest.raises(KeyboardInterrupt):
            store.save(0, "3.1", state(3), "2.1")
        with pytest.raises(KeyboardInterrupt):
            store.save(0, "2.1", state(9), "1.1")
    assert store.load(0, "2.1")["rounds"] == 2
    assert store.load(0, "1.1")["rounds"] == 1
    assert sorted(p.name for p in (tmp_path / "00" / "0").iterdir()) == ["1.1.state", "2.1.state"]


def test_a_process_killed_while_writing_leaves_the_old_state(tmp_path: Path, monkeypatch) -> None:
    store = ClientStore(tmp_path)
    store.save(0, "1.1", state(1), INITIAL)
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(files.os, "replace", lambda *a: os._exit(9))
        store.save(0, "2.1", state(2), "1.1")
        os._exit(0)
    os.waitpid(child, 0)
    assert store.load(0, "1.1")["rounds"] == 1
    with pytest.raises(Stale):
        store.load(0, "2.1")
    store.save(0, "2.1", state(2), "1.1")
    store.save(0, "3.1", state(3), "2.1")
    assert store.load(0, "3.1")["rounds"] == 3


def test_a_memo_is_found_under_its_key_only(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    assert store.staged(0, "k") is None
    store.stage(0, "k", state(1))
    assert store.staged(0, "other") is None
    assert store.staged(0, "k")["rounds"] == 1
    store.save(0, "1.1", state(1), INITIAL)  # committing leaves the memo alone
    assert store.staged(0, "k")["rounds"] == 1


def test_a_full_disk_is_told_from_other_failures(tmp_path: Path, monkeypatch) -> None:
    from safetensors import SafetensorError

    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(store_module, "save_file", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_tree(tmp_path / "state", {})
    assert caught.value.errno == errno.ENOSPC
    assert is_full(caught.value)
    assert not is_full(ValueError("full"))
    assert not is_full(FileNotFoundError(errno.ENOENT, "no"))
