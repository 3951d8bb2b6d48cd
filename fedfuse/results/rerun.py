"""The command that makes a run again, from its resolved configuration."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from typing import Any

from fedfuse.config.hydra_words import PLAIN, quoted
from fedfuse.config.idle import idle
from fedfuse.config.message import from_json
from fedfuse.config.schema import Config
from fedfuse.errors import UserError
from fedfuse.results.run_data import RunRecord
from fedfuse.results.setting import flatten

# what a search found is spelled out as plain keys
LEFT_OUT = ("out", "overwrite", "search.trials", "search.keys", "search.edges")
_SPECIAL = {"null", "true", "false", "nan", "inf"}


def reproduce(run: RunRecord) -> str:
    """Return `fedfuse run …` with every key that is not the platform's default.

    Notes
    -----
    Hyper-parameters of the strategy are all spelled out, because this package knows no strategy's defaults.
    """
    defaults = flatten(dataclasses.asdict(Config()))
    words = ["fedfuse", "run"]
    flat, silent = flatten(run.config), _idle(run.config)
    for key, value in sorted(flat.items(), key=lambda pair: _rank(pair[0])):
        if key in LEFT_OUT or key in silent or (key in defaults and defaults[key] == value):
            continue
        if not key.startswith("strategy.") and value is None:
            continue
        name = key.removesuffix(".name")
        words.append(shlex.quote(f"{name}={_hydra(value)}"))
    return " ".join(words)


def _idle(values: dict[str, Any]) -> set[str]:
    """Keys that did nothing in a run, which its command would be refused for; none where it cannot be told."""
    try:
        return set(idle(from_json(json.dumps(values), code=True)))
    except (UserError, ValueError, TypeError):  # a strategy that is not installed here, an older run
        return set()


def _rank(key: str) -> tuple[bool, bool, bool]:
    """Put the strategy first, then what else chooses a group, then single keys, then those inside groups."""
    return key != "strategy.name", not key.endswith(".name"), "." in key


def _hydra(value: Any) -> str:
    """Write a value in Hydra's override grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list):
        return f"[{','.join(map(_hydra, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_hydra(part)}" for key, part in value.items()) + "}"
    text = str(value)
    plain = PLAIN.fullmatch(text) and text.lower() not in _SPECIAL and not re.fullmatch(r"[-+0-9.eE_]+", text)
    return text if plain else quoted(text)
