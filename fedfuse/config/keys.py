"""The keys of a configuration: what each means, its default, and with what it does anything; said once, in the schema.

Help, documentation and errors read it from here.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple


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
    return field(default, meaning=meaning, only=only)


def field(default: Any, **metadata: Any) -> Any:
    """A dataclass field; a list or dict is copied for each instance."""
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Key(NamedTuple):
    """One key, as a reference shows it."""

    name: str
    kind: str
    default: Any
    meaning: str
    only: str

    @property
    def line(self) -> str:
        """Name, default, meaning and condition in one line."""
        only = f" (only with {self.only})" if self.only else ""
        return f"{self.name}={said(self.default)}: {self.meaning}{only}"


def keys_of(kind: type[Any], prefix: str = "") -> list[Key]:
    """The keys of a configuration dataclass, groups within it unfolded, in its order."""
    hints, out = typing.get_type_hints(kind), []
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            out += keys_of(typing.cast(type[Any], hint), f"{prefix}{field.name}.")
            continue
        missing = field.default is dataclasses.MISSING
        factory: Any = field.default_factory
        default = factory() if missing and factory is not dataclasses.MISSING else field.default
        about = field.metadata
        name = f"{prefix}{field.name}"
        out.append(Key(name, kind_of(hint), default, about.get("meaning", ""), about.get("only", "")))
    return out


def leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a nested configuration with its dotted key; what is empty, too."""
    if isinstance(values, dict) and values:
        for key, value in values.items():
            yield from leaves(value, f"{prefix}{key}.")
    else:
        yield prefix.rstrip("."), values


def allowed(kind: str, rule: typing.Mapping[str, Any]) -> str:
    """What a hyper-parameter may be, in words."""
    if rule.get("choices") is not None:
        return " | ".join(said(choice) for choice in rule["choices"])
    bounds = [f"> {rule['above']}"] if rule.get("above") is not None else []
    bounds += [f"≥ {rule['low']}"] if rule.get("low") is not None else []
    bounds += [f"≤ {rule['high']}"] if rule.get("high") is not None else []
    return f"{kind} {' and '.join(bounds)}".strip()


def kind_of(hint: Any) -> str:
    """A type in the words of the command line."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if one is type(None) else kind_of(one) for one in inside)
    if origin in (list, tuple):
        return "list"
    if origin is dict:
        return "mapping"
    return {str: "text", int: "whole number", float: "number", bool: "true or false"}.get(hint, "name")


def said(value: Any) -> str:
    """A value as it is typed."""
    if value is None:
        return "null"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(said, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
