"""Weighted sums: the same bits whoever adds the groups up, and nothing broadcast by accident."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfuse.wire.group_sums import add_up, kept_back, weight_of
from fedfuse.wire.records import InvalidArrays, sha_arrays
from fedfuse.wire.sums import GROUP, Sum


def arrays(seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    scale = 10.0 ** torch.randint(-12, 12, (5,), generator=draw)  # far apart, so that the order of adding shows
    return {"w": torch.randn(5, generator=draw) * scale, "n": torch.randint(0, 100, (), generator=draw)}


def one_by_one(cohort: list[int], weights: list[float], missing: set[int]) -> Sum:
    total = Sum()
    for i, client in enumerate(cohort):
        if client not in missing:
            total.add(i // GROUP, arrays(client), weights[i])
    return total


def by_groups(cohort: list[int], weights: list[float], missing: set[int], presummed: set[int]) -> Sum:
    """Some groups are added up beside their clients, as an actor does, and arrive as one."""
    total = Sum()
    for group in range(-(-len(cohort) // GROUP)):
        members = [(i, cohort[i]) for i in range(group * GROUP, min(len(cohort), (group + 1) * GROUP))]
        members = [(i, c) for i, c in members if c not in missing]
        if group in presummed and members:
            beside = Sum()
            for i, client in members:
                beside.add(0, arrays(client), weights[i])
            value, weight = beside.group()
            dtypes = {k: str(v).removeprefix("torch.") for k, v in beside.dtypes.items()}
            total.add_group(group, value, weight, dtypes)
        else:
            for i, client in members:
                total.add(group, arrays(client), weights[i])
    return total


@given(
    st.integers(1, 30),
    st.sets(st.integers(0, 29), max_size=12),
    st.sets(st.integers(0, 3)),
    st.lists(st.integers(1, 500), min_size=30, max_size=30),
)
@settings(max_examples=80, deadline=None)
def test_equal_bits_however_groups_are_delivered(size, missing, presummed, weights) -> None:
    cohort = list(range(size))
    if not set(cohort) - missing:
        return
    expected = one_by_one(cohort, weights, missing).mean()
    assert sha_arrays(by_groups(cohort, weights, missing, presummed).mean()) == sha_arrays(expected)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=20))
@settings(max_examples=40, deadline=None)
def test_the_mean_is_the_weighted_mean(weights) -> None:
    total = one_by_one(list(range(len(weights))), weights, set())
    exact = sum(w * arrays(i)["w"].double() for i, w in enumerate(weights)) / sum(weights)
    scale = sum(w * arrays(i)["w"].double().abs() for i, w in enumerate(weights)) / sum(weights)
    assert bool(((total.mean()["w"].double() - exact).abs() <= 1e-6 * scale).all())
    value, weight = total.total()
    assert weight == sum(weights)
    assert value["w"].dtype == torch.float64


def test_groups_are_of_eight() -> None:
    """2⁵³ + 1 is 2⁵³ in float64: what clients 8 and 9 say counts only where they are added to each other first."""
    said = [2.0**53, *[0.0] * 7, 1.0, 1.0]
    total = Sum()
    for i, value in enumerate(said):
        total.add(i // GROUP, {"w": torch.tensor([value], dtype=torch.float64)}, 1.0)
    assert total.total()[0]["w"].item() == 2.0**53 + 2


def test_the_mean_of_one_is_itself_bit_for_bit() -> None:
    total = Sum()
    total.add(0, arrays(3), 137)
    assert sha_arrays(total.mean()) == sha_arrays(arrays(3))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float64, torch.float16])
def test_dtypes_are_kept(dtype: torch.dtype) -> None:
    total = Sum()
    total.add(0, {"n": torch.tensor([0, 1, 1]).to(dtype)}, 1)
    total.add(0, {"n": torch.tensor([0, 1, 0]).to(dtype)}, 2)
    mean = total.mean()["n"]
    assert mean.dtype == dtype
    if not dtype.is_floating_point:
        assert mean.tolist() == torch.tensor([0, 1, 0]).to(dtype).tolist()  # 1/3 rounds to 0


def test_batch_counters_are_averaged_and_rounded() -> None:
    total = Sum()
    for count, weight in ((10, 1.0), (13, 1.0)):
        total.add(0, {"num_batches_tracked": torch.tensor(count)}, weight)
    mean = total.mean()["num_batches_tracked"]
    assert (mean.dtype, mean.item()) == (torch.int64, 12)


def test_members_missing_leave_the_grouping() -> None:
    """A client that is left out leaves sum and weight, and moves nobody into another group."""
    cohort = list(range(20))
    weights = [float(i + 1) for i in cohort]
    total = one_by_one(cohort, weights, {0, 9, 10})
    assert total.total()[1] == sum(w for c, w in zip(cohort, weights, strict=True) if c not in {0, 9, 10})


def test_a_sum_is_not_written_to_by_whoever_looks_at_it() -> None:
    value = arrays(1)
    before = {k: v.clone() for k, v in value.items()}
    total = Sum()
    total.add(0, value, 2.0)
    total.add(0, arrays(2), 2.0)
    total.add(1, value, 2.0)
    first = total.mean()
    assert sha_arrays(value) == sha_arrays(before)
    assert sha_arrays(first) == sha_arrays(total.mean())


def test_a_group_that_came_in_a_message_is_not_written_to() -> None:
    """It lies in the message's memory: the groups after it are added to a copy."""
    first, second = ({"w": torch.tensor([value, 2.0], dtype=torch.float64)} for value in (1.0, 5.0))
    total = Sum()
    total.add_group(0, first, 3.0, {"w": "float32"})
    total.add_group(1, second, 4.0, {"w": "float32"})
    assert total.total()[0]["w"].tolist() == [6.0, 4.0]
    assert total.total()[1] == 7.0
    assert (first["w"].tolist(), second["w"].tolist()) == ([1.0, 2.0], [5.0, 2.0])


