"""Messages as they cross the network: one record for all small ones, and nothing lost, reordered or believed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import example, given
from hypothesis import strategies as st

from fedfuse.core.shares import INVALID
from fedfuse.network.joined import JOINED, ORDER, JoinedGrid, answered, joined, parted
from fedfuse.wire.packing import packed, unpacked
from fedfuse.wire.records import InvalidArrays, record
from tests.deploy.network import Network, run, seats, tiny
from tests.federations import play

keys = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
numbers = st.integers(-(2**62), 2**62) | st.floats(allow_nan=False)
values = numbers | st.text(max_size=5) | st.binary(max_size=5) | st.booleans() | st.lists(st.integers(0, 9), max_size=3)
configs = st.dictionaries(keys, values, max_size=4).map(ConfigRecord)
metrics = st.dictionaries(keys, numbers | st.lists(st.floats(0, 1), min_size=1, max_size=3), max_size=4).map(
    MetricRecord
)
arrays = st.integers(0, 200).map(lambda n: record({"a/b": torch.arange(n, dtype=torch.float64), "": torch.ones(2, 3)}))
contents = st.dictionaries(keys, configs | metrics | arrays, min_size=1, max_size=6).map(RecordDict)


def told(content: RecordDict) -> list[Any]:
    """What a content says, in order, with the types."""
    out: list[Any] = []
    for name, value in content.items():
        if isinstance(value, ArrayRecord):
            out.append((name, [(k, a.dtype, a.shape, a.numpy().tobytes()) for k, a in value.items()]))
        else:
            out.append((name, type(value), [(k, type(v), v) for k, v in value.items()]))
    return out


@given(contents)
@example(RecordDict({"*": record({"w": torch.ones(200)})}))  # the name that the one record travels by
def test_what_is_joined_comes_apart_as_it_was(content: RecordDict) -> None:
    before = told(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedfuse.network.joined.SMALL", 800)  # some arrays go along, some apart
        sent = joined(packed(content))
    assert len(sent) <= 1 + len(content.array_records)
    assert JOINED in sent
    assert told(unpacked(parted(sent))) == before == told(content)


def test_small_records_travel_in_one_and_large_arrays_apart() -> None:
    content = RecordDict({"config": ConfigRecord({"client": 3}), "metrics": MetricRecord({"loss": 0.5})})
    content["model"] = record({"w": torch.ones(10)})
    content["large"] = record({"w": torch.ones(2**18 + 1)})
    assert set(joined(packed(content))) == {JOINED, "3"}


def test_what_is_not_packed_travels_apart() -> None:
    content = RecordDict({"model": record({"w": torch.ones(10)})})
    assert set(joined(content)) == {JOINED, "0"}
    assert told(parted(joined(content))) == told(content)


def order(*records: list[Any], **entries: Any) -> RecordDict:
    return RecordDict({JOINED: ConfigRecord({ORDER: json.dumps(list(records)), **entries})})


def with_(content: RecordDict, **more: Any) -> RecordDict:
    for name, value in more.items():
        content[name] = value
    return content


HOSTILE = {
    "no order": RecordDict({JOINED: ConfigRecord({"0/a": 1})}),
    "no JSON": RecordDict({JOINED: ConfigRecord({ORDER: "["})}),
    "deep": RecordDict({JOINED: ConfigRecord({ORDER: "[" * 100_000})}),
    "a number": RecordDict({JOINED: ConfigRecord({ORDER: 3})}),
    "nothing": order(),
    "no pairs": order(["config"]),
    "a kind of its own": order(["array", "a"]),
    "one name twice": order(["config", "a"], ["config", "a"]),
    "two kinds of one name": order(["config", "a"], ["metrics", "a"]),
    "too many": order(*[["config", str(i)] for i in range(200)]),
    "an entry of no record": order(["config", "a"], **{"1/b": 1}),
    "an entry of the last record but one": order(["config", "a"], **{"-1/b": 1}),
    "an entry of a record in other digits": order(["config", "a"], **{"00/b": 1}),
    "an entry without a record": order(["config", "a"], **{"b": 1}),
    "text as metric": order(["metrics", "a"], **{"0/b": "x"}),
    "arrays that are none": order(["arrays", "a"], **{"0/": "x"}),
    "arrays that are missing": order(["arrays", "a"]),
    "arrays with more": order(["arrays", "a"], **{"0/": b"x", "0/b": 1}),
    "arrays that are large": order(["arrays", "a"], **{"0/": b"x" * (2**20 + 1)}),
    "apart and not there": order(["apart", "a"]),
    "apart and no arrays": with_(order(["apart", "a"]), **{"0": ConfigRecord()}),
    "apart with entries": with_(order(["apart", "a"], **{"0/b": 1}), **{"0": ArrayRecord({"b": Array(np.ones(2))})}),
    "apart by its name": with_(order(["apart", "a"]), a=ArrayRecord({"b": Array(np.ones(2))})),
    "more beside it": with_(order(["config", "a"]), b=ConfigRecord()),
    "a name that is a list": order(["config", ["a"]]),
    "a name that is a number": order(["config", 1]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_stranger_joins_is_refused_by_name(name: str) -> None:
    with pytest.raises(InvalidArrays, match="not joined as it should be"):
        parted(HOSTILE[name])
    asked: list[Message] = []
    reply = answered(Message(HOSTILE[name], 1, "train"), lambda message: asked.append(message) or message)  # type: ignore[func-returns-value]
    assert not asked
    assert reply.error.code == INVALID


def test_content_that_came_plain_is_looked_at_like_any() -> None:
    content = RecordDict({"config": ConfigRecord({"client": 3})})
    assert parted(content) is content


def test_an_answer_goes_back_joined_and_an_error_as_it_is() -> None:
    message = Message(joined(RecordDict({"config": ConfigRecord({"client": 3})})), 1, "train")

    def handle(given: Message) -> Message:
        assert dict(given.content.config_records["config"]) == {"client": 3}
        return Message(RecordDict({"metrics": MetricRecord({"loss": 1.5})}), reply_to=given)

    reply = answered(message, handle)
    assert set(reply.content) == {JOINED}
    assert dict(parted(reply.content).metric_records["metrics"]) == {"loss": 1.5}
    failed = answered(message, lambda given: Message(Error(7, "no"), reply_to=given))
    assert failed.error.reason == "no"


class Wire(Network):
    """A network that carries joined messages."""

    crossed: list[set[str]]

    def push_messages(self, messages: Any) -> list[str]:
        given = list(messages)
        for message in given:
            self.crossed.append(set(message.content))
            message.content = parted(message.content)
        keys = super().push_messages(given)
        for key in keys:
            if self.replies[key].has_content():
                self.replies[key].content = joined(packed(self.replies[key].content))
                self.crossed.append(set(self.replies[key].content))
        return keys


@pytest.mark.parametrize("strategy", ["fedavg", "knfu"])
def test_a_run_over_a_network_that_joins_gives_the_digest_of_inline(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedfuse.network.exchange.POLL", 0.01)
    network = Wire(seats(tmp_path, 3))
    network.crossed = []
    built, _ = run(tiny(strategy), JoinedGrid(network), tmp_path / "run")  # type: ignore[arg-type]
    assert built.digest == play(strategy).digest
    assert network.crossed
    assert all(crossed == {JOINED} for crossed in network.crossed)  # all of it is small here
