"""Guards: the names of Flower that compat/ touches are there and mean what we take them to mean; and life without."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.proto.control_pb2 import RegisterNodeRequest, RegisterNodeResponse

from fedfuse.compat import (
    flower_apps,
    flower_arrays,
    flower_control,
    flower_fleet,
    flower_identity,
    flower_records,
    flower_replies,
)
from fedfuse.errors import WorldError

flower_identity.claim_identity()

VALUES = [
    (ArrayRecord, {"w": flower_records.LiveArray(torch.arange(3.0))}),
    (MetricRecord, {"loss": 0.5, "num-examples": 3}),
    (ConfigRecord, {"round": 1, "names": ["a", "b"]}),
]


@pytest.mark.parametrize(("kind", "values"), VALUES)
def test_a_record_keeps_its_content_where_we_know_it(kind: type, values: dict) -> None:
    assert flower_records.known()
    made, checked = flower_records.trusted(kind, dict(values)), kind(dict(values))
    assert made.__dict__.keys() | {"_is_dirty"} == checked.__dict__.keys() | {"_is_dirty"}  # set by writing to one
    assert type(made) is kind
    assert plain(made) == plain(checked)
    assert flower_records.entries(checked) == dict(checked.items())
    inside = flower_records.trusted(RecordDict, {"record": made})
    assert dict(inside) == dict(RecordDict({"record": made}))


def test_without_the_name_records_are_made_by_flower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower_records, "CONTENT", "_gone")
    monkeypatch.setattr(flower_records, "known", lambda: False)
    for kind, values in VALUES:
        made = flower_records.trusted(kind, dict(values))
        assert plain(made) == plain(values)
        assert plain(flower_records.entries(made)) == plain(values)
    content = flower_records.trusted(RecordDict, {"a": made})
    del flower_records.entries(content)["a"]
    assert "a" not in content


def test_an_array_that_has_not_left_the_machine_reads_as_flowers_own() -> None:
    from flwr.app import Array

    value = torch.arange(6.0).reshape(2, 3)
    live, plain = flower_records.LiveArray(value), Array(value)
    assert (live.dtype, live.shape, live.stype, live.data) == (plain.dtype, plain.shape, plain.stype, plain.data)
    assert flower_records.live_tensor(live) is value
    assert flower_records.live_tensor(plain) is None


def plain(record: object) -> dict:
    items = record.items()  # type: ignore[attr-defined]
    return {name: value.numpy().tolist() if hasattr(value, "numpy") else value for name, value in items}


def asked() -> Message:
    message = Message(RecordDict(), dst_node_id=7, message_type="train", group_id="g")
    message.metadata.__dict__["_message_id"] = "m1"
    return message


def test_a_reply_is_what_flower_makes() -> None:
    assert flower_replies.known()
    message, content = asked(), RecordDict({"config": ConfigRecord({"a": 1})})
    ours, theirs = flower_replies.reply_to(message, content), Message(content, reply_to=message)
    assert ours.__dict__.keys() == theirs.__dict__.keys()
    assert ours.content is content
    mine, flowers = dict(ours.metadata.__dict__), dict(theirs.metadata.__dict__)
    for name in ("_created_at", "_ttl"):  # a clock's
        assert mine.pop(name) == pytest.approx(flowers.pop(name), abs=1)
    assert mine == flowers


@pytest.mark.parametrize("known", [True, False])
def test_a_message_like_another_is_what_flower_makes(monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    monkeypatch.setattr(flower_replies, "known", lambda: known)
    first, content = Message(RecordDict(), 7, "train.vote"), RecordDict({"config": ConfigRecord({"a": 1})})
    ours, theirs = flower_replies.like(first, content, 9), Message(content, 9, "train.vote")
    assert ours.__dict__.keys() == theirs.__dict__.keys()
    assert ours.content is content
    mine, flowers = dict(ours.metadata.__dict__), dict(theirs.metadata.__dict__)
    assert mine.pop("_created_at") == pytest.approx(flowers.pop("_created_at"), abs=1)
    assert mine == flowers
    assert first.metadata.dst_node_id == 7


def test_without_the_names_a_reply_is_flowers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower_replies, "known", lambda: False)
    reply = flower_replies.reply_to(asked(), RecordDict())
    assert reply.metadata.reply_to_message_id == "m1"


def test_a_reply_is_made_where_nobody_has_said_who_we_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the actors of Flower's simulator: the look at Flower's fields makes a message of its own."""
    message = asked()
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(flower_identity.TaskIdentity, name, None)
    flower_replies.known.cache_clear()
    assert flower_replies.reply_to(message, RecordDict()).metadata.reply_to_message_id == "m1"


