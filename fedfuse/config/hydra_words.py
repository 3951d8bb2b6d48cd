"""What Hydra makes of the words of a command line, and the same by parts, in a tenth of the time."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedfuse.config import catalogue, registry
from fedfuse.config.clock_keys import ClockConfig, ScheduleConfig
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

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

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
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for group, node in GROUPS.items():
        store.store(group=group, name="schema", node=node)
        for word in options(group):
            if not _says_more(group, word):
                store.store(group=group, name=word, node=_named(group, word))


@functools.cache
def _says_more(group: str, word: str) -> bool:
    """Whether a file is shipped for a word."""
    from importlib import resources

    return (resources.files("fedfuse.config.conf") / group / f"{word}.yaml").is_file()


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


def by_hydra(overrides: Sequence[str], chosen: str) -> DictConfig:
    """Hydra's own composition."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    _offer()
    store = ConfigStore.instance()
    store.store(group="strategy", name=chosen, node=registry.schema(chosen))
    for name, path in _asked(overrides).items():
        store.store(group="experiment", name=name, node=OmegaConf.load(path), package="_global_")
    GlobalHydra.instance().clear()
    with initialize_config_module("fedfuse.config.conf", version_base="1.3"):
        return hydra_compose("config", overrides=list(overrides))


def by_parts(overrides: Sequence[str], chosen: str) -> DictConfig | None:
    """What Hydra makes of the same words, where that is certain: a sweep composes each of its runs.

    Hydra puts words of groups into their places, then sets values. Here it does so once in a process for words that
    files say more about; other words and values are put into a copy. None where Hydra has more to do, or something to
    refuse: all errors are Hydra's own.
    """
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        given = [parsed(text) for text in overrides]
        if not all(map(_is_plain, given)):
            return None
        words = tuple(sorted({one.key_or_group: str(one.value()) for one in given if _is_word(one)}.items()))
        read = tuple((path, path.stat().st_mtime_ns) for path in _asked(overrides).values())
        hyper: Any = registry.entry(chosen).hyper
        found = copy.deepcopy(_base(words, hyper, read))
        for one in given:
            if not _is_word(one):
                OmegaConf.update(found, one.key_or_group, one.value(), merge=True, force_add=one.is_force_add())
    except (HydraException, OmegaConfBaseException):
        return None
    return found


def _is_word(one: Override) -> bool:
    return one.key_or_group in (*GROUPS, "strategy", "experiment") and not isinstance(one.value(), dict)


def _is_plain(one: Override) -> bool:
    if one.is_delete() or one.is_add() or one.is_sweep_override() or one.package:
        return False
    word = one.value()
    of_group = isinstance(word, str) and "$" not in word and not one.is_force_add()
    return of_group or not _is_word(one)


@functools.lru_cache(maxsize=64)
def _base(words: tuple[tuple[str, str], ...], hyper: Any, read: tuple[tuple[Path, int], ...]) -> DictConfig:
    """What Hydra makes of words; hyper-parameters and preset files, which it depends on too, tell apart."""
    from omegaconf import OmegaConf

    by_file = tuple((group, word) for group, word in words if read or _says_more(group, word))
    found = copy.deepcopy(_by_files(by_file, hyper if read else None, read))
    for group, word in words:
        if (group, word) not in by_file:
            node = registry.schema(word) if group == "strategy" else _named(group, word)
            found[group] = OmegaConf.structured(node)
    return found


@functools.lru_cache(maxsize=64)
def _by_files(words: tuple[tuple[str, str], ...], hyper: Any, read: tuple[tuple[Path, int], ...]) -> DictConfig:
    return by_hydra([f"{group}={word}" for group, word in words], dict(words).get("strategy", "fedavg"))


@functools.lru_cache(maxsize=4096)
def parsed(text: str) -> Override:
    """A word of the command line as Hydra reads it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(text)


PLAIN = re.compile(r"[A-Za-z0-9_./:%@+-]+")


def quoted(text: str) -> str:
    """A text as a word of the command line that Hydra reads as that text, whatever is in it."""
    # backslashes escape a quote only just before it, where they must be doubled
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text)
    return f"'{escaped}'"


def _asked(overrides: Iterable[str]) -> dict[str, Path]:
    """The files of the presets that are named."""
    names = [text.partition("=")[2].strip("'\"") for text in overrides if text.startswith("experiment=")]
    return {name: path for name, path in preset_files().items() if name in names} if names else {}
