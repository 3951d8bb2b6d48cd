"""Counted bytes: what training needed, apart from set-up, evaluation and re-sending.

Rules: array payload, logical per client, each (client, topic, version) once. A version that an evaluation happened to
deliver first is charged to training when training needs it, at what it costs without evaluations, so that
`evaluate.every` changes no training figure. All rows add up to what was really put into messages, or to more:
evaluations bring a value that grows in increments, which may be smaller together than the snapshot that is charged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from fedfuse.wire.knowledge import Address, Board, Parcel

Row = tuple[int, int, str, str, str, int]  # round, client, direction, message, record, bytes


_TOTALS = {"setup": "setup_bytes", "resend": "resent_bytes"}


@dataclass
class Traffic:
    """Rows of this round, totals of the run, and evaluation deliveries that training may still need."""

    rows: list[Row] = field(default_factory=list)
    totals: Counter[str] = field(default_factory=Counter)
    used: dict[tuple[int, Address], int] = field(default_factory=dict)  # version training last had
    pending: dict[tuple[int, Address], list[tuple[int, int]]] = field(default_factory=dict)  # (round, bytes)
    distinct: dict[tuple[Address, bool], int] = field(default_factory=dict)

    def _row(self, round: int, client: int, direction: str, message: str, record: str, size: int) -> None:
        if size:
            self.rows.append((round, client, direction, message, record, size))
            key = f"{direction}_bytes" if message == "train" else _TOTALS.get(message, f"evaluate_{direction}_bytes")
            self.totals[key] += size

    def down(
        self,
        message: str,
        round: int,
        client: int,
        needed: Iterable[Address],
        parcels: list[Parcel],
        board: Board,
    ) -> None:
        """Charge one message to a client; `needed` is everything on the board that is meant for it."""
        sent: dict[Address, int] = {}
        for parcel in parcels:
            sent[parcel.address] = sent.get(parcel.address, 0) + parcel.nbytes
        if message == "evaluate":
            for address, size in sent.items():
                self.pending.setdefault((client, address), []).append((round, size))
            return
        for address in needed:
            key, version = (client, address), board.items[address].version
            label = "setup" if board.topics[address[0]].once else message
            have = self.used.get(key, -1)
            if have >= version:
                self._row(round, client, "down", "resend", address[0], sent.get(address, 0))
                continue
            path = board.path(address, have)
            earlier = self.pending.pop(key, [])
            carried = sent.get(address, 0) + sum(size for _, size in earlier)
            charged = sum(step.nbytes for step in path)  # more than was carried, where evaluations found a shorter way
            self._row(round, client, "down", label, address[0], charged)
            rest = max(0, carried - charged)
            for when, size in earlier:  # what evaluation carried beyond training's need stays evaluation's
                self._row(when, client, "down", "evaluate", address[0], min(size, rest))
                rest -= min(size, rest)
            self._row(round, client, "down", "resend", address[0], rest)
            self.used[key] = version
            for step in path:
                kind = (address, step.since < 0)
                if self.distinct.get(kind, -1) < step.version:
                    self.distinct[kind] = step.version
                    if label == "train":
                        self.totals["down_unique_bytes"] += step.nbytes

    def up(self, message: str, round: int, client: int, record: str, size: int) -> None:
        """Charge one record of a reply."""
        self._row(round, client, "up", message, record, size)

    def beside(self, message: str, round: int, client: int, direction: str, record: str, size: int) -> None:
        """Charge what is no array and needed all the same, as the keys and shares of secure sums."""
        self._row(round, client, direction, message, record, size)

    def resent(self, round: int, client: int, parcels: Iterable[Parcel]) -> None:
        """Charge a message that had to be sent again."""
        for parcel in parcels:
            self._row(round, client, "down", "resend", parcel.topic, parcel.nbytes)

    def take_rows(self) -> list[Row]:
        """Hand over this round's rows."""
        rows, self.rows = self.rows, []
        return rows

    def settle(self) -> None:
        """End of the run: evaluation deliveries that training never needed are evaluation's.

        No checkpoint follows: a run that goes on for more rounds may need them yet.
        """
        for (client, (topic, _)), pieces in sorted(self.pending.items()):
            for round, size in pieces:
                self._row(round, client, "down", "evaluate", topic, size)
        self.pending.clear()

    def summary(self) -> dict[str, int]:
        """Totals as `summary.json` has them."""
        names = ("up_bytes", "down_bytes", "down_unique_bytes", "setup_bytes")
        more = ("evaluate_up_bytes", "evaluate_down_bytes", "resent_bytes")
        return {name: int(self.totals[name]) for name in names + more}

    # -- checkpoint ----------------------------------------------------------------------------------------

    def saved(self) -> dict[str, Any]:
        """Plain lists for a checkpoint (rows are stored with the round they belong to)."""
        return {
            "totals": dict(self.totals),
            "used": [[c, t, to, v] for (c, (t, to)), v in self.used.items()],
            "pending": [[c, t, to, [list(p) for p in pieces]] for (c, (t, to)), pieces in self.pending.items()],
            "distinct": [[t, to, whole, v] for ((t, to), whole), v in self.distinct.items()],
        }

    @classmethod
    def restored(cls, saved: dict[str, Any]) -> Traffic:
        """Undo `saved`."""
        return cls(
            [],
            Counter(saved["totals"]),
            {(c, (t, to)): v for c, t, to, v in saved["used"]},
            {(c, (t, to)): [(r, s) for r, s in pieces] for c, t, to, pieces in saved["pending"]},
            {((t, to), whole): v for t, to, whole, v in saved["distinct"]},
        )
