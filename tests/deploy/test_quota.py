"""A node fills the server's disk: what it may leave there has a limit, and only what is gone makes room."""

from __future__ import annotations

import asyncio
import base64
import datetime
import hashlib
import itertools
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store.sql_object_store import SqlObjectStore

from fedfuse.compat.flower_identity import claim_identity
from fedfuse.compat.superlink_objects import MESSAGES, OBJECT, holds
from fedfuse.deploy import quota as counted
from fedfuse.deploy.certs import node_keys
from fedfuse.deploy.doors import whole
from fedfuse.deploy.quota import LITTLE, ROW, TREE, OverQuota, Quota, Sites, in_time, sites_door
from fedfuse.network.audit import Audit
from fedfuse.network.roster import Place, Roster, fingerprint
from tests.deploy.test_doors import Inner
from tests.deploy.test_doors import ask as asked

RUN, NODE = 7, 42
claim_identity()


class Link(Inner):
    """The SuperLink behind the door, with Flower's own store: takes what is announced and pushed."""

    def __init__(self, path: Path, keys: dict[bytes, int]) -> None:
        super().__init__()
        self.store = SqlObjectStore(str(path))
        self.store.initialize()
        state = SimpleNamespace(get_node_id_by_public_key=keys.get)
        self.state = SimpleNamespace(
            superlink_lifespan=SimpleNamespace(objectstore_factory=SimpleNamespace(store=lambda: self.store)),
            linkstate_factory=SimpleNamespace(state=lambda: state),
        )

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, self.paths = (await receive())["body"], [*self.paths, scope["path"]]
        if scope["path"] == MESSAGES:
            self.store.preregister(RUN, PushMessagesRequest.FromString(body).message_object_trees[0])
        elif scope["path"] == OBJECT:
            pushed = PushObjectRequest.FromString(body)
            self.store.put(pushed.object_id, pushed.object_content)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


class Site:
    """A node with a key, who signs as Flower's does."""

    def __init__(self, folder: Path, name: str) -> None:
        from cryptography.hazmat.primitives.serialization import load_ssh_private_key

        folder.mkdir(parents=True, exist_ok=True)
        node_keys(folder, name)
        self.key: Any = load_ssh_private_key((folder / f"{name}.key").read_bytes(), None)
        from fedfuse.compat.flower_fleet import public_key_to_bytes

        self.public = public_key_to_bytes(self.key.public_key())

    def headers(self, forged: bool = False) -> list[tuple[bytes, bytes]]:
        from flwr.supercore.primitives.asymmetric import sign_message

        now = datetime.datetime.now(datetime.UTC).isoformat()
        signature = sign_message(self.key, (now + "x" * forged).encode())
        told = {"flwr-public-key": base64.b64encode(self.public), "flwr-signature": base64.b64encode(signature)}
        return [*((k.encode(), v) for k, v in told.items()), (b"flwr-timestamp", now.encode())]


class World:
    """A server's door with two sites before it."""

    def __init__(self, tmp_path: Path, megabytes: int = 1) -> None:
        self.mallory, self.ann = (Site(tmp_path / "keys", name) for name in ("mallory", "ann"))
        self.link = Link(tmp_path / "link.db", {self.mallory.public: NODE, self.ann.public: NODE + 1})
        self.post = tmp_path / "post"
        self.post.mkdir()
        for site, client in ((self.mallory, 0), (self.ann, 1)):
            Roster(self.post / "roster.json").add(
                fingerprint(site.public), Place(("mallory", "ann")[client], client, None)
            )
        self.audit = Audit(self.post / "audit.jsonl")
        self.door = sites_door(self.link, self.post, self.audit, megabytes)

    def ask(self, site: Site, path: str, request: Any, **how: Any) -> tuple[int, str]:
        def sealed(scope: Any) -> Any:
            return {**scope, "headers": [*scope["headers"], *site.headers(**how)]}

        async def door(scope: Any, receive: Any, send: Any) -> None:
            await self.door(sealed(scope), receive, send)

        status, said = asked(door, path, body=request.SerializeToString())
        return status, said.decode()

    def reply(self, site: Site, size: int, fill: int = 0, node: int = NODE) -> list[tuple[int, str]]:
        """Announce and push a reply of one array."""
        import numpy as np
        from flwr.app import Array

        value = np.random.default_rng(fill).integers(0, 255, size, dtype=np.uint8)
        content = RecordDict({"arrays": ArrayRecord({"w": Array(value)})})
        message = Message(content, dst_node_id=1, message_type="train")
        message.metadata.__dict__["_message_id"] = message.object_id
        objects = get_all_nested_objects(message)
        announced = self.ask(site, MESSAGES, announcing(get_object_tree(message), node))
        pushed = [
            self.ask(site, OBJECT, PushObjectRequest(node=Node(node_id=node), run_id=RUN, object_id=key,
                                                     object_content=value.deflate()))
            for key, value in objects.items()
        ] if announced[0] == 200 else []  # fmt: skip
        self.last = message.object_id
        return [announced, *pushed]


