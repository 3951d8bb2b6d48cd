"""How a key of the configuration is declared: a field that says what it means."""

from __future__ import annotations

import dataclasses
from typing import Any


def key(default: Any, meaning: str, *, only: str = "") -> Any:
    """Declare a key of the configuration: a dataclass field with its meaning.

    Parameters
    ----------
    default
        A list or dict is copied for each configuration.
    meaning : str
        One sentence, with the unit and the words that are allowed.
    only : str
        With what it does anything, as `fedfuse.config.idle` reads it; empty: always.
    """
    metadata = {"meaning": meaning, "only": only}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)
