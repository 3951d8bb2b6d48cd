"""What a deployed site's examples have been spent on: every release is entered before it is made, and never forgotten.

A run keeps its own ledger; the data set's goes on over all runs, so that a new run is no new budget.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path

from fedfuse.config.files import synced
from fedfuse.errors import Refused
from fedfuse.train.accounting import History, Release, epsilon, joined

USUAL = 1e-5  # δ, at most, where nobody says one


@dataclass(frozen=True)
class Limits:
    """What a site's policy allows its data set to be spent on, over all runs; None is no limit.

    Attributes
    ----------
    epsilon : float or None
        ε of everything ever released, at `delta`; without one at the run's, and 10⁻⁵ at most:
        with a large δ any ε is kept.
    delta : float or None
        Largest δ of a run.
    noise : float or None
        Least σ of a release.
    """

    epsilon: float | None = None
    delta: float | None = None
    noise: float | None = None


class Ledger:
    """Two files of releases, one a line: of a run, and of the data set over all runs.

    Parameters
    ----------
    run : Path
    lifetime : Path or None
    limits : Limits
    """

    def __init__(self, run: Path, lifetime: Path | None = None, limits: Limits | None = None) -> None:
        self.run, self.lifetime, self.limits = Path(run), lifetime, limits or Limits()

    @property
    def history(self) -> History:
        """What this run has released so far."""
        return entered(self.run)

    def enter(self, release: Release, delta: float) -> None:
        """Enter a release, on the disk before this returns.

        Raises
        ------
        Refused
            If the site's policy does not allow it; nothing is entered then.
        """
        noise = release[0]
        if self.limits.noise is not None and noise < self.limits.noise:
            raise Refused(f"site policy: noise multiplier {noise:g}; allowed: at least {self.limits.noise:g}")
        if self.limits.delta is not None and delta > self.limits.delta:
            raise Refused(f"site policy: delta {delta:g}; allowed: at most {self.limits.delta:g}")
        if self.lifetime is None:
            _append(self.run, release)
            return
        self.lifetime.parent.mkdir(parents=True, exist_ok=True)
        with open(self.lifetime, "a", encoding="utf-8") as lock:  # two runs at once do not spend the same rest
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.limits.epsilon is not None:
                spent = self.spent(release, delta)
                if spent > self.limits.epsilon:
                    raise Refused(
                        f"site policy: epsilon {spent:.3g} of this data set over all runs with this training; "
                        f"allowed: at most {self.limits.epsilon:g}"
                    )
            _append(self.lifetime, release)
            _append(self.run, release)

    def spent(self, release: Release | None = None, delta: float | None = None) -> float:
        """ε of the data set over all runs, after one more release if there is one."""
        at = self.limits.delta if self.limits.delta is not None else min(delta or USUAL, USUAL)
        history = joined((), entered(self.lifetime) if self.lifetime else ())
        history = joined(history, (release,)) if release else history
        return epsilon(history, at) if history else 0.0


def entered(path: Path) -> History:
    """What a file of releases holds; a last line that a loss of power cut short was never promised."""
    if not path.exists():
        return ()
    found = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            noise, rate, steps = json.loads(line)
            found.append((noise, rate, steps))
    return tuple(found)


def _append(path: Path, release: Release) -> None:
    fresh = not path.exists()
    with open(path, "a+b") as file:
        file.seek(0)
        content = file.read()
        if content and not content.endswith(b"\n"):  # a loss of power cut the last line short
            file.truncate(content.rfind(b"\n") + 1)
        file.write(json.dumps(release).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    if fresh:
        synced(path.parent)
