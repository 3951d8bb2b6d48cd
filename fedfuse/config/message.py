"""A run's configuration on the wire: JSON there, a checked `Config` here, with no Hydra in between."""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedfuse.config import registry
from fedfuse.config.allowed import check_texts
from fedfuse.config.dotted import code as code_allowed
from fedfuse.config.rules import check
from fedfuse.config.schema import Config, TrackingConfig
from fedfuse.errors import UserError, nearest

LONGEST = 65536  # characters; a configuration is a few thousand


def as_json(config: Config) -> str:
    """Write a checked configuration as canonical JSON."""
    return json.dumps(dataclasses.asdict(config), sort_keys=True)


def for_sites(config: Config) -> Config:
    """The configuration as sites are told it: without what is the server's own (folders, trackers, passwords)."""
    told = dataclasses.replace(config, out=None, tracking=TrackingConfig())
    strategy = dataclasses.replace(config.strategy, **registry.told(config.strategy))
    return dataclasses.replace(told, strategy=strategy, data=dataclasses.replace(config.data, root=None))


def from_json(text: str, code: bool = False, folders: Sequence[Path] | None = None) -> Config:
    """Read a configuration that somebody else wrote; every key, type and value is checked.

    Parameters
    ----------
    text : str
        JSON.
    code : bool
        Whether it may name code and files, which this machine's own operator has allowed.
    folders : sequence of Path, optional
        See `check_texts`.

    Raises
    ------
    UserError
        Naming the key, the value and what is allowed; for an unregistered strategy too.
    Refused
        If it says anything but registered names and numbers.
    """
    if len(text) > LONGEST:
        raise UserError(f"configuration: {len(text)} characters; allowed are {LONGEST}")
    try:
        values = json.loads(text, parse_int=_whole)
    except (ValueError, RecursionError) as error:
        raise UserError(f"configuration: not JSON ({error})") from error
    if not isinstance(values, dict) or not isinstance(values.get("strategy"), dict):
        raise UserError("configuration: an object with a strategy is needed")
    if not code:
        check_texts(values, folders)
    name = values["strategy"].get("name")
    if not isinstance(name, str):
        raise UserError(f"strategy={name!r}: a name is needed")
    registry.entry(name)  # refuses what is not registered
    with code_allowed(code):
        chosen = registry.typed(_build(registry.schema(name), values["strategy"], "strategy."))
    config = _build(Config, {key: value for key, value in values.items() if key != "strategy"}, "")
    config.strategy = chosen
    check(config)
    return config


def _whole(digits: str) -> int:
    if len(digits) > 19:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return int(digits)


def _build(kind: type[Any], values: Any, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise UserError(f"{prefix.rstrip('.')}: an object is needed, got {type(values).__name__}")
    known, hints = [field.name for field in dataclasses.fields(kind)], _hints(typing.cast(Any, kind))
    for key in values:
        if key not in known:
            raise UserError(f"{prefix}{key}: no such key; {nearest(key, known)}")
    return kind(**{key: _value(hints[key], value, f"{prefix}{key}") for key, value in values.items()})


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _value(hint: Any, value: Any, where: str) -> Any:
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type[Any], hint), value, where + ".")
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in inside:
            return None
        for option in inside:
            if option is not type(None):
                try:
                    return _value(option, value, where)
                except UserError:
                    continue
    elif origin is list and isinstance(value, list):
        return [_value(inside[0], item, where) if inside else item for item in value]
    elif origin is tuple and isinstance(value, list):
        return tuple(value)
    elif origin is dict and isinstance(value, dict):
        return {str(key): _value(inside[1], item, where) if inside else item for key, item in value.items()}
    elif isinstance(value, bool):  # which is a whole number to Python
        if hint is bool:
            return value
    elif hint is float and isinstance(value, int | float):
        return float(value)
    elif hint in (int, str, list, dict) and isinstance(value, hint):
        return value
    raise UserError(f"{where}={value!r}: {getattr(hint, '__name__', hint)} is needed")
