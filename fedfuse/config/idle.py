"""No silence: a key that was set and does nothing in this run is named, with what it would go with.

Each key of the schema says with what it does anything (`only`). The grammar is small, so that one text serves the
reader and the check: alternatives are parted by " or ", what must hold together by " with "; a term is `key=a|b`,
`key!=a|b`, a key that must be set, or one of `CONDITIONS` in words.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from fedfuse.config import registry
from fedfuse.config.catalogue import layout_of
from fedfuse.config.keys import Key, said
from fedfuse.config.schema import Config, known, valued
from fedfuse.errors import UserError


class Idle(UserError):
    """Keys were set that do nothing.

    Attributes
    ----------
    keys : tuple of str
    """

    def __init__(self, keys: Mapping[str, str]) -> None:
        super().__init__("; ".join(keys.values()))
        self.keys = tuple(keys)


def idle(config: Config, sweep: bool = True, typed: Iterable[str] = ()) -> dict[str, str]:
    """Keys that were set and do nothing in this run: each with one line that says why.

    Parameters
    ----------
    config : Config
    sweep : bool
        Whether it may be one of several runs.
    typed : iterable of str
        Keys that the user set, which count whatever their value; a group's word counts as its `name`. Others are set
        where they differ from their default.
    """
    out, asked = {}, _full(typed)
    for key in known().values():
        if not key.only:
            continue
        value = valued(config, key.name)
        if (value != key.default or key.name in asked) and not holds(key.only, config, sweep):
            out[key.name] = f"{_named(key)}={said(value)} does nothing here: it goes with {key.only}"
    return out


# naming something of the user's own, or an objective, that then is not what runs: another experiment than was asked for
REFUSED = (
    "model.build", "model.extra", "data.load", "loss.", "distil.", "labels.", "privacy.level", "secure.", "clock.",
    "schedule.", "until.", "attack.", "defence.", "train.micro_batch", "train.clip", "train.betas", "model.lora_",
    "data.packing", "model.quantize",
)  # fmt: skip


def refuse(config: Config, typed: Iterable[str]) -> None:
    """Refuse what was typed and would leave another experiment than was asked for; the rest a run notes in a line.

    Parameters
    ----------
    config : Config
    typed : iterable of str
        See `idle`.

    Raises
    ------
    Idle
        One line for each.
    UserError
        As `check_effort`.
    """
    check_effort(config)
    asked, every = _full(typed), known()
    found = {
        name: why
        for name, why in idle(config, typed=asked).items()
        if name in asked and name.startswith(REFUSED) and not _asks_nothing(every[name], valued(config, name))
    }
    if found:
        raise Idle(found)


def check_effort(config: Config) -> None:
    """Refuse what a strategy's own word says of a distillation that `distil.*` says otherwise, or that is none.

    Raises
    ------
    UserError
        Naming both.
    """
    asked, hyper = config.distil, config.strategy
    passes = "epochs" if asked.steps is None else "steps"
    efforts = {field.name: field.metadata.get("effort") for field in dataclasses.fields(hyper)}
    for own, part in efforts.items():
        name = passes if part == "epochs" else part
        if name and getattr(asked, name) is not None:
            registry.without_effect(hyper, own, f"beside distil.{name}={getattr(asked, name)}, which goes before it")
    if getattr(asked, passes) == 0:
        registry.check_factors(hyper, {own: f"distil.{passes}=0" for own, part in efforts.items() if part == "epochs"})


def distils(config: Config) -> bool:
    """Whether the strategy trains on soft labels at all, by its own words and the user's."""
    asked, hyper = config.distil, config.strategy
    if not _declared(config, "distils"):
        return False
    said = asked.epochs if asked.steps is None else asked.steps
    own = [getattr(hyper, f.name) for f in dataclasses.fields(hyper) if f.metadata.get("effort") == "epochs"]
    return said != 0 if said is not None else 0 not in own


def _full(typed: Iterable[str]) -> set[str]:
    """Typed keys, a group's word as its `name`."""
    return {f"{name}.name" if f"{name}.name" in known() else name for name in typed}


def _asks_nothing(key: Key, value: Any) -> bool:
    """Whether a default says that something is off, so that without effect it is what was asked for."""
    return bool(value == key.default and (not value or value in ("off", "none")))


def _named(key: Key) -> str:
    return key.name.removesuffix(".name")


def holds(only: str, config: Config, sweep: bool = True) -> bool:
    """Whether a condition of the schema holds."""
    return any(
        all(_term(term.strip(), config, sweep) for term in part.split(" with ")) if part not in CONDITIONS
        else CONDITIONS[part](config, sweep)
        for part in only.split(" or ")
    )  # fmt: skip


