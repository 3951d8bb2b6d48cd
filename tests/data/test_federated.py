"""What is cut when: transfer set, clients, splits; nothing twice, the same for everyone."""

import dataclasses
import pickle
import sys
import time
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfuse.config.schema import DataConfig, PartitionConfig, TransferConfig
from fedfuse.data import Dataset, Examples, prepare
from fedfuse.data.build import stratified
from fedfuse.data.dataset import SPLITS
from fedfuse.data.federated import split_counts
from fedfuse.errors import UserError


def federation(partition="iid", clients=10, seed=0, data=None, transfer=None, **settings_):
    return prepare(
        data or DataConfig(),
        PartitionConfig(name=partition, **settings_),
        transfer or TransferConfig(),
        clients,
        seed,
    )


def custom(monkeypatch, make, **extra):
    module = types.ModuleType("somebodys_data")
    module.make = make
    monkeypatch.setitem(sys.modules, "somebodys_data", module)
    return DataConfig(name="custom", layout="custom", load="somebodys_data:make", extra=extra)


@settings(max_examples=25, deadline=None)
@given(
    partition=st.sampled_from(["iid", "size", "prior", "clustered"]),
    clients=st.integers(3, 40),
    size=st.integers(1, 400),
    seed=st.integers(0, 99),
)
def test_nothing_is_in_two_places(partition, clients, size, seed):
    f = federation(partition, clients, seed, transfer=TransferConfig(size=size))
    inputs = f.dataset.train.inputs
    assert len(np.unique(f.rows)) == len(f.rows)
    assert f.clients == clients
    assert f.offsets[0, 0] == 0
    assert f.offsets[-1, -1] == len(f.rows)
    assert (f.offsets[1:, 0] == f.offsets[:-1, 3]).all()
    assert (np.diff(f.offsets, axis=1) >= 0).all()
    # digits hold no two equal images, so bytes identify a row
    transfer = {row.tobytes() for row in f.transfer.inputs}
    dealt = {row.tobytes() for row in inputs[f.rows]}
    assert len(transfer) == size
    assert not transfer & dealt
    if partition in ("iid", "size"):
        assert len(dealt) + len(transfer) == len(inputs)
    total = sum(row["examples"] for row in f.histogram())
    assert total == len(f.rows)


def test_defaults_and_order_of_cutting():
    f = federation()
    assert len(f.transfer) == 143
    assert (f.transfer.targets == -1).all()
    test = {row.tobytes() for row in f.dataset.test.inputs}
    assert len(test) == len(f.dataset.test) == 359
    assert not test & {row.tobytes() for row in f.dataset.train.inputs}
    # The transfer set depends on neither partition nor number of clients, only on the seed.
    assert federation("prior", 3).transfer_hash() == f.transfer_hash()
    assert federation(seed=1).transfer_hash() != f.transfer_hash()
    # A client's cut depends on its rows and the seed alone.
    sizes = f.sizes()
    assert sizes[0].tolist() == [91, 13, 26]


def test_tensors_and_histogram():
    f = federation(clients=5)
    x, y = f.tensors(2, "train")
    assert x.shape == (len(y), 1, 8, 8)
    assert str(x.dtype) == "torch.float32"
    assert str(y.dtype) == "torch.int64"
    raw = f.split(2, "train")
    expected = (raw.inputs / 255.0 - f.dataset.mean[0]) / f.dataset.std[0]
    assert np.allclose(x.numpy(), expected, atol=1e-6)
    whole = f.dataset.tensor(f.dataset.train.inputs)
    assert abs(float(whole.mean())) < 0.02
    assert abs(float(whole.std()) - 1) < 0.02
    inputs, labels = f.test_tensors()
    assert len(inputs) == len(labels) == 359
    counted = np.zeros(10, dtype=int)
    for row in f.histogram():
        if row["client"] == 2 and row["split"] == "train":
            counted[row["label"]] = row["examples"]
    assert (counted == np.bincount(raw.targets, minlength=10)).all()
    assert f.transfer_tensors()[1] is None


def test_clients_without_rows_have_empty_tensors(monkeypatch):
    def make():
        groups = np.array([0] * 98 + [1, 2])
        train = Examples(np.ones((100, 3), dtype=np.float32), np.arange(100) % 2, groups)
        return Dataset("custom", train, None, ("a", "b"), "features", group_names=("x", "y", "z"))

    data = custom(monkeypatch, make)
    f = federation("natural", None, data=data, transfer=TransferConfig(size=98), seed=1)
    assert f.clients == 3
    assert f.test_tensors() is None
    empty = [client for client in range(3) if f.sizes()[client].sum() == 0]
    assert empty
    assert any("no examples left" in note for note in f.notes)
    x, y = f.tensors(empty[0], "train")
    assert x.shape == (0, 3)
    assert y.shape == (0,)
    with pytest.raises(UserError, match="allowed: 3 or null"):
        federation("natural", 2, data=data)


