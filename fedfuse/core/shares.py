"""What clients share in a phase: checked against what their strategy declares, streamed, summed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fedfuse.core.workspace import Workspace
from fedfuse.errors import UserError, WorldError
from fedfuse.train.classwise import mean_over_holders
from fedfuse.wire.records import Arrays, InvalidArrays, validate
from fedfuse.wire.sums import Sum

if TYPE_CHECKING:
    from fedfuse.core.strategy import FusionStrategy

Metrics = dict[str, float | int]
Records = dict[str, Arrays]

STALE, REFUSED, FAILED, INVALID, FULL, SPOILT = range(1001, 1007)  # codes of error replies


def nobody(round: int, phase: str, left_out: Sequence[str]) -> WorldError:
    """What a phase ends with in which no client succeeded, and why the first did not."""
    return WorldError(f"round {round}, {phase}: no client succeeded{': ' + left_out[0] if left_out else ''}")


@dataclass(frozen=True)
class Share:
    """What one client shared in a phase: valid records and metrics. Records that `sums` declares are not here."""

    client: int
    records: Records
    metrics: Mapping[str, Any]
    group: int = 0  # of the cohort's, within which clients are summed first
    weight: float = 1.0  # what it counts for beside others, s(staleness); in `sums` already

    @property
    def examples(self) -> int:
        """The client's training examples, as it says."""
        return int(self.metrics["num-examples"])


class Shares(Iterable[Share]):
    """A round's shares, in client order, streamed as they arrive; and the weighted sums that `sums` declares."""

    def __init__(self, stream: Iterator[Share], sums: Mapping[str, Sum]) -> None:
        self._stream, self._sums = stream, sums

    def __iter__(self) -> Iterator[Share]:
        return self._stream

    def mean(self, record: str) -> Arrays:
        """Weighted mean Σ wᵢ·xᵢ / Σ wᵢ of a record declared in `sums`, summed in float64 in fixed groups."""
        return self._sum(record).mean()

    def total(self, record: str) -> tuple[Arrays, float]:
        """Σ wᵢ·xᵢ in float64, and Σ wᵢ."""
        return self._sum(record).total()

    def _sum(self, record: str) -> Sum:
        if record not in self._sums:
            raise UserError(
                f"record {record!r} is no sum: declare sums = {{{record!r}: 'num-examples'}} (or None: all alike) "
                "in the strategy's class, or take it from each share"
            )
        for _ in self._stream:
            pass
        return self._sums[record]

    def averaged(self, record: str, parts: Iterable[tuple[Share, Arrays, float]]) -> Arrays:
        """Weighted mean of arrays made from single shares of a record, in float64, client order and fixed groups."""
        total = Sum()
        for share, arrays, weight in parts:
            total.add(share.group, arrays, weight)
        return total.mean()

    def over_holders(self, record: str, values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Class by class, the weighted mean over the clients that hold the class, and which classes are held.

        Parameters
        ----------
        record : str
            Where the values came in.
        values, weights
            (N, C, d) and (N, C), of the clients in the order of their shares: see `classwise.mean_over_holders`.
        """
        return mean_over_holders(values, weights)


def declared(server: FusionStrategy | type[FusionStrategy], phase: str) -> Mapping[str, Any]:
    """The records that clients share in a phase, each with its layout: `records`, or `records_<phase>`."""
    found: Mapping[str, Any] = server.records if phase == "train" else getattr(server, f"records_{phase}", {})
    return found


def check_share(
    server: type[FusionStrategy],
    hyper: Any,
    workspace: Workspace,
    client: int,
    phase: str,
    records: Records,
    metrics: Mapping[str, Any],
    summed: set[str] | frozenset[str] = frozenset(),
) -> None:
    """Check what a client shared against what its strategy declares; run beside the client or at the server.

    Raises
    ------
    InvalidArrays
        Naming the record or metric and what is wrong.
    """
    wanted = declared(server, phase)
    scope = workspace.scope(client, hyper)
    if missing := [name for name in wanted if name not in records and name not in summed]:
        raise InvalidArrays(f"missing record {', '.join(sorted(missing))}")
    if extra := sorted(records.keys() - wanted.keys()):
        raise InvalidArrays(f"unexpected record {', '.join(extra)}")
    for name, content in records.items():
        spec = wanted[name]
        validate(name, content, spec(scope) if spec is not None else None)
    server.examine(scope, records)
    examples = metrics.get("num-examples")
    if not isinstance(examples, int | float) or not 0 <= examples < 2**53:
        raise InvalidArrays(f"num-examples is {examples!r}; a count is needed")
    for name, (least, most) in server.metrics.items() if phase == "train" else ():
        value = metrics.get(name)
        if not isinstance(value, int | float) or not least <= value <= most:
            raise InvalidArrays(f"metric {name} is {value!r:.40}; a number from {least:g} to {most:g} is needed")
    if isinstance(metrics.get("seconds"), list):
        raise InvalidArrays("metric seconds is a list; a number is needed")
    for key, value in metrics.items():
        for number in value if isinstance(value, list) else [value]:
            if key != "loss" and number != number:
                raise InvalidArrays(f"metric {key} is not a number")
