"""Arrays on the wire: what is refused, what survives the way, and hashes that no two contents share."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfuse.wire.packing import PACKED, packed, unpacked
from fedfuse.wire.records import (
    InvalidArrays,
    LiveArray,
    Scope,
    arrays,
    digest_of,
    flatten,
    layout_nbytes,
    leaves,
    nbytes,
    record,
    sha,
    sha_arrays,
    tensors,
    unflatten,
    validate,
)

DTYPES = [torch.float32, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=6)


@st.composite
def tensor(draw, dtypes=tuple(DTYPES)):
    dtype = draw(st.sampled_from(dtypes))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    made = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    return made.to(dtype)


CONTENT = st.dictionaries(NAMES, tensor(), max_size=3)


def same(a: dict, b: dict) -> bool:
    """Equal names, dtypes, shapes and bytes."""
    return set(a) == set(b) and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a
    )


# --- there and back ---------------------------------------------------------------------------------------


@given(CONTENT)
@settings(max_examples=60, deadline=None)
def test_records_come_back_as_they_went(content) -> None:
    assert same(tensors(record(content)), content)
    sent = packed(RecordDict({"a": record(content)}))
    assert not any(isinstance(array, LiveArray) for array in sent["a"].values())
    back = unpacked(sent)["a"]
    assert list(back) == list(content)
    assert same(tensors(back), content)
    assert nbytes(record(content)) == nbytes(back) == nbytes(content)


@given(st.dictionaries(NAMES, CONTENT, max_size=3))
@settings(max_examples=60, deadline=None)
def test_bytes_between_processes_keep_the_senders_order(content) -> None:
    """Flower's protobuf, as SuperLink and SuperNodes exchange it, of records packed and not."""
    sent = RecordDict({name: record(value) for name, value in content.items()})
    for outgoing in (packed(sent), sent):
        sound = ProtoRecordDict.FromString(recorddict_to_proto(outgoing).SerializeToString())
        back = unpacked(recorddict_from_proto(sound))
        assert [(name, list(value)) for name, value in back.items()] == [(n, list(v)) for n, v in content.items()]


def test_live_arrays_are_what_flower_would_have_made() -> None:
    value = np.arange(6, dtype=np.float32).reshape(2, 3)
    live, plain = LiveArray(value), Array(value)
    assert (live.dtype, tuple(live.shape), live.stype, live.data) == (
        plain.dtype,
        tuple(plain.shape),
        plain.stype,
        plain.data,
    )
    assert live.numpy() is value


def hostile(array: Array) -> ArrayRecord:
    out = ArrayRecord()
    out["w"] = array
    return out


def test_arrays_that_cannot_be_read_are_refused() -> None:
    good = Array(np.ones(3, dtype=np.float32))
    with pytest.raises(InvalidArrays, match=r"encoded as 'torch.pickle'"):
        tensors(hostile(Array(good.dtype, (3,), "torch.pickle", good.data)))
    with pytest.raises(InvalidArrays, match="cannot be read"):
        tensors(hostile(Array(good.dtype, (3,), "numpy.ndarray", good.data[:40])))
    with pytest.raises(InvalidArrays, match="cannot be read"):
        tensors(hostile(Array("object", (3,), "numpy.ndarray", b"\x80\x04N.")))
    with pytest.raises(InvalidArrays, match="only numbers are taken"):
        tensors(hostile(Array(np.array(["text"]))))
    with pytest.raises(InvalidArrays, match="only numbers are taken"):
        tensors(hostile(Array(np.ones(2, dtype=np.complex64))))
    for kind in (torch.complex64, torch.bfloat16):  # numpy has none of the latter: it could not leave the machine
        with pytest.raises(InvalidArrays, match="only numbers are taken"):
            tensors(record({"w": torch.ones(2, dtype=kind)}))


def test_pickled_arrays_are_never_unpickled() -> None:
    from io import BytesIO

    buffer = BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InvalidArrays, match="cannot be read"):
        tensors(hostile(Array("object", (1,), "numpy.ndarray", buffer.getvalue())))


def test_big_endian_arrays_are_turned_round() -> None:
    value = np.array([1.5, -2.0], dtype=">f4")
    assert tensors(hostile(Array(value)))["w"].tolist() == [1.5, -2.0]


# --- what arrays must look like ---------------------------------------------------------------------------

LAYOUT = {"w": ("float32", (2, 3)), "n": ("int64", ()), "rows": ("float32", (-4, 3))}