def test_who_writes_into_tensors_spoils_no_data(monkeypatch):
    def make():
        train, test = (Examples(np.ones((n, 3), dtype=np.float32), np.arange(n) % 2) for n in (60, 20))
        return Dataset("custom", train, test, ("a", "b"), "features")

    f = federation(clients=3, data=custom(monkeypatch, make), transfer=TransferConfig(size=10))
    for x, y in (f.tensors(1, "train"), f.test_tensors(), f.transfer_tensors()):
        x.zero_()
        if y is not None:
            y.fill_(7)
    for kept in (f.dataset.train, f.dataset.test, f.transfer):
        assert (kept.inputs == 1).all()
        assert (kept.targets < 2).all()


def test_transfer_sources():
    noise = federation(transfer=TransferConfig(source="noise", size=20))
    assert noise.transfer.inputs.shape == (20, 1, 8, 8)
    assert noise.transfer.inputs.dtype == np.uint8
    assert len(noise.rows) == len(noise.dataset.train)
    labelled = federation(transfer=TransferConfig(size=30, labelled=True))
    x, y = labelled.transfer_tensors()
    assert len(x) == len(y) == 30
    assert y.min() >= 0
    none = federation(transfer=TransferConfig(size=0))
    assert none.transfer is None
    with pytest.raises(UserError, match="no transfer set"):
        none.transfer_tensors()


def test_out_of_domain_transfer_takes_the_data_s_shape(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "train.npz", x=rng.integers(0, 256, (40, 12, 10, 3), dtype=np.uint8), y=np.arange(40) % 4)
    source = {"source": "npz", "root": str(tmp_path), "size": 15}
    f = federation(transfer=TransferConfig(**source))
    assert f.transfer.inputs.shape == (15, 1, 8, 8)
    assert len(f.rows) == len(f.dataset.train)
    for settings_, said in (({"labelled": True}, "other classes"), ({"size": 100}, "has 32 examples")):
        with pytest.raises(UserError, match=said):
            federation(transfer=TransferConfig(**{**source, **settings_}))


REFUSED = [
    ({}, {"size": 1438}, "transfer.size=1438 of 1438"),
    ({}, {"size": -1}, "transfer.size=-1"),
    ({}, {"source": "nose"}, "did you mean 'noise'"),
    ({}, {"source": "noise", "labelled": True}, "noise has no labels"),
    ({}, {"size": 10, "subset": 11}, "transfer.subset=11"),
    ({"validation": 0.5, "personal_test": 0.5}, {}, "a sum < 1"),
    ({"validation": -0.1}, {}, "data.validation=-0.1"),
    ({"personal_test": 1.0}, {}, "data.personal_test=1.0"),
    ({"limit": 0}, {}, "data.limit=0"),
    ({"test_fraction": 1.0}, {}, "test_fraction=1.0"),
    ({"name": "digit"}, {}, "did you mean 'digits'"),
    ({"layout": "parket"}, {}, "did you mean 'parquet'"),
    ({"extra": {"size": 3}}, {}, "data.extra.size"),
    ({"layout": "custom"}, {}, "data=custom needs data.load=pkg.mod:fn, which returns"),
    ({"layout": "custom", "load": "no_such_package:make"}, {}, "no_such_package"),
    ({"layout": "custom", "load": "json:dumps_all"}, {}, "has no .dumps_all"),
]


@pytest.mark.parametrize(("data", "transfer", "said"), REFUSED, ids=[row[2] for row in REFUSED])
def test_refused(data, transfer, said):
    with pytest.raises(UserError, match=said) as caught:
        federation(data=DataConfig(**data), transfer=TransferConfig(**transfer))
    assert "\n" not in str(caught.value)


def test_a_stratum_has_its_share_rounded_to_the_nearest():
    strata = np.repeat([0, 1], [10, 90])
    found = [np.bincount(strata[stratified(strata, count, "x")], minlength=2).tolist() for count in (4, 6, 14, 16)]
    assert found == [[0, 4], [1, 5], [1, 13], [2, 14]]


def test_splits_are_shares_and_something_is_always_left_to_train_on():
    assert split_counts(np.array([0, 1, 2, 3, 10]), 0.5, 0.4).tolist() == [
        [0, 0, 0], [1, 0, 0], [1, 0, 1], [1, 1, 1], [1, 5, 4],
    ]  # fmt: skip
    assert split_counts(np.array([10]), 0.1, 0.2).tolist() == [[7, 1, 2]]


def test_limit_is_stratified_and_ignores_the_seed():
    small = DataConfig(limit=100, test_limit=50)
    first, second = federation(data=small, seed=0), federation(data=small, seed=1)
    assert len(first.dataset.train) == 100
    assert len(first.dataset.test) == 50
    assert (first.dataset.train.inputs == second.dataset.train.inputs).all()
    counts = np.bincount(first.dataset.train.targets)
    assert counts.min() >= 9
    assert counts.max() <= 11


