"""From words on a command line to a checked `Config`, by Hydra; every mistake is one line."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from fedfuse.config import catalogue, registry
from fedfuse.config.clock_keys import MANY, ClockConfig, ScheduleConfig
from fedfuse.config.clock_rules import timed
from fedfuse.config.dotted import given
from fedfuse.config.idle import refuse
from fedfuse.config.schema import (
    AttackConfig,
    Config,
    DataConfig,
    DefenceConfig,
    LossConfig,
    ModelConfig,
    PartitionConfig,
    RuntimeConfig,
    SecureConfig,
    TrackingConfig,
)
from fedfuse.errors import UserError, nearest

GROUPS = {
    "data": DataConfig,
    "partition": PartitionConfig,
    "model": ModelConfig,
    "loss": LossConfig,
    "runtime": RuntimeConfig,
    "secure": SecureConfig,
    "attack": AttackConfig,
    "defence": DefenceConfig,
    "tracking": TrackingConfig,
    "clock": ClockConfig,
    "schedule": ScheduleConfig,
}


def options(group: str) -> list[str]:
    """Names that a group's word may be."""
    return sorted(catalogue.GROUPS[group])


@functools.cache
def _offer() -> None:
    """Tell Hydra the schema, and of each group every word of the catalogue that no file in `conf/` says more about."""
    from importlib import resources

    from hydra.core.config_store import ConfigStore

    store, shipped = ConfigStore.instance(), resources.files("fedfuse.config.conf")
    store.store(name="schema", node=Config)
    for group, node in GROUPS.items():
        store.store(group=group, name="schema", node=node)
        for word in options(group):
            if not (shipped / group / f"{word}.yaml").is_file():
                store.store(group=group, name=word, node=_named(group, word))


def _named(group: str, word: str) -> Any:
    """A group's configuration that says its name, and nothing else."""
    if group == "data":
        return DataConfig(name=word, layout=word if word in catalogue.LAYOUTS else "builtin")
    if group == "loss":
        return LossConfig(name=None if word == "default" else word)  # default: each strategy uses its paper's own
    return GROUPS[group](name=word)


