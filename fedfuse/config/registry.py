"""Strategies by name: one decorator in one file, found through the entry-point group `fedfuse.strategies`.

An entry point names a package (or a single module); its modules are read, not imported, to list what there is, and only
the module of the chosen strategy is imported. So a new strategy is one new file.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import math
import pkgutil
import sys
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fedfuse.config.dotted import refuse_by_wire
from fedfuse.config.keys import Key, allowed, keys_of, said
from fedfuse.config.keys import field as declare
from fedfuse.errors import UserError, in_words, nearest

if TYPE_CHECKING:
    from fedfuse.core.client import FusionClient
    from fedfuse.core.strategy import FusionStrategy

GROUP = "fedfuse.strategies"


class Entry(NamedTuple):
    """A registered strategy: both halves and its hyper-parameters."""

    name: str
    server: type[FusionStrategy]
    client: type[FusionClient]
    hyper: type[Any]
    paper: str


class Listed(NamedTuple):
    """A strategy as read from its source, before anything is imported."""

    name: str
    module: str
    paper: str
    summary: str


registered: dict[str, Entry] = {}  # in this process so far
_files: dict[str, str | None] = {}  # name -> file that registered it
unreadable: dict[str, str] = {}  # file -> why it could not be listed


def hyper(
    default: Any,
    meaning: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: tuple[Any, ...] | None = None,
    path: bool = False,
    only: str = "",
    effort: str = "",
) -> Any:
    """Declare a hyper-parameter: a dataclass field with its meaning (paper's symbol, unit) and what is allowed.

    Parameters
    ----------
    default
        The paper's or recommended value.
    meaning : str
        Shown by `fedfuse list` and in errors.
    low, high : float, optional
        Closed bounds.
    above : float, optional
        Open lower bound.
    choices : tuple, optional
        Allowed values.
    path : bool
        It names a file or folder of the server's machine: whoever asks by wire may not say it, clients are not told it.
    only : str
        Its factors, other hyper-parameters: where one is 0, false or null this one does nothing, and is refused unless
        at its default. "mu", "voting with vote_epochs" (both are needed), "mu or lam" (one of them is).
    effort : str
        Which part of a distillation's effort it is, "epochs", "batch_size" or "lr": the user's `distil.*` of that name
        goes before it, so that beside one it is refused unless at its default.
    """
    bounds = {"low": low, "high": high, "above": above}
    return declare(default, meaning=meaning, **bounds, choices=choices, path=path, only=only, effort=effort)


@dataclasses.dataclass(frozen=True)
class NoHyper:
    """A strategy without hyper-parameters."""


def strategy(
    name: str, *, client: type[FusionClient], hyper: type[Any] = NoHyper, paper: str = ""
) -> Callable[[type[Any]], type[Any]]:
    """Register a server class (with its client class and hyper-parameters) under a name.

    Registering the same name again from the same file replaces the entry, so reloading is harmless.

    Parameters
    ----------
    name : str
        What users type: `strategy=<name>`. Give it and `paper` as literals: they are read without importing.
    client : type
        The client half.
    hyper : dataclass, optional
        Hyper-parameters: fields of plain types, declared with `fedfuse.hyper`.
    paper : str
        Citation.

    Raises
    ------
    ValueError
        If another file has registered the name.
    """

    def register(cls: type[Any]) -> type[Any]:
        old, file = registered.get(name), getattr(sys.modules.get(cls.__module__), "__file__", None)
        same = file is not None and _files.get(name) == file  # a file may be imported under two names
        if old is not None and old.server.__module__ != cls.__module__ and not same:
            raise ValueError(f"strategy {name!r} is registered by {old.server.__module__} already")
        if not dataclasses.is_dataclass(hyper):
            raise ValueError(f"strategy {name!r}: hyper must be a dataclass")
        registered[name], _files[name] = Entry(name, cls, client, hyper, paper), file
        return cls

    return register


def listed() -> dict[str, Listed]:
    """Return every strategy that is installed, by reading sources; nothing of them is imported."""
    found: dict[str, Listed] = {}
    for point in importlib.metadata.entry_points(group=GROUP):
        spec = importlib.util.find_spec(point.value.split(":")[0])
        if spec is None:
            continue
        if spec.submodule_search_locations:
            for module in pkgutil.iter_modules(spec.submodule_search_locations):
                for folder in spec.submodule_search_locations:
                    path = Path(folder) / f"{module.name}.py"
                    if path.exists():
                        found |= {item.name: item for item in read(path, f"{spec.name}.{module.name}")}
        elif spec.origin:
            found |= {item.name: item for item in read(Path(spec.origin), spec.name)}
    for entry in registered.values():
        if entry.name not in found:
            found[entry.name] = Listed(
                entry.name,
                entry.server.__module__,
                entry.paper,
                (entry.server.__doc__ or "").strip().split("\n")[0],
            )
    return dict(sorted(found.items()))


def read(path: Path, module: str) -> list[Listed]:
    """What strategies a source file registers; one that cannot be parsed is noted in `unreadable`."""
    return _parsed(path, module, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _parsed(path: Path, module: str, changed: int) -> list[Listed]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as error:
        unreadable[path.name] = " ".join(str(error).split())
        return []
    out = []
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        for call in node.decorator_list:
            if isinstance(call, ast.Call) and getattr(call.func, "id", getattr(call.func, "attr", "")) == "strategy":
                words = {k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)}
                first = call.args[0] if call.args else None
                name = first.value if isinstance(first, ast.Constant) else words.get("name")
                if isinstance(name, str):
                    summary = (ast.get_docstring(node) or "").split("\n")[0]
                    out.append(Listed(name, module, str(words.get("paper", "")), summary))
    return out


def entry(name: str) -> Entry:
    """Return a registered strategy, importing its module if need be.

    Raises
    ------
    UserError
        If there is none of that name, or its module cannot be imported.
    """
    if name not in registered:
        known = listed()
        if name not in known:
            if f"{name}.py" in unreadable:
                raise UserError(f"strategy={name}: {name}.py cannot be read ({unreadable[f'{name}.py']})")
            broken = "".join(f"; {file} cannot be read ({why})" for file, why in sorted(unreadable.items()))
            where = f" (looked in the packages with an entry point {GROUP})"
            raise UserError(
                f"strategy={name}: unknown; {nearest(name, known, 'fedfuse list strategies')}{where}{broken}"
            )
        try:
            importlib.import_module(known[name].module)
        except UserError as error:
            raise UserError(f"strategy={name}: {error}") from error
        except Exception as error:
            why = f"{known[name].module} cannot be imported ({in_words(error)})"
            raise UserError(f"strategy={name}: {why}") from error
        if name not in registered:
            raise UserError(f"strategy={name}: {known[name].module} did not register it")
    return registered[name]


def check(name: str, values: Any) -> None:
    """Check hyper-parameters against what their fields allow.

    Raises
    ------
    UserError
        One line naming the strategy, the field, the value and what is allowed.
    Refused
        If the values came by wire and name a path.
    """
    check_factors(values, {})
    for field in dataclasses.fields(values):
        value, rule = getattr(values, field.name), field.metadata
        where = f"strategy.{field.name}={value}"
        if value is None or not rule:
            continue
        if rule.get("path"):
            refuse_by_wire(where)
        if rule.get("choices") is not None and value not in rule["choices"]:
            raise UserError(f"{where}: {name} allows {', '.join(map(str, rule['choices']))}")
        if isinstance(value, int | float) and not isinstance(value, bool):
            if not math.isfinite(value):
                raise UserError(f"{where}: {name} needs a finite number")
            if rule.get("low") is not None and value < rule["low"]:
                raise UserError(f"{where}: {name} needs at least {rule['low']}")
            if rule.get("above") is not None and value <= rule["above"]:
                raise UserError(f"{where}: {name} needs more than {rule['above']}")
            if rule.get("high") is not None and value > rule["high"]:
                raise UserError(f"{where}: {name} needs at most {rule['high']}")


def check_factors(values: Any, off: Mapping[str, str]) -> None:
    """Refuse hyper-parameters whose factors (`hyper(only=)`) are 0, false or null; null epochs are as many as are due.

    Parameters
    ----------
    values
        The hyper-parameters.
    off : mapping
        Factors that something else switches off, and what that is.

    Raises
    ------
    UserError
        Naming the first of them, its value and its default.
    """
    none = dict(off)
    for field in dataclasses.fields(values):
        value = getattr(values, field.name)
        if not value and not (value is None and field.metadata.get("effort") == "epochs"):
            none[field.name] = f"strategy.{field.name}={said(value)}"
    for field in dataclasses.fields(values):
        ways = [way.split(" with ") for way in field.metadata.get("only", "").split(" or ") if way]
        if ways and all(any(factor in none for factor in way) for way in ways):
            told = dict.fromkeys(none[factor] for way in ways for factor in way if factor in none)
            without_effect(values, field.name, f"with {' and '.join(told)}")


def schema(name: str) -> type[Any]:
    """Return the schema of Hydra's group `strategy`: the strategy's fields and its `name`.

    OmegaConf makes frozen dataclasses read-only, so this is an open copy; `typed` makes the real thing of it.
    """
    hyper: Any = entry(name).hyper
    return _schema(name, hyper)


@functools.lru_cache(maxsize=1024)
def _schema(name: str, hyper: type[Any]) -> type[Any]:
    hints = typing.get_type_hints(hyper)
    columns: list[Any] = [("name", str, dataclasses.field(default=name))]
    for field in dataclasses.fields(hyper):
        missing = field.default_factory is dataclasses.MISSING
        default = {"default": field.default} if missing else {"default_factory": field.default_factory}
        columns.append((field.name, hints[field.name], dataclasses.field(**default)))
    return dataclasses.make_dataclass(f"{hyper.__name__}Schema", columns)


def typed(values: Any) -> Any:
    """Return hyper-parameters as the strategy's own dataclass, with the strategy's `name` beside them.

    Raises
    ------
    UserError
        If a value is not allowed.
    """
    chosen = entry(values.name)
    hyper: Any = chosen.hyper
    named = _with_name(chosen.name, hyper)
    given = {field.name: getattr(values, field.name) for field in dataclasses.fields(named)}
    try:
        made = named(**given)
    except (TypeError, ValueError) as error:
        raise UserError(f"strategy={chosen.name}: {error}") from error
    check(chosen.name, made)
    return made


@functools.lru_cache(maxsize=1024)
def _with_name(name: str, hyper: type[Any]) -> Any:
    return dataclasses.make_dataclass(
        hyper.__name__,
        [("name", str, dataclasses.field(default=name))],
        bases=(hyper,),
        frozen=hyper.__dataclass_params__.frozen,  # type: ignore[attr-defined]
    )


def told(hyper: Any) -> dict[str, Any]:
    """Hyper-parameters as clients are told them: without what names a file or folder of the server's."""
    kinds = dataclasses.fields(hyper)
    return {f.name: None if f.metadata.get("path") else getattr(hyper, f.name) for f in kinds if f.name != "name"}


def without_effect(hyper: Any, name: str, why: str) -> None:
    """Refuse a hyper-parameter that is not at its default where nothing reads it.

    Parameters
    ----------
    hyper
        The hyper-parameters.
    name : str
        Which of them nothing reads, as they are.
    why : str
        With what, in words: ``"with strategy.weights=uniform, where all count alike"``.

    Raises
    ------
    UserError
        Naming it, its value and its default.
    """
    value = getattr(hyper, name)
    (default,) = (field.default for field in dataclasses.fields(hyper) if field.name == name)
    if value != default:
        allowed = "null" if default is None else default
        raise UserError(f"strategy.{name}={value} does nothing {why}; allowed there: {allowed}")


def hypers(name: str) -> list[Key]:
    """The hyper-parameters of a strategy, with what their fields allow.

    Raises
    ------
    UserError
        If there is no such strategy.
    """
    out = []
    for found, field in zip(keys_of(kind := entry(name).hyper), dataclasses.fields(kind), strict=True):
        out.append(found._replace(name=f"strategy.{found.name}", kind=allowed(found.kind, field.metadata)))
    return out


def declared(entry: Entry, hyper: Any, name: str) -> Any:
    """What a strategy that is not built declares of itself: it depends on its class and hyper-parameters alone."""

    class Unbuilt(entry.server):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            self.hyper = hyper

    return getattr(Unbuilt(), name)


def sums_of(entry: Entry, hyper: Any) -> dict[str, str | None]:
    """The sums of a strategy that is not built."""
    return {} if entry.server.pooled else dict(declared(entry, hyper, "sums"))