def test_pickles_beside_its_arrays():
    f = federation()
    buffers = []
    body = pickle.dumps(f, protocol=5, buffer_callback=buffers.append)
    assert len(body) < 4000
    assert sum(buffer.raw().nbytes for buffer in buffers) > f.dataset.train.inputs.nbytes
    back = pickle.loads(body, buffers=[bytes(buffer.raw()) for buffer in buffers])
    # Read-only arrays, as Ray hands them out.
    assert not back.dataset.train.inputs.flags.writeable
    for split in SPLITS:
        assert (back.tensors(1, split)[0] == f.tensors(1, split)[0]).all()
    assert back.transfer_hash() == f.transfer_hash()
    assert back.dataset.preprocessing() == f.dataset.preprocessing()


def test_a_hundred_thousand_clients_take_seconds(monkeypatch):
    def make(count):
        inputs = np.zeros((count, 2), dtype=np.float32)
        return Dataset("custom", Examples(inputs, np.arange(count) % 10), None, tuple("0123456789"), "features")

    data = custom(monkeypatch, make, count=200_000)
    start = time.monotonic()
    f = federation("iid", 100_000, data=data)
    assert f.clients == 100_000
    assert (f.sizes()[:, 0] >= 1).all()
    assert len(f.histogram()) > 100_000
    assert time.monotonic() - start < 30


def test_names_are_cheap():
    import subprocess

    code = (
        "import sys, fedfuse.data as d; assert 'digits' in d.names() and 'prior' in d.partition_names();"
        "heavy = {'numpy', 'torch', 'pandas', 'datasets', 'pyarrow', 'sklearn', 'PIL', 'matplotlib'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_what_the_data_lack_is_told(monkeypatch):
    x = np.ones((40, 3), dtype=np.float32)
    test = Examples(x[:10], np.arange(10) % 4)
    classes = ("ape", "bee", "cat", "dog", "emu")

    def told(test):
        return federation(
            data=custom(monkeypatch, lambda: Dataset("d", train, test, classes, "features")), clients=2
        ).notes

    train = Examples(x, np.arange(40) % 3)
    assert told(test) == ("no example to train on of 2 of 5 classes: dog, emu; 1 of them in the global test set",)
    classes = classes[:3]
    assert told(None) == ("no global test set: data=d brings none",)
    few = "no score on the global test set: it has 1 example, 2 are needed"
    assert told(Examples(x[:1], np.zeros(1)))[0].startswith(few)
    assert told(Examples(x[:2], np.zeros(2))) == ()


def test_clients_that_no_score_is_of_are_counted(monkeypatch):
    """A mean over one client of three is none over three."""
    owner = np.array([0] * 30 + [1] * 5 + [2] * 2)  # a fifth: 6, 1 and 0 examples
    train = Examples(np.ones((37, 3), dtype=np.float32), np.arange(37) % 2, owner)

    def told(personal):
        data = custom(monkeypatch, lambda: Dataset("d", train, train, ("a", "b"), "features"))
        data = dataclasses.replace(data, personal_test=personal)
        without = TransferConfig(size=0)
        return [note for note in federation("natural", None, data=data, transfer=without).notes if "personal" in note]

    assert [note.startswith("personal tests: 2 of 3 clients have fewer than 2 examples") for note in told(0.2)] == [
        True
    ]
    assert told(0.0) == []


def archive(root, inputs, labels):
    root.mkdir()
    np.savez(root / "train.npz", x=inputs, y=labels)
    return str(root)


def public(own, source, **more):
    """The transfer set of an archive's rows."""
    data = DataConfig(name="npz", root=own, test_fraction=0.0)
    return prepare(data, PartitionConfig(name="iid"), TransferConfig(source=source, size=4, **more), 1, 0).transfer


def test_noise_is_of_the_kind_of_the_data(tmp_path):
    tokens = archive(tmp_path / "tokens", np.arange(30).reshape(10, 3) % 7, np.arange(10) % 2)
    noise = public(tokens, "noise").inputs
    assert (noise.dtype, noise.shape) == (np.int64, (4, 3))
    assert 0 <= noise.min() <= noise.max() < 7
    assert len(np.unique(noise)) > 2
    features = archive(tmp_path / "features", np.ones((10, 3)), np.arange(10) % 2)
    noise = public(features, "noise").inputs
    assert noise.dtype == np.float32
    assert len(np.unique(noise)) == noise.size


def test_another_sets_rows_must_be_as_those_of_the_data(tmp_path):
    own = archive(tmp_path / "own", np.ones((10, 3)), np.arange(10) % 2)
    same = archive(tmp_path / "same", np.full((5, 3), 2.0), np.arange(5) % 2)
    assert public(own, "npz", root=same).inputs.tolist() == [[2.0] * 3] * 4
    wide = archive(tmp_path / "wide", np.ones((5, 4)), np.arange(5) % 2)
    whole = archive(tmp_path / "whole", np.ones((5, 3), dtype=np.int64), np.arange(5) % 2)
    for other, form in ((wide, r"features float32 \(4,\)"), (whole, r"tokens int64 \(3,\)")):
        with pytest.raises(UserError, match=f"gives {form}, data=npz is features float32"):
            public(own, "npz", root=other)
