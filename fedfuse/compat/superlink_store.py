"""How Flower's SuperLink keeps objects: it believes their contents, not who named them first, and is soon done.

A message is announced as a tree of hashes before its objects come. Flower keeps each object's first announcement and
raises for whoever announces other children. So a node that could guess a record, its server's next one say, announced
that with a child of its own, and the server's own message was refused: the run ended, as often as it was resumed.
Here a later announcement takes the place of an earlier one until the content is there, whose head names the children.

Flower also asks its database five times an object, within one transaction, and every other one waits 5 s for its end:
an announcement of 1,500 objects ended the server, by an executor whose heartbeat was not taken. Here all objects of a
tree are looked up together (2,000 in 0.9 s and again in 0.2, where Flower took 7.5 and 9.8, on two loaded cores), and
who waits does so for a minute.

Internal names of Flower 1.41: `SqlObjectStore` with `preregister`, `put`, `delete` and `delete_objects_in_run`, which
are replaced, `_mutation_session` and `dialect_insert`; `SQLITE_PRAGMAS` of `sql_mixin`; the tables `StoredObject`,
`ObjectChild` and `RunObject`; `iterate_object_tree`, `is_valid_sha256_hash` and
`get_object_children_ids_from_object_content`. Without them the server does not start. Guard:
`tests/compat/test_superlink_store.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from itertools import islice
from typing import Any

from flwr.supercore import sql_mixin
from flwr.supercore.inflatable.inflatable_object import (
    get_object_children_ids_from_object_content,
    is_valid_sha256_hash,
    iterate_object_tree,
)
from flwr.supercore.object_store.sql_object_store import SqlObjectStore
from flwr.supercore.state.schema.objectstore_models import ObjectChild, RunObject, StoredObject
from flwr.supercore.utils import uint64_to_int64
from sqlalchemy import bindparam, delete, insert, select, update

WAIT = ("busy_timeout", "60000")  # ms
_put = SqlObjectStore.put


def believe_contents() -> None:
    """Let this process's stores of objects believe contents, and their databases wait."""
    if WAIT not in sql_mixin.SQLITE_PRAGMAS:
        sql_mixin.SQLITE_PRAGMAS = (*sql_mixin.SQLITE_PRAGMAS, WAIT)  # type: ignore[assignment]
    SqlObjectStore.preregister = _preregister  # type: ignore[method-assign]
    SqlObjectStore.put = _put_believed  # type: ignore[method-assign]
    SqlObjectStore.delete = _delete  # type: ignore[method-assign]
    SqlObjectStore.delete_objects_in_run = _delete_objects_in_run  # type: ignore[method-assign]


def _preregister(self: Any, run_id: int, object_tree: Any) -> list[str]:
    """Take in an announced tree; which of its objects are not here yet.

    Raises
    ------
    ValueError
        If it names no hashes, one object with different children, or others than its content has.
    """
    announced: dict[str, set[str]] = {}  # children before their parents
    for node in iterate_object_tree(object_tree):
        children = {child.object_id for child in node.children}
        if not is_valid_sha256_hash(node.object_id) or len(children) < len(node.children):
            raise ValueError(f"object {node.object_id[:64]!r} is no hash, or has a child twice")
        if announced.setdefault(node.object_id, children) != children:  # what stands below itself has no end
            raise ValueError(f"object {node.object_id} is announced with different children")
    with self._mutation_session() as session:
        rows = [{"object_id": key, "content": b"", "is_available": 0, "ref_count": 0} for key in announced]
        session.execute(self.dialect_insert(StoredObject).on_conflict_do_nothing(), rows)
        known, here = _children(session, announced), set[str]()
        for some in _some(announced):
            there = select(StoredObject.object_id).where(StoredObject.object_id.in_(some))
            here.update(session.scalars(there.where(StoredObject.is_available == 1)))
        if lied := [key for key in here if known[key] != announced[key]]:
            raise ValueError(f"object {lied[0]} has other children")
        _change(session, {key: (known[key], children) for key, children in announced.items()})
        mine = [{"run_id": uint64_to_int64(run_id), "object_id": key} for key in announced]
        session.execute(self.dialect_insert(RunObject).on_conflict_do_nothing(), mine)
    return [key for key in announced if key not in here]


