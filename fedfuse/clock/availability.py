"""When a device is on: sorted disjoint intervals that repeat with a period, found by bisection.

Every answer is computed from the moment asked for; nothing is remembered from one question to the next, so neither the
order of questions nor a long jump in time changes an answer.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedfuse.clock import fedscale
from fedfuse.clock.draws import exponential, nanoseconds, uniform
from fedfuse.clock.tables import numbers
from fedfuse.config.clock_keys import ClockConfig
from fedfuse.errors import UserError

Span = tuple[int, int]  # on from the first, off from the second, nanoseconds


@dataclass(frozen=True)
class Intervals:
    """One client's on intervals within a period, which repeats for ever.

    Parameters
    ----------
    spans : sequence of (on, off)
        Sorted, disjoint, not touching, within [0, period].
    period : int
        Nanoseconds; 0: always on.
    """

    spans: tuple[Span, ...] = ()
    period: int = 0

    @property
    def always(self) -> bool:
        """Whether it is never off."""
        return self.period == 0 or self.spans == ((0, self.period),)

    def on(self, at: int) -> bool:
        """Whether the device is on at a moment."""
        if self.always:
            return True
        found = self._last(at % self.period)
        return found >= 0 and at % self.period < self.spans[found][1]

    def off_after(self, at: int) -> int | None:
        """The moment at which a device that is on goes off; None if never. `at` itself where it is off."""
        if self.always:
            return None
        turn, now = divmod(at, self.period)
        found = self._last(now)
        if found < 0 or now >= self.spans[found][1]:
            return at
        end = self.spans[found][1]
        if end == self.period and self.spans[0][0] == 0:  # on across the turn of the period
            return (turn + 1) * self.period + self.spans[0][1]
        return turn * self.period + end

    def on_from(self, at: int) -> int | None:
        """The first moment from `at` on at which the device is on; None if never."""
        if self.on(at):
            return at
        if not self.spans:
            return None
        turn, now = divmod(at, self.period)
        later = self._last(now) + 1
        if later < len(self.spans):
            return turn * self.period + self.spans[later][0]
        return (turn + 1) * self.period + self.spans[0][0]

    def _last(self, now: int) -> int:
        """The last span that begins no later."""
        return bisect_right(self.spans, now, key=lambda span: span[0]) - 1


ALWAYS = Intervals()


def joined(spans: Sequence[Span], period: int) -> Intervals:
    """Intervals from sorted disjoint spans, touching ones joined; cut at the period."""
    out: list[Span] = []
    for start, end in spans:
        start, end = max(start, 0), min(end, period)
        if start >= end:
            continue
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((start, end))
    return Intervals(tuple(out), period)


def availability(config: ClockConfig, clients: int, seed: int) -> list[Intervals]:
    """Every client's on intervals.

    Raises
    ------
    UserError
        If a file cannot be read, misses a client, has intervals that overlap or end before they begin, or if nobody
        is ever on.
    """
    period = nanoseconds(config.period_s)
    if config.intervals is not None:
        path = Path(config.intervals)
        given = _table(path, clients) if path.suffix == ".csv" else fedscale.behaviours(path, clients, seed)
        found = [_of_file(path, client, spans) for client, spans in enumerate(given)]
    elif config.availability == "markov":
        found = [_markov(config, client, seed, period) for client in range(clients)]
    elif config.availability == "diurnal":
        found = [_diurnal(config, client, seed, period) for client in range(clients)]
    else:
        return [ALWAYS] * clients
    if not any(one.spans for one in found):
        asked = "availability" if config.intervals is None else "intervals"
        raise UserError(f"clock.{asked}={getattr(config, asked)}: nobody is ever on")
    return found


def _of_file(path: Path, client: int, given: tuple[list[Span], int]) -> Intervals:
    spans, period = given
    for (start, end), (after, _) in zip(sorted(spans), sorted(spans)[1:], strict=False):
        if after < end:
            raise UserError(
                f"{path}: client {client} is on from {start / 1e9:g} to {end / 1e9:g} s and from {after / 1e9:g} s; "
                f"intervals may not overlap"
            )
    return joined(sorted(spans), period)


def _table(path: Path, clients: int) -> list[tuple[list[Span], int]]:
    spans: dict[int, list[Span]] = {}
    last = 0
    for line, row in numbers(path, ("client", "on_s", "off_s")):
        on, off = row["on_s"], row["off_s"]
        if not 0 <= on < off < math.inf:
            raise UserError(f"{path}, line {line}: on_s={on:g}, off_s={off:g}; allowed is 0 ≤ on_s < off_s")
        span = nanoseconds(on), nanoseconds(off)
        spans.setdefault(int(row["client"]), []).append(span)
        last = max(last, span[1])
    if missing := [client for client in range(clients) if client not in spans]:
        raise UserError(f"{path}: client {missing[0]} has no row; needed is one or more for each of {clients} clients")
    return [(spans[client], last) for client in range(clients)]  # the table repeats after its last moment


def _markov(config: ClockConfig, client: int, seed: int, period: int) -> Intervals:
    """Alternating exponential times, begun in the state that a long run would be found in."""
    means = (nanoseconds(config.off_s), nanoseconds(config.on_s))
    on = uniform(seed, "markov start", client) < config.on_s / (config.on_s + config.off_s)
    now, spans, step = 0, list[Span](), 0
    while now < period:
        end = now + max(1, round(exponential(means[on], seed, "markov", client, step)))
        if on:
            spans.append((now, end))
        now, on, step = end, not on, step + 1
    return joined(spans, period)


def _diurnal(config: ClockConfig, client: int, seed: int, period: int) -> Intervals:
    """On for a share of each period, from an hour that the client's time zone decides."""
    start, length = round(uniform(seed, "time zone", client) * period), round(config.on_share * period)
    return joined(sorted([(start, start + length), (start - period, start + length - period)]), period)