def test_an_identity_is_asked_for_and_can_be_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    identity = flower_identity.TaskIdentity
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(identity, name, None)
    with pytest.raises(RuntimeError):
        Message(RecordDict(), dst_node_id=1, message_type="train")
    flower_identity.claim_identity()
    Message(RecordDict(), dst_node_id=1, message_type="train")
    assert (identity.run_id, identity.task_id, identity.node_id) == (1, 1, 1)
    monkeypatch.setattr(flower_identity, "TaskIdentity", None)
    flower_identity.claim_identity()


def test_messages_take_a_name_and_travel_in_two_parts() -> None:
    message = Message(RecordDict(), dst_node_id=1, message_type="train")
    flower_apps.name_message(message, "m9")
    assert message.metadata.message_id == "m9"
    again = flower_apps.as_received(message.metadata, RecordDict({"c": ConfigRecord({"a": 2})}))
    assert again.metadata.message_id == "m9"
    assert again.content["c"]["a"] == 2
    assert flower_apps.new_run(3).run_id == 3


def test_an_array_is_sized_before_it_is_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np
    from flwr.app import Array
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

    array = Array(np.arange(1000.0))
    children = {key: value for key, value in get_all_nested_objects(array).items() if key != array.object_id}
    monkeypatch.setattr(Array, "inflate", Array.inflate)  # put back after the test
    flower_arrays.limit_arrays(len(array.data))
    assert np.array_equal(Array.inflate(array.deflate(), children).numpy(), array.numpy())
    flower_arrays.limit_arrays(len(array.data) - 1)
    with pytest.raises(Exception, match=f"an array of {len(array.data)} bytes"):
        Array.inflate(array.deflate(), children)


def test_what_flower_does_for_apps_and_nodes_is_there() -> None:
    for module in (flower_apps, flower_fleet):
        assert all(hasattr(module, name) for name in module.__all__)
    assert flower_apps.flatten_dict({"a": {"b": 1}}) == {"a.b": 1}
    assert flower_apps.APP_RAISED > 0
    flower_fleet.DeactivateNodeRequest(node_id=1)


def test_flowers_robust_rules_take_arrays() -> None:
    import numpy as np

    from fedfuse.compat import flower_robust

    rows = np.array([[0.0], [1.0], [2.0], [9.0]])
    assert flower_robust.trim_mean(rows, 0.25).tolist() == [1.5]
    (found,) = flower_robust.aggregate_n_closest_weights([np.array([1.5])], [[row] for row in rows], 2)
    assert found.tolist() == [1.5]
    contents = [RecordDict({"arrays": ArrayRecord([row])}) for row in (*rows, np.array([1.2]))]
    assert flower_robust.select_multikrum(contents, 1, 1)[0] in contents[1:3] + contents[4:]


class Control(BaseHTTPRequestHandler):
    """A SuperLink that lets each key in once."""

    known: set[bytes] = set()
    refusal: bytes | None = None

    def do_POST(self) -> None:
        key = RegisterNodeRequest.FromString(self.rfile.read(int(self.headers["content-length"]))).public_key
        status, said = 200, RegisterNodeResponse(node_id=2**63 + 5).SerializeToString()
        if self.refusal is not None:
            status, said = 403, self.refusal
        elif key in self.known:
            status, said = 412, b'{"code": 23, "detail": "Public key already in use."}'
        self.known.add(key)
        assert self.path == "/v1/control/register-node"
        self.send_response(status)
        self.send_header("content-length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, *_: object) -> None: ...


def test_a_key_is_let_in_without_flowers_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    link, key = HTTPServer(("127.0.0.1", 0), Control), ec.generate_private_key(ec.SECP384R1()).public_key()
    threading.Thread(target=link.serve_forever, daemon=True).start()
    address = f"127.0.0.1:{link.server_port}"
    monkeypatch.setattr(Control, "known", set())
    assert flower_control.registered(address, None, key) == 2**63 + 5
    assert flower_control.registered(address, None, key) is None
    monkeypatch.setattr(Control, "refusal", b'{"detail": "ann may read; this\\nneeds register"}')
    with pytest.raises(WorldError, match=r"ann may read; this needs register$"):
        flower_control.registered(address, None, key)
    link.shutdown()
    link.server_close()
    with pytest.raises(WorldError, match="cannot be asked"):
        flower_control.registered(address, None, key)
