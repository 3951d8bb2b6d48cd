"""From words on a command line to a checked `Config`, by Hydra; every mistake is one line."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields

from fedfuse.config import catalogue, registry
from fedfuse.config.clock_keys import MANY
from fedfuse.config.dotted import hand_on
from fedfuse.config.hydra_words import GROUPS, by_hydra, by_parts, options, parsed, presets
from fedfuse.config.idle import refuse
from fedfuse.config.rules import allowed, check
from fedfuse.config.schema import Config, known
from fedfuse.errors import UserError, first_line, nearest


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """Expand a sweep (`seed=0,1 strategy=a,b`) into the overrides of its runs, as Hydra's basic sweeper does.

    Raises
    ------
    UserError
        If an override cannot be parsed.
    """
    from hydra.core.override_parser.types import IntervalSweep

    choices = []
    for text in map(listed, overrides):
        try:
            one = parsed(text)
        except Exception as error:
            raise UserError(f"{text!r}: not of the form key=value ({first_line(error)})") from error
        if one.is_sweep_override():
            key = one.get_key_element()
            if isinstance(one.value(), IntervalSweep):
                raise UserError(f"{text}: is a space to search; say search.trials=<number> with fedfuse compare")
            choices.append([f"{key}={value}" for value in one.sweep_string_iterator()])
        else:
            choices.append([text])
    return [list(combination) for combination in itertools.product(*choices)]


def listed(text: str) -> str:
    """`audit=a,b` as the list that it is: both in every run, no sweep over them; `data.inputs=[a,b]` as its word.

    What Hydra's grammar has no letters for (`out=runs/Übung`) is quoted, and so is a directory of a sweep
    (`out=runs/knfu/seed=2`), which it takes for another key.
    """
    key, _, value = text.partition("=")
    if key == "data.inputs" and value.startswith("[") and value.endswith("]"):
        names = ",".join(name.strip().strip("'\"") for name in value[1:-1].split(","))
        return f"{key}='{names}'"
    plain = not {"'", '"', "{", "$"} & set(value)
    if key == "out" and "=" in value and plain:
        return f"{key}='{value}'"  # with its commas: seed=0,train.lr=0.1 is one name
    if not value.isascii() and plain:
        return f"{key}={ITEM.sub(QUOTED, value)}"
    return f"audit=[{value}]" if key == "audit" and not value.startswith(("[", "$")) else text


ITEM, QUOTED = re.compile(r"[^\s,\[\]][^,\[\]]*"), r"'\g<0>'"


def strategy_of(overrides: Sequence[str]) -> str | None:
    """The strategy that overrides name, if they do."""
    for text in reversed(overrides):
        if text.startswith("strategy="):
            return text.partition("=")[2].strip("'\"")
    return None


def compose(overrides: Sequence[str]) -> Config:
    """Compose and check the configuration of one run.

    Parameters
    ----------
    overrides : sequence of str
        As typed: `key=value`.

    Raises
    ------
    UserError
        For an unknown key or name (with the nearest valid one) and for an impossible value.
    """
    from omegaconf import OmegaConf

    overrides = [listed(text) for text in overrides]
    for text in overrides:
        if "=" not in text:
            raise UserError(f"{text!r}: not of the form key=value")
    _check_keys(overrides)
    overrides = [f"++{text}" if text.startswith(OPEN) else text for text in overrides]  # whether there yet or not
    chosen = strategy_of(overrides) or "fedavg"
    words = [*overrides, *([f"strategy={chosen}"] if strategy_of(overrides) is None else [])]
    try:
        found = by_parts(words, chosen) or by_hydra(words, chosen)
        config: Config = OmegaConf.to_object(found)  # type: ignore[assignment]
        config.strategy = registry.typed(config.strategy)
    except UserError:
        raise
    except Exception as error:
        raise UserError(_explain(error, overrides, chosen)) from error
    hand_on(config)
    if config.model.path and catalogue.layout_of(config.data.name, config.data.layout) in ("text", "instruct", "roles"):
        # the model's own, unless another is said
        config.data.extra = {"tokenizer": config.model.path, **config.data.extra}
    if config.until.seconds is not None and not any(text.lstrip("+~").startswith("rounds=") for text in overrides):
        config.rounds = MANY
    check(config)
    refuse(config, typed(overrides))
    return config


def compose_one(overrides: Sequence[str]) -> Config:
    """`compose` for a run that stands alone, not in a sweep: one that tunes nothing.

    Raises
    ------
    UserError
        As `compose`, and if trials of a search are asked for.
    """
    config = compose(overrides)
    if config.search.trials is not None:
        raise UserError(f"search.trials={config.search.trials}: one run tunes nothing; use fedfuse compare")
    return config


def typed(overrides: Iterable[str]) -> list[str]:
    """The keys that words set."""
    return [text.partition("=")[0].lstrip("+~").partition("@")[0] for text in overrides]


def _check_keys(overrides: Sequence[str]) -> None:
    """Find an unknown key or group word before anything heavy is imported."""
    every = known()
    for text in overrides:
        key, _, value = text.lstrip("+~").partition("=")
        value = value.strip("'\"")
        key = key.split("@")[0]
        if key.startswith("strategy."):
            continue
        if key == "experiment":
            if value not in presets():
                raise UserError(f"experiment={value}: unknown; {nearest(value, presets())}")
            continue
        if key == "strategy":
            if value not in registry.registered and value not in registry.listed():
                registry.entry(value)  # says what is wrong
            continue
        if key in GROUPS:
            words = options(key)
            if value not in words and not value.startswith(("{", "[", "${")):
                if key == "model" and ":" in value:  # as in `model.pool`
                    raise UserError(f"model={value}: code of your own is said as model=custom model.build={value}")
                raise UserError(f"{key}={value}: unknown; {nearest(value, words)}")
            continue
        if key not in every and not key.startswith(OPEN):
            raise UserError(f"{key}: no such key; {meant(key, [*every, *GROUPS, 'strategy'])}")


ELSEWHERE = {  # what Flower, Hydra and others call it
    "dir": "out", "output_dir": "out", "hydra.run.dir": "out", "fraction_fit": "participation",
    "fraction_train": "participation", "fraction": "participation", "num_supernodes": "clients", "nodes": "clients",
    "num_gpus": "runtime.device", "num_workers": "runtime.workers", "workers": "runtime.workers", "iid": "partition",
    "local_epochs": "train.epochs", "num_server_rounds": "rounds", "public": "transfer.size", "proxy": "transfer.size",
}  # fmt: skip


def meant(name: str, known: Iterable[str]) -> str:
    """Say which key was probably meant: another platform's word for it goes first, then the same word in a group."""
    known = list(known)
    if ELSEWHERE.get(name) in known:
        return f"did you mean {ELSEWHERE[name]!r}?"
    inside = [key for key in known if key.rpartition(".")[2] == name.rpartition(".")[2]]
    if inside:
        return f"did you mean {' or '.join(map(repr, inside))}?"
    told, many = nearest(name, known), len(known) > FEW
    if not many:
        return told
    close = told.partition(" Allowed: ")[0]
    return f"{close if close != told and close else ''} fedfuse help run lists all keys".strip()


FEW = 40  # keys that an error line can list


OPEN = ("data.extra.", "model.extra.", "model.paths.", "loss.options.")


def _explain(error: Exception, overrides: Sequence[str], strategy: str) -> str:
    text = " ".join(str(part) for part in (error, error.__cause__) if part)
    own = [f"strategy.{field.name}" for field in fields(registry.schema(strategy))]
    match = re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' (?:is )?not in", text)
    if match:
        key = match.group(1)
        return f"{key}: no such key; {nearest(key, own if key.startswith('strategy.') else known())}"
    match = re.search(r"Error merging override (.+)", first_line(error))
    if match and error.__cause__ is not None:
        if (key := known().get(match.group(1).partition("=")[0].lstrip("+~"))) is not None:
            return f"{match.group(1)}: allowed is {', '.join(filter(None, (_a(key.kind), allowed(key.name))))}"
        return f"{match.group(1)}: {first_line(error.__cause__)}"
    return first_line(error)


def _a(kind: str) -> str:
    return f"a {kind}" if kind.split()[0] in ("whole", "number", "list", "mapping", "name") else kind
