"""The two kinds of failure: what a user can mend, and what the world did."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable
from pathlib import Path


class UserError(Exception):
    """A mistake in a command or configuration: one line on stderr, exit code 2, nothing written."""


class WorldError(Exception):
    """The world failed (no client succeeded, disk full, lost workers): exit code 1, the run can be resumed."""


class Refused(Exception):
    """A message, an order or a bundle asks for something that this node does not do."""


def in_words(error: BaseException) -> str:
    """Say an exception and where it was raised in one line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    frames = traceback.extract_tb(error.__traceback__)
    return f"{text} ({frames[-1].name}, {Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else text


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Say which of `allowed` was probably meant by `name`, as the tail of an error line."""
    options = sorted(allowed)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    listed = ", ".join(options) if len(options) <= 40 else ", ".join(options[:40]) + ", …"
    return (f"did you mean {close[0]!r}? " if close else "") + f"Allowed: {listed}"
