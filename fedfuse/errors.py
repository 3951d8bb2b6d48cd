"""The two kinds of failure: what a user can mend, and what the world did."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in a command or configuration: one line on stderr, exit code 2, nothing written."""


class WorldError(Exception):
    """The world failed (no client succeeded, disk full, lost workers): exit code 1, the run can be resumed."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Say which of `allowed` was probably meant by `name`, as the tail of an error line."""
    options = sorted(allowed)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    listed = ", ".join(options) if len(options) <= 40 else ", ".join(options[:40]) + ", …"
    return (f"did you mean {close[0]!r}? " if close else "") + f"Allowed: {listed}"
