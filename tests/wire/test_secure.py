"""Sums in whole numbers, and masks that cancel in them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedfuse.core.masked_sums import MaskedSums
from fedfuse.errors import Refused, WorldError
from fedfuse.wire import masks
from fedfuse.wire.fixed_point import FixedPoint, beyond
from fedfuse.wire.records import InvalidArrays
from fedfuse.wire.sums import Sum
from tests.halves import server


def test_the_quantised_sum_in_closed_form() -> None:
    point = FixedPoint(clip=2.0, levels=8, heaviest=4.0)  # a step of Σ w·x is 2·2·4/8 = 2
    values = {1: [0.5, -3.0, 1.9], 4: [1.0, 1.0, -0.25], 3: [0.0, 9.0, 0.7]}
    total = Sum(point)
    for group, (weight, x) in enumerate(values.items()):
        total.add(group, {"x": torch.tensor(x, dtype=torch.float64)}, weight)
    #            1·(.5, -2, 1.9)/2            4·(1, 1, -.25)/2        3·(0, 2, .7)/2
    by_hand = np.array([0, -1, 1]) + np.array([2, 2, 0]) + np.array([0, 3, 1])  # halves to even
    found, weights = total.total()
    assert found["x"].tolist() == (2.0 * by_hand).tolist()
    assert weights == 8
    assert total.mean()["x"].tolist() == (2.0 * by_hand / 8).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fine_sum_is_within_half_a_step_a_client_and_the_same_in_any_order(dtype: torch.dtype) -> None:
    point = FixedPoint(8.0, 2**22, 50.0)
    draw = torch.Generator().manual_seed(0)
    xs, weights = [torch.randn(100, generator=draw).to(dtype) for _ in range(4)], [50.0, 3.0, 0.0, 17.0]
    exact = sum(w * x.double() for w, x in zip(weights, xs, strict=True))
    found = set()
    for order in itertools.permutations(range(4)):
        total = Sum(point)
        for place, i in enumerate(order):
            total.add(place // 2, {"x": xs[i]}, weights[i])
        value = total.total()[0]["x"]
        found.add(value.numpy().tobytes())
        assert (value - exact).abs().max() <= 4 * point.step(dtype) / 2
    assert len(found) == 1


def test_counters_are_summed_beyond_the_clipping_range_and_what_is_clipped_is_counted() -> None:
    point = FixedPoint(8.0, 2**22, 2.0)
    arrays = {"n": torch.tensor([1000]), "x": torch.tensor([9.0, 1.0, -8.5])}
    total = Sum(point)
    total.add(0, arrays, 2.0)
    total.add(0, {"n": torch.tensor([2000]), "x": torch.zeros(3)}, 1.0)
    assert total.mean()["n"].tolist() == [1333]
    assert beyond({"m": arrays}, {"m": point}) == 0.5
    assert beyond({"m": {"x": torch.tensor([8.0, -8.0, 8.5, 1.0])}}, {"m": point}) == 0.25  # the range's ends are in it
    assert beyond({}, {"m": point}) == 0.0
    assert total.nbytes(arrays) == 16


def test_what_would_wrap_around_is_refused() -> None:
    total = Sum(FixedPoint(8.0, 2**22, 10.0))
    with pytest.raises(InvalidArrays, match="weight 11"):
        total.add(0, {"x": torch.zeros(1)}, 11.0)
    with pytest.raises(InvalidArrays, match="not finite"):
        total.add(0, {"x": torch.tensor([float("nan")])}, 1.0)


class Phase:
    """One phase's protocol, without messages."""

    def __init__(self, clients: list[int], shares: int, threshold: int, silent: tuple[int, ...] = ()) -> None:
        self.threshold = threshold
        self.own = {i: masks.keys("s") for i in clients}
        public = {i: tuple(own["public"]) for i, own in self.own.items()}
        around = masks.neighbourhoods(clients, shares)
        sealed = {i: masks.share(self.own[i], i, {j: public[j] for j in around[i]}, threshold) for i in clients}
        for i in silent:
            del sealed[i]
        self.members = {i: around[i] & sealed.keys() for i in sealed}
        self.public = {i: pair[0] for i, pair in public.items()}
        for i, near in self.members.items():
            masks.accept(self.own[i], i, {j: sealed[j][i] for j in near if j != i})

    def total(self, values: dict[int, np.ndarray], deaf: tuple[int, ...] = ()) -> np.ndarray:
        sent = {i: masks.mask(self.own[i], i, v) for i, v in values.items()}
        self.sent, shares = sent, dict[int, list[bytes]]()
        for i in sent.keys() - set(deaf):
            near = self.members[i]
            for j, part in masks.reveal(self.own[i], near & sent.keys(), near - sent.keys()).items():
                shares.setdefault(j, []).append(part)
        total = sum(sent.values(), np.zeros(len(next(iter(values.values()))), np.uint32))
        return masks.unmasked(total, sent.keys(), self.members, self.public, shares, self.threshold)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_masks_cancel_whoever_drops_out_whenever(data: st.DataObject) -> None:
    clients = data.draw(st.lists(st.integers(0, 99), min_size=3, max_size=6, unique=True))
    n = len(clients)
    threshold = n // 2 + 1
    gone = data.draw(st.lists(st.sampled_from(clients), max_size=n - threshold, unique=True))
    cut, deaf = sorted((data.draw(st.integers(0, len(gone))), data.draw(st.integers(0, len(gone)))))
    phase = Phase(clients, n, threshold, silent=tuple(gone[:cut]))
    length = data.draw(st.integers(1, 50))
    draw = np.random.default_rng(data.draw(st.integers(0, 9)))
    left = [i for i in clients if i not in gone[:deaf]]
    values = {i: draw.integers(0, 2**32, length, dtype=np.uint32) for i in left}
    found = phase.total(values, deaf=tuple(gone[deaf:]))
    assert (found == sum(values.values(), np.zeros(length, np.uint32))).all()
    assert all((phase.sent[i] != values[i]).mean() > 0.5 or length < 4 for i in left)


