"""Rows of a stack: their sums are those of one client after the other, to the bit, and what is not finite is found."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfuse.wire import rows
from fedfuse.wire.one_pass import patience
from fedfuse.wire.rows import Row, look_through, sums_of


def stack(clients: int, seed: int = 0) -> list[Row]:
    draw = torch.Generator().manual_seed(seed)
    stacks = {
        "w": torch.randn(clients, 3, 2, generator=draw) * torch.logspace(-3, 3, clients).view(-1, 1, 1),
        "b": torch.randn(clients, generator=draw),
        "seen": torch.arange(clients) + 1,
    }
    return [Row({name: one[k] for name, one in stacks.items()}, stacks, k) for k in range(clients)]


def one_by_one(group: list[tuple[Row, float]]) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for row, weight in group:
        for name, value in row.items():
            scaled = value.double() * weight
            total[name] = total[name] + scaled if name in total else scaled
    return total


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_uneven_groups_are_summed_in_order(data: st.DataObject) -> None:
    clients = stack(9, seed=3)
    order = data.draw(st.permutations(range(9)))
    taken = data.draw(st.integers(1, 9))  # who was lost is in no group
    cuts = sorted(data.draw(st.sets(st.integers(1, taken), max_size=3)) | {taken})
    groups, at = [], 0
    for cut in cuts:
        groups.append([(clients[k], 0.3 + k) for k in order[at:cut]])
        at = cut
    for group, got in zip(groups, sums_of(groups), strict=True):
        wanted = one_by_one(group)
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            assert torch.equal(got[name], value), name


@pytest.mark.parametrize("left", [0, 100, 2**60])
def test_compiled_loops_add_rows_as_torch_does(left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "left", left)
    clients = stack(9, seed=5)
    for row in clients:
        del row["seen"]
    groups = [[(clients[k], 0.3 + k) for k in part] for part in ((4, 0, 8), (2,), (3, 1, 7, 5))]
    for _ in range(3):
        for group, got in zip(groups, sums_of(groups), strict=True):
            wanted = one_by_one(group)
            assert got.keys() == wanted.keys()
            assert all(torch.equal(got[name], value) for name, value in wanted.items())


def test_little_room_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    clients = stack(8)
    groups = [[(clients[k], k + 0.1) for k in part] for part in ((5, 0), (7,), (1, 2, 3), (6, 4))]
    wanted = sums_of(groups)
    monkeypatch.setattr(rows, "ROOM", 1)
    for one, other in zip(wanted, sums_of(groups), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_who_is_not_finite_is_found_and_nobody_else(value: float) -> None:
    clients = stack(5)
    clients[3]["w"][1, 1] = value
    look_through([clients[k] for k in (4, 3, 0)])
    assert [row.finite for row in clients] == [True, False, False, False, True]
    clients[3]["w"][1, 1] = 0.0
    look_through(clients)
    assert all(row.finite for row in clients)


def test_opposite_infinities_do_not_cancel() -> None:
    clients = stack(2)
    clients[1]["w"][0] = torch.tensor([float("inf"), -float("inf")])
    look_through(clients)
    assert [row.finite for row in clients] == [True, False]


def test_rows_of_two_stacks_are_not_said_to_be_finite() -> None:
    mixed = [stack(2)[0], stack(2)[1]]
    look_through(mixed)
    assert [row.finite for row in mixed] == [False, False]


def test_a_copy_of_a_row_is_nobodys() -> None:
    assert copy.deepcopy(stack(2)[1]) is None


def test_whole_numbers_are_always_finite() -> None:
    stacks = {"seen": torch.tensor([3, 1])}
    clients = [Row({"seen": stacks["seen"][k]}, stacks, k) for k in range(2)]
    look_through(clients)
    assert [row.finite for row in clients] == [True, True]
