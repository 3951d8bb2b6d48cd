"""What a node's push to Flower's SuperLink says, whether what it pushed is still there, and which nodes there are.

Internal names of Flower 1.41, read and not changed: `PushMessagesRequest` and `PushObjectRequest` of `flwr.proto`,
`authenticate_node` of `flwr.superlink.routers.fleet.node_auth` with the header `flwr-public-key`, `get_linkstate` of
`flwr.superlink.dependencies.linkstate`, and the application's `state.superlink_lifespan.objectstore_factory` and
`state.linkstate_factory`. They buy a quota a node, and sites by name in `fedfuse deploy status`: Flower's command line
shows no node's key. If they are gone, the server does not start, every push is refused by name, or `status` fails.
Guards: `tests/deploy/test_quota.py`, `tests/deploy/test_doors.py`.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from fedfuse.errors import UserError, WorldError

KEY = "flwr-public-key"
MESSAGES, OBJECT = "/v1/fleet/push-messages", "/v1/fleet/push-object"


@dataclass(frozen=True)
class Push:
    """What a node wants to leave at the server.

    Attributes
    ----------
    asked : message of Flower's
    objects : dict
        Bytes of each object, by its hash; 0 where it is only announced.
    """

    asked: Any
    objects: dict[str, int]


def push_of(path: str, body: bytes, most: int) -> Push:
    """Read a request to push.

    Raises
    ------
    UserError
        If it is none, speaks for another node, or announces more than `most` objects.
    """
    from flwr.proto.fleet_pb2 import PushMessagesRequest
    from flwr.proto.message_pb2 import PushObjectRequest
    from google.protobuf.message import DecodeError

    try:
        asked: Any = (PushObjectRequest if path == OBJECT else PushMessagesRequest).FromString(body)
    except DecodeError:
        raise UserError("a push that cannot be read") from None
    if path == OBJECT:
        return Push(asked, {asked.object_id: len(asked.object_content)})
    if len(asked.messages_list) != 1 or len(asked.message_object_trees) != 1:
        raise UserError("a push has one message and its objects")
    about, tree = asked.messages_list[0].metadata, asked.message_object_trees[0]
    if about.src_node_id != asked.node.node_id:
        raise UserError("a node answers in its own name only")
    if about.message_id != tree.object_id:
        raise UserError("these are another message's objects")
    found: dict[str, int] = {}
    waiting, seen = [tree], 0
    while waiting:
        node, seen = waiting.pop(), seen + 1
        found[node.object_id] = 0
        if seen + len(waiting) + len(node.children) > most:  # each time it is named: so often the store looks it up
            raise UserError(f"a message of more than {most} objects")
        waiting += node.children
    return Push(asked, found)


def proved(app: Any, scope: Any, push: Push | None = None) -> bytes | None:
    """The key of the node that pushes, if it proves that it has it, by Flower's own check; else None.

    Without a push, whoever asks need only be one of the nodes: its headers are signed, and the body is not read yet.
    """
    from fastapi import HTTPException, Request
    from flwr.superlink.dependencies.linkstate import get_linkstate
    from flwr.superlink.routers.fleet.node_auth import authenticate_node

    request = Request({**scope, "app": app, "state": {}})
    try:
        key = base64.b64decode(request.headers[KEY])
        if push is None and (node := get_linkstate(request).get_node_id_by_public_key(key)) is None:
            return None
        request.state.protobuf_request = SimpleNamespace(node_id=node) if push is None else push.asked
        authenticate_node(request)
    except (HTTPException, KeyError, ValueError):
        return None
    return key


def holds(app: Any) -> Callable[[str], bool]:
    """How to ask the SuperLink's application whether it still has an object.

    Raises
    ------
    WorldError
        If this Flower's cannot be asked.
    """
    try:
        factory = app.state.superlink_lifespan.objectstore_factory
    except AttributeError as error:
        raise WorldError("this Flower's SuperLink shows no store of objects, so nodes have no quota") from error
    return lambda key: key in factory.store()


def nodes(app: Any) -> list[tuple[bytes, int, str, str]]:
    """The nodes that were let in and not revoked: public key, id, Flower's word for how they are, and since when."""
    found = app.state.linkstate_factory.state().get_node_info(statuses=["registered", "online", "offline"])
    since = {"online": "last_activated_at", "offline": "last_deactivated_at"}
    return [
        (one.public_key, one.node_id, one.status, getattr(one, since.get(one.status, "registered_at"))) for one in found
    ]
