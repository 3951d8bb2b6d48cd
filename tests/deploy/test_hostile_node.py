"""One node does its worst: the run goes on with the others, and says whose fault it was."""

from __future__ import annotations

import json
import re
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message

from fedfuse.compat.flower_arrays import limit_arrays
from fedfuse.config.schema import Config
from fedfuse.core.loop import Federation
from fedfuse.errors import WorldError, one_line
from fedfuse.network.exchange import Patience
from fedfuse.network.sizes import UNKNOWN
from fedfuse.results.run_data import load
from fedfuse.wire.records import InvalidArrays, digest_of, plain_numpy
from tests.deploy.network import Network, run, seats, tiny
from tests.federations import QUICK


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedfuse.network.exchange.POLL", 0.01)


class Hostile(Network):
    """Node 102's replies cannot even be taken from the wire, as those of a real node may be."""

    broken: BaseException = KeyError("arraychunk_ids")
    kinds: tuple[str, ...] = ("train",)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.bad: set[str] = set()
        self.reply = self._noted

    def _noted(self, message: Message, reply: Message) -> Message:
        if message.metadata.dst_node_id == 102 and message.metadata.message_type in self.kinds:
            self.bad.add(message.metadata.message_id)
        return reply

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        asked = list(message_ids)
        taken = super().pull_messages(asked)  # signed for, as Flower does, before it looks inside
        if self.bad & {reply.metadata.reply_to_message_id for reply in taken}:
            raise self.broken
        return taken


def honest(
    tmp_path: Path,
    gone: Callable[[Message], bool],
    config: Config | None = None,
    nodes: tuple[int, ...] = (102,),
    clients: int = 3,
) -> str:
    """The digest of the honest rest if some nodes had simply been silent."""
    network = Network(seats(tmp_path / "honest", clients))
    network.reply = lambda message, reply: (
        Message(Error(1003, "silent"), reply_to=message)
        if message.metadata.dst_node_id in nodes and gone(message)
        else reply
    )
    built, _ = run(config or tiny("fedavg"), network, tmp_path / "honest-run")
    return rest(built, [c for c in range(clients) if 100 + c not in nodes])


def rest(built: Federation, clients: Iterable[int] = (0, 1)) -> str:
    """The digest as semantics.md has it, over some clients: all that the server publishes and keeps, and theirs."""
    shas = built.strategy.inbox.shas
    assert all(shas[client] for client in clients)
    return digest_of(built.strategy.sha(), [shas[client] for client in clients])


@pytest.mark.parametrize(
    "broken",
    [
        KeyError("arraychunk_ids"),
        ValueError("x\nfedfuse: y"),
        MemoryError(),
        RecursionError(),
        httpx.HTTPStatusError("500", request=httpx.Request("POST", "https://x"), response=httpx.Response(500)),
    ],
    ids=repr,
)
def test_a_reply_that_cannot_be_taken_from_the_wire_leaves_out_its_node_alone(
    broken: BaseException, tmp_path: Path
) -> None:
    network = Hostile(seats(tmp_path, 3))
    network.broken = broken
    built, _ = run(tiny("fedavg"), network, tmp_path / "run")
    assert rest(built) == honest(tmp_path, lambda m: m.metadata.message_type == "train")
    assert built.strategy.inbox.failures["replies"] + built.strategy.inbox.failures["rejected"] == 2
    assert any("client 2: its reply cannot be read" in line for line in built.strategy.inbox.left_out)