def good() -> dict[str, torch.Tensor]:
    return {"w": torch.zeros(2, 3), "n": torch.tensor(1), "rows": torch.zeros(4, 3)}


def test_the_right_arrays_are_taken() -> None:
    validate("r", good(), LAYOUT)
    for rows in (0, 1, 4):
        validate("r", {**good(), "rows": torch.zeros(rows, 3)}, LAYOUT)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"w": None}, "r: missing w"),
        ({"extra": torch.zeros(1)}, "r: unexpected extra"),
        ({"w": torch.zeros(3, 2)}, r"r/w: shape \(3, 2\), expected \(2, 3\)"),
        ({"w": torch.zeros(6)}, r"r/w: shape \(6,\), expected \(2, 3\)"),
        ({"w": torch.zeros(2, 3).double()}, "r/w: dtype float64, expected float32"),
        ({"n": torch.tensor(1, dtype=torch.int32)}, "r/n: dtype int32, expected int64"),
        ({"rows": torch.zeros(5, 3)}, r"r/rows: shape \(5, 3\), expected \(at most 4, 3\)"),
        ({"w": torch.tensor([[0, 1, 2], [0, float("nan"), 0]])}, "r/w: not finite"),
        ({"w": torch.tensor([[0, float("inf"), 2], [0, float("-inf"), 0]])}, "r/w: not finite"),
    ],
)
def test_other_arrays_are_refused(change, words: str) -> None:
    content = {k: v for k, v in {**good(), **change}.items() if v is not None}
    with pytest.raises(InvalidArrays, match=words):
        validate("r", content, LAYOUT)


def test_large_values_are_finite_although_their_sum_is_not() -> None:
    validate("r", {"w": torch.full((4,), 3e38)}, None)
    with pytest.raises(InvalidArrays):
        validate("r", {"w": torch.tensor([3e38, 3e38, float("inf")])}, None)


def test_without_a_layout_only_finiteness_counts() -> None:
    validate("r", {"anything": torch.zeros(7, dtype=torch.int8)}, None)
    with pytest.raises(InvalidArrays, match="not finite"):
        validate("r", {"anything": torch.tensor(float("nan"))}, None)


def test_specs_name_sizes() -> None:
    class Hyper:
        rank = 4

    scope = Scope({"classes": 10, "transfer": 24, "examples": 7, "features": 0}, {}, Hyper())
    layout = arrays(p=("<=transfer", "classes"), a=("rank", 3), n=("int64",), s=("float64", "<=rank"), m=("<=20",))(
        scope
    )
    assert layout == {
        "p": ("float32", (-24, 10)),
        "a": ("float32", (4, 3)),
        "n": ("int64", ()),
        "s": ("float64", (-4,)),
        "m": ("float32", (-20,)),
    }
    assert layout_nbytes(layout) == 4 * 240 + 4 * 12 + 8 + 8 * 4 + 4 * 20


# --- hashes -----------------------------------------------------------------------------------------------


@given(st.dictionaries(NAMES, CONTENT, max_size=3), st.dictionaries(NAMES, CONTENT, max_size=3))
@settings(max_examples=80, deadline=None)
def test_equal_hashes_mean_equal_contents(a, b) -> None:
    equal = set(a) == set(b) and all(same(a[k], b[k]) for k in a)
    assert (sha(a) == sha(b)) == equal
    assert sha(a) == sha(dict(reversed([(k, dict(reversed(v.items()))) for k, v in a.items()])))


def test_moving_a_boundary_moves_the_hash() -> None:
    zero = torch.zeros(2)
    contents = [
        {"ab": {"c": zero}},
        {"a": {"bc": zero}},
        {"a": {"b": zero}, "c": {}},
        {"a": {"b": torch.zeros(1), "c": torch.zeros(1)}},
        {"a": {"b": zero.reshape(2, 1)}},
        {"a": {"b": zero.reshape(1, 2)}},
        {"a": {"b": zero}},
        {"a": {"b": zero.to(torch.int32)}},
        {"a": {"b": zero, "": torch.zeros(0)}},
        {"a": {"b": torch.zeros(1, dtype=torch.float64)}},
        {"a": {}},
        {},
    ]
    assert len({sha(content) for content in contents}) == len(contents)


def test_an_array_cannot_pose_as_record_names() -> None:
    """Name, dtype, shape and bytes of one array read like four more record names, were they not counted."""
    size = ord("=")  # a length whose eight bytes are text, sorted after "<f4"
    text = "A" * (4 * size)
    array = torch.frombuffer(bytearray(text.encode()), dtype=torch.float32)
    shape = size.to_bytes(8, "little").decode()
    assert sha({"0": {"1": array}}) != sha({name: {} for name in ("0", "1", "<f4", shape, text)})


