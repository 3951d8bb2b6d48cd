"""Guards: one request says which replies have come, and each is read apart from the others, by Flower's own code."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedResponse, PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.superlink.grid.http_grid import HttpGrid

from fedfuse.compat.flower_grid import announced
from fedfuse.compat.flower_identity import claim_identity
from tests.deploy.network import Network

claim_identity()


class Client:
    """Flower's runtime interface with two replies, the second of which is damaged."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.confirmed: list[str] = []
        self.answer, self.objects = PullAppMessagesResponse(), dict[str, bytes]()
        for key in ("first", "second"):
            question = Message(RecordDict(), 7, "train")
            question.metadata.__dict__["_message_id"] = key
            reply = Message(RecordDict({"config": ConfigRecord({"client": key})}), reply_to=question)
            reply.metadata.__dict__["_message_id"] = reply.object_id
            self.answer.messages_list.append(message_to_proto(reply))
            self.answer.message_object_trees.append(get_object_tree(reply))
            for name, part in get_all_nested_objects(reply).items():
                self.objects[name] = part.deflate() if key == "first" else b"damaged"

    def PullMessages(self, request: Any) -> Any:
        self.asked.append(list(request.message_ids))
        return self.answer

    def PullObject(self, request: Any) -> Any:
        content = self.objects[request.object_id]
        return PullObjectResponse(object_found=True, object_available=True, object_content=content)

    def ConfirmMessageReceived(self, request: Any) -> Any:
        self.confirmed.append(request.message_object_id)
        return ConfirmMessageReceivedResponse()


def grid_of(client: Any) -> HttpGrid:
    grid = HttpGrid(token="x")
    grid._client = client
    grid._run = type("Run", (), {"run_id": 1})()
    return grid


def test_one_request_says_which_replies_are_there_and_a_damaged_one_is_read_alone() -> None:
    client = Client()
    grid = grid_of(client)
    found = announced(grid, ["first", "second", "third"])
    assert found is not None
    assert client.asked == [["first", "second", "third"]]
    assert set(found) == {"first", "second"}
    (reply,) = found["first"].pull_messages(["first"])
    assert reply.metadata.reply_to_message_id == "first"
    assert dict(reply.content.config_records["config"]) == {"client": "first"}
    assert client.confirmed == [reply.metadata.message_id]
    with pytest.raises(Exception):  # noqa: B017 (whatever Flower says)
        list(found["second"].pull_messages(["second"]))
    assert len(client.asked) == 1
    assert grid._client is client


def test_a_server_that_fails_at_one_of_them_is_asked_for_each_and_other_errors_are_told() -> None:
    class Failing(Client):
        code = 500

        def PullMessages(self, request: Any) -> Any:
            answer = httpx.Response(self.code, request=httpx.Request("POST", "https://here"))
            answer.raise_for_status()

    failing = Failing()
    assert announced(grid_of(failing), ["first"]) is None
    failing.code = 403
    with pytest.raises(httpx.HTTPStatusError):
        announced(grid_of(failing), ["first"])


def test_a_grid_of_another_kind_says_nothing() -> None:
    assert announced(Network([]), ["first"]) is None
