"""Arrays of clients that lie side by side in memory: summed and looked through for all of them at once.

Clients that are trained abreast share rows of common tensors (`fedfuse.models.replicas`). Sums of groups are made by
the same additions in the same order as one by one, so that bits do not depend on it: by torch of all groups in step, by
compiled loops (`fedfuse.wire.one_pass`) group by group, whose sum then stays in the processor's caches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from fedfuse.wire.one_pass import Loops, fits, patience
from fedfuse.wire.records import Arrays

ROOM = 512 * 2**20  # bytes of sums that are made at once


class Row(dict[str, torch.Tensor]):
    """One client's arrays: row `slot` of each of the `stacks`.

    Attributes
    ----------
    finite : bool
        Whether all numbers were found to be finite when they were looked at last (`look_through`).
    """

    def __init__(self, arrays: Arrays, stacks: Mapping[str, torch.Tensor], slot: int) -> None:
        super().__init__(arrays)
        self.stacks, self.slot, self.finite = stacks, slot, False

    def __deepcopy__(self, memo: Any) -> None:
        """Whoever copies a replica has a model of its own, which is nobody's row."""


def look_through(rows: Sequence[Row]) -> None:
    """Find out which rows are finite, by one question to the device; who is not found to be may be so all the same."""
    for row in rows:
        row.finite = False
    if not rows or any(row.stacks is not rows[0].stacks for row in rows):
        return
    stacks = rows[0].stacks
    slots = [row.slot for row in rows]
    sums = [
        _chosen(stacks[name], slots).reshape(len(rows), -1).sum(1)
        for name, value in rows[0].items()
        if value.is_floating_point()
    ]
    found = torch.stack(sums).sum(0).isfinite().tolist() if sums else [True] * len(rows)
    for row, finite in zip(rows, found, strict=True):
        row.finite = finite


def sums_of(groups: Sequence[Sequence[tuple[Row, float]]]) -> list[Arrays]:
    """Σ wᵢ·xᵢ of each group, in float64, added member by member in order; no group is empty."""
    first = groups[0][0][0]
    size = 8 * max(1, sum(value.numel() for value in first.values()))
    step = max(1, ROOM // size)
    loops = patience.loops(size // 8 * sum(map(len, groups))) if all(fits(first.stacks[n]) for n in first) else None
    add_up = _in_step if loops is None else partial(_row_by_row, loops)
    return [one for k in range(0, len(groups), step) for one in add_up(groups[k : k + step])]


def _row_by_row(loops: Loops, groups: Sequence[Sequence[tuple[Row, float]]]) -> list[Arrays]:
    first = groups[0][0][0]
    sums: list[Arrays] = [{} for _ in groups]
    for name, value in first.items():
        size, rows = value.numel(), first.stacks[name].data_ptr()
        totals = torch.empty(len(groups), *value.shape, dtype=torch.float64)
        for g, group in enumerate(groups):
            at, put = totals.data_ptr() + g * size * 8, loops.store
            for row, weight in group:
                put(at, rows + row.slot * size * 4, size, weight)
                put = loops.add
            sums[g][name] = totals[g]
    return sums


def _in_step(groups: Sequence[Sequence[tuple[Row, float]]]) -> list[Arrays]:
    order = sorted(range(len(groups)), key=lambda g: -len(groups[g]))  # who still has a member is always a front part
    stacks = groups[0][0][0].stacks
    names = list(groups[0][0][0])
    weights = torch.zeros(len(groups[order[0]]), len(groups), dtype=torch.float64)
    for place, g in enumerate(order):
        for member, (_, weight) in enumerate(groups[g]):
            weights[member, place] = weight
    weights = weights.to(stacks[names[0]].device)
    totals: dict[str, torch.Tensor] = {}
    for member, heavy in enumerate(weights.unbind()):
        alive = [g for g in order if len(groups[g]) > member]
        slots = [groups[g][member][0].slot for g in alive]
        for name in names:
            values = _chosen(stacks[name], slots)
            scaled = values.to(torch.float64, copy=True).mul_(heavy[: len(alive)].view(-1, *[1] * (values.ndim - 1)))
            if member == 0:
                totals[name] = scaled
            else:
                totals[name][: len(alive)].add_(scaled)
    rows = {name: total.unbind() for name, total in totals.items()}
    places = {g: place for place, g in enumerate(order)}
    return [{name: rows[name][places[g]] for name in names} for g in range(len(groups))]


def _chosen(stack: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
    """Rows of a stack; a view where they lie at equal distances."""
    step = slots[1] - slots[0] if len(slots) > 1 else 1
    if step > 0 and list(slots) == list(range(slots[0], slots[-1] + 1, step)):
        return stack[slots[0] : slots[-1] + 1 : step]
    return stack.index_select(0, torch.tensor(slots).to(stack.device))
