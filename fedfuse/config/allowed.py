"""What a configuration from the wire may say: registered names and plain numbers, by key; server and sites share it.

A configuration that a message or an order brings is somebody else's. Nothing in it may import code, open a file of the
asker's choice, or fetch anything: text is taken only under keys listed here, and only where it is a name that is
registered, or a word that cannot be a path. An operator may lift that for people who may run code there anyway
(`allow_code` in a site's policy, `fedfuse deploy server --allow-code`). Behind this list is a second lock: where code
is not allowed, `fedfuse.config.dotted.resolve` refuses to import whatever it is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedfuse.config import catalogue
from fedfuse.config.keys import leaves
from fedfuse.config.rules import WORDS
from fedfuse.config.schema import Config
from fedfuse.errors import Refused, UserError

WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_ .@*,\-]{0,99}", re.ASCII)  # a column, a pattern of layers: never a path
OPTION = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}", re.ASCII)
DATA = frozenset(catalogue.SOURCES) - {"custom"}
LAYOUTS = (frozenset(catalogue.LAYOUTS) | {"builtin"}) - {"custom"}
EXTRA = frozenset(
    {"chat", "features", "least", "length", "long", "per_source", "shape", "size", "sources", "test", "text", "train"}
)


def _architecture(value: Any) -> bool:
    base, at, width = str(value).partition("@")
    return base in {"auto", *catalogue.MODELS} and (not at or re.fullmatch(r"\d{1,3}(\.\d{1,3})?", width) is not None)


def _word(value: Any) -> bool:
    return WORD.fullmatch(value) is not None and ".." not in value


def _sentence(value: Any) -> bool:
    return _word(value.replace("?", "").replace("!", ""))


def _nothing(value: Any) -> bool:
    return not value


# every key that can hold text: what it may say. A value of None is always allowed; a list, item by item.
TEXTS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(WORDS, _word),  # which of them is allowed is said by `fedfuse.config.rules`, of whoever asks
    "data.name": DATA.__contains__,
    "data.layout": LAYOUTS.__contains__,
    "data.inputs": _word,
    "data.targets": _word,
    "data.groups": _word,
    "data.target": _word,
    "data.load": _nothing,
    "data.hub": _nothing,
    "data.root": _nothing,
    "partition.name": frozenset(catalogue.PARTITIONS).__contains__,
    "partition.sizes": frozenset({"dirichlet", "linear"}).__contains__,
    "transfer.source": (DATA | {"holdout", "noise"}).__contains__,
    "transfer.root": _nothing,
    "model.name": _architecture,
    "model.pool": _architecture,
    "model.build": _nothing,
    "model.path": _nothing,
    "model.lora_targets": _word,
    "model.checkpoint": _nothing,
    "distil.optimizer": _word,
    "train.pool": _word,
    "loss.name": frozenset(catalogue.LOSSES).__contains__,
    "loss.build": _nothing,
    "runtime.name": frozenset(catalogue.RUNTIMES).__contains__,
    "runtime.server_device": lambda value: re.fullmatch(r"auto|cpu|cuda(:\d{1,2})?", value) is not None,
    "runtime.address": _nothing,
    "runtime.state_dir": _nothing,
    "tracking.name": frozenset(catalogue.TRACKERS).__contains__,
    "tracking.uri": _nothing,
    "tracking.experiment": _word,
    "search.keys": _word,
    "search.edges": _word,
    "clock.name": "off".__eq__,  # a deployment's clock is real
    "clock.devices": _nothing,
    "clock.intervals": _nothing,
    "clock.tiers": _word,
    "audit": frozenset(catalogue.AUDITS).__contains__,
    "out": _nothing,
}
MOST = {"clients": 1_000_000, "runtime.retries": 100}  # numbers that something is done so often for
NEVER = {  # the only value, of any type
    "data.download": False,
    "model.checkpoints": {},
    "model.paths": {},
    "model.extra": {},
}
HTTP = re.compile(r"https?://[^\s/\\]\S*", re.ASCII)  # a tracker's address: nothing that is a file of the server's


def check_texts(values: Any, folders: Sequence[Path] | None = None) -> None:
    """Refuse a configuration, as it came from the wire, that says anything but registered names and numbers.

    Parameters
    ----------
    values : dict
        The configuration's values, nested by group.
    folders : sequence of Path, optional
        The server's, for an operator's order: `data.root` may lie below them, and `tracking.uri` be an address.
        None at a site, where an order names neither.

    Raises
    ------
    Refused
        Naming the key and the value.
    """
    for key, value in leaves(values):
        if folders is not None and key == "data.root" and isinstance(value, str):
            _below(value, folders)
            continue
        if folders is not None and key == "tracking.uri" and isinstance(value, str):
            if not HTTP.fullmatch(value):
                raise Refused(f"tracking.uri={value[:80]!r}: over the wire only http:// and https:// are taken")
            continue
        if key in MOST and isinstance(value, int) and value > MOST[key]:
            raise Refused(f"{key}={str(value)[:80]}: over the wire at most {MOST[key]} is taken")
        if not _allowed(key, value):
            raise Refused(f"{key}={str(value)[:80]!r}: over the wire only registered names and numbers are taken")


def _below(root: str, folders: Sequence[Path]) -> None:
    """Refuse a folder of the server's that is not the operators' to read, also where a link leads to it."""
    try:
        place = Path(root).expanduser().resolve()
    except (OSError, RuntimeError, ValueError):  # a loop of links, nobody's home, a zero byte
        place = Path("/")
    if not any(place.is_relative_to(folder) for folder in folders):
        said = ", ".join(map(str, folders)) or "none is given"
        raise Refused(f"data.root={root[:80]!r}: orders' data lie below the server's --data alone ({said})")


def no_attack(config: Config) -> None:
    """Refuse a configuration in which clients lie or are spied upon, wherever clients are sites.

    Raises
    ------
    UserError
    """
    if config.attack.on:
        raise UserError(f"attack={config.attack.name}: clients lie in simulations only; allowed in a deployment is off")
    if config.audit:
        raise UserError(
            f"audit={','.join(config.audit)}: what is true of sites is theirs alone; allowed in a deployment is none"
        )


def _allowed(key: str, value: Any) -> bool:
    for name, only in NEVER.items():
        if key == name or key.startswith(f"{name}."):
            return bool(value == only)
    if isinstance(value, list):
        return len(value) <= 10_000 and all(_allowed(key, item) for item in value)
    if value is None or isinstance(value, bool | int | float) or value == {}:
        return True
    if not isinstance(value, str):
        return False
    if key in TEXTS:
        return bool(TEXTS[key](value))
    group, _, rest = key.partition(".")
    if group == "strategy":
        return _sentence(value) and OPTION.fullmatch(rest) is not None
    if key == "data.extra.tokenizer":  # a name of ours; a directory would be a path
        return value == "bytes"
    if key.startswith("data.extra."):
        return rest.removeprefix("extra.") in EXTRA and _word(value)
    option = key.removeprefix("loss.options.")
    return option != key and OPTION.fullmatch(option) is not None and _word(value)