def test_few_neighbours_are_enough() -> None:
    phase = Phase(list(range(8)), 5, 3)
    assert {len(near) for near in phase.members.values()} == {5}
    values = {i: np.full(9, i, np.uint32) for i in range(8) if i != 4}
    assert phase.total(values).tolist() == [24] * 9


def test_too_few_shares_are_named() -> None:
    phase = Phase([0, 1, 2], 3, 2)
    with pytest.raises(ValueError, match="1 shares of client 0's mask; 2 are needed"):
        phase.total({i: np.ones(3, np.uint32) for i in range(3)}, deaf=(0, 2))


def refused(do: object) -> str:
    with pytest.raises(Refused) as caught:
        do()  # type: ignore[operator]
    return str(caught.value)


def test_a_client_gives_no_more_than_a_sum() -> None:
    phase = Phase([0, 1, 2, 3], 4, 3)
    own, values = phase.own[0], np.ones(3, np.uint32)
    assert "out of turn" in refused(lambda: masks.reveal(own, [0, 1, 2, 3], []))
    first = masks.mask(own, 0, values)
    assert (masks.mask(own, 0, values) == first).all()  # a repeated message: the same bytes
    assert "others than before" in refused(lambda: masks.mask(own, 0, values + np.uint32(1)))
    assert "threshold is 3" in refused(lambda: masks.reveal(dict(own), [0, 1], [2, 3]))
    assert "threshold is 3" in refused(lambda: masks.reveal(dict(own), [0], [1, 2, 3]))
    assert "unmask" in refused(lambda: masks.reveal(dict(own), [0, 1, 2, 3], [3]))
    masks.reveal(own, [0, 1, 2], [3])
    masks.reveal(own, [0, 1, 2], [3])
    assert "of others than before" in refused(lambda: masks.reveal(own, [0, 1, 3], [2]))
    assert "of others than before" in refused(lambda: masks.reveal(own, [0, 1, 2, 3], []))


@pytest.mark.parametrize(("count", "threshold"), [(1, 1), (1, 2), (3, 4), (4, 2)])
def test_groups_that_would_hide_nothing_are_refused_by_the_client(count: int, threshold: int) -> None:
    pairs = [masks.keys("s") for _ in range(count)]
    peers = {i: tuple(own["public"]) for i, own in enumerate(pairs)}
    assert "threshold" in refused(lambda: masks.share(pairs[0], 0, peers, threshold))  # type: ignore[arg-type]


def test_false_keys_and_false_shares_are_refused() -> None:
    pairs = [masks.keys("s") for _ in range(3)]
    peers = {i: tuple(own["public"]) for i, own in enumerate(pairs)}
    assert "two share" in refused(lambda: masks.share(dict(pairs[0]), 0, {**peers, 2: peers[1]}, 2))  # type: ignore
    assert "not this client's" in refused(lambda: masks.share(dict(pairs[0]), 0, {**peers, 0: peers[1]}, 2))  # type: ignore
    sealed = {i: masks.share(pairs[i], i, peers, 2) for i in range(3)}  # type: ignore[arg-type]
    assert "cannot be opened" in refused(lambda: masks.accept(dict(pairs[0]), 0, {1: sealed[2][0], 2: sealed[2][0]}))
    assert "threshold is 2" in refused(lambda: masks.accept(dict(pairs[0]), 0, {}))


