"""One domain as the target: nobody has its labels, nobody trains on what it is tested on, and gaps are named."""

import numpy as np
import pytest

from fedfuse.config.schema import DataConfig, PartitionConfig, TransferConfig
from fedfuse.data import Dataset, Examples, prepare
from fedfuse.errors import UserError
from tests.data.test_federated import custom

NAMES = ("north", "south", "west")


def domains(gap="", groups=True, target_labels=0):
    """90 + 45 rows of 3 domains and 3 classes; a row's first number names it, its second its domain."""
    parts = []
    for start, n in ((0, 90), (1000, 45)):
        ids = np.arange(n)
        group, y = ids % 3, ids // 3 % 3
        y = np.where(group == 1, (y + target_labels) % 3, y)
        x = np.stack([start + ids, group, y], 1).astype(np.float32)
        keep = np.ones(n, dtype=bool) if gap != ("train" if start == 0 else "test") else ~((group == 1) & (y == 2))
        parts.append(Examples(x[keep], y[keep], group[keep] if groups else None))
    return Dataset("theirs", *parts, ("a", "b", "c"), "features", group_names=NAMES if groups else None)


def left_out(monkeypatch, make=domains, size=None, target="south", partition="domain", seed=0, **transfer):
    data = custom(monkeypatch, make)
    data.target = target
    clients = None if partition == "domain" else 4
    return prepare(data, PartitionConfig(name=partition), TransferConfig(size=size, **transfer), clients, seed)


def test_the_target_is_unlabelled_to_everyone_and_tested_on_its_own_test_split(monkeypatch):
    f = left_out(monkeypatch)
    assert f.clients == 2
    assert f.dataset.group_names == ("north", "west")
    for client, group in ((0, 0), (1, 2)):  # ids are counted anew; the rows are the domain's own
        rows = f.rows[f.offsets[client, 0] : f.offsets[client, 3]]
        assert set(f.dataset.train.inputs[rows, 1]) == {group}
        assert len(rows) == 30
    assert (f.transfer.targets == -1).all()
    assert sorted(f.transfer.inputs[:, 0]) == list(range(1, 90, 3))  # all of its training rows
    assert f.transfer_tensors()[1] is None
    assert set(f.dataset.test.inputs[:, 1]) == {1}
    assert len(f.dataset.test) == 15
    seen = {*f.transfer.inputs[:, 0], *f.dataset.train.inputs[:, 0]}
    assert not seen & set(f.dataset.test.inputs[:, 0])  # FedKA's notebook tests on the split it aligns to


def test_target_labels_reach_nothing_that_is_trained_on(monkeypatch):
    """Two targets that differ in labels alone leave clients and transfer set as they are."""

    def relabelled(shift):
        made = domains()
        groups, y = made.train.groups, made.train.targets
        return Dataset("theirs", Examples(made.train.inputs, np.where(groups == 1, (y + shift) % 3, y), groups),
                       made.test, made.classes, made.kind, group_names=NAMES)  # fmt: skip

    one, other = (left_out(monkeypatch, lambda shift=shift: relabelled(shift)) for shift in (0, 1))
    assert one.transfer_hash() == other.transfer_hash()
    assert (one.rows == other.rows).all()
    assert (one.dataset.train.targets == other.dataset.train.targets).all()
    assert (one.transfer.targets == other.transfer.targets).all()


def test_a_size_takes_so_many_of_the_target_and_any_partition_deals_the_rest(monkeypatch):
    f = left_out(monkeypatch, size=7, partition="iid", seed=3)
    assert f.clients == 4
    assert (len(f.transfer), len(f.rows)) == (7, 60)
    again = left_out(monkeypatch, size=7, partition="iid", seed=4)
    assert f.transfer_hash() != again.transfer_hash()


@pytest.mark.parametrize(
    ("said", "make", "words"),
    [
        ("domain south has no training example of class 'c'; every domain", lambda: domains("train"), {}),
        ("domain south has no test example of class 'c'", lambda: domains("test"), {}),
        ("has no domains", lambda: domains(groups=False), {}),
        ("is no domain of data=custom|theirs; did you mean 'south'", domains, {"target": "souht"}),
        ("transfer.labelled=true: with data.target=south .* allowed: false", domains, {"labelled": True}),
        ("transfer.source=noise: with data.target=south .* allowed: holdout", domains, {"source": "noise"}),
        ("transfer.size=31: data.target=south has 30", domains, {"size": 31}),
        ("transfer.size=0: data.target=south", domains, {"size": 0}),
        ("transfer.subset=31 of 30", domains, {"subset": 31}),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(monkeypatch, said, make, words):
    with pytest.raises(UserError, match=said) as caught:
        left_out(monkeypatch, make, **words)
    assert "\n" not in str(caught.value)


def test_domains_elsewhere_are_refused():
    with pytest.raises(UserError, match=r"data\.target=usps: data=digits has no domains"):
        prepare(DataConfig(target="usps"), PartitionConfig(name="iid"), TransferConfig(), 3, 0)


def test_digits_of_three_sources_mean_the_same(real_data):
    """A label is the digit, whichever source it is of (FedKA's notebook shifts one source's by one)."""
    for name in ("mnist", "usps", "mnist_m"):
        if not (real_data / name).is_dir():
            pytest.skip(f"no {name}")
    data = DataConfig(name="mixed", layout="mixed", extra={"sources": ["mnist", "usps", "mnist_m"], "per_source": 400})
    data.target = "mnist"
    f = prepare(data, PartitionConfig(name="domain"), TransferConfig(), None, 0)
    assert f.dataset.classes == tuple("0123456789")
    assert (f.clients, len(f.transfer)) == (2, 400)
    assert f.dataset.group_names == ("usps", "mnist_m")
    usps = f.dataset.train.take(np.flatnonzero(f.dataset.train.groups == 0))
    centre = usps.inputs[:, :, 13:19, 13:19].mean((1, 2, 3))
    assert int(np.argmin([centre[usps.targets == c].mean() for c in range(10)])) == 0  # a nought is empty inside