def test_what_a_record_weighs() -> None:
    assert weight_of(None, {}) == weight_of(None, {"num-examples": 7}) == 1.0
    assert weight_of(None, {"num-examples": 0}) == 0.0  # who has no examples has nothing to say
    assert weight_of("steps", {"steps": 2.5, "num-examples": 7}) == 2.5
    for said in ({"num-examples": 7}, {"steps": "2"}):
        with pytest.raises(InvalidArrays, match=r"metric steps is .*; it is a weight"):
            weight_of("steps", said)


def test_what_is_only_summed_moves_into_the_totals() -> None:
    records = {name: {"w": torch.tensor([2.0])} for name in ("model", "core", "own")}
    totals = {"model": Sum(), "core": Sum(), "absent": Sum()}
    sums = {"model": "num-examples", "core": None, "absent": None}
    add_up(records, {"num-examples": 5}, 0, totals, sums, scale=0.5)
    assert set(records) == {"own"}
    assert {name: total.total()[1] for name, total in totals.items()} == {"model": 2.5, "core": 0.5, "absent": 0.0}
    assert totals["model"].total()[0]["w"].item() == 5.0
    records = {"model": {"w": torch.tensor([4.0])}}
    add_up(records, {"num-examples": 3}, 1, totals, sums)
    assert (totals["model"].total()[0]["w"].item(), totals["model"].total()[1]) == (17.0, 5.5)


def test_what_was_summed_beside_its_client_is_told_with_its_bytes() -> None:
    assert kept_back({"summed.record": ["a", "b"], "summed.bytes": [8, 12]}) == {"a": 8, "b": 12}
    assert kept_back({}) == {}
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        kept_back({"summed.record": ["a", "b"], "summed.bytes": [8]})


def test_groups_must_come_in_order() -> None:
    total = Sum()
    total.add(1, arrays(1), 1)
    with pytest.raises(ValueError, match="group 0 after group 1"):
        total.add(0, arrays(0), 1)


def test_no_weight_no_mean() -> None:
    with pytest.raises(ValueError, match="positive total weight"):
        Sum().mean()
    total = Sum()
    total.add(0, arrays(1), 0.0)
    with pytest.raises(ValueError, match="positive total weight"):
        total.mean()


@pytest.mark.parametrize(
    "other",
    [
        {"w": torch.zeros(1), "n": torch.tensor(1)},  # would broadcast
        {"w": torch.zeros(2, 5), "n": torch.tensor(1)},
        {"w": torch.zeros(5)},
        {"w": torch.zeros(5), "n": torch.tensor(1), "x": torch.zeros(1)},
        {"w": torch.zeros(5, dtype=torch.float64), "n": torch.tensor(1)},
    ],
)
@pytest.mark.parametrize("group", [0, 1])
def test_other_layouts_do_not_enter(other, group: int) -> None:
    total = Sum()
    total.add(0, arrays(1), 1)
    with pytest.raises(InvalidArrays, match="differ from those of the clients before"):
        total.add(group, other, 1)
    assert sha_arrays(total.mean()) == sha_arrays(arrays(1))


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_strange_weights_do_not_enter(weight: float) -> None:
    total = Sum()
    total.add(0, arrays(1), 1)
    with pytest.raises(InvalidArrays, match="weight"):
        total.add(0, arrays(2), weight)
    assert sha_arrays(total.mean()) == sha_arrays(arrays(1))


@pytest.mark.parametrize("size", [(), (7,), (2 * 32768 + 5,), (300, 300)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("weight", [1.0, 17.0, 2.0**29 - 1, 2.0**29 + 1, 2.0**40 + 1, 0.1])
def test_products_and_sums_are_rounded_apart(size: tuple[int, ...], dtype: torch.dtype, weight: float) -> None:
    """Also where the product and the sum are one instruction: it is used only where the product is exact."""
    draw = torch.Generator().manual_seed(0)
    first, second = ((torch.randn(size, generator=draw) * 1e4).to(dtype) for _ in range(2))
    total = Sum()
    total.add(0, {"w": first}, 3.0)
    total.add(0, {"w": second}, weight)
    product = second.double() * weight
    assert torch.equal(total.group()[0]["w"], first.double() * 3.0 + product)
    turned = Sum()  # transposed: not contiguous
    turned.add(0, {"w": first.t() if first.dim() == 2 else first}, 3.0)
    turned.add(0, {"w": second.t() if second.dim() == 2 else second}, weight)
    other = turned.group()[0]["w"]
    assert torch.equal(other.t() if other.dim() == 2 else other, total.group()[0]["w"])