def test_memory_layout_does_not_enter_the_hash() -> None:
    value = torch.arange(6.0).reshape(2, 3)
    assert sha_arrays({"w": value}) == sha_arrays({"w": value.T.contiguous().T})
    assert sha_arrays({"w": value}) != sha_arrays({"w": value.T})
    assert sha_arrays({"w": torch.tensor([0.0])}) != sha_arrays({"w": torch.tensor([-0.0])})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_types_that_numpy_lacks_have_a_hash(dtype: torch.dtype) -> None:
    one = torch.tensor([[1.0, -0.0], [2.0, 0.5]]).to(dtype)
    raw = one.view(torch.int16 if dtype == torch.bfloat16 else torch.uint8)
    others = (one[:1], one.t(), (-one.float()).to(dtype), one.float(), raw, one.reshape(4))
    assert sha_arrays({"a": one}) == sha_arrays({"a": one.t().contiguous().t()})
    assert len({sha_arrays({"a": value}) for value in (one, *others)}) == 1 + len(others)
    assert sha_arrays({"a": one[0, 0]}) != sha_arrays({"a": one[1, 0]})


def test_clients_enter_the_digest_in_order() -> None:
    assert digest_of("s", ["a", "b"]) != digest_of("s", ["b", "a"])


# --- nested state -----------------------------------------------------------------------------------------

KEYS = st.text("ab./~\\0", max_size=4)
PLAIN = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=3)
TREES = st.recursive(tensor() | PLAIN | st.lists(PLAIN, max_size=2), lambda t: st.dictionaries(KEYS, t, max_size=3))


def equal_trees(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and same({"": a}, {"": b})
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal_trees(a[k], b[k]) for k in a)
    return type(a) is type(b) and a == b


@given(st.dictionaries(KEYS, TREES, max_size=4))
@settings(max_examples=80, deadline=None)
def test_trees_come_back_as_they_went(tree) -> None:
    assert equal_trees(tree, unflatten(leaves(tree)))


def test_two_trees_never_flatten_alike() -> None:
    one = flatten({"a/b": torch.zeros(1), "a": {"b": torch.ones(1)}})[0]
    assert len(one) == 2
    assert flatten({"a/b": 1})[1] != flatten({"a": {"b": 1}})[1]


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"a": {"b": object()}}, "state 'a/b' is a object"),
        ({"a": (1, 2)}, "state 'a' is a tuple"),
        ({"a": np.zeros(2)}, "state 'a' is a ndarray"),
        ({3: torch.zeros(1)}, "key 3"),
        ({"a": {0: 1}}, "key 0"),
        ({"a": [torch.zeros(1)]}, "state 'a' is a list holding a Tensor"),
    ],
)
def test_what_cannot_be_kept_is_refused(tree, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        flatten(tree)


@pytest.mark.parametrize("records", [1, 2])
def test_a_record_of_empty_arrays_is_counted_before_it_is_read(records: int, monkeypatch) -> None:
    """The attack: 300,000 arrays of nothing, in 21 MB, kept their receiver busy for 14 seconds."""
    import safetensors.torch

    def sent(count: int) -> RecordDict:
        head = json.dumps({f"{i}/a{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(count)})
        content = np.frombuffer(len(head).to_bytes(8, "little") + head.encode(), np.uint8)
        return RecordDict({f"r{i}": ArrayRecord({PACKED: Array(content)}) for i in range(records)})

    monkeypatch.setattr("fedfuse.wire.packing.MOST", 100)
    assert len(unpacked(sent(100 // records))["r0"]) == 100 // records
    read, load = list[int](), safetensors.torch.load
    monkeypatch.setattr("safetensors.torch.load", lambda content: read.append(len(content)) or load(content))
    with pytest.raises(InvalidArrays, match="more arrays than a message may have; allowed are 100"):
        unpacked(sent(102 // records))
    assert len(read) < records


def test_a_packed_record_has_no_two_arrays_of_one_name() -> None:
    import safetensors.numpy

    twice = safetensors.numpy.save({"0/w": np.zeros(2, np.float32), "7/w": np.ones(2, np.float32)})
    content = RecordDict({"arrays": ArrayRecord({PACKED: Array(np.frombuffer(twice, np.uint8))})})
    with pytest.raises(InvalidArrays, match="arrays: two arrays of one name"):
        unpacked(content)
