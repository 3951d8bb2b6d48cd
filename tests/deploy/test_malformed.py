"""Whatever a node sends back: nothing malformed is averaged in, nothing crashes the server."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedfuse.compat.flower_identity import claim_identity
from fedfuse.config import registry
from fedfuse.core.build import build_strategy
from fedfuse.core.scenario import prepare_scenario
from fedfuse.core.strategy import FusionStrategy
from fedfuse.network.remote_grid import RemoteGrid
from fedfuse.network.replies import MOST, fault_of
from fedfuse.wire.packing import packed
from tests.deploy.network import Network, tiny

claim_identity()
EXAMPLES = 600


class Scripted(Network):
    """Answers with what the test wrote."""

    def __init__(self) -> None:
        super().__init__([SimpleNamespace()] * 3)  # type: ignore[list-item]
        self.contents: dict[int, RecordDict] = {}

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        keys = []
        for message in messages:
            keys.append(f"m{next(self._ids)}")
            message.metadata.__dict__["_message_id"] = keys[-1]
            self.replies[keys[-1]] = Message(self.contents[message.metadata.dst_node_id - 100], reply_to=message)
        return keys


def npy(value: np.ndarray) -> Array:
    buffer = BytesIO()
    np.save(buffer, value, allow_pickle=value.dtype == object)
    return Array(str(value.dtype), tuple(value.shape), "numpy.ndarray", buffer.getvalue())


class Table:
    """One strategy, asked again and again."""

    def __init__(self) -> None:
        config = tiny("fedavg")
        self.scenario = prepare_scenario(config)
        self.strategy: FusionStrategy = build_strategy(registry.entry("fedavg"), self.scenario)
        self.strategy.ensure_begun()
        self.start = {k: v.clone() for k, v in self.strategy.model.items()}
        self.grid = Scripted()
        self.adapter = RemoteGrid(self.grid, {}, say=lambda line: None)
        self.adapter.nodes = {0: 100, 1: 101, 2: 102}

    def good(self, client: int, value: float | None = None) -> dict[str, Any]:
        arrays = {
            k: np.full(tuple(v.shape), client if value is None else value, "float32") for k, v in self.start.items()
        }
        return {
            "arrays": {k: npy(v) for k, v in arrays.items()},
            "metrics": {"num-examples": 10, "loss": 1.0, "seconds": 0.1},
            "config": {"client": client, "phase": "train", "tag": "0"},
        }

    def ask(self, third: RecordDict) -> FusionStrategy:
        strategy = self.strategy
        strategy.round += 1
        self.grid.contents = {0: content(self.good(0)), 1: content(self.good(1)), 2: third}
        messages = strategy.messages([0, 1, 2], "train", {})
        strategy.aggregate_train(strategy.round, self.adapter.send_and_receive(messages))
        return strategy


def content(parts: dict[str, Any]) -> RecordDict:
    out = RecordDict()
    for name, value in parts.items():
        if isinstance(value, ArrayRecord | MetricRecord | ConfigRecord):
            out[name] = value
        elif name == "metrics":
            out[name] = MetricRecord(value)
        elif name == "config":
            out[name] = ConfigRecord(value)
        else:
            record = ArrayRecord()
            for key, array in value.items():
                record[key] = array
            out[name] = record
    return out


@pytest.fixture(scope="module")
def table() -> Table:
    return Table()


# --- ways to be wrong: each takes a good reply's parts, a draw, and returns parts that must be rejected ----------


def wrong_arrays(parts: dict[str, Any], draw: Any) -> dict[str, Any]:
    arrays = parts["arrays"]
    name = draw(st.sampled_from(sorted(arrays)))
    value = arrays[name].numpy()
    kind = draw(
        st.sampled_from(
            [
                "gone",
                "renamed",
                "more",
                "shape",
                "flat",
                "dtype",
                "nan",
                "inf",
                "huge",
                "garbage",
                "cut",
                "stype",
                "pickle",
                "packed",
                "empty",
            ]
        )
    )
    if kind == "gone":
        del arrays[name]
    elif kind == "renamed":
        arrays[draw(st.text(min_size=1, max_size=30)) + "~"] = arrays.pop(name)
    elif kind == "more":
        arrays[draw(st.text(min_size=1, max_size=30)) + "~"] = npy(value)
    elif kind == "shape":
        arrays[name] = npy(np.zeros((*value.shape, draw(st.integers(2, 5))), "float32"))
    elif kind == "flat":
        arrays[name] = npy(np.zeros(value.size + draw(st.integers(1, 9)), "float32"))
    elif kind == "dtype":
        dtype = draw(st.sampled_from(["float64", "float16", "int32", "int64", "bool", "complex64", "<U3", "uint8"]))
        arrays[name] = npy(value.astype(dtype))
    elif kind in ("nan", "inf"):
        broken = value.copy()
        broken.reshape(-1)[draw(st.integers(0, value.size - 1))] = float(kind) * draw(st.sampled_from([1, -1]))
        arrays[name] = npy(broken)
    elif kind == "huge":
        arrays[name] = npy(np.zeros((100, *value.shape), "float32"))
    elif kind == "garbage":
        arrays[name] = Array("float32", tuple(value.shape), "numpy.ndarray", draw(st.binary(max_size=400)))
    elif kind == "cut":
        arrays[name] = Array(
            "float32", tuple(value.shape), "numpy.ndarray", npy(value).data[: draw(st.integers(0, 100))]
        )
    elif kind == "stype":
        arrays[name] = Array("float32", tuple(value.shape), draw(st.text(max_size=20)) + "!", npy(value).data)
    elif kind == "pickle":
        bomb = draw(st.sampled_from([pickle.dumps(list), npy(np.array([print], dtype=object)).data]))
        arrays[name] = Array("float32", tuple(value.shape), "numpy.ndarray", bomb)
    elif kind == "packed":
        whole = packed(content({"arrays": dict(arrays)}))["arrays"]["safetensors"].numpy()
        cut = draw(st.integers(0, whole.size - 1))
        value = draw(st.sampled_from([whole[:cut], whole[::-1].copy(), whole.astype("int16"), np.zeros((), "uint8")]))
        arrays.clear()
        arrays["safetensors"] = npy(value)
    else:
        arrays.clear()
    return parts


def wrong_records(parts: dict[str, Any], draw: Any) -> dict[str, Any]:
    kind = draw(st.sampled_from(["none", "other", "extra", "sum", "summed", "config", "metrics", "flood", "kinds"]))
    if kind == "none":
        del parts["arrays"]
    elif kind == "other":
        parts[draw(st.text(min_size=1, max_size=20)) + "~"] = parts.pop("arrays")
    elif kind == "extra":
        parts[draw(st.text(min_size=1, max_size=20)) + "~"] = dict(parts["arrays"])
    elif kind == "sum":
        parts["sum:model"] = {k: npy(v.numpy().astype("float64")) for k, v in parts["arrays"].items()}
        parts["config"] |= {"weight:model": 1e9, "dtypes:model": json.dumps(dict.fromkeys(parts["arrays"], "float32"))}
    elif kind == "summed":
        parts["config"] |= {"summed.record": ["model"], "summed.bytes": [draw(st.integers(0, 2**40))]}
        del parts["arrays"]
    elif kind == "flood":
        parts |= {f"r{i}": {} for i in range(draw(st.integers(65, 80)))}
    elif kind == "kinds":
        parts["arrays"] = draw(st.sampled_from([ConfigRecord({"a": 1}), MetricRecord({"a": 1})]))
    else:
        del parts[kind]
    return parts


def wrong_words(parts: dict[str, Any], draw: Any) -> dict[str, Any]:
    odd = st.one_of(
        st.text(max_size=20),
        st.binary(max_size=20),
        st.booleans(),
        st.floats(),
        st.lists(st.integers(0, 9), max_size=3),
    )
    key = draw(st.sampled_from(["client", "client", "retried", "trained", "phase", "tag", "word", "long", "number"]))
    if key == "word":
        parts["config"][draw(st.text(min_size=1, max_size=30)) + "~"] = draw(odd)
    elif key == "long":
        parts["config"]["tag"] = "x" * draw(st.integers(513, 5000))
    elif key == "number":
        parts["config"]["client"] = draw(st.integers(-(2**63), 2**63 - 1).filter(lambda n: n != 2))
    elif key in ("client", "retried", "trained"):
        parts["config"][key] = draw(odd)
    else:
        parts["config"][key] = draw(odd.filter(lambda v: not isinstance(v, str)))
    return parts


def wrong_metrics(parts: dict[str, Any], draw: Any) -> dict[str, Any]:
    kind = draw(st.sampled_from(["none", "negative", "nan", "inf", "list", "huge", "flood", "lossinf"]))
    metrics = parts["metrics"]
    if kind == "none":
        del metrics["num-examples"]
    elif kind == "negative":
        metrics["num-examples"] = draw(st.integers(-(2**62), -1))
    elif kind == "nan":
        metrics[draw(st.sampled_from(["num-examples", "seconds", "other"]))] = float("nan")
    elif kind == "inf":
        metrics[draw(st.sampled_from(["num-examples", "seconds", "loss"]))] = draw(
            st.sampled_from([float("inf"), -float("inf")])
        )
    elif kind == "list":
        metrics[draw(st.sampled_from(["num-examples", "seconds", "loss", "personal/accuracy"]))] = draw(
            st.lists(st.integers(0, 9), max_size=3)
        )
    elif kind == "huge":
        metrics["num-examples"] = draw(st.integers(2**53, 2**62))
    elif kind == "flood":
        metrics |= {f"m{i}": i for i in range(draw(st.integers(65, 90)))}
    else:
        metrics["loss"] = float("inf")
    return parts


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_nothing_malformed_is_averaged_in(table: Table, data: st.DataObject) -> None:
    way = data.draw(st.sampled_from([wrong_arrays, wrong_arrays, wrong_records, wrong_words, wrong_metrics]))
    bad = content(way(table.good(2, 1e6), data.draw))
    before = table.strategy.inbox.failures["rejected"]
    strategy = table.ask(bad)
    assert strategy.inbox.failures["rejected"] == before + 1, strategy.inbox.left_out
    for name, value in strategy.model.items():  # the mean of 0 and 1, whatever the third said
        assert torch.equal(value, torch.full_like(value, 0.5)), name


@pytest.mark.parametrize(("key", "said"), [
    ("tag", "../../x"), ("tag", "1.1\n"), ("tag", "1" * 13), ("tag", "1.1.1"), ("sha", "ab" * 31), ("sha", "AB" * 32),
    ("sha", "x\x1b[2J"), ("phase", "a b"), ("phase", ""), ("phase", "__class__\n"), ("phase", "x" * 65),
])  # fmt: skip
def test_words_that_the_server_keeps_have_a_form(key: str, said: str, table: Table) -> None:
    bad = table.good(2, 1e6)
    bad["config"][key] = said
    before = table.strategy.inbox.failures["rejected"]
    strategy = table.ask(content(bad))
    assert strategy.inbox.failures["rejected"] == before + 1
    assert strategy.inbox.left_out == [f"client 2: config entry '{key}' is no {key}, or no str"]


@pytest.mark.parametrize(("key", "said"), [("tag", ""), ("tag", "12.3"), ("sha", ""), ("sha", "0a" * 32)])
def test_words_of_that_form_are_taken(key: str, said: str, table: Table) -> None:
    good = table.good(2)
    good["config"][key] = said
    assert table.ask(content(good)).inbox.left_out == []


def test_a_good_reply_is_averaged_in(table: Table) -> None:
    strategy = table.ask(content(table.good(2)))
    for value in strategy.model.values():
        assert torch.equal(value, torch.full_like(value, 1.0))
    assert strategy.inbox.left_out == []


def reply_of(metrics: dict[str, Any], records: int = 0) -> Any:
    parts: dict[str, Any] = {f"r{i}": ArrayRecord() for i in range(records)}
    return SimpleNamespace(content=content({**parts, "metrics": metrics, "config": {"client": 4}}))


@pytest.mark.parametrize("share", ["accuracy", "accuracy_macro", "exact_match", "digits/accuracy"])
def test_a_share_may_be_all_and_nothing_and_no_more(share: str) -> None:
    for value in (0, 0.0, 1, 1.0, 0.25, [0.0, 1.0]):
        if not isinstance(value, list) or "/" not in share:
            assert fault_of(reply_of({share: value}), 4) is None, value
    for value in (-1e-9, 1 + 1e-9, -1, 2, [0.5, 1.5]):
        assert fault_of(reply_of({share: value}), 4) is not None, value


def test_a_reply_has_so_many_records_and_metrics_and_counts_no_more_examples_than_it_said() -> None:
    assert fault_of(reply_of({f"m{i}": 0.0 for i in range(MOST)}, records=MOST - 2), 4) is None
    assert fault_of(reply_of({f"m{i}": 0.0 for i in range(MOST + 1)}), 4) is not None
    assert fault_of(reply_of({}, records=MOST - 1), 4) is not None
    assert fault_of(reply_of({"num-examples": 7}), 4, 7) is None
    assert fault_of(reply_of({"num-examples": 8}), 4, 7) is not None
    assert fault_of(reply_of({}), 5) is not None
