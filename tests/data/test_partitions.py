"""Who gets which rows: every partition, its promises and what it refuses."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfuse.config.schema import DataConfig, PartitionConfig, TransferConfig
from fedfuse.data import prepare
from fedfuse.data.draw import deal_by_prior, draw_by_prior
from fedfuse.data.federated import split_counts
from fedfuse.data.flwr_partitions import fewest_short
from fedfuse.data.partition import largest_remainder, partition_rows
from fedfuse.errors import UserError

COVERING = ("iid", "dirichlet", "size", "natural", "domain")
CHEAP = ("iid", "size", "natural", "domain", "prior", "clustered")


def dealt(name, targets, clients, seed, natural=None, **settings_):
    config = PartitionConfig(name=name, **{"min_size": 1, "groups": 2, **settings_})
    ids = np.unique(natural) if natural is not None else np.empty(0, dtype=np.int64)
    return partition_rows(config, targets, natural, ids, clients, seed)


def assert_disjoint(parts, count, covering):
    rows = np.concatenate(parts)
    assert len(np.unique(rows)) == len(rows)
    assert rows.min() >= 0
    assert rows.max() < count
    if covering:
        assert len(rows) == count


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(CHEAP),
    clients=st.integers(2, 12),
    count=st.integers(60, 200),
    classes=st.integers(2, 6),
    alpha=st.sampled_from([1e-3, 0.1, 1.0, 100.0]),
    seed=st.integers(0, 1000),
)
def test_no_row_is_dealt_twice(name, clients, count, classes, alpha, seed):
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, classes, count)
    groups = np.arange(count) % clients
    parts, _ = dealt(name, targets, clients, seed, natural=groups, alpha=alpha)
    assert len(parts) == clients
    assert_disjoint(parts, count, name in COVERING)
    if name in ("natural", "domain"):
        assert all(len(np.unique(groups[part])) == 1 for part in parts)


@pytest.mark.parametrize("name", ["dirichlet", "shards", "pathological", "size"])
def test_flower_partitioners(name):
    targets = np.arange(400) % 10
    for clients in (4, 11):
        parts, _ = dealt(name, targets, clients, 3, alpha=1.0, sizes="linear")
        again, _ = dealt(name, targets, clients, 3, alpha=1.0, sizes="linear")
        other, _ = dealt(name, targets, clients, 4, alpha=1.0, sizes="linear")
        assert_disjoint(parts, 400, name in COVERING)
        assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
        assert not all(np.array_equal(a, b) for a, b in zip(parts, other, strict=True))
    if name == "pathological":
        assert all(len(np.unique(targets[part])) == 2 for part in parts)
    if name == "size":
        assert np.all(np.diff([len(part) for part in parts]) >= 0)


def test_iid_is_flowers_cut():
    import datasets
    from flwr_datasets.partitioner import IidPartitioner

    partitioner = IidPartitioner(num_partitions=7)
    partitioner.dataset = datasets.Dataset.from_dict({"row": list(range(100))})
    sizes = [len(partitioner.load_partition(client)) for client in range(7)]
    parts, _ = dealt("iid", np.zeros(100, dtype=np.int64), 7, 0)
    assert [len(part) for part in parts] == sizes


def test_least_size_is_kept_or_refused():
    targets = np.arange(1000) % 10
    parts, _notes = dealt("dirichlet", targets, 10, 0, alpha=0.15, min_size=25)
    assert min(len(part) for part in parts) >= 25
    parts, _ = dealt("size", targets, 10, 0, alpha=1e-4, min_size=20)
    assert min(len(part) for part in parts) >= 20
    with pytest.raises(UserError, match=r"alpha=0.001.*clients=10.*1000 examples"):
        dealt("dirichlet", targets, 10, 0, alpha=0.001, min_size=50)
    with pytest.raises(UserError, match="needs 2000 examples"):
        dealt("dirichlet", targets, 10, 0, alpha=1.0, min_size=200)


def of_flower(targets, clients, seed, **asked):
    import datasets
    from flwr_datasets.partitioner import DirichletPartitioner

    partitioner = DirichletPartitioner(clients, "label", self_balancing=False, seed=seed, **asked)
    partitioner.dataset = datasets.Dataset.from_dict({"label": targets.tolist(), "row": list(range(len(targets)))})
    return [partitioner.load_partition(client)["row"][:] for client in range(clients)]


@pytest.mark.filterwarnings("ignore")
def test_sizes_alone_tell_which_of_flowers_draws_fit():
    targets = np.random.default_rng(0).integers(0, 7, 1500)
    told, drawn = [], []
    for seed in range(6):
        told.append(fewest_short(0.5, targets, 45, 10, seed) == 0)
        try:
            drawn.append(bool(of_flower(targets, 45, seed, alpha=0.5, min_partition_size=10)))
        except ValueError:
            drawn.append(False)
    assert told == drawn
    assert set(told) == {True, False}


def test_thousands_of_clients_are_dealt_in_seconds(monkeypatch, tmp_path):
    """Rows come without a data set for each client; what no draw can satisfy is refused before any row is drawn."""
    import datasets
    from flwr_datasets import partitioner

    monkeypatch.setenv("FEDFUSE_CACHE", str(tmp_path))
    built, select = [], datasets.Dataset.select
    monkeypatch.setattr(datasets.Dataset, "select", lambda *given, **more: built.append(1) or select(*given, **more))
    targets = np.arange(20000) % 10
    for name in ("shards", "pathological"):
        parts, _ = dealt(name, targets, 2000, 0)
        assert_disjoint(parts, 20000, name in COVERING)
    assert len(built) < 20
    monkeypatch.setattr(partitioner, "DirichletPartitioner", None)
    with pytest.raises(UserError, match=r"no draw out of 1 fits clients=2000 and 20000 examples"):
        dealt("dirichlet", targets, 2000, 0, alpha=0.5, min_size=8)


def test_cached_indices_need_no_flwr_datasets(tmp_path):
    """The second process reads the indices from disk; both processes deal the same rows."""
    code = (
        "import sys, hashlib; from fedfuse.config.schema import *; from fedfuse.data import prepare\n"
        "f = prepare(DataConfig(), PartitionConfig(alpha=0.3), TransferConfig(), 10, 5)\n"
        "print(hashlib.sha256(f.rows.tobytes() + f.offsets.tobytes()).hexdigest(), f.transfer_hash())\n"
        "print('flwr_datasets' in sys.modules, 'torch' in sys.modules, 'sklearn' in sys.modules)"
    )
    environment = {**os.environ, "FEDFUSE_CACHE": str(tmp_path)}
    runs = []
    for hashing in ("1", "2"):
        environment["PYTHONHASHSEED"] = hashing
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        runs.append(done.stdout.splitlines())
    assert runs[0][0] == runs[1][0]
    assert runs[0][1] == "True False False"
    assert runs[1][1] == "False False False"


def test_damaged_cache_is_computed_again(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDFUSE_CACHE", str(tmp_path))
    targets = np.arange(200) % 5
    first, _ = dealt("shards", targets, 4, 0)
    (kept,) = (tmp_path / "partitions").glob("*.npz")
    kept.write_bytes(b"PK broken")
    again, _ = dealt("shards", targets, 4, 0)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("name", ["prior", "clustered"])
def test_prior_deals_exact_counts(name):
    targets = np.repeat(np.arange(10), 100)
    parts, _ = dealt(name, targets, 10, 1, alpha=1.0, examples=30)
    assert [len(part) for part in parts] == [30] * 10
    assert_disjoint(parts, 1000, False)


@pytest.mark.parametrize("examples", [0, 34])
def test_prior_says_how_many_examples_a_client_may_have(examples):
    targets, rng = np.arange(100) % 4, np.random.default_rng(0)
    with pytest.raises(UserError, match=rf"partition\.examples={examples} .*100 examples; allowed is 1 to 33$"):
        deal_by_prior("prior", 1.0, 1, examples, targets, 3, rng)
    for allowed in (1, 33):
        assert [len(rows) for rows in deal_by_prior("prior", 1.0, 1, allowed, targets, 3, rng)[0]] == [allowed] * 3


def test_prior_tops_up_in_proportion_and_says_so():
    targets = np.repeat(np.arange(3), [10, 500, 500])
    priors = np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    parts, shortage = draw_by_prior(targets, priors, 100, np.random.default_rng(0))
    assert [len(part) for part in parts] == [100, 100]
    assert shortage[0] == 90
    # Client 0 took all of class 0; client 1's shortage goes to class 1, since its prior has no class 2.
    assert np.bincount(targets[parts[0]], minlength=3)[0] == 10
    counts = np.bincount(targets[parts[1]], minlength=3)
    assert counts[0] == 0
    assert counts[1] == 100
    _, notes = dealt("prior", targets, 10, 0, alpha=0.1, examples=101)
    assert any("topped up" in note for note in notes)


@pytest.mark.parametrize("name", ["prior", "clustered", "size"])
def test_any_alpha_deals_towards_its_limit(name):
    """One class, or nearly all to one client, for the least α that there is; alike for the largest."""
    targets = np.arange(400) % 4
    for alpha, even in ((5e-324, False), (1e300, True)):
        parts, _ = dealt(name, targets, 4, 0, alpha=alpha)
        if name == "size":
            assert (np.ptp([len(part) for part in parts]) <= 1) == even
        else:
            kinds = [len(np.unique(targets[part])) for part in parts]
            assert kinds == [4] * 4 if even else max(kinds) < 4


def test_prior_without_shortage_is_silent_and_follows_the_prior():
    targets = np.repeat(np.arange(4), 1000)
    parts, notes = dealt("prior", targets, 5, 0, alpha=1e6, examples=400)
    assert notes == []
    shares = np.array([np.bincount(targets[part], minlength=4) / 400 for part in parts])
    assert np.abs(shares - 0.25).max() < 0.1


def test_clustered_shares_priors_round_robin():
    targets = np.repeat(np.arange(10), 2000)
    parts, notes = dealt("clustered", targets, 6, 2, alpha=0.2, examples=300, groups=3)
    counts = np.array([np.bincount(targets[part], minlength=10) / 300 for part in parts])

    def distance(a, b):
        return np.abs(counts[a] - counts[b]).sum()

    assert max(distance(group, group + 3) for group in range(3)) < 0.3 < distance(0, 1)
    assert any("mod 3" in note for note in notes)


def test_domain_can_have_several_clients_each():
    groups = np.array([0] * 50 + [1] * 20)
    parts, _ = dealt("domain", np.zeros(70, dtype=np.int64), 4, 0, natural=groups, clients_per_domain=2)
    assert [len(part) for part in parts] == [25, 25, 10, 10]


REFUSED = [
    ({"name": "iid"}, 0, "clients=0"),
    ({"name": "iid"}, -3, "clients=-3"),
    ({"name": "iid"}, 5000, "clients=5000"),
    ({"name": "dirichlet", "alpha": 0.0}, 5, "alpha=0.0"),
    ({"name": "dirichlet", "alpha": -1.0}, 5, "alpha=-1.0"),
    ({"name": "dirichlet", "alpha": float("nan")}, 5, "alpha=nan"),
    ({"name": "prior", "alpha": 1e308}, 5, "alpha=1e.308; allowed: more than 0 and at most 1e.300"),
    ({"name": "dirichlett"}, 5, "did you mean 'dirichlet'"),
    ({"name": "natural"}, None, "natural ids"),
    ({"name": "shards", "shards_per_client": 0}, 5, "shards_per_client=0"),
    ({"name": "pathological", "classes_per_client": 11}, 5, "1 to 10"),
    ({"name": "prior", "examples": 1000}, 5, "allowed is 1 to 259"),
    ({"name": "clustered", "groups": 9}, 5, "groups=9"),
    ({"name": "size", "sizes": "square"}, 5, "sizes=square"),
    ({"name": "size", "min_size": -1}, 5, "min_size=-1"),
]


@pytest.mark.parametrize(("settings_", "clients", "said"), REFUSED, ids=[row[2] for row in REFUSED])
def test_refused_partitions(settings_, clients, said):
    with pytest.raises(UserError, match=said) as caught:
        prepare(DataConfig(), PartitionConfig(**settings_), TransferConfig(), clients, 0)
    assert "\n" not in str(caught.value)


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 400), min_size=1, max_size=8),
    validation=st.floats(0, 0.99),
    personal=st.floats(0, 0.99),
)
def test_split_counts(sizes, validation, personal):
    if validation + personal >= 1:
        personal = (1 - validation) / 2
    counts = split_counts(np.array(sizes), validation, personal)
    assert (counts >= 0).all()
    assert (counts.sum(axis=1) == sizes).all()
    assert (counts[:, 0] >= np.minimum(1, sizes)).all()


@given(st.lists(st.floats(1e-3, 1), min_size=1, max_size=20), st.integers(0, 1000))
def test_largest_remainder(shares, total):
    weights = np.array(shares) / np.sum(shares)
    sizes = largest_remainder(weights, total)
    assert sizes.sum() == total
    assert (np.abs(sizes - weights * total) <= 1 + 1e-9).all()
