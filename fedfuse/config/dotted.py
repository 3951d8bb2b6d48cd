"""Code of the user's own, named in a configuration as `pkg.mod:name`: imported here, and nowhere else.

For one's own machine. Where a configuration came by wire, `code(False)` shuts this door.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from fedfuse.errors import Refused, UserError

_own_machine: ContextVar[bool] = ContextVar("own_machine", default=True)


@contextlib.contextmanager
def code(allowed: bool) -> Iterator[None]:
    """Whether names in a configuration may be imported while this lasts: not where the configuration came by wire."""
    token = _own_machine.set(allowed)
    try:
        yield
    finally:
        _own_machine.reset(token)


def refuse_by_wire(said: str) -> None:
    """Refuse what names a file or folder, where the configuration came by wire.

    Raises
    ------
    Refused
        With what was said.
    """
    if not _own_machine.get():
        raise Refused(f"{said[:80]}: over the wire no file or folder is named")


class Given(str):
    """A key's text that brings along what it stands for: something a Python program handed over, for one's own machine.

    It is pickled with what it carries, so that workers on this machine or a cluster of one's own have it too; it never
    becomes more than its text in a file or on the wire.
    """

    made: Callable[..., Any]

    def __new__(cls, text: str, made: Callable[..., Any]) -> Given:
        """The text and what it stands for."""
        self = super().__new__(cls, text)
        self.made = made
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as both."""
        return Given, (str(self), self.made)


handed_over: dict[str, Given] = {}


def give(made: Callable[..., Any]) -> str:
    """Name something that a Python program hands over, so that a configuration can say it.

    A cell of a notebook that is run again hands over a new function of the same name: it takes the old one's place, so
    that what is seeded by the name stays as it was.
    """
    text = f"{PYTHON}:{getattr(made, '__qualname__', type(made).__name__).replace('<', '').replace('>', '')}"
    handed_over[text] = Given(text, made)
    return text


def given(text: str | None) -> str | None:
    """The text with what it stands for, where a program of this process has handed that over."""
    return None if text is None else handed_over.get(text, text)


def hand_on(config: Any) -> None:
    """Let a configuration's texts bring along what a program of this process has handed over for them."""
    for group, key in KEYS:
        setattr(getattr(config, group), key, given(getattr(getattr(config, group), key)))


PYTHON = "python"
KEYS = (("model", "build"), ("loss", "build"), ("data", "load"))  # that name code


def resolve(path: str, key: str) -> Callable[..., Any]:
    """Import what `pkg.mod:name` names; the working directory counts as a place to look.

    Parameters
    ----------
    path
        The dotted path; `name` may have dots (`transformers:AutoModel.from_pretrained`).
    key
        The configuration key, for error lines.

    Raises
    ------
    UserError
        If the path is malformed, its module cannot be imported, or the name is missing or not callable.
    Refused
        If the configuration came by wire.
    """
    if not _own_machine.get():
        raise Refused(f"{key}={path[:80]!r}: over the wire nothing is imported")
    if isinstance(handed := given(path), Given):
        return handed.made
    module_name, colon, name = path.partition(":")
    if module_name == PYTHON:
        raise UserError(f"{key}={path}: was handed over from Python and is not here; run it from there again")
    if not (module_name and colon and name):
        raise UserError(f"{key}={path!r} must be written pkg.mod:name")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(f"{key}={path}: cannot import {module_name}: {error}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise UserError(f"{key}={path}: {module_name} has no {name!r}")
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"{key}={path} is not a function or class")
    return found