def announcing(tree: ObjectTree, node: int, source: int | None = None) -> PushMessagesRequest:
    request = PushMessagesRequest(node=Node(node_id=node), message_object_trees=[tree])
    about = request.messages_list.add().metadata
    about.src_node_id, about.message_id = node if source is None else source, tree.object_id
    return request


def digest(i: int) -> str:
    return hashlib.sha256(str(i).encode()).hexdigest()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_one_node_cannot_fill_the_server(world: World) -> None:
    """The attack: reply after reply that nobody fetches. Another node is not touched by it."""
    taken = 0
    for i in range(40):
        answers = world.reply(world.mallory, 100_000, i)
        taken += all(status == 200 for status, _ in answers)
        refused = [said for status, said in answers if status == 507]
        assert all("objects here, too many to take more" in said for said in refused)
        assert bool(refused) == any(status != 200 for status, _ in answers)
    assert 7 <= taken <= 10  # of a megabyte
    assert (world.post.parent / "link.db").stat().st_size < 2.5 * 2**20
    assert {status for status, _ in world.reply(world.ann, 100_000, 99, NODE + 1)} == {200}
    entries, _ = world.audit.verify()
    assert [(entry["event"], entry["who"]) for entry in entries] == [("quota", "mallory")]  # told once


def test_what_the_server_is_done_with_makes_room(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counted, "PAUSE", 0.0)
    for i in range(40):  # four times what fits at once
        assert {status for status, _ in world.reply(world.mallory, 100_000, i)} == {200}
        world.link.store.delete(world.last)
    assert world.audit.verify()[0] == []


def test_a_million_announced_objects_are_too_many(world: World) -> None:
    tree = ObjectTree(object_id=digest(-1), children=[ObjectTree(object_id=digest(i)) for i in range(TREE)])
    status, said = world.ask(world.mallory, MESSAGES, announcing(tree, NODE))
    assert (status, f"more than {TREE} objects" in said) == (400, True)
    some = ObjectTree(object_id=digest(-1), children=[ObjectTree(object_id=digest(i)) for i in range(300)])
    assert world.ask(world.mallory, MESSAGES, announcing(some, NODE))[0] == 507  # 300 rows are more than a megabyte
    assert len(world.link.store) == 0


def test_objects_that_are_named_again_and_again_are_too_many(world: World) -> None:
    """A megabyte of two dozen hashes that stand below each other: the store would look each up 16,000 times."""

    def below(level: int) -> list[ObjectTree]:
        children = below(level + 1) if level < 12 else []
        return [ObjectTree(object_id=digest(2 * level + i), children=children) for i in (0, 1)]

    tree = ObjectTree(object_id=digest(-1), children=below(0))
    assert len(tree.SerializeToString()) < 2**21
    status, said = world.ask(world.mallory, MESSAGES, announcing(tree, NODE))
    assert (status, f"more than {TREE} objects" in said) == (400, True)


def test_a_node_that_announces_without_end_leaves_the_store_to_others(world: World) -> None:
    """The attack: the same announcement over and over, each of which the store is busy with for seconds."""

    class Slow(Link):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            assert not busy or scope["path"] != MESSAGES
            busy.append(time.monotonic())
            await asyncio.sleep(0.05)
            spans.append((busy.pop(), time.monotonic()))
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

    busy: list[float] = []
    spans: list[tuple[float, float]] = []
    world.link.__class__ = Slow
    body = announcing(ObjectTree(object_id=digest(0)), NODE).SerializeToString()

    async def several() -> None:
        await asyncio.gather(*(once() for _ in range(4)))

    async def once() -> None:
        scope = {"type": "http", "method": "POST", "path": MESSAGES, "query_string": b"", "state": {}}
        scope["headers"] = [(b"content-length", str(len(body)).encode()), *world.mallory.headers()]

        async def receive() -> Any:
            return {"type": "http.request", "body": body}

        async def send(_: Any) -> None: ...

        await world.door(scope, receive, send)

    asyncio.run(several())
    assert len(spans) == 4
    assert all(later - ended >= 0.14 for (_, ended), (later, _) in itertools.pairwise(spans))


