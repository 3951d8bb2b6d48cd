"""A mapping from a Python program as the words of a command line; classes, callables and arrays are given names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedfuse.config import registry
from fedfuse.config.dotted import give
from fedfuse.config.hydra_words import PLAIN, quoted
from fedfuse.errors import UserError

# keys that take a list
LISTS = ("data.inputs", "model.pool", "train.pool", "search.keys", "search.edges", "data.extra.sources")


def merged(settings: Any, more: Mapping[str, Any]) -> dict[str, Any]:
    """What a call's mapping and its keyword arguments say together.

    Raises
    ------
    UserError
        If the first is no mapping.
    """
    if settings is not None and not isinstance(settings, Mapping):
        raise UserError(f"{settings!r:.60}: allowed are keywords (strategy='knfu', rounds=3) and a mapping of keys")
    return {**(settings or {}), **more}


def overrides(settings: Mapping[str, Any], prefix: str = "", swept: bool = False) -> list[str]:
    """Write a mapping as command-line words; `name` inside a group's mapping chooses the group.

    Parameters
    ----------
    settings : mapping
        Dotted or nested keys.
    prefix : str
        Of the group that it stands in.
    swept : bool
        Whether a list is values to sweep over.

    Raises
    ------
    UserError
        For something that is handed over and cannot be used.
    """
    words = []
    for key, value in settings.items():
        if key == "seed" and not swept and isinstance(value, list | tuple):
            raise UserError(f"seed={_word(value)}: a run has one seed; fedfuse.compare takes several")
        if not prefix and key in HANDED_OVER and _is_handed_over(key, value):
            words += HANDED_OVER[key](value)
        elif isinstance(value, Mapping):
            inner = dict(value)
            if "name" in inner and not prefix:
                words.append(f"{key}={inner.pop('name')}")
            words += overrides(inner, f"{prefix}{key}.", swept)
        elif swept and isinstance(value, list | tuple) and value and (f"{prefix}{key}" not in LISTS or _nested(value)):
            said = [_strategy(v)[0].partition("=")[2] if isinstance(v, type) else _word(v) for v in value]
            words.append(f"{prefix}{key}={','.join(said)}")
        else:
            words.append(f"{prefix}{key}={_word(value)}")
    return words


def _nested(value: Any) -> bool:
    return all(isinstance(one, list | tuple) for one in value)


def _is_handed_over(key: str, value: Any) -> bool:
    if value is None or isinstance(value, str):
        return False
    if key != "data":
        return callable(value)
    words = isinstance(value, list) and all(isinstance(one, str) for one in value)
    return not words and not (isinstance(value, Mapping) and "train" not in value)


def _strategy(value: Any) -> list[str]:
    for entry in registry.registered.values():
        if entry.server is value:
            return [f"strategy={entry.name}"]
    name = getattr(value, "__name__", type(value).__name__)
    if not isinstance(value, type):
        raise UserError(f"strategy={name}: is no class; a name or a class with @strategy is needed")
    raise UserError(f"strategy={name}: is not registered; put @strategy(name, …) before the class")


def _model(value: Any) -> list[str]:
    if hasattr(value, "state_dict") and not isinstance(value, type):
        raise UserError("model: is a module; hand over what makes one, for each run begins with its seed's own weights")
    return ["model=custom", f"model.build={quoted(give(value))}"]


def _loss(value: Any) -> list[str]:
    if not isinstance(value, type):
        raise UserError(f"loss: is a {type(value).__name__}; hand over the class, of which each client makes one")
    return ["loss=custom", f"loss.build={quoted(give(value))}"]


def _data(value: Any) -> list[str]:
    from fedfuse.data.from_python import dataset

    return ["data=custom", f"data.load={quoted(give(Held(dataset(value))))}"]


class Held:
    """A data set that is there already, as `data.load` takes it."""

    def __init__(self, made: Any) -> None:
        self.made, self.__qualname__ = made, "data"

    def __call__(self) -> Any:
        """The data set."""
        return self.made


HANDED_OVER: dict[str, Callable[[Any], list[str]]] = {
    "strategy": _strategy, "model": _model, "loss": _loss, "data": _data,
}  # fmt: skip


def _word(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ",".join(_word(v) for v in value) + "]"
    text = str(value)
    return quoted(text) if isinstance(value, str | Path) and text and not PLAIN.fullmatch(text) else text
