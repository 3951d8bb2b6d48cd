"""Which code a run was made by: a sha256 of its strategy, and of what its configuration names to be imported.

Comments, docstrings and the way of writing do not count. What those files import is not looked at.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

from fedfuse.config import registry
from fedfuse.config.dotted import KEYS, PYTHON, resolve
from fedfuse.config.files import write_text
from fedfuse.config.schema import Config
from fedfuse.errors import UserError
from fedfuse.results.run_data import environment_in
from fedfuse.results.setting import hashes_in
from fedfuse.wire.client_store import ClientStore

THEN = "+"  # between the code that a run began with and the code that it went on with
SHOWN = 12  # digits of a hash


def hashes_of(config: Config) -> dict[str, str]:
    """The first digits of the sha256 of a run's code, by what it is for; what has no source is left out."""
    entry = registry.entry(config.strategy.name)
    kinds = {
        kind for half in (entry.server, entry.client, entry.hyper) for kind in half.__mro__ if _of_strategies(kind)
    }
    found = {"strategy": _hash(sorted({text for kind in kinds if (text := _source(kind))}))}
    for group, key in KEYS:
        path = getattr(getattr(config, group), key)
        if path and (text := _source(resolve(path, f"{group}.{key}"), alone=path.startswith(f"{PYTHON}:"))):
            found[group] = _hash([text])
    return {name: value for name, value in found.items() if value}


def changed(began: dict[str, str], now: dict[str, str]) -> list[str]:
    """What code is for that is not what it was; of what was not kept then, nobody knows."""
    return [name for name, value in now.items() if began.get(name, value) != value]


def check_code(path: Path, config: Config) -> None:
    """Refuse to take a finished run for one of today's code.

    Raises
    ------
    UserError
        Naming what has changed.
    """
    began, now = hashes_in(environment_in(path)), hashes_of(config)
    for name in changed(began, now):
        raise UserError(
            f"out={path}: was run by other code of the {name} (sha256 {began[name]}, now {now[name]}); remove that "
            f"folder, choose another out, or say overwrite=true; or bring the code back"
        )


def go_on_with(path: Path, config: Config, clients: ClientStore) -> None:
    """Keep with a run that goes on by which code it does, where that has changed since it began, or nobody knows."""
    began, now = hashes_in(environment_in(path)), hashes_of(config)
    other = changed({name: value.split(THEN)[-1] for name, value in began.items()}, now)
    if other or not began:
        clients.forget_staged()
    if other:
        code = {**began, **{name: f"{began[name]}{THEN}{now[name]}" for name in other}}
        write_text(path / "environment.json", json.dumps(environment_in(path) | {"code": code}, indent=1))


def code_notes(path: Path) -> list[str]:
    """What whoever reads the result of a run has to know whose code changed on the way."""
    other = [name for name, value in hashes_in(environment_in(path)).items() if THEN in value]
    return [f"the code of the {' and the '.join(other)} changed while this run was interrupted: no code gives its "
            f"digest from the start"] if other else []  # fmt: skip


def _of_strategies(kind: type) -> bool:
    """Whether a class is a strategy's own: not the platform's, whose version is kept, nor of what lies below that."""
    package, _, rest = kind.__module__.partition(".")
    return package not in sys.stdlib_module_names | {"flwr"} and (package != "fedfuse" or rest.startswith("strategies"))


def _source(made: Any, alone: bool = False) -> str:
    """The file that something was written in; of a program or a notebook, which has other lines, that alone."""
    made = inspect.unwrap(made)
    try:
        file = inspect.getsourcefile(made)
        if file and not alone and made.__module__ != "__main__" and Path(file).exists():
            return Path(file).read_text(encoding="utf-8")
        return inspect.getsource(made)
    except (OSError, TypeError, AttributeError, ValueError):
        return ""


def _hash(sources: list[str]) -> str:
    told = "\0".join(map(_plain, sources))
    return hashlib.sha256(told.encode()).hexdigest()[:SHOWN] if told else ""


@functools.lru_cache(64)  # a sweep asks for each of its runs
def _plain(source: str) -> str:
    """The code without comments and docstrings, written one way."""
    try:
        tree = ast.parse(textwrap.dedent(source))
    except SyntaxError:  # a lambda in the middle of a call
        return source
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                first.value.value = ""
    return ast.unparse(tree)