def test_a_reply_whose_parts_do_not_come_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Announced and never sent: Flower waits for the parts for minutes, and hours where one comes now and then."""
    monkeypatch.setattr("fedfuse.network.exchange.SOON", 0.1)

    class Slow(Hostile):
        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            if self.bad & set(message_ids):
                over.wait(60)
                return []
            return Network.pull_messages(self, message_ids)

    network, over, began = Slow(seats(tmp_path, 3)), threading.Event(), time.monotonic()
    built, said = run(tiny("fedavg"), network, tmp_path / "run", Patience(deadline=3.0))
    assert time.monotonic() - began < 40
    over.set()
    assert rest(built) == honest(tmp_path, lambda m: m.metadata.message_type == "train")
    assert "fedfuse: client 2: no reply within 3 s; left out" in said


HELLOS: dict[str, Any] = {
    "no examples": {"examples": [0, 0, 0]},
    "no counts": {"examples": "many"},
    "negative": {"examples": [-5, 0, 0]},
    "huge": {"examples": [2**50, 0, 0]},
    "short": {"examples": [5]},
    "floats": {"examples": [1.5, 2.0, 3.0]},
    "a boolean client": {"client": True},
    "another client": {"client": 7},
    "a taken client": {"client": 0},
    "text": {"client": "2\nfedfuse: "},
}


@pytest.mark.parametrize("kind", list(HELLOS))
@pytest.mark.parametrize("own", [False, True])
def test_a_bad_hello_names_its_node_and_leaves_it_out(kind: str, own: bool, tmp_path: Path) -> None:
    network, config = Network(seats(tmp_path, 3)), tiny("fedavg")
    if own:
        from fedfuse.network.own_data import counts_of

        found = {"client": 2, "examples": [100, 10, 10], **HELLOS[kind]}
        if "client" not in HELLOS[kind]:
            with pytest.raises(Exception, match="examples="):
                counts_of(found)
        return

    def forge(message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "query.hello" and message.metadata.dst_node_id == 102:
            old: Any = dict(reply.content["hello:2"])
            reply.content["hello:2"] = ConfigRecord({**old, **HELLOS[kind]})
        return reply

    network.reply = forge
    with pytest.raises(WorldError, match=r"no node acts as client \[2\]; turned away: "):
        run(config, network, tmp_path / "all", Patience(join=0.2))
    built, said = run(config, network, tmp_path / "run", Patience(join=0.2, clients=2))
    assert rest(built) == honest(tmp_path, lambda m: m.metadata.message_type != "query.hello")
    assert any(line.startswith("fedfuse: node 102 is not taken: ") for line in said)
    assert "fedfuse: begins without client [2]: no node acts as it" in said
    assert built.digest is None
    assert built.digest_missing == [2]


def test_a_node_that_does_not_answer_its_hello_keeps_out_nobody_who_comes_later(tmp_path: Path) -> None:
    """The attack: hellos were waited for together, until joining was over; who came meanwhile had a second left."""
    network = Network([*seats(tmp_path, 3), seats(tmp_path, 3)[0]])  # one more node that was let in, and is silent
    network.away, silent, began = {101, 102}, 103, time.monotonic()

    def silence(message: Message) -> bool:
        network.away -= {101} if network.log.count("query.hello>103") else set()
        network.away -= {102} if network.log.count("query.hello>101") else set()
        return message.metadata.dst_node_id != silent

    network.before = silence
    built, said = run(tiny("fedavg", "rounds=1"), network, tmp_path / "run", Patience(join=60))
    assert time.monotonic() - began < 30
    assert built.strategy.inbox.left_out == []
    assert [line for line in said if "acts as client 2" in line] == ["fedfuse: node 102 acts as client 2"]
    network.away, network.before = {101}, lambda message: message.metadata.dst_node_id != silent
    with pytest.raises(WorldError, match=r"^after 1 s no node acts as client \[1\]; turned away: node 103 does not "):
        run(tiny("fedavg", "rounds=1"), network, tmp_path / "again", Patience(join=1))


# --- one of each kind at once -----------------------------------------------------------------------------


def nan(reply: Message) -> Message:
    for record in reply.content.array_records.values():
        for name, array in list(record.items()):
            value = array.numpy().copy()
            if value.dtype.kind == "f":
                value.reshape(-1)[:1] = np.nan
                record[name] = Array(value)
    return reply


def shape(reply: Message) -> Message:
    for record in reply.content.array_records.values():
        for name, array in list(record.items()):
            record[name] = Array(np.concatenate([array.numpy().reshape(-1)] * 2))
    return reply


def more(reply: Message) -> Message:
    reply.content["extra"] = ArrayRecord({"w": Array(np.zeros(3, "float32"))})
    return reply


def heavy(reply: Message) -> Message:
    reply.content["metrics"]["num-examples"] = 2**52
    return reply


def other(reply: Message) -> Message:
    reply.metadata.__dict__["_src_node_id"] = 100
    return reply


def name(reply: Message) -> Message:
    reply.content["config"]["client"] = 0
    return reply


KINDS: dict[int, Callable[[Message], Message] | None] = {
    102: None, 103: nan, 104: shape, 105: more, 106: heavy, 107: other, 108: name, 109: None,
}  # fmt: skip


@pytest.mark.parametrize("strategy", ["fedavg", "fedmd"])
def test_one_hostile_node_of_each_kind_leaves_the_digest_of_the_honest_rest(strategy: str, tmp_path: Path) -> None:
    """Two of ten are honest; 102 cannot be read, 109 fails with a text that forges the log."""
    config = tiny(strategy, "clients=10", "rounds=1")
    network = Hostile(seats(tmp_path, 10))

    def forge(message: Message, reply: Message) -> Message:
        node = message.metadata.dst_node_id
        if message.metadata.message_type != "train" or node not in KINDS:
            return reply
        if node == 109:
            return Message(Error(1003, NASTY), reply_to=message)
        change = KINDS[node]
        return change(reply) if change is not None else network._noted(message, reply)

    network.reply = forge
    built, _said = run(config, network, tmp_path / "run")
    left_out = " ".join(built.strategy.inbox.left_out)
    for client in range(2, 10):
        assert f"client {client}" in left_out, client
    wanted = honest(tmp_path, lambda m: m.metadata.message_type == "train", config, tuple(KINDS), 10)
    assert rest(built) == wanted


def test_a_weight_cannot_grow_beyond_the_hello(tmp_path: Path) -> None:
    network = Network(seats(tmp_path, 3))

    def heavy(message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "train" and message.metadata.dst_node_id == 102:
            reply.content["metrics"]["num-examples"] = 2**52
        return reply

    network.reply = heavy
    built, _ = run(tiny("fedavg"), network, tmp_path / "run")
    assert rest(built) == honest(tmp_path, lambda m: m.metadata.message_type == "train")
    assert any("num-examples is 4503599627370496; it said it has" in line for line in built.strategy.inbox.left_out)


def test_a_reply_in_anothers_name_is_not_taken(tmp_path: Path) -> None:
    network = Network(seats(tmp_path, 3))

    def other(message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "train" and message.metadata.dst_node_id == 102:
            reply.metadata.__dict__["_src_node_id"] = 101
        return reply

    network.reply = other
    built, _ = run(tiny("fedavg"), network, tmp_path / "run")
    assert rest(built) == honest(tmp_path, lambda m: m.metadata.message_type == "train")


def test_nine_kilobytes_do_not_become_six_gigabytes() -> None:
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

    record = ArrayRecord({"w": Array("uint8", (2**20,), "numpy.ndarray", bytes(2**20))})
    objects = {key: value.deflate() for key, value in get_all_nested_objects(record).items()}
    (array,) = [key for key, value in objects.items() if value.startswith(b"Array ")]
    head, body = objects[array].split(b"\x00", 1)
    about = json.loads(body)
    bomb = json.dumps({**about, "arraychunk_ids": [0] * 6000}).encode()
    assert len(bomb) < 20_000
    head = head.rsplit(b" ", 1)[0] + f" {len(bomb)}".encode()
    limit_arrays(64 * 2**20)
    try:
        with pytest.raises(ValueError, match="an array of 6291456000 bytes; allowed are 67108864"):
            inflate_object_from_contents(array, {**objects, array: head + b"\x00" + bomb})
        whole: Any = inflate_object_from_contents(record.object_id, dict(objects))
        assert whole["w"].data == bytes(2**20)
    finally:
        limit_arrays(UNKNOWN)


@pytest.mark.parametrize("shape", [(2**40,), (2**20, 2**20), (-1,), (0, 2**62), (2**62, 4)])
def test_a_header_allocates_nothing(shape: tuple[int, ...]) -> None:
    from io import BytesIO

    from numpy.lib import format as npy

    buffer = BytesIO()
    npy.write_array_header_2_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": shape})
    claimed = Array("float32", (1,), "numpy.ndarray", buffer.getvalue() + b"1234")
    with pytest.raises(InvalidArrays, match="cannot be read"):
        plain_numpy("w", claimed)


def test_arrays_of_either_order_come_back() -> None:
    for value in (np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.array(3.5)):
        assert np.array_equal(plain_numpy("w", Array(value)), value)


# --- words ------------------------------------------------------------------------------------------------

NASTY = "x\r\nfedfuse-run-directory: AAAA\x1b[2J\x1b]0;t\x07\u202e\u2028\x85\u200b\udcff\x00 end"


def printable(line: str) -> bool:
    return all(c == " " or unicodedata.category(c)[0] not in "CZ" for c in line)


def test_one_line_is_one_printable_line() -> None:
    assert one_line(NASTY) == "x fedfuse-run-directory: AAAA [2J ]0;t end"
    assert printable(one_line("".join(map(chr, range(0x3000)))))
    assert len(one_line("x" * 10_000)) == 500


def test_no_word_of_a_request_begins_a_line_of_the_servers_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """The attack: a registered node asks for a bundle by a hash that says something else; Flower logs it as it came."""
    import io
    import logging

    from flwr.proto.fab_pb2 import GetFabRequest
    from flwr.supercore import log
    from flwr.superlink.servicer.fleet import fleet_handlers

    from fedfuse.compat.flower_log import in_one_line

    logger = logging.getLogger("flwr")
    assert logger.log == log  # whose filter is asked
    monkeypatch.setattr(logger, "filters", [])
    said = io.StringIO()
    logger.addHandler(handler := logging.StreamHandler(said))
    nasty = NASTY.replace("\udcff", "")
    try:
        for protected in (False, True):
            if protected:
                in_one_line()
                in_one_line()
                assert len(logger.filters) == 1
            said.seek(0)
            said.truncate()
            with pytest.raises(Exception):  # noqa: B017 - there is no such run, nor a store to look it up in
                fleet_handlers.get_fab(GetFabRequest(hash_str=nasty), None)  # type: ignore[arg-type]
            log(logging.ERROR, f"[/v1/fleet/get-fab][ApiError] {nasty} 100 %s")
            lines = said.getvalue().removesuffix("\n").split("\n")
            assert all(printable(line) for line in lines) == protected
            assert any(line.startswith("fedfuse-run-directory") for line in lines) != protected
    finally:
        logger.removeHandler(handler)


@pytest.mark.parametrize("where", ["error", "hello", "metric", "record", "array", "config"])
def test_no_word_of_a_nodes_begins_a_line_of_the_log(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The attack of the audit: the log carried results home, and a node's text was printed raw into it."""
    nasty = NASTY + " " + "word " * 12 + "fedfuse-run-directory: BBBB"  # a wrapped line would begin with it
    network = Network(seats(tmp_path, 3))

    def forge(message: Message, reply: Message) -> Message:
        if message.metadata.dst_node_id != 102:
            return reply
        kind = message.metadata.message_type
        if where == "hello" and kind == "query.hello":
            reply.content["hello:2"]["version"] = nasty
        elif kind == "train" and where == "error":
            return Message(Error(1003, nasty), reply_to=message)
        elif kind == "train" and where == "metric":
            reply.content["metrics"][nasty] = 1.0
        elif kind == "train" and where == "record":
            reply.content[nasty] = reply.content.pop("arrays")
        elif kind == "train" and where == "array":
            reply.content["arrays"][nasty] = Array(np.zeros(3, "float32"))
        elif kind == "train" and where == "config":
            reply.content["config"] = ConfigRecord({nasty: 1})
        return reply

    network.reply = forge
    _built, said = run(tiny("fedavg"), network, tmp_path / "run", Patience(join=0.2, clients=2), quiet=False)
    printed = capsys.readouterr().out
    if where in ("error", "config"):  # the words are told, in a line that is ours
        assert "fedfuse-run-directory" in printed + "".join(said)
    for line in [*said, *printed.split("\n")]:
        assert printable(line.strip()), repr(line)
        assert not line.lstrip().startswith("fedfuse-run-directory")