def _term(term: str, config: Config, sweep: bool) -> bool:
    if term in CONDITIONS:
        return CONDITIONS[term](config, sweep)
    if "=" not in term:
        return bool(valued(config, term))
    name, _, words = term.partition("=")
    allowed = set(words.split("|"))
    if name.endswith("!"):
        return any(not (one & allowed) for one in _facts(config, name[:-1]))
    return any(one & allowed for one in _facts(config, name))


def _facts(config: Config, name: str) -> Iterator[set[str]]:
    """What a key stands for: for a pool, each of its members apart."""
    data = config.data
    layout = layout_of(data.name, data.layout)
    if name == "data":
        yield {data.name, layout}
    elif name == "data.layout":
        yield {layout}
    elif name == "model":
        tokens = data.extra.get("text") == "tokens" or "tokenizer" in data.extra
        for one in config.model.pool or [config.model.name]:
            word = "custom" if ":" in one else one.partition("@")[0]
            yield {"hf" if word == "auto" and tokens else word}
    elif name == "train.optimizer":
        for one in config.train.pool or [config.train.optimizer]:
            yield {one.partition("@")[0]}
    else:
        value = valued(config, name)
        yield {said(getattr(value, "name", value) if dataclasses.is_dataclass(value) else value)}


def _declared(config: Config, name: str) -> Any:
    return registry.declared(registry.entry(config.strategy.name), config.strategy, name)


def _subset(config: Config, sweep: bool) -> bool:
    return (config.transfer.subset or getattr(config.strategy, "subset", None)) is not None and _shares(config, sweep)


def _shares(config: Config, sweep: bool) -> bool:
    return bool(_declared(config, "transfer") != "none")


def uses_loss(config: Config, sweep: bool = True) -> bool:
    """Whether one of the strategy's halves calls `self.loss`, read from its code."""
    entry = registry.entry(config.strategy.name)
    return any(
        "loss" in _names(found.__code__)
        for half in (entry.server, entry.client)
        for kind in half.__mro__
        if not kind.__module__.startswith(("fedfuse.core.", "flwr.", "builtins"))
        for found in map(_function, vars(kind).values())
        if found is not None
    )


def digests(entry: registry.Entry) -> bool:
    """Whether its clients keep a model of their own and train it on what they receive, read from the code of that."""
    received = _function(entry.client.receive)
    return bool(entry.client.personal and received is not None and {"distil", "train"} & _names(received.__code__))


def adapts(config: Config) -> bool:
    """Whether the strategy brings adapters of its own."""
    return hasattr(config.strategy, "targets")


def _function(value: Any) -> types.FunctionType | None:
    value = getattr(value, "__func__", getattr(value, "fget", value))
    return value if isinstance(value, types.FunctionType) else None


def _names(code: types.CodeType) -> set[str]:
    """Names of attributes that a function uses, those of functions inside it included."""
    inner = [one for one in code.co_consts if isinstance(one, types.CodeType)]
    return set(code.co_names).union(*map(_names, inner))


CONDITIONS: dict[str, Callable[[Config, bool], bool]] = {
    "a sweep": lambda config, sweep: sweep,
    "a strategy with a transfer set": _shares,
    "a subset of the transfer set (transfer.subset, strategy.subset)": _subset,
    "a strategy that trains on soft labels": uses_loss,
    "a strategy that distils": lambda config, sweep: bool(_declared(config, "distils")),
    "a distillation of some passes": lambda config, sweep: distils(config),
    "a strategy that asks for labels": lambda config, sweep: (
        registry.entry(config.strategy.name).client.partly_labelled
    ),
    "a strategy whose clients train on what they receive": lambda config, sweep: digests(
        registry.entry(config.strategy.name)
    ),
    "a strategy that sums records": lambda config, sweep: bool(
        registry.sums_of(registry.entry(config.strategy.name), config.strategy)
    ),
    "a strategy without adapters of its own": lambda config, sweep: not adapts(config),
    "a strategy without a momentum of its own (strategy.local_momentum)": lambda config, sweep: (
        getattr(config.strategy, "local_momentum", None) is None
    ),
    "no privacy of examples (there: privacy.chunk)": lambda config, sweep: not config.privacy.by_example,
    "no privacy of examples (there: privacy.clip)": lambda config, sweep: not config.privacy.by_example,
    "a strategy whose clients train": lambda config, sweep: not _declared(config, "pooled"),
    "an optimiser without a rate of its own (train.pool)": lambda config, sweep: (
        not config.train.pool or any("@" not in word for word in config.train.pool)
    ),
}
