"""CFD in closed form: nearest quantised rows, exact codes below T_s·log2 C bits, deltas, dual distillation."""

import itertools
import math

import numpy as np
import pytest
import torch

from fedfuse.strategies.cfd import coded, fold
from fedfuse.wire.label_code import BITS as ALLOWED
from fedfuse.wire.label_code import decode, encode, pack, probabilities, quantise, unpack
from fedfuse.wire.records import InvalidArrays, Scope, record, validate
from tests.federations import answer, federation, intercept, play
from tests.halves import client, random_labels, server, shares, take

BITS = (1, 2, 3, 5, 8)


@pytest.mark.parametrize("bits", BITS)
def test_quantised_rows_sum_to_one(bits):
    levels = quantise(random_labels(200, 10), bits)
    whole = 2**bits - 1
    assert (levels.long().sum(1) == whole).all()
    rows = probabilities(levels, bits)
    np.testing.assert_allclose(rows.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(rows.double() * whole, levels, atol=1e-4)


@pytest.mark.parametrize(("bits", "classes"), [(1, 4), (2, 3), (2, 4), (3, 3)])
def test_no_other_row_is_nearer(bits, classes):
    whole = 2**bits - 1
    lattice = torch.tensor(
        [row for row in itertools.product(range(whole + 1), repeat=classes) if sum(row) == whole], dtype=torch.float64
    )
    p = torch.cat([random_labels(100, classes, seed=3), torch.full((1, classes), 1 / classes, dtype=torch.float64)])
    distance = (p[:, None] - lattice[None] / whole).abs().sum(-1)
    mine = (p - quantise(p, bits).double() / whole).abs().sum(1)
    np.testing.assert_allclose(mine, distance.min(1).values, atol=1e-12)


def test_one_bit_is_the_one_hot_argmax():
    p = torch.tensor([[0.2, 0.5, 0.3], [0.4, 0.2, 0.4], [0.0, 0.0, 1.0]])
    assert quantise(p, 1).tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize("bits", [*BITS, 32])
@pytest.mark.parametrize("seed", range(3))
def test_codes_decode_exactly(bits, seed):
    p = random_labels(60, 7, seed).float()
    levels = p if bits == 32 else quantise(p, bits)
    assert torch.equal(decode(encode(levels, bits), 60, 7, bits), levels)
    if bits != 32:
        changed = torch.arange(60) % 4 == 0
        previous = torch.where(changed[:, None], quantise(random_labels(60, 7, seed + 10), bits), levels)
        data = encode(levels, bits, previous)
        assert torch.equal(decode(data, 60, 7, bits, previous), levels)
        assert len(data) < len(encode(levels, bits))


def test_one_bit_labels_take_less_than_log2_c_bits_each():
    rows, classes = 1000, 10
    draw = np.random.default_rng(0)
    for alpha in (0.1, 0.5, 1.0, 5.0):  # label shares of clients, from skewed to nearly even
        labels = draw.choice(classes, rows, p=draw.dirichlet([alpha] * classes))
        levels = quantise(torch.eye(classes)[torch.tensor(labels)], 1)
        bits = 8 * len(encode(levels, 1))
        share = np.bincount(labels, minlength=classes) / rows
        entropy = -(share[share > 0] * np.log2(share[share > 0])).sum()
        assert bits < rows * math.log2(classes)
        assert bits < rows * entropy + (classes - 1) / 2 * math.log2(rows) + 32
        assert len(encode(levels, 1, levels)) <= 2  # nothing changed


def test_real_predictions_take_less_than_log2_c_bits_each():
    over = ("data.limit=1500", "transfer.size=300", "rounds=3", "partition=dirichlet", "partition.alpha=0.3")
    up = play("cfd", *over).totals["up_bytes"]
    assert up * 8 < 3 * 3 * 300 * math.log2(10)
    assert up < play("cfd", *over, "strategy.delta=false").totals["up_bytes"]


@pytest.mark.parametrize("bits", [1, 3])
def test_bytes_that_the_coder_does_not_write_are_refused(bits):
    levels = quantise(random_labels(30, 5), bits)
    data = encode(levels, bits)
    for spoilt in (data + b"\0", data + b"\1", data * 101, data[:-1], b"\xff" * 400):
        try:
            found = decode(spoilt, 30, 5, bits)
        except InvalidArrays:
            continue
        assert encode(found, bits) == spoilt  # then it is a message, and of valid rows
        assert (found.long().sum(1) == 2**bits - 1).all()
    with pytest.raises(InvalidArrays):
        decode(data + b"\0", 30, 5, bits)
    with pytest.raises(InvalidArrays):
        decode(b"\0" * 5, 30, 5, 32)
    with pytest.raises(InvalidArrays):
        decode(np.full((30, 5), np.nan, "<f4").tobytes(), 30, 5, 32)


def test_deltas_fold_to_the_newest_labels():
    steps = [quantise(random_labels(40, 6, seed), 2) for seed in range(4)]
    value = {"code": pack(steps[0], 2)}
    for old, new in itertools.pairwise(steps):
        value = fold(value, {"code": pack(new, 2, old)})
        assert torch.equal(unpack(value["code"])[0], new)
    assert torch.equal(value["code"], pack(steps[-1], 2))
    with pytest.raises(InvalidArrays):
        unpack(pack(steps[1], 2, steps[0]))  # a delta to nothing
    with pytest.raises(InvalidArrays):
        unpack(torch.zeros(3, dtype=torch.uint8))


@pytest.mark.parametrize("bits", [8, 32])
def test_a_code_is_at_most_floats_and_64_bytes(bits):
    """Floats with their header fit, and so do nearly even rows of 8 bits; a byte over the bound is refused."""
    layout = coded(Scope({"subset": 30, "classes": 7}, {}))
    p = random_labels(30, 7, sharp=0.1).float()
    longest = pack(p if bits == 32 else quantise(p, bits), bits)
    validate("labels", {"code": longest}, layout)
    validate("labels", {"code": torch.zeros(4 * 30 * 7 + 64, dtype=torch.uint8)}, layout)
    with pytest.raises(InvalidArrays, match="at most 904"):
        validate("labels", {"code": torch.zeros(4 * 30 * 7 + 65, dtype=torch.uint8)}, layout)


@pytest.mark.parametrize("bits", [1, 32])
def test_dual_distillation_and_mean(bits, monkeypatch):
    strategy = server("cfd", f"strategy.bits_up={bits}", "strategy.bits_down=32")
    labels = [random_labels(24, 10, seed).float() for seed in range(3)]
    sent = [p if bits == 32 else quantise(p, 1) for p in labels]
    own, seen = random_labels(24, 10, 9).float(), {}
    monkeypatch.setattr(strategy, "teach", lambda loss, mean, rows: seen.update(mean=mean))
    monkeypatch.setattr(strategy, "answers", lambda student, rows: own)
    codes = [{"labels": {"code": torch.tensor(list(encode(s, bits)), dtype=torch.uint8)}} for s in sent]
    strategy.fuse(shares(strategy, *codes))
    mean = torch.stack([probabilities(s, bits).double() for s in sent]).mean(0)
    np.testing.assert_allclose(seen["mean"], mean, rtol=1e-6)
    assert torch.equal(unpack(strategy.published("labels")["code"])[0], own)  # not the mean: the model's answer


@pytest.mark.parametrize("bits", [1, 3, 32])
def test_the_server_too_codes_what_changed_unless_it_sends_floats(bits, monkeypatch):
    strategy = server("cfd", f"strategy.bits_down={bits}", "strategy.delta=true")
    first = random_labels(24, 10).float()
    second = torch.where((torch.arange(24) % 8 == 0)[:, None], random_labels(24, 10, 5).float(), first)
    said = iter((first, second))
    monkeypatch.setattr(strategy, "teach", lambda loss, mean, rows: None)
    monkeypatch.setattr(strategy, "answers", lambda student, rows: next(said))
    up = {"labels": {"code": torch.tensor(list(encode(quantise(first, 1), 1)), dtype=torch.uint8)}}
    for round in (1, 2):
        strategy.round = round
        strategy.state["sent"] = {}
        strategy.fuse(shares(strategy, up))
    old, new = (rows if bits == 32 else quantise(rows, bits) for rows in (first, second))
    lengths = [len(pack(old, bits)), len(pack(new, bits, None if bits == 32 else old))]
    assert [value * 24 / 8 for *_, metric, value in strategy.logged if metric == "bits_per_label/down"] == lengths
    assert (lengths[1] < lengths[0]) == (bits != 32)
    assert torch.equal(unpack(strategy.published("labels")["code"])[0], new)


def test_clients_start_from_the_common_beginning():
    half, other = client("cfd"), client("cfd", "strategy.reinit=false")
    code = pack(quantise(random_labels(24, 10), 1), 1)
    for h in (half, other):
        h.begin("train")
        h.fit()
    assert set(half.state) == set()
    assert set(other.state) == {"weights"}
    take(other, "labels", code=code)
    fresh = client("cfd")
    take(fresh, "labels", code=code)
    assert not torch.equal(next(iter(fresh.weights().values())), next(iter(other.weights().values())))


def test_both_ends_hold_the_same_previous_labels(tmp_path):
    done = play("cfd", "rounds=4", "participation=0.7", path=tmp_path / "run")
    for who, levels in done.strategy.state["sent"].items():
        kept = done.directory.clients.load(int(who), done.strategy.outbox.tags[int(who)])
        assert torch.equal(kept["sent"], levels)
    assert done.digest == play("cfd", "rounds=4", "participation=0.7", grid="serial").digest


def test_an_excluded_code_leaves_both_ends_in_step(tmp_path):
    """The client goes on from the state before the code that was refused, so its next delta fits the server."""
    with federation("cfd", "rounds=4", path=tmp_path / "run") as (built, directory):
        strategy, bad = built.strategy, record({"code": torch.full((60,), 255, dtype=torch.uint8)})
        intercept(built, lambda reply: answer(reply, labels=bad), kind="train", round=2, client=1)
        built.run()
        assert strategy.inbox.failures["rejected"] == 1
        kept = directory.clients.load(1, strategy.outbox.tags[1])
        assert torch.equal(kept["sent"], strategy.state["sent"]["1"])
        assert strategy.outbox.tags[1] == strategy.outbox.tags[0]


@pytest.mark.parametrize(
    "over",
    [("bits_up=3", "bits_down=32"), ("bits_up=32", "bits_down=8"), ("dual=false", "reinit=false"), ("subset=10",)],
)
def test_settings_run(over):
    done = play("cfd", *(f"strategy.{o}" for o in over), "model.pool=[mlp,mlp_small,mlp_wide]")
    assert done.strategy.inbox.failures == {"replies": 0, "rejected": 0, "retried": 0}
    if over[0] == "bits_up=32":
        assert done.totals["up_bytes"] == 2 * 3 * 24 * 10 * 4


def test_a_code_of_other_rows_is_excluded_and_counted():
    strategy = server("cfd")
    good = torch.tensor(list(encode(quantise(random_labels(24, 10), 1), 1)), dtype=torch.uint8)
    bad = torch.full((60,), 255, dtype=torch.uint8)
    strategy.fuse(shares(strategy, {"labels": {"code": good}}, {"labels": {"code": bad}}))
    assert strategy.inbox.failures["rejected"] == 1
    assert set(strategy.state["sent"]) == {"0"}
    assert ALLOWED[-1] == 32
