"""The real files, where they are at hand."""

import numpy as np
import pytest

from fedfuse.config.schema import DataConfig, PartitionConfig, TransferConfig
from fedfuse.data import prepare
from fedfuse.data.load import load


def present(folder, name):
    if not (folder / name).exists():
        pytest.skip(f"{name} is not under {folder}")


def test_mnist(real_data):
    present(real_data, "mnist")
    f = prepare(DataConfig(name="mnist"), PartitionConfig(name="iid"), TransferConfig(), 10, 0)
    assert (len(f.dataset.train), len(f.dataset.test), len(f.transfer)) == (60_000, 10_000, 1000)
    # the first ten labels of the training file, as everybody knows them
    assert f.dataset.train.targets[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert f.sizes().sum() == 59_000


def test_cifar10(real_data, monkeypatch):
    present(real_data, "cifar10")
    # Decoding 60,000 images takes a while; the test split is enough to see that it is right.
    root = real_data / "cifar10" / "test.parquet"
    dataset = load(DataConfig(name="cifar10", root=str(root), test_fraction=0))
    assert dataset.shape == (3, 32, 32)
    assert len(dataset.train) == 10_000
    assert dataset.classes[3] == "cat"
    assert (np.bincount(dataset.train.targets) == 1000).all()
    assert dataset.mean == (0.4914, 0.4822, 0.4465)
    assert np.abs(dataset.tensor(dataset.train.inputs[:2000]).mean(dim=(0, 2, 3)).numpy()).max() < 0.06


def test_office_caltech10(real_data):
    present(real_data, "office_caltech10")
    f = prepare(DataConfig(name="office_caltech10"), PartitionConfig(name="domain"), TransferConfig(), None, 0)
    assert f.dataset.group_names == ("amazon", "caltech10", "dslr", "webcam")
    assert len(f.dataset.train) + len(f.dataset.test) == 958 + 1123 + 157 + 295
    assert f.clients == 4


def test_texts_have_natural_clients(real_data):
    """Questions by intent, reviews by domain; SST-2 under its folder's name."""
    for name in ("trec", "amazon_reviews", "glue"):
        present(real_data, name)
    hashed = {"text": "tokens", "length": 12}
    f = prepare(
        DataConfig(name="trec", groups="fine", extra=hashed),
        PartitionConfig(name="natural"),
        TransferConfig(size=10),
        None,
        0,
    )
    assert (len(f.dataset.train), len(f.dataset.test), f.clients) == (5452, 500, 50)
    assert "NUM:dist" in f.dataset.group_names
    domains = DataConfig(name="amazon_reviews", inputs="title", groups="domain", extra=hashed)
    f = prepare(domains, PartitionConfig(name="domain", clients_per_domain=2), TransferConfig(size=10), None, 0)
    assert f.dataset.group_names == ("books", "dvd", "electronics", "kitchen")
    assert (f.clients, len(f.dataset.train) + len(f.dataset.test)) == (8, 8000)
    few = {**hashed, "train": "sst2_validation.jsonl.gz", "test": "sst2_validation.jsonl.gz"}
    assert load(DataConfig(name="sst2", extra=few)).shape == (12,)