def preset_files() -> dict[str, Path]:
    """The experiment presets by name."""
    from importlib import resources

    folder = Path(str(resources.files("fedfuse.experiments")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def presets() -> list[str]:
    """Names of the experiment presets."""
    return list(preset_files())


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """Expand a sweep (`seed=0,1 strategy=a,b`) into the overrides of its runs, as Hydra's basic sweeper does.

    Raises
    ------
    UserError
        If an override cannot be parsed.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import IntervalSweep

    parser, choices = OverridesParser.create(), []
    for text in map(listed, overrides):
        try:
            parsed = parser.parse_override(text)
        except Exception as error:
            raise UserError(f"{text!r}: not of the form key=value ({_first_line(error)})") from error
        if parsed.is_sweep_override():
            key = parsed.get_key_element()
            if isinstance(parsed.value(), IntervalSweep):
                raise UserError(f"{text}: is a space to search; say search.trials=<number> with fedfuse compare")
            choices.append([f"{key}={value}" for value in parsed.sweep_string_iterator()])
        else:
            choices.append([text])
    return [list(combination) for combination in itertools.product(*choices)]


def listed(text: str) -> str:
    """`audit=a,b` as the list that it is: both in every run, no sweep over them."""
    key, _, value = text.partition("=")
    return f"audit=[{value}]" if key == "audit" and not value.startswith(("[", "$")) else text


def strategy_of(overrides: Sequence[str]) -> str | None:
    """The strategy that overrides name, if they do."""
    for text in reversed(overrides):
        if text.startswith("strategy="):
            return text.split("=", 1)[1].strip("'\"")
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
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    overrides = [listed(text) for text in overrides]
    for text in overrides:
        if "=" not in text:
            raise UserError(f"{text!r}: not of the form key=value")
    _check_keys(overrides)
    overrides = [f"++{text}" if text.startswith(_OPEN) else text for text in overrides]  # whether there yet or not
    chosen = strategy_of(overrides) or "fedavg"
    _offer()
    store = ConfigStore.instance()
    store.store(group="strategy", name=chosen, node=registry.schema(chosen))
    asked = [o for o in overrides if o.startswith("experiment=")]
    for name, path in preset_files().items() if asked else ():
        store.store(group="experiment", name=name, node=OmegaConf.load(path), package="_global_")
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("fedfuse.config.conf", version_base="1.3"):
            extra = [f"strategy={chosen}"] if strategy_of(overrides) is None else []
            found = hydra_compose("config", overrides=[*overrides, *extra])
        config: Config = OmegaConf.to_object(found)  # type: ignore[assignment]
        config.strategy = registry.typed(config.strategy)
    except UserError:
        raise
    except Exception as error:
        raise UserError(_explain(error, overrides, chosen)) from error
    config.model.build, config.data.load = given(config.model.build), given(config.data.load)
    if config.model.path and catalogue.layout_of(config.data.name, config.data.layout) in ("text", "instruct", "roles"):
        config.data.extra = {
            "tokenizer": config.model.path,
            **config.data.extra,
        }  # the model's own, unless another is said
    if config.until.seconds is not None and not any(text.lstrip("+~").startswith("rounds=") for text in overrides):
        config.rounds = MANY
    check(config)
    refuse(config, [re.split("=", text.lstrip("+~"), maxsplit=1)[0] for text in overrides])
    return config


def _check_keys(overrides: Sequence[str]) -> None:
    """Find an unknown key or group word before anything heavy is imported."""
    known = keys(Config, "")
    for text in overrides:
        key, value = re.split("=", text.lstrip("+~"), maxsplit=1)
        value = value.strip("'\"")
        key = key.split("@")[0]
        if key.startswith(("hydra.", "strategy.")) or key == "hydra":
            continue
        if key == "experiment":
            if value not in presets():
                raise UserError(f"experiment={value}: unknown; {nearest(value, presets())}")
            continue
        if key == "strategy":
            if value not in registry.listed():
                registry.entry(value)  # says what is wrong
            continue
        if key in GROUPS:
            allowed = options(key)
            if value not in allowed and not value.startswith(("{", "[", "${")):
                raise UserError(f"{key}={value}: unknown; {nearest(value, allowed)}")
            continue
        if key not in known and not key.startswith(_OPEN):
            raise UserError(f"{key}: no such key; {meant(key, [*known, *GROUPS, 'strategy'])}")


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


_OPEN = ("data.extra.", "model.extra.", "model.paths.", "loss.options.")


def keys(node: Any, prefix: str) -> list[str]:
    """All dotted keys of a configuration dataclass."""
    import typing

    hints = typing.get_type_hints(node)
    out = []
    for field in fields(node):
        name = f"{prefix}{field.name}"
        if is_dataclass(hints[field.name]):
            out += keys(hints[field.name], name + ".")
        else:
            out.append(name)
    return out


def _explain(error: Exception, overrides: Sequence[str], strategy: str) -> str:
    text = " ".join(str(part) for part in (error, error.__cause__) if part)
    known = [f"strategy.{field.name}" for field in fields(registry.schema(strategy))]
    match = re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' (?:is )?not in", text)
    if match:
        key = match.group(1)
        return f"{key}: no such key; {nearest(key, known if key.startswith('strategy.') else keys(Config, ''))}"
    match = re.search(r"Error merging override (.+)", _first_line(error))
    if match and error.__cause__ is not None:
        return f"{match.group(1)}: {_first_line(error.__cause__)}"
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def check(config: Config) -> None:
    """Refuse impossible values.

    Raises
    ------
    UserError
        Naming the key, the value and what is allowed.
    """
    at_least = {"clients": 1, "rounds": 1, "seed": 0, "train.epochs": 0, "train.batch_size": 1, "train.weight_decay": 0}
    at_least |= {"evaluate.every": 1, "evaluate.batch_size": 1, "runtime.workers": 1, "runtime.retries": 0}
    at_least |= {"runtime.parallel": 1, "search.trials": 1}
    at_least |= {"runtime.memory": 320}  # MB: a quarter is Ray's object store, which takes no less than 80
    at_least |= {"evaluate.samples": 0, "evaluate.max_tokens": 1}
    at_least |= {"model.lora_rank": 1, "train.max_steps": 1, "train.micro_batch": 1}
    at_least |= {"privacy.trainings": 1, "privacy.chunk": 1}
    at_least |= {"distil.epochs": 0, "distil.steps": 0, "distil.batch_size": 1}
    at_least |= {"secure.quantization_range": 2, "secure.num_shares": 2}
    at_least |= {"stop.patience": 1, "transfer.size": 0, "transfer.subset": 1, "labels.rounds": 1}
    for key, low in at_least.items():
        value = _value(config, key)
        if value is not None and not low <= value < float("inf"):
            raise UserError(f"{key}={value}: allowed is at least {low}")
    for key, allowed_words in WORDS.items():
        value = _value(config, key)
        if value not in allowed_words:
            raise UserError(f"{key}={value}: {nearest(str(value), allowed_words)}")
    for name in config.audit:
        if name not in catalogue.AUDITS:
            raise UserError(f"audit={name}: {nearest(str(name), catalogue.AUDITS)}")
    if len(set(config.audit)) < len(config.audit):
        raise UserError(f"audit={','.join(config.audit)}: allowed is each once")
    part, train, temperature, model = config.participation, config.train, config.loss.temperature, config.model
    labels, privacy, distil, optimizers = (
        config.labels,
        config.privacy,
        config.distil,
        ", ".join(WORDS["train.optimizer"]),
    )
    rules: list[tuple[str, Any, bool, str]] = [
        ("participation", part, 0 < part <= 1, "more than 0 and at most 1"),
        ("train.lr", train.lr, 0 < train.lr < float("inf"), "more than 0"),
        ("train.momentum", train.momentum, 0 <= train.momentum < 1, "at least 0 and below 1"),
        ("model.lora_alpha", model.lora_alpha, model.lora_alpha is None or model.lora_alpha > 0, "more than 0"),
        ("model.lora_dropout", model.lora_dropout, 0 <= model.lora_dropout < 1, "at least 0 and below 1"),
        ("train.warmup", train.warmup, 0 <= train.warmup < 1, "at least 0 and below 1"),
        ("train.lr_floor", train.lr_floor, 0 <= train.lr_floor <= 1, "0 to 1"),
        ("train.clip", train.clip, train.clip is None or 0 < train.clip < float("inf"), "more than 0"),
        ("train.betas", train.betas, len(train.betas) == 2 and all(0 <= b < 1 for b in train.betas), "two from 0 to 1"),
        ("labels.initial", labels.initial, 0 < labels.initial <= 1, "more than 0 and at most 1"),
        ("labels.budget", labels.budget, 0 <= labels.budget <= 1, "0 to 1"),
        ("distil.lr", distil.lr, distil.lr is None or 0 < distil.lr < float("inf"), "more than 0"),
        (
            "distil.optimizer",
            distil.optimizer,
            distil.optimizer in (None, *WORDS["train.optimizer"]),
            "null, " + optimizers,
        ),
        ("distil.steps", distil.steps, None in (distil.steps, distil.epochs), "null beside distil.epochs"),
        ("loss.temperature", temperature, temperature is None or temperature > 0, "more than 0"),
        ("privacy.epsilon", privacy.epsilon, privacy.epsilon is None or 0 < privacy.epsilon < 1000, "0 to 1000"),
        ("privacy.delta", privacy.delta, privacy.delta is None or 0 < privacy.delta < 1, "between 0 and 1"),
        ("privacy.noise", privacy.noise, privacy.noise is None or 0 < privacy.noise < 1e4, "0 to 10,000"),
        ("privacy.clip", privacy.clip, 0 < privacy.clip < float("inf"), "more than 0"),
    ]
    exact = train.precision == "float32" or not privacy.by_example
    clip, needed = config.secure.clipping_range, config.secure.reconstruction_threshold
    rules.append(("secure.clipping_range", clip, 0 < clip < float("inf"), "more than 0"))
    good = 0.5 < needed <= 1 or (needed >= 2 and needed % 1 == 0)
    rules.append(("secure.reconstruction_threshold", needed, good, "above 0.5 up to 1, or a whole number from 2 on"))
    lies, defence = config.attack, config.defence
    rules.append(("attack.fraction", lies.fraction, 0 < lies.fraction <= 1, "more than 0 and at most 1"))
    rules.append(("attack.scale", lies.scale, lies.scale is None or 0 < lies.scale < float("inf"), "more than 0"))
    good = len(set(lies.clients)) == len(lies.clients) and min(lies.clients, default=0) >= 0
    rules.append(("attack.clients", lies.clients, good, "numbers of clients from 0 on, each once"))
    rules.append(("defence.fraction", defence.fraction, 0 < defence.fraction < 0.5, "more than 0 and below 0.5"))
    rules.append(("defence.rate", defence.rate, 0 < defence.rate < float("inf"), "more than 0"))
    rules.append(("train.precision", train.precision, exact, "float32 under privacy: its noise is exact there"))
    share, limit = config.runtime.gpu_fraction, config.runtime.client_timeout
    rules.append(("runtime.gpu_fraction", share, 0 < share <= 1, "more than 0 and at most 1"))
    rules.append(("runtime.client_timeout", limit, limit is None or 0 < limit < float("inf"), "more than 0 (seconds)"))
    rules += timed(config)
    for word in config.train.pool or ():
        name, at, rate = word.partition("@")
        good = name in WORDS["train.optimizer"] and (not at or _positive(rate))
        allowed = " or ".join(", ".join(WORDS["train.optimizer"]).rsplit(", ", 1))
        rules.append(("train.pool", word, good, f"{allowed}, and a rate after @ as in adam@0.001"))
    server = config.runtime.server_device
    known = server is None or re.fullmatch(r"auto|cpu|cuda(:\d{1,2})?", server) is not None
    rules.append(("runtime.server_device", server, known, "null, auto, cpu, cuda or cuda:<number>"))
    for key, value, good, allowed in rules:
        if not good:
            raise UserError(f"{key}={value}: allowed is {allowed}")


WORDS = {
    "train.optimizer": ("sgd", "adam", "adamw"),
    "train.optimizer_state": ("fresh", "keep"),
    "train.precision": ("float32", "bf16"),
    "train.schedule": ("constant", "linear", "cosine"),
    "model.dtype": ("float32", "bf16"),
    "model.quantize": ("none", "8bit", "4bit"),
    "runtime.device": ("auto", "cpu", "cuda"),
    "runtime.vectorize": ("off", "auto"),
    "privacy.clipping": ("ghost", "plain"),
    "privacy.level": ("example", "client"),
    "evaluate.moment": ("received", "trained"),
    "secure.name": ("off", "on"),
    "clock.name": tuple(catalogue.CLOCKS),
    "clock.speeds": ("lognormal", "tiers"),
    "clock.availability": ("always", "markov", "diurnal"),
    "clock.policy": ("whole", "end"),
    "schedule.name": tuple(catalogue.SCHEDULES),
    "schedule.staleness": ("constant", "polynomial", "hinge"),
    "attack.name": catalogue.GROUPS["attack"],
    "attack.knows": ("own", "honest"),
    "defence.name": catalogue.GROUPS["defence"],
    "defence.around": ("mean", "median", "geometric_median"),
}


def _positive(text: str) -> bool:
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False


def _value(config: Config, key: str) -> Any:
    node: Any = config
    for part in key.split("."):
        node = getattr(node, part)
    return node
