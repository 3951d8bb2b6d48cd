"""Whether stacks pay on a CPU, measured once for each architecture and kept: bits are equal, so only time is at stake.

The first few trainings of a kind are made alone, the next in small stacks, both against the thread's own clock; from
then on the faster way is taken. The first training alone and the first stack of each size build what later ones find (a
library's kernels for the shapes, memory), half as much again as the work itself, and are not counted. Clients that ask
for no training have nothing to gain: they are seated now and then to hear whether they still do not. On a GPU, where
bits may differ, nothing is tried: stacks are always made.
"""

from __future__ import annotations

from typing import Any

TRIES = 2  # of each way that count
PART = 8  # clients of a stack as long as nothing is known
SILENT = 32  # times that clients who asked for nothing are not seated, before they are again; then twice as long
LONGEST = 4096  # of these times
GAIN = 0.97  # of the time alone that a stack may take at most, for it to be worth it


class Trials:
    """What was measured, by architecture and kind of training."""

    def __init__(self) -> None:
        self._alone: dict[Any, list[float]] = {}
        self._stacked: dict[Any, list[float]] = {}
        self._made: set[tuple[Any, int]] = set()  # kinds, and how many were trained at once
        self._pays: dict[Any, bool] = {}
        self._silent: dict[tuple[str, str], tuple[int, int]] = {}  # times that are left, and of how many

    def pays(self, kind: Any) -> bool | None:
        """Whether stacks pay; None while it is not known."""
        return self._pays.get(kind, None if TRIES else True)

    def declined(self, architecture: str) -> bool:
        """Whether everything that was measured of an architecture had better run alone."""
        known = [pays for (name, *_), pays in self._pays.items() if name == architecture]
        asked = {kind for kind in (*self._alone, *self._stacked) if kind[0] == architecture}
        return bool(known) and len(known) == len(asked) and not any(known)

    def silent(self, architecture: str, kind: str) -> bool:
        """Whether clients of an architecture asked for nothing when they were last seated for messages of a kind."""
        left, of = self._silent.get((architecture, kind), (0, 0))
        if left:
            self._silent[architecture, kind] = left - 1, of
        return left > 0

    def heard(self, architecture: str, kind: str, asked: bool) -> None:
        """Remember whether clients who were seated asked for a training."""
        if asked:
            self._silent.pop((architecture, kind), None)
            return
        _, before = self._silent.get((architecture, kind), (0, SILENT // 2))
        times = min(2 * before, LONGEST)
        self._silent[architecture, kind] = times, times

    def wants_alone(self, kind: Any) -> bool:
        """Whether the next training of a kind shall be made alone, to be measured."""
        return self.pays(kind) is None and len(self._alone.setdefault(kind, [])) < TRIES

    def measured(self, kind: Any, clients: int, seconds: float, steps: int) -> None:
        """Remember what the training of so many clients at once took, for the steps of all; of one, alone."""
        if self.pays(kind) is not None or not steps:
            return
        alone, stacked = self._alone.setdefault(kind, []), self._stacked.setdefault(kind, [])
        if (kind, clients) not in self._made:
            self._made.add((kind, clients))
            return
        (stacked if clients > 1 else alone).append(seconds / steps)
        if min(len(alone), len(stacked)) >= TRIES:
            self._pays[kind] = min(stacked) <= GAIN * min(alone)
