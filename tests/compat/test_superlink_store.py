"""Guards: nobody's lies about objects refuse anybody else's message, and nothing stands below itself."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore import sql_mixin
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store.sql_object_store import SqlObjectStore
from sqlalchemy import event, text

from fedfuse.compat.flower_identity import claim_identity
from fedfuse.compat.superlink_store import believe_contents

claim_identity()
JUNK = hashlib.sha256(b"junk").hexdigest()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SqlObjectStore:
    monkeypatch.setattr(sql_mixin, "SQLITE_PRAGMAS", sql_mixin.SQLITE_PRAGMAS)
    for name in ("preregister", "put", "delete", "delete_objects_in_run"):
        monkeypatch.setattr(SqlObjectStore, name, getattr(SqlObjectStore, name))
    believe_contents()
    made = SqlObjectStore(str(tmp_path / "link.db"))
    made.initialize()
    return made


def above(key: str, *children: str) -> ObjectTree:
    return ObjectTree(object_id=key, children=[ObjectTree(object_id=child) for child in children])


def message() -> Message:
    return Message(RecordDict({"run": ConfigRecord({"round": 2})}), dst_node_id=7, message_type="train")


def arrived(store: SqlObjectStore, sent: Message) -> bool:
    """Push what an announcement asks for, and read the message as its receiver does."""
    objects = {key: value.deflate() for key, value in get_all_nested_objects(sent).items()}
    for key in store.preregister(1, get_object_tree(sent)):
        store.put(key, objects[key])
    return whole(store, sent)


def whole(store: SqlObjectStore, sent: Message) -> bool:
    keys = [node.object_id for node in iterate_object_tree(store.get_object_tree(sent.object_id))]
    got = inflate_object_from_contents(sent.object_id, {key: store.get(key) or b"" for key in keys})
    return JUNK not in keys and got.content == sent.content  # type: ignore[attr-defined]


@pytest.mark.parametrize("lie", ["a child that it has not", "without its children"])
@pytest.mark.parametrize("when", ["before", "while it comes", "after"])
def test_a_guessed_object_announced_otherwise_refuses_nobodys_message(
    lie: str, when: str, store: SqlObjectStore
) -> None:
    """The attack of an audit: the server's next record, with a child of its own, ended the run."""
    sent = message()
    guessed = sent.content["run"].object_id if lie.startswith("a") else sent.content.object_id
    lying = above(guessed, *([JUNK] if lie.startswith("a") else []))
    if when == "before":
        store.preregister(1, lying)
        assert arrived(store, sent)
    elif when == "while it comes":
        objects = {key: value.deflate() for key, value in get_all_nested_objects(sent).items()}
        missing = store.preregister(1, get_object_tree(sent))
        store.preregister(1, lying)
        for key in missing:
            store.put(key, objects[key])
        assert whole(store, sent)
    else:
        assert arrived(store, sent)
        with pytest.raises(ValueError, match="has other children"):
            store.preregister(1, lying)
        assert whole(store, sent)
    store.delete(sent.object_id)
    assert sent.object_id not in store


def test_nothing_stands_below_itself(store: SqlObjectStore) -> None:
    """Flower follows a tree to its end: one without an end would answer no question any more."""
    a, b = (hashlib.sha256(name).hexdigest() for name in (b"a", b"b"))
    with pytest.raises(ValueError, match="with different children"):
        store.preregister(1, ObjectTree(object_id=JUNK, children=[ObjectTree(object_id=b, children=[above(a, b)])]))
    store.preregister(1, ObjectTree(object_id=JUNK, children=[above(a, b)]))
    store.preregister(1, ObjectTree(object_id=JUNK, children=[above(b, a)]))
    assert store.get_object_tree(b) == above(b, a)
    content = f"Message {b} 0\0".encode()  # names as its child what was announced as standing above it
    key = hashlib.sha256(content).hexdigest()
    store.preregister(1, above(b, key))
    store.verify = False  # of a content's form
    store.put(key, content)
    assert store.get_object_tree(b) == above(b, key)


def test_a_tree_of_no_hashes_is_refused(store: SqlObjectStore) -> None:
    for tree in (above("x"), above(JUNK, JUNK.replace("a", "b"), JUNK.replace("a", "b"))):
        with pytest.raises(ValueError, match="is no hash, or has a child twice"):
            store.preregister(1, tree)
    assert len(store) == 0


def test_an_objects_children_are_not_kept_twice(store: SqlObjectStore) -> None:
    sent = message()
    assert arrived(store, sent)
    assert store.preregister(1, get_object_tree(sent)) == []
    store.delete_objects_in_run(1)
    assert len(store) == 0


def test_the_database_is_asked_as_often_for_many_objects_as_for_few(store: SqlObjectStore) -> None:
    """The attack: while it took in an announcement of 1,500 objects nobody else reached the database; it ended."""
    asked = list[str]()
    event.listen(store._engine, "before_cursor_execute", lambda *what: asked.append(what[2]))
    keys = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(400)]
    assert len(store.preregister(1, above(JUNK, *keys))) == 401
    assert len(store) == 401
    store.delete(JUNK)
    assert len(store) == 0
    store.preregister(1, above(JUNK, *keys))
    store.delete_objects_in_run(1)
    assert len(store) == 0
    assert len(asked) < 60


def test_who_waits_for_the_database_does_so_for_a_minute(store: SqlObjectStore) -> None:
    with store.session() as session:
        assert session.execute(text("PRAGMA busy_timeout")).scalar() == 60_000
