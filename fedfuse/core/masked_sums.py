"""What clients sent masked, added up as it comes: the server holds one running sum and no client's own numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedfuse.core.shares import declared
from fedfuse.errors import WorldError
from fedfuse.wire.fixed_point import FixedPoint
from fedfuse.wire.group_sums import MASKED, Sums, weight_of
from fedfuse.wire.records import Arrays, InvalidArrays, Layout, arrays_in, layout_of, tensors, validate
from fedfuse.wire.sums import Sum

if TYPE_CHECKING:
    from flwr.app import Message

    from fedfuse.core.strategy import FusionStrategy

Records = Mapping[str, Arrays]


Place = tuple[str, str, tuple[int, ...], int]  # record, array, shape, and where it begins in the vector


def masked(records: Records) -> tuple[np.ndarray, list[Place]]:
    """Records' whole numbers modulo 2³² in one vector, and where each array lies in it, in the records' own order.

    In the vector they lie by name, so that all clients' masks cancel whatever order each has its arrays in.
    """
    starts, pieces, start = {}, [], 0  # type: dict[tuple[str, str], int], list[np.ndarray], int
    for name, key in sorted((name, key) for name, arrays in records.items() for key in arrays):
        starts[name, key] = start
        pieces.append(records[name][key].reshape(-1).to(torch.int64).numpy())
        start += len(pieces[-1])
    places = [
        (name, key, tuple(value.shape), starts[name, key])
        for name, arrays in records.items()
        for key, value in arrays.items()
    ]
    return (np.concatenate(pieces) if pieces else np.zeros(0, np.int64)).astype(np.uint32), places


def placed(vector: np.ndarray, places: list[Place]) -> dict[str, Arrays]:
    """Undo `masked`; as signed numbers of 32 bits, which is what they are modulo 2³²."""
    out, signed = {}, torch.from_numpy(vector.view(np.int32))  # type: dict[str, Arrays], torch.Tensor
    for name, key, shape, start in places:
        out.setdefault(name, {})[key] = signed[start : start + int(np.prod(shape, dtype=np.int64))].reshape(shape)
    return out


class MaskedSums:
    """The sum modulo 2³² of what the clients of a phase sent masked.

    Parameters
    ----------
    points : dict of str to FixedPoint
        The records that are masked.
    """

    def __init__(self, points: Mapping[str, FixedPoint]) -> None:
        self.points = points
        self.vector = np.zeros(0, np.uint32)
        self._layouts: dict[str, Layout] = {}
        self._places: list[Place] = []
        self._weights = dict.fromkeys(points, 0.0)
        self._clients = 0

    def check(self, records: Records, strategy: FusionStrategy, client: int) -> None:
        """Refuse a reply whose masked records are not laid out as its strategy declares: names, shapes, dtypes.

        Raises
        ------
        InvalidArrays
            Naming the record and what is wrong.
        """
        if missing := sorted(self.points.keys() ^ records.keys()):
            raise InvalidArrays(f"masked record {missing[0]} is missing or was not asked for")
        phase = strategy.phase
        specs = declared(strategy, phase)
        scope = strategy.workspace.scope(client, strategy.hyper)
        for name, arrays in records.items():
            spec = specs[name]
            layout = (
                None if spec is None else {f"{dtype}:{key}": ("int32", s) for key, (dtype, s) in spec(scope).items()}
            )
            validate(name, arrays, layout)
            if layout_of(arrays) != self._layouts.get(name, layout_of(arrays)) or any(
                dtype != "int32" or not isinstance(getattr(torch, key.partition(":")[0], None), torch.dtype)
                for key, (dtype, _) in layout_of(arrays).items()
            ):
                raise InvalidArrays(f"masked {name} differs from what the clients before sent in name, shape or dtype")

    def add(self, client: int, records: Records, metrics: Mapping[str, Any], sums: Sums) -> dict[str, int]:
        """Add a checked reply, and say how many bytes each record had."""
        weights = {name: weight_of(sums[name], metrics) for name in records}
        for name, weight in weights.items():
            self.points[name].check(weight)
        self._layouts = {name: layout_of(arrays) for name, arrays in records.items()}
        vector, places = masked(records)
        self._places = self._places or places  # the first client's order, as `Sum` has it
        self.vector = self.vector + vector if self._clients else vector
        self._clients += 1
        for name, weight in weights.items():
            self._weights[name] += weight
        return {name: sum(value.numel() * 4 for value in arrays.values()) for name, arrays in records.items()}

    def hand_over(self, vector: np.ndarray, totals: Mapping[str, Sum]) -> None:
        """Put the unmasked sum where the strategy finds it.

        Raises
        ------
        WorldError
            If it is larger than its clients' numbers can add up to: some client's masks were not what it said.
        """
        for name, arrays in placed(vector, self._places).items():
            parts = {key.partition(":")[2]: value.to(torch.float64) for key, value in arrays.items()}
            # no more than this is a sum of numbers that were clipped and weighted, each rounded: a mean within ±c
            point = self.points[name]
            most = self._weights[name] / point.heaviest * point.levels / 2 + self._clients
            if any(bool((value.abs() > most).any()) for value in parts.values()):
                raise WorldError(f"{name}: the masks of {self._clients} clients do not cancel, or one sent too much")
            dtypes = {key.partition(":")[2]: key.partition(":")[0] for key in arrays}
            totals[name].add_group(0, parts, self._weights[name], dtypes)


def masked_in(reply: Message) -> dict[str, Arrays]:
    """A reply's masked records."""
    found = arrays_in(reply.content)
    return {name.removeprefix(MASKED): tensors(value) for name, value in found.items() if name.startswith(MASKED)}
