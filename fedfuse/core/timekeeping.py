"""What virtual time leaves behind: rows of `schedule.parquet`, their hash, and what was for nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from fedfuse.clock.world import ARRIVED, Flight, World

Row = tuple[int, int, str, str, int, int, int, int, int, int, float, int, int, int, float | None]


@dataclass
class Timekeeping:
    """The flights that have ended.

    Attributes
    ----------
    rows : list
        This round's: round, client, phase, outcome, attempt, since (the round whose message it carried), start,
        received, computed and end in nanoseconds, weight, bytes down and up, FLOPs, joules.
    chain : str
        Hash of all rows so far.
    totals : dict
        Flights by outcome; bytes, FLOPs and seconds of what arrived, and of what was for nothing.
    """

    world: World
    rows: list[Row] = field(default_factory=list)
    chain: str = ""
    totals: dict[str, float] = field(default_factory=dict)

    def note(self, round: int, phase: str, flights: Iterable[Flight], weights: dict[int, float] | None = None) -> None:
        """Write flights down that ended in a round."""
        for flight in sorted(flights):
            weight = (weights or {}).get(flight.client, 1.0) if flight.outcome == ARRIVED else 0.0
            joules = self.world.joules(flight)
            row = (
                round, flight.client, phase, flight.outcome, flight.attempt, flight.round, flight.start,
                flight.received, flight.computed, flight.end, weight, flight.down, flight.up, flight.flops, joules,
            )  # fmt: skip
            self.rows.append(row)
            self.chain = hashlib.sha256(f"{self.chain}{row!r}".encode()).hexdigest()
            self._add(flight, joules)

    def _add(self, flight: Flight, joules: float | None) -> None:
        use = "useful" if flight.outcome == ARRIVED else "wasted"
        amounts: dict[str, float] = {
            f"flights/{flight.outcome}": 1,
            f"{use}/down_bytes": flight.down,
            f"{use}/up_bytes": flight.up,
            f"{use}/flops": flight.flops,
            f"{use}/busy_ns": flight.end - flight.start,
        }
        if joules is not None:
            amounts["joules"] = joules
        for key, amount in amounts.items():
            self.totals[key] = self.totals.get(key, 0) + amount

    def summary(self, now: int) -> dict[str, Any]:
        """What `summary.json` says of time."""
        t = self.totals
        told: dict[str, Any] = {
            "seconds": now / 1e9,
            "flights": {key.partition("/")[2]: int(v) for key, v in sorted(t.items()) if key.startswith("flights/")},
            "wasted_bytes": int(t.get("wasted/down_bytes", 0) + t.get("wasted/up_bytes", 0)),
            "wasted_flops": int(t.get("wasted/flops", 0)),
            "wasted_s": t.get("wasted/busy_ns", 0) / 1e9,
            "busy_s": (t.get("wasted/busy_ns", 0) + t.get("useful/busy_ns", 0)) / 1e9,
        }
        return told | ({"joules": t["joules"]} if "joules" in t else {})