def _put_believed(self: Any, object_id: str, object_content: bytes) -> None:
    """Keep an object's content, and the children that it names."""
    with self._mutation_session() as session:
        _put(self, object_id, object_content)
        named = set(get_object_children_ids_from_object_content(object_content))
        known = _children(session, [object_id])[object_id]
        here = set[str]()
        for some in _some(named - known):
            here.update(session.scalars(select(StoredObject.object_id).where(StoredObject.object_id.in_(some))))
        # a child whose content is not here may be announced as standing above this object: that had no end
        more = {child for child in here if object_id not in _below(session, child)}
        _change(session, {object_id: (known, (named & known) | more)})


def _delete(self: Any, object_id: str) -> None:
    """Delete an object that stands below none, and what stands below it alone."""
    with self._mutation_session() as session:
        _deleted(session, [object_id])


def _delete_objects_in_run(self: Any, run_id: int) -> None:
    """Delete a run's objects."""
    with self._mutation_session() as session:
        mine = RunObject.run_id == uint64_to_int64(run_id)
        found = list(session.scalars(select(RunObject.object_id).where(mine)))
        session.execute(delete(RunObject).where(mine))
        _deleted(session, found)


def _deleted(session: Any, keys: Collection[str]) -> None:
    waiting = set(keys)
    while waiting:
        gone: list[str] = []
        for some in _some(waiting):
            free = select(StoredObject.object_id).where(StoredObject.object_id.in_(some), StoredObject.ref_count == 0)
            gone += session.scalars(free)
        below = _children(session, gone)
        _change(session, {key: (children, set()) for key, children in below.items()})
        for some in _some(gone):
            session.execute(delete(StoredObject).where(StoredObject.object_id.in_(some)))
        waiting = set().union(*below.values())


def _below(session: Any, key: str) -> set[str]:
    """An object and all that stands below it."""
    found: set[str] = set()
    waiting = {key}
    while waiting:
        found |= waiting
        waiting = set().union(*_children(session, waiting).values()) - found
    return found


def _children(session: Any, keys: Collection[str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {key: set() for key in keys}
    for some in _some(keys):
        pairs = select(ObjectChild.parent_id, ObjectChild.child_id).where(ObjectChild.parent_id.in_(some))
        for parent, child in session.execute(pairs):
            found[parent].add(child)
    return found


def _change(session: Any, children: dict[str, tuple[set[str], set[str]]]) -> None:
    """Give objects other children, each by what it had and has; who is nobody's any more stays until its run ends."""
    less = [(parent, child) for parent, (before, after) in children.items() for child in before - after]
    more = [(parent, child) for parent, (before, after) in children.items() for child in after - before]
    table: Any = ObjectChild.__table__
    if less:
        gone = delete(table).where(table.c.parent_id == bindparam("p"), table.c.child_id == bindparam("c"))
        session.connection().execute(gone, [{"p": parent, "c": child} for parent, child in less])
    if more:
        session.execute(insert(ObjectChild), [{"parent_id": parent, "child_id": child} for parent, child in more])
    counts = Counter(child for _, child in more)
    counts.subtract(child for _, child in less)
    if counts:
        objects: Any = StoredObject.__table__
        counted = update(objects).where(objects.c.object_id == bindparam("k"))
        counted = counted.values(ref_count=objects.c.ref_count + bindparam("n"))
        session.connection().execute(counted, [{"k": key, "n": count} for key, count in counts.items()])


def _some(keys: Collection[str], most: int = 500) -> Iterator[tuple[str, ...]]:
    """Keys by the hundreds: a database takes only so many in a question."""
    left = iter(keys)
    while some := tuple(islice(left, most)):
        yield some