def test_keys_that_two_clients_share_are_neithers() -> None:
    public = {i: tuple(masks.keys("s")["public"]) for i in range(4)}
    assert masks.unusable(public) == {}  # type: ignore[arg-type]
    public[3] = (public[3][0], public[1][0])
    assert masks.unusable(public) == dict.fromkeys((1, 3), "a key that is not its own alone")  # type: ignore[arg-type]


# --- the server's running sum -----------------------------------------------------------------------------


def whole(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def summed() -> MaskedSums:
    """Two clients' numbers, as large as 7 quarters of 8 // 2 steps and two roundings allow: one sends too much."""
    found = MaskedSums({"model": FixedPoint(clip=2.0, levels=8, heaviest=4.0)})
    sums = {"model": "num-examples"}
    said = {"int64:n": whole(1), "float32:w": whole(3, -2, 0).reshape(3, 1)}
    assert found.add(0, {"model": said}, {"num-examples": 4}, sums) == {"model": 16}
    said = {"int64:n": whole(4), "float32:w": whole(6, -7, 1).reshape(3, 1)}
    assert found.add(1, {"model": said}, {"num-examples": 3}, sums) == {"model": 16}
    return found


def test_masked_numbers_are_summed_modulo_the_word_and_come_back_signed() -> None:
    found, totals = summed(), {"model": Sum(FixedPoint(2.0, 8, 4.0))}
    assert found.vector.tolist() == [9, 2**32 - 9, 1, 5]  # arrays in the order of their names
    found.hand_over(found.vector, totals)
    total, weight = totals["model"].total()
    assert total["w"].tolist() == [[18.0], [-18.0], [2.0]]  # a step is 2·2·4/8 = 2
    assert total["n"].tolist() == [5 * 2.0**20]
    assert weight == 7.0
    with pytest.raises(InvalidArrays, match="weight 5"):
        found.add(2, {"model": {"float32:w": whole(1)}}, {"num-examples": 5}, {"model": "num-examples"})


@pytest.mark.parametrize("place", range(4))
def test_a_sum_that_no_clients_numbers_add_up_to_is_told(place: int) -> None:
    found = summed()
    vector = np.array([9, 2**32 - 9, 1, 5], np.uint32)
    vector[place] = 2**32 - 10  # with the largest weights it could be
    with pytest.raises(WorldError, match="model: the masks of 2 clients do not cancel"):
        found.hand_over(vector, {"model": Sum(FixedPoint(2.0, 8, 4.0))})


def test_masked_records_are_what_the_strategy_declares() -> None:
    built = server("fedavg")
    good = {f"float32:{name}": torch.zeros(value.shape, dtype=torch.int32) for name, value in built.model.items()}
    first = next(iter(good))
    found = MaskedSums({"model": FixedPoint(2.0, 8, 4.0)})
    found.check({"model": good}, built, 1)
    other = {name: value for name, value in good.items() if name != first}
    for bad, why in (
        ({}, "masked record model is missing or was not asked for"),
        ({"model": good, "more": good}, "masked record more is missing or was not asked for"),
        ({"model": {**good, first: good[first].long()}}, first),
        ({"model": {**good, first: good[first][:1]}}, first),
        ({"model": other}, first),
        ({"model": {**other, f"complex9:{first[8:]}": good[first]}}, "model"),
    ):
        with pytest.raises(InvalidArrays, match=why):
            found.check(bad, built, 1)


def test_masked_records_are_laid_out_as_those_of_the_clients_before() -> None:
    built, found = server("fedavg"), summed()
    built.records = {"model": None}  # a strategy that declares no layout
    like = {"int64:n": whole(9), "float32:w": whole(0, 0, 0).reshape(3, 1)}
    found.check({"model": like}, built, 2)
    for bad in (
        {**like, "float32:w": whole(0, 0, 0)},
        {"int32:n": whole(9), "float32:w": like["float32:w"]},
        {"int64:n": whole(9)},
    ):
        with pytest.raises(InvalidArrays, match="masked model differs from what the clients before sent"):
            found.check({"model": bad}, built, 2)
    fresh = MaskedSums(found.points)
    for bad in ({"float32:w": torch.zeros(3)}, {"foo:w": whole(1)}, {"float32:w": whole(1), "n": whole(1)}):
        with pytest.raises(InvalidArrays, match="masked model differs"):
            fresh.check({"model": bad}, built, 0)
