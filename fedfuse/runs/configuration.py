"""A run's configuration as the file in its directory, and back, checked."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

import yaml

from fedfuse.config import registry
from fedfuse.config.allowed import leaves
from fedfuse.config.dotted import given
from fedfuse.config.files import DUMPER, LOADER, read_text
from fedfuse.config.rules import check
from fedfuse.config.schema import Config, without_gone
from fedfuse.errors import UserError

CODE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")  # pkg.mod:name
ADDRESSES = frozenset({"tracking.uri", "runtime.address", "runtime.device", "runtime.server_device"})


def as_yaml(config: Config) -> str:
    """The resolved configuration as YAML."""
    values = asdict(config)
    for group, key in (("model", "build"), ("data", "load")):  # plain text, whatever it carries
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
        raise UserError(f"{path}: not a run directory (no config.yaml)")
    try:
        raw = without_gone(yaml.load(read_text(file, 1 << 20), Loader=LOADER))
        name = raw["strategy"]["name"]
        base = OmegaConf.structured(Config)
        values = {k: v for k, v in raw.items() if k != "strategy"}
        config: Config = OmegaConf.to_object(OmegaConf.merge(base, values))  # type: ignore[assignment]
        schema = OmegaConf.structured(registry.schema(name))
        config.strategy = registry.typed(OmegaConf.to_object(OmegaConf.merge(schema, raw["strategy"])))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{file}: not a configuration of this fedfuse ({str(error).splitlines()[0]})") from error
    config.model.build, config.data.load = given(config.model.build), given(config.data.load)
    check(config)
    return config


def code_of(config: Config) -> str:
    """The first key of a configuration that names code of the user's, with its value; empty if none does."""
    for key, value in leaves(asdict(config)):
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, str) and CODE.fullmatch(item) and key not in ADDRESSES:
                return f"{key}={item}"
    return ""
