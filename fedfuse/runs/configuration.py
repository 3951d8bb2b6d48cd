"""A run's configuration as the file in its directory, and back, checked."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import yaml

from fedfuse.config import registry
from fedfuse.config.dotted import KEYS, hand_on
from fedfuse.config.files import DUMPER, LOADER, read_text
from fedfuse.config.keys import leaves
from fedfuse.config.rules import check
from fedfuse.config.schema import Config, without_gone
from fedfuse.errors import UserError, first_line

ADDRESSES = frozenset({"tracking.uri", "runtime.address"})
COLONS = frozenset(
    {"out", "data.root", "transfer.root", "runtime.device", "runtime.server_device"}
)  # that import nothing


def as_yaml(config: Config) -> str:
    """The resolved configuration as YAML."""
    values = asdict(config)
    for group, key in KEYS:  # plain text, whatever it carries
        if values[group][key] is not None:
            values[group][key] = str.__str__(values[group][key])
    return str(yaml.dump(values, Dumper=DUMPER, sort_keys=False))


def load_config(path: Path) -> Config:
    """Read a run directory's `config.yaml` back as a checked `Config`.

    Raises
    ------
    UserError
        If there is none, or it is not one of this version's.
    """
    from omegaconf import OmegaConf

    file = path / "config.yaml"
    if not file.exists():
        from fedfuse.results.run_data import not_a_run

        raise UserError(not_a_run(path))
    try:
        raw = without_gone(yaml.load(read_text(file, 1 << 20), Loader=LOADER))
        for key, value in leaves(raw):
            if "${" in str(value):  # OmegaConf would fill in this machine's environment
                raise ValueError(f"{key}={value} asks for what is not in it")
        name = raw["strategy"]["name"]
        base = OmegaConf.structured(Config)
        values = {k: v for k, v in raw.items() if k != "strategy"}
        config: Config = OmegaConf.to_object(OmegaConf.merge(base, values))  # type: ignore[assignment]
        schema = OmegaConf.structured(registry.schema(name))
        config.strategy = registry.typed(OmegaConf.to_object(OmegaConf.merge(schema, raw["strategy"])))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{file}: not a configuration of this fedfuse ({first_line(error)})") from error
    hand_on(config)
    check(config)
    return config


def known_config(path: Path, allow_code: bool) -> Config:
    """Read a directory's configuration to act on it: it may be a stranger's.

    Raises
    ------
    UserError
        If it names code, or an address to call, and that is not allowed.
    """
    config = load_config(path)
    if not allow_code and (asked := code_of(config)):
        raise UserError(f"{path}/config.yaml: {asked} is code that it would run; if you know it, say --allow-code")
    return config


def code_of(config: Config) -> str:
    """The first key of a configuration that names code of the user's, with its value; empty if none does."""
    for key, value in leaves(asdict(config)):
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, str) and ":" in item and key not in ADDRESSES | COLONS:
                return f"{key}={item}"
    return ""


def address_of(config: Config) -> str:
    """The first key of a configuration that names an address, which whoever goes on with it would call."""
    found = {"runtime.address": config.runtime.address, "tracking.uri": config.tracking.uri}
    return next((f"{key}={value}" for key, value in found.items() if value is not None), "")
