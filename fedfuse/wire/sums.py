"""Weighted sums over a cohort: float64, in client order within groups fixed by the cohort, groups in order.

The same groups are used everywhere, so one worker, many workers and a network server give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from fedfuse.wire.fixed_point import BITS, FixedPoint
from fedfuse.wire.one_pass import add_scaled, scaled
from fedfuse.wire.records import Arrays, InvalidArrays, Layout, layout_of, nbytes
from fedfuse.wire.rows import Row, sums_of

GROUP = 8  # clients summed together, in one actor where there are actors


class Sum:
    """Σ wᵢ·xᵢ and Σ wᵢ of one record over a cohort, holding one group and the groups before it, added up.

    Clients and groups must come in order: they do, since replies are streamed in client order.

    Parameters
    ----------
    fixed : FixedPoint or None
        Sum whole numbers of its steps (secure aggregation): groups then hold these.
    """

    def __init__(self, fixed: FixedPoint | None = None) -> None:
        self.fixed = fixed
        self.dtypes: dict[str, torch.dtype] = {}
        self._layout: Layout = {}
        self._group, self._current, self._weight = -1, {}, 0.0  # type: int, Arrays, float
        self._total: Arrays = {}
        self._weights = 0.0
        self._rows: list[tuple[Row, float]] = []  # of the open group, if all that was added to it lies side by side

    def add(self, group: int, arrays: Arrays, weight: float) -> None:
        """Add one client's arrays.

        Raises
        ------
        InvalidArrays
            If they are laid out otherwise than those before, or the weight is negative or not finite.
        """
        self.check(arrays, weight)
        if group != self._group:
            self._open(group, {name: str(value.dtype).removeprefix("torch.") for name, value in arrays.items()})
            if isinstance(arrays, Row) and self.fixed is None:
                self._rows, self._weight = [(arrays, weight)], weight
                return
            self._current = {name: self._scaled(value, weight) for name, value in arrays.items()}
            self._weight = weight
            return
        if self._rows and isinstance(arrays, Row) and arrays.stacks is self._rows[0][0].stacks:
            self._rows.append((arrays, weight))
            self._weight += weight
            return
        settle([self])
        for name, value in arrays.items():
            if self.fixed is not None:
                self._current[name].add_(self._scaled(value, weight))
            else:
                add_scaled(self._current[name], value, weight)
        self._weight += weight

    def _scaled(self, value: torch.Tensor, weight: float) -> torch.Tensor:
        if self.fixed is not None:
            return self.fixed.quantised(value.cpu(), weight)
        return scaled(value, weight)

    def check(self, arrays: Arrays, weight: float) -> None:
        """Refuse what cannot be added: an addition would broadcast other shapes without a word."""
        if not 0 <= weight < math.inf:
            raise InvalidArrays(f"weight {weight}; at least 0 is needed")
        if self.fixed is not None:
            self.fixed.check(weight)
        layout = layout_of(arrays)
        if self._layout and layout != self._layout:
            raise InvalidArrays("arrays to be summed differ from those of the clients before in name, shape or dtype")
        self._layout = layout

    def add_group(self, group: int, arrays: Arrays, weight: float, dtypes: Mapping[str, str]) -> None:
        """Add a whole group that was summed beside its clients; its arrays are not needed any longer then."""
        self._open(group, dtypes)
        self._add_up(arrays, weight, lent=True)

    def _open(self, group: int, dtypes: Mapping[str, str]) -> None:
        if group < self._group:
            raise ValueError(f"group {group} after group {self._group}: sums need client order")
        self.dtypes.update({name: getattr(torch, text) for name, text in dtypes.items()})
        self._close()
        self._group = group

    def _close(self) -> None:
        settle([self])
        self._add_up(self._current, self._weight)
        self._current, self._weight = {}, 0.0

    def _add_up(self, arrays: Arrays, weight: float, lent: bool = False) -> None:
        for name, value in arrays.items():
            if name in self._total:
                self._total[name].add_(value.to(self._total[name].device))
            else:
                self._total[name] = value.clone() if lent else value
        self._weights += weight

    def group(self) -> tuple[Arrays, float]:
        """The open group's sum and weight, to be sent in place of its members' arrays."""
        settle([self])
        return self._current, self._weight

    def total(self) -> tuple[Arrays, float]:
        """Σ wᵢ·xᵢ in float64, and Σ wᵢ."""
        self._close()
        if self.fixed is not None:
            steps = {name: self.fixed.step(self.dtypes[name]) for name in self._total}
            return {name: value * steps[name] for name, value in self._total.items()}, self._weights
        return {name: value.cpu() for name, value in self._total.items()}, self._weights  # if it was summed on a GPU

    @property
    def pending(self) -> list[tuple[Row, float]]:
        """What was added to the open group and lies side by side, not yet added up."""
        return self._rows

    def settled(self, arrays: Arrays) -> None:
        """Take the sum of what was `pending`."""
        self._current, self._rows = arrays, []

    def nbytes(self, arrays: Arrays) -> int:
        """A client's payload as it travels."""
        if self.fixed is not None:
            return sum(value.numel() for value in arrays.values()) * (BITS // 8)
        return nbytes(arrays)

    def mean(self) -> Arrays:
        """Divide once and cast once; integer buffers keep their dtype, rounded.

        Raises
        ------
        ValueError
            If all weights are 0.
        """
        self._close()
        total, weight = (self._total, self._weights) if self.fixed is None else self.total()
        if weight <= 0:
            raise ValueError("a weighted mean needs a positive total weight")
        out: Arrays = {}
        for name, value in total.items():  # on a GPU where it was summed there
            dtype = self.dtypes[name]
            quotient = value / weight
            out[name] = (quotient if dtype.is_floating_point else quotient.round()).to(dtype).cpu()
        return out


def settle(sums: Iterable[Sum]) -> None:
    """Add up what is pending, of all sums at once whose rows lie side by side."""
    found: dict[int, list[Sum]] = {}
    for one in sums:
        if one.pending:
            found.setdefault(id(one.pending[0][0].stacks), []).append(one)
    for some in found.values():
        for one, arrays in zip(some, sums_of([one.pending for one in some]), strict=True):
            one.settled(arrays)
