"""The two kinds of failure: what a user can mend, and what the world did."""

from __future__ import annotations

import difflib
import traceback
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

TRACEBACK = "FEDFUSE_TRACEBACK"  # set, every failure is told with its whole story


class UserError(Exception):
    """A mistake in a command or configuration: one line on stderr, exit code 2, nothing written."""


class WorldError(Exception):
    """The world failed (no client succeeded, disk full, lost workers): exit code 1, the run can be resumed."""


class Refused(Exception):
    """A message, an order or a bundle asks for something that this node does not do."""


def one_line(text: object, most: int = 500) -> str:
    """Say somebody else's words in one printable line, so that they can neither pass for ours nor steer a terminal.

    Control and format characters (line ends, escapes, changes of writing direction), surrogates and unassigned code
    points become spaces; blanks are joined; what is longer than `most` characters is cut.
    """
    said = str(text)[: 4 * most]
    plain = "".join(c if c == " " or unicodedata.category(c)[0] not in "CZ" else " " for c in said)
    plain = " ".join(plain.split())
    return plain if len(plain) <= most else plain[: most - 1] + "…"


def printable(text: str, most: int | None = None) -> str:
    """Replace control characters (terminal escapes among them) by the replacement character, and cut at `most`."""
    plain = "".join(letter if letter.isprintable() else "\ufffd" for letter in text)
    return plain if most is None or len(plain) <= most else plain[: most - 1] + "…"


def in_words(error: BaseException) -> str:
    """Say an exception and where it was raised in one line."""
    text = one_line(f"{type(error).__name__}: {error}")
    frames = traceback.extract_tb(error.__traceback__)
    return f"{text} ({frames[-1].name}, {Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else text


def first_line(error: BaseException) -> str:
    """The first line of an exception that says something, else its type: what a library says goes on for pages."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def nearest(name: str, allowed: Iterable[str], all_by: str = "") -> str:
    """Say which of `allowed` was probably meant by `name`, as the tail of an error line.

    Parameters
    ----------
    name : str
    allowed : iterable of str
    all_by : str
        The command that lists them all, told where the line cannot.
    """
    options = sorted(allowed)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.65)
    close = close or [option for option in options if len(name) > 2 and option.startswith(name)]
    some = listed(options, 40)
    if len(options) > 40 and all_by:
        some += f" (all: {all_by})"
    return (f"did you mean {close[0]!r}? " if close else "") + f"Allowed: {some}"


def listed(values: Sequence[object], most: int = 10) -> str:
    """The first few of some values in words."""
    return ", ".join(map(str, values[:most])) + (", …" if len(values) > most else "")