def test_a_node_answers_in_its_own_name_and_with_its_own_objects(world: World) -> None:
    tree = ObjectTree(object_id=digest(0))
    status, said = world.ask(world.mallory, MESSAGES, announcing(tree, NODE, NODE + 1))
    assert (status, "in its own name only" in said) == (400, True)
    request = announcing(tree, NODE)
    request.messages_list[0].metadata.message_id = digest(1)  # a root that no confirmation would delete
    status, said = world.ask(world.mallory, MESSAGES, request)
    assert (status, "another message's objects" in said) == (400, True)
    del request.messages_list[:]
    assert world.ask(world.mallory, MESSAGES, request)[0] == 400
    assert world.link.paths == []


def test_a_stranger_counts_for_nobody(world: World) -> None:
    """Whoever signs with another key, or does not sign, neither fills a node's quota nor empties it."""
    world.reply(world.mallory, 10_000)
    before = world.door.quota.held(world.mallory.public)
    request = PushObjectRequest(node=Node(node_id=NODE), run_id=RUN, object_id=digest(1), object_content=bytes(900_000))
    with pytest.raises(Exception, match="match content hash"):  # the application behind, which would say 401
        world.ask(world.mallory, OBJECT, request, forged=True)
    assert world.door.quota.held(world.mallory.public) == before > 10_000


def test_of_strangers_nothing_large_is_read(world: World) -> None:
    """The attack of an audit: 25 strangers held 63 MiB each at the server, who read them before it asked who it was."""
    read: list[int] = []

    async def counting(scope: Any, receive: Any, send: Any) -> None:
        async def received() -> Any:
            read.append(1)
            return await receive()

        await world.door(scope, received, send)

    body = bytes(LITTLE + 1)
    for path in (OBJECT, MESSAGES, "/v1/fleet/pull-messages"):
        assert asked(counting, path, body=body, length=len(body))[0] == 401
    mallory = world.mallory.headers(forged=True)

    async def signed(scope: Any, receive: Any, send: Any) -> None:
        await counting({**scope, "headers": [*scope["headers"], *mallory]}, receive, send)

    assert asked(signed, OBJECT, body=body, length=len(body))[0] == 401
    mallory = [*Site(world.post, "nobody").headers()]  # a key of its own that nobody registered
    assert asked(signed, OBJECT, body=body, length=len(body))[0] == 401
    mallory = [(b"transfer-encoding", b"chunked")]
    assert asked(signed, OBJECT, body=body)[0] == 401
    assert (read, world.link.paths) == ([], [])
    mallory = world.mallory.headers()
    assert asked(signed, OBJECT, body=body, length=len(body))[0] == 400  # read, and no push
    assert read


def test_a_small_request_that_does_not_end_is_not_waited_for() -> None:
    """The attack: a stranger's request of some bytes, and no more of it for ever."""

    async def never() -> Any:
        await asyncio.sleep(60)

    async def ended() -> None:
        began = time.monotonic()
        assert await whole(in_time(never, 0.1)) == b""
        assert time.monotonic() - began < 10

    async def here() -> None:
        async def parts() -> Any:
            return waiting.pop() if waiting else await asyncio.sleep(0.3, {"type": "http.disconnect"})

        waiting = [{"body": b"b"}, {"body": b"a", "more_body": True}]
        receive = in_time(parts, 0.1)
        assert await whole(receive) == b"ab"
        assert (await receive())["type"] == "http.disconnect"  # waited for as long as it takes

    asyncio.run(ended())
    asyncio.run(here())


def test_junk_is_named(world: World) -> None:
    for path in (MESSAGES, OBJECT):
        status, said = asked(world.door, path, body=b"\xff" * 50)
        assert (status, json.loads(said)["detail"]) == (400, "a push that cannot be read")


def test_it_counts_each_object_once() -> None:
    there: set[str] = set()
    quota = Quota(10 * ROW, there.__contains__)
    quota.take(b"a", {"x": 0, "y": 0})
    quota.take(b"a", {"x": 5})
    quota.take(b"a", {"x": 5})
    assert quota.held(b"a") == 2 * ROW + 5
    assert quota.held(b"b") == 0
    there.update("xy")
    with pytest.raises(OverQuota):
        quota.take(b"a", {"z": 9 * ROW})
    assert quota.held(b"a") == 2 * ROW + 5
    quota.take(b"b", {"z": 9 * ROW})


def test_without_flowers_store_there_is_no_server() -> None:
    from fedfuse.errors import WorldError

    with pytest.raises(WorldError, match="shows no store of objects"):
        holds(SimpleNamespace(state=SimpleNamespace()))
    assert issubclass(Sites, counted.Door)
