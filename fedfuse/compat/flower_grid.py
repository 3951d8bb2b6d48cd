"""Which replies have come to Flower's SuperLink, asked for all messages in one request.

Flower's grid takes the replies to a list of messages together, and raises for all of them if one cannot be read. So
they were asked for one by one: ten requests a look for ten clients, each looked up in the server's database. Here one
request says which replies are there, and each is then read by Flower's own code, apart from the others.

Internal names of Flower 1.41: `HttpGrid._client` with `PullMessages`, and `PullAppMessagesRequest` and `…Response` of
`flwr.proto.runtime_pb2`. Without them replies are asked for one by one. Guard: `tests/compat/test_flower_grid.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import httpx
from flwr.serverapp import Grid


class _Asked:
    """A client of Flower's runtime interface that knows already which replies are there."""

    def __init__(self, client: Any, answer: Any) -> None:
        self._client, self._answer = client, answer

    def PullMessages(self, request: Any) -> Any:  # noqa: N802 (Flower's name)
        return self._answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)


def announced(grid: Grid, keys: Iterable[str]) -> dict[str, Grid] | None:
    """For each message that is answered, a grid whose `pull_messages` reads that answer alone.

    Parameters
    ----------
    grid : Grid
    keys : iterable of str
        Of messages.

    Returns
    -------
    dict or None
        None if this grid, or the server with these keys, cannot say.
    """
    client: Any = getattr(grid, "_client", None)
    if not hasattr(client, "PullMessages"):
        return None
    from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse

    try:
        found = client.PullMessages(PullAppMessagesRequest(message_ids=keys))
    except httpx.HTTPStatusError as error:
        if error.response.is_server_error:  # by one of the replies
            return None
        raise
    out: dict[str, Grid] = {}
    for message, tree in zip(found.messages_list, found.message_object_trees, strict=True):
        one: Any = copy.copy(grid)
        one._client = _Asked(client, PullAppMessagesResponse(messages_list=[message], message_object_trees=[tree]))
        out[message.metadata.reply_to_message_id] = one
    return out
