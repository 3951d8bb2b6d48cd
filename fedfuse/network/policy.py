"""What a site allows: a small file that the site's own operator writes; everything else is refused, by name."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedfuse.config.schema import Config
from fedfuse.errors import Refused, UserError, nearest


@dataclass(frozen=True)
class Policy:
    """Limits of one site; the default allows every registered strategy and no foreign code.

    Attributes
    ----------
    strategies, data : tuple of str or None
        Names that may run; None is all.
    max_rounds, max_epochs : int or None
        Upper limits of a run.
    min_examples : int
        Least number of training examples this site joins with.
    require_dp : bool
        Refuse runs without differential privacy.
    allow_code : bool
        Let a run name Python callables or files of this site (`model.build`, `data.load`, `loss.build`,
        `model.checkpoint`). Only for runs of people who may run code here anyway.
    """

    strategies: tuple[str, ...] | None = None
    data: tuple[str, ...] | None = None
    max_rounds: int | None = None
    max_epochs: int | None = None
    min_examples: int = 1
    require_dp: bool = False
    allow_code: bool = False

    def check(self, config: Config) -> None:
        """Refuse a run that this site does not take part in.

        Raises
        ------
        Refused
            Naming the key, the value and what the policy allows.
        """
        name = config.strategy.name
        if self.strategies is not None and name not in self.strategies:
            raise Refused(f"site policy: strategy={name}; allowed: {', '.join(self.strategies) or 'none'}")
        if self.data is not None and config.data.name not in self.data:
            raise Refused(f"site policy: data={config.data.name}; allowed: {', '.join(self.data) or 'none'}")
        if self.max_rounds is not None and config.rounds > self.max_rounds:
            raise Refused(f"site policy: rounds={config.rounds}; allowed: at most {self.max_rounds}")
        if self.max_epochs is not None and config.train.epochs > self.max_epochs:
            raise Refused(f"site policy: train.epochs={config.train.epochs}; allowed: at most {self.max_epochs}")
        if self.require_dp and not config.privacy.on:
            raise Refused("site policy: differential privacy is required, the run has none")

    def check_examples(self, examples: int) -> None:
        """Refuse to join with too few training examples.

        Raises
        ------
        Refused
            With the number and the limit.
        """
        if examples < self.min_examples:
            raise Refused(f"site policy: {examples} training examples; at least {self.min_examples} are needed")

    def as_json(self) -> str:
        """Write it for the site's own processes."""
        return json.dumps(dataclasses.asdict(self))


def policy_from(values: dict[str, Any], where: str) -> Policy:
    """Build a policy from plain values.

    Raises
    ------
    UserError
        For an unknown key or a value of the wrong type.
    """
    known = {field.name: field for field in dataclasses.fields(Policy)}
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{where}: {key}: no such key; {nearest(key, known)}")
        if key in ("strategies", "data"):
            good = value is None or (isinstance(value, list) and all(isinstance(v, str) for v in value))
            allowed = "a list of names"
        elif key in ("require_dp", "allow_code"):
            good, allowed = isinstance(value, bool), "true or false"
        else:
            good = value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0)
            allowed = "a whole number, at least 0"
        if not good:
            raise UserError(f"{where}: {key}={value!r}; allowed is {allowed}")
    chosen: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return Policy(**chosen)


def read_policy(path: Path | None) -> Policy:
    """Read a site's policy file (TOML); without one, the default.

    Raises
    ------
    UserError
        If it cannot be read.
    """
    if path is None:
        return Policy()
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--policy {path}: {error}") from error
    return policy_from(values, f"--policy {path}")