@pytest.mark.parametrize(("name", "why"), [
    ("<script>\x1b[31m", "is no name of a record"), ("x" * 200_000, "is no name of a record"),
    ("more", "unexpected record more in an evaluation"),
])  # fmt: skip
def test_a_record_of_an_evaluation_that_nobody_looks_at_is_refused(name: str, why: str, tmp_path: Path) -> None:
    """The attack: a site's own names of records stood in the run's tables."""
    network = Network(seats(tmp_path, 3))

    def forge(message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "evaluate" and message.metadata.dst_node_id == 102:
            reply.content[name] = ArrayRecord({"a": Array(np.zeros(3, "f4"))})
        return reply

    network.reply = forge
    built, _ = run(tiny("fedavg"), network, tmp_path / "run")
    assert why in built.strategy.inbox.left_out[-1]
    assert built.strategy.inbox.left_out[-1].startswith("client 2: ")
    assert set(load(tmp_path / "run").traffic.collect()["record"]) == {"model"}


def test_records_of_an_evaluation_that_a_server_judges_have_names_too(tmp_path: Path) -> None:
    network = Network(seats(tmp_path, 3))

    def forge(message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "evaluate" and message.metadata.dst_node_id == 102:
            reply.content["<b>"] = reply.content["personal"]
        return reply

    network.reply = forge
    built, _ = run(tiny("fedgkt"), network, tmp_path / "run")
    assert built.strategy.inbox.left_out == ["client 2: record '<b>' is no name of a record"]
    assert not any("<" in name for name in load(tmp_path / "run").traffic.collect()["record"])


def test_a_node_that_is_started_again_without_end_is_not_waited_for(tmp_path: Path) -> None:
    """The attack: a node that activates itself again and never answers was sent the model every second, for ever."""

    class Restless(Network):
        def get_nodes(self) -> list[Any]:
            self.stamps[102] += "'"
            return super().get_nodes()

    network = Restless(seats(tmp_path, 3))
    network.before = lambda message: message.metadata.message_type != "train" or message.metadata.dst_node_id != 102
    config = tiny("fedavg", "rounds=1")
    built, _ = run(config, network, tmp_path / "run", Patience(retries=1))
    assert network.log.count("train>102") == 2
    said = "client 2: its node was started again, after the message was sent 2 times"
    assert built.strategy.inbox.left_out == [said]
    assert rest(built) == honest(tmp_path, lambda m: m.metadata.message_type == "train", config)


@pytest.mark.parametrize("value", [1e308, -0.5, 1.01])
@pytest.mark.parametrize("split", ["personal", "validation"])
def test_a_score_is_a_share(value: float, split: str, tmp_path: Path) -> None:
    """One site's accuracy of 1e308 ended everybody's run early, and the report page for ever."""
    network = Network(seats(tmp_path, 3))

    def boast(message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "evaluate" and message.metadata.dst_node_id == 102:
            reply.content["metrics"][f"{split}/accuracy"] = value
        return reply

    network.reply = boast
    built, _ = run(tiny("fedavg", "rounds=1", "evaluate.validation=true"), network, tmp_path / "run")
    assert any(f"metric '{split}/accuracy' is" in line for line in built.strategy.inbox.left_out)
    assert 0 <= built.headline["accuracy/personal"] <= 1


@pytest.mark.parametrize(("kind", "metric", "value"), [
    ("train", "loss", 1.7e308), ("train", "loss", -2e100), ("train", "more", 1e308), ("train", "seconds", 1e10),
    ("evaluate", "personal/loss", 1.7e308), ("train", "answered", 1e300), ("train", "answered", -1e300),
])  # fmt: skip
def test_no_number_of_a_site_makes_a_run_that_nobody_can_read(
    kind: str, metric: str, value: float, tmp_path: Path
) -> None:
    """The attack: a loss of 1.7e308 was added up to infinity, and everybody's results were corrupt for every reader."""
    network = Network(seats(tmp_path, 3))

    def huge(message: Message, reply: Message) -> Message:
        if message.metadata.dst_node_id == 102 and message.metadata.message_type == kind:
            if metric == "answered":
                reply.metadata.__dict__["_created_at"] = value
            else:
                reply.content["metrics"][metric] = value
        return reply

    network.reply = huge
    built, _ = run(tiny("fedavg", "rounds=1"), network, tmp_path / "run")
    json.loads((tmp_path / "run" / "summary.json").read_text(), parse_constant=float.fromhex)  # no Infinity, no NaN
    assert load(tmp_path / "run").timing.collect()["seconds"].abs().max() < 1e9
    assert load(tmp_path / "run").metrics.collect()["value"].abs().max() < 1e9
    assert bool(built.strategy.inbox.left_out) == (metric != "answered")


@pytest.mark.parametrize(("strategy", "metric", "value", "said"), [
    ("fednova", "progress", None, "metric progress is None"),
    ("fednova", "progress", [1.0], r"metric progress is \[1.0\]"),
    ("fednova", "progress", 1e99, r"metric progress is 1e\+99; a number from 0 to 9.0072e\+15"),
    ("fednova", "progress", -1.0, "metric progress is -1.0"),
    ("dare", "drawn", None, "metric drawn is None"),
    ("dare", "drawn", [1, 2], r"metric drawn is \[1, 2\]"),
    ("flwr_qfedavg", "train_loss", None, "metric train_loss is None"),
    ("flwr_qfedavg", "train_loss", [1.0], r"metric train_loss is \[1.0\]"),
    ("flwr_qfedavg", "train_loss", 1e99, r"metric train_loss is 1e\+99"),
])  # fmt: skip
def test_a_metric_that_fuse_reads_leaves_out_its_sender_alone(
    strategy: str, metric: str, value: Any, said: str, tmp_path: Path
) -> None:
    """The attack: one site's metric, missing or no number, raised in `fuse` and ended everybody's run, by no name."""
    network, config = Network(seats(tmp_path, 3)), tiny(strategy)

    def forge(message: Message, reply: Message) -> Message:
        if message.metadata.dst_node_id == 102 and message.metadata.message_type == "train":
            told: Any = reply.content["metrics"]
            assert metric in told
            del told[metric]
            if value is not None:
                told[metric] = value
        return reply

    network.reply = forge
    built, _ = run(config, network, tmp_path / "run")
    assert rest(built) == honest(tmp_path, lambda m: m.metadata.message_type == "train", config)
    assert re.match(f"client 2: {said}", built.strategy.inbox.left_out[0])


def test_a_metric_that_nobody_asked_for_reaches_no_rule_of_flowers(tmp_path: Path) -> None:
    """The attack: Flower's rules skip a round in which one reply has a metric that the others have not."""
    network = Network(seats(tmp_path, 3))

    def forge(message: Message, reply: Message) -> Message:
        if message.metadata.dst_node_id == 102 and message.metadata.message_type == "train":
            reply.content["metrics"]["train_loss"] = [1.0]
        return reply

    network.reply = forge
    built, _ = run(tiny("flwr_fedavg"), network, tmp_path / "run")
    assert rest(built, range(3)) == honest(tmp_path, lambda m: False, tiny("flwr_fedavg"), nodes=())


@pytest.mark.parametrize(("strategy", "record", "key"), [
    ("fedftg", "counts", "counts"), ("fedgen", "counts", "counts"), ("fedproto", "prototypes", "counts"),
    ("fedhkd", "classes", "counts"), ("fedd2s", "layers", "counts"), ("gaussian_heads", "moments", "n"),
])  # fmt: skip
def test_a_client_counts_no_more_labels_than_it_has_examples(
    strategy: str, record: str, key: str, tmp_path: Path
) -> None:
    """The attack: counts of 2⁶³ − 1 wrapped around in a sum, and drew no classes for anybody."""
    network, config = Network(seats(tmp_path, 3)), tiny(strategy, "rounds=1", *QUICK.get(strategy, ()))

    def forge(message: Message, reply: Message) -> Message:
        if message.metadata.dst_node_id == 102 and message.metadata.message_type == "train":
            told: Any = reply.content[record]
            told[key] = Array(np.full_like(told[key].numpy(), np.iinfo(np.int64).max))
        return reply

    network.reply = forge
    built, _ = run(config, network, tmp_path / "run")
    assert rest(built) == honest(tmp_path, lambda m: m.metadata.message_type == "train", config)
    (said,) = built.strategy.inbox.left_out
    assert re.fullmatch(rf"client 2: {record}(/{key})?: 9.22337e\+19 examples; the client has \d+", said)


@pytest.mark.parametrize("strategy", ["fednova", "flexlora"])
def test_numbers_that_only_overflow_together_end_no_run_for_good(strategy: str, tmp_path: Path) -> None:
    """Finite in every reply, not in what is fused of them: that is not committed, and the others go on."""
    network, draw = Network(seats(tmp_path, 3)), np.random.default_rng(0)

    def huge(message: Message, reply: Message) -> Message:
        about = message.content.config_records.get("run", {})
        if message.metadata.dst_node_id == 102 and message.metadata.message_type == "train" and about["round"] == 2:
            for record in reply.content.array_records.values():
                for name, array in list(record.items()):
                    value = array.numpy()
                    signs = draw.choice([-1, 1], value.shape)
                    record[name] = Array((np.finfo(value.dtype).max * signs).astype(value.dtype))
        return reply

    network.reply = huge
    config = tiny(strategy, "rounds=3", "evaluate.every=3")
    with pytest.raises(WorldError, match=r"round 2: what was fused of the clients' shares is unusable: .* not finite"):
        run(config, network, tmp_path / "run")

    def gone(message: Message, reply: Message) -> Message:
        hello = message.metadata.message_type.startswith("query")
        return reply if hello or message.metadata.dst_node_id != 102 else Message(Error(1003, "gone"), reply_to=message)

    network.reply = gone
    built, _ = run(config, network, tmp_path / "run", resumed=True)
    assert built.done == 3
