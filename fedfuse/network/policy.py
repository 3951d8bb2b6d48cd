"""What a site allows: a small file that the site's own operator writes; everything else is refused, by name."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedfuse.config.catalogue import SOURCES
from fedfuse.config.schema import Config, DataConfig
from fedfuse.errors import Refused, UserError, nearest
from fedfuse.train.ledger import Limits

SELECTED = frozenset({"name", "layout", "inputs", "targets", "groups", "extra", "classes"})
SPARE = 50  # trainings or evaluations of a run that may be asked for again: replies are lost, servers and nodes killed


def layouts_of(name: str) -> frozenset[str]:
    """How data of that name is read: its own reader."""
    source = SOURCES.get(name)
    return frozenset({"builtin"} | ({source.layout} if source else set()))


@dataclass(frozen=True)
class Policy:
    """Limits of one site; the default allows every registered strategy and no foreign code.

    Attributes
    ----------
    strategies, data : tuple of str or None
        Names that may run; None is all.
    max_rounds, max_epochs, max_steps : int or None
        Upper limits: of a run's rounds, and of the passes over examples and the steps of an optimiser that one message
        may ask for, counted as they are made, whatever a strategy calls them.
    max_runs : int or None
        Runs whose folders this site keeps at once; a new one is refused until some are deleted.
    max_disk : int or None
        MB that this site keeps for all runs together, its audit log included; then nothing more is answered.
    min_examples : int
        Least number of training examples this site joins with.
    max_held_out : float or None
        Largest share of its examples that a run may keep for validation and for the site's own test: with them it is
        scored in every evaluation, and what scores give away no differential privacy covers.
    require_dp : bool
        Refuse runs without differential privacy, and those that choose columns, unless `select` does.
    require_secure : bool
        Refuse runs without secure aggregation; in a run with it, no summed record leaves unmasked anyway.
    max_epsilon, max_delta, min_noise : float or None
        With differential privacy: ε that this site's data may be spent on, over all runs ever, at `max_delta` or,
        without one, at a run's own δ and 10⁻⁵ at most; largest δ of a run; least noise multiplier σ.
    select : dict or None
        What of this site's data is used, in place of what a run says: `name`, `layout`, `inputs`, `targets`, `groups`,
        `extra`; and `classes`, the names that its labels may have, whether they occur or not: a run's task has to
        have them all, so that no task asks for one. Needed with `require_dp` where a site has data of its own.
    allow_code : bool
        Let a run name Python callables or files of this site (`model.build`, `data.load`, `loss.build`,
        `model.checkpoint`). Only for runs of people who may run code here anyway.
    """

    strategies: tuple[str, ...] | None = None
    data: tuple[str, ...] | None = None
    max_rounds: int | None = None
    max_epochs: int | None = None
    max_steps: int | None = None
    max_runs: int | None = 1000
    max_disk: int | None = 20480
    min_examples: int = 1
    max_held_out: float | None = None
    require_dp: bool = False
    require_secure: bool = False
    max_epsilon: float | None = None
    max_delta: float | None = None
    min_noise: float | None = None
    select: dict[str, Any] | None = None
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
        if self.data is not None and self.select is None and config.data.layout not in layouts_of(config.data.name):
            raise Refused(f"site policy: data={config.data.name} is not read as data.layout={config.data.layout}")
        if self.max_rounds is not None and config.rounds > self.max_rounds:
            raise Refused(f"site policy: rounds={config.rounds}; allowed: at most {self.max_rounds}")
        if self.max_epochs is not None and config.train.epochs > self.max_epochs:
            raise Refused(f"site policy: train.epochs={config.train.epochs}; allowed: at most {self.max_epochs}")
        held_out = round(config.data.validation + config.data.personal_test, 9)  # 0.1 + 0.2 is 0.3
        if self.max_held_out is not None and held_out > self.max_held_out:
            keys = f"data.validation={config.data.validation:g} and data.personal_test={config.data.personal_test:g}"
            raise Refused(f"site policy: {keys}; allowed: {self.max_held_out:g} together")
        if self.require_dp and not config.privacy.by_example:
            has = (
                "only clients' (privacy.level=client), from a server that sees the updates"
                if config.privacy.on
                else "none"
            )
            raise Refused(f"site policy: differential privacy is required, the run has {has}")
        columns = [key for key in ("inputs", "targets", "groups") if getattr(config.data, key) is not None]
        if self.require_dp and self.select is None and columns:  # whether its classes are such and such, no noise hides
            keys = ", ".join(f"data.{key}={getattr(config.data, key)}" for key in columns)
            raise Refused(f"site policy: {keys}; allowed: with require_dp, the columns of [select]")
        if self.require_secure and not config.secure.on:
            raise Refused("site policy: secure aggregation is required, the run has none (secure=on)")
        asked = config.privacy
        if asked.on:
            # a run without an epsilon has no end to its budget; what is really spent is checked with every training
            if self.max_epsilon is not None and (asked.epsilon is None or asked.epsilon > self.max_epsilon):
                raise Refused(f"site policy: privacy.epsilon={asked.epsilon}; allowed: at most {self.max_epsilon:g}")
            if self.max_delta is not None and asked.delta is not None and asked.delta > self.max_delta:
                raise Refused(f"site policy: privacy.delta={asked.delta:g}; allowed: at most {self.max_delta:g}")
            if self.min_noise is not None and asked.noise is not None and asked.noise < self.min_noise:
                raise Refused(f"site policy: privacy.noise={asked.noise:g}; allowed: at least {self.min_noise:g}")

    def check_round(self, round: int) -> None:
        """Refuse a message of a round that no run may have.

        Raises
        ------
        Refused
            With the round and the limit.
        """
        if self.max_rounds is not None and not 0 <= round <= self.max_rounds:
            raise Refused(f"site policy: round {round}; allowed: at most {self.max_rounds}")

    def check_answers(self, answered: int, phases: int, kind: str = "trainings") -> None:
        """Refuse to train, or to be evaluated, more often in a run than its rounds can ask for.

        Raises
        ------
        Refused
            With the number of them and the limit.
        """
        if self.max_rounds is not None and answered > (most := (self.max_rounds + 1) * phases + SPARE):
            raise Refused(f"site policy: {answered} {kind} in this run; allowed: at most {most}")

    def selected(self, data: DataConfig) -> DataConfig:
        """What of this site's data is used: what the site says, if it says so."""
        if self.select is None:
            return data
        plain: dict[str, Any] = dict.fromkeys(("inputs", "targets", "groups"))
        chosen = {key: value for key, value in self.select.items() if key != "classes"}
        return replace(data, **{**plain, "layout": "builtin", "extra": {}, **chosen}, load=None, hub=None)

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Classes that the labels of this site's own data may have, as the site says.

        Raises
        ------
        UserError
            If privacy is required and the site says none: a task could ask for what its rows have.
        """
        said = (self.select or {}).get("classes")
        if said is None and self.require_dp:
            raise UserError("site policy: require_dp needs classes = [...] in [select], all that labels here may be")
        return None if said is None else tuple(said)

    @property
    def limits(self) -> Limits:
        """What the ledger of this site's data allows."""
        return Limits(self.max_epsilon, self.max_delta, self.min_noise)

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
        elif key == "select":
            good = value is None or (isinstance(value, dict) and set(value) <= SELECTED)
            good = good and (value is None or isinstance(value.get("extra", {}), dict))
            named = value.get("classes") if good and value is not None else None
            good = good and (named is None or (isinstance(named, list) and all(isinstance(v, str) for v in named)))
            allowed = f"a table of {', '.join(sorted(SELECTED))}"
        elif key in ("max_epsilon", "max_delta", "min_noise", "max_held_out"):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            good, allowed = value is None or (number and 0 < value < float("inf")), "a number above 0"
        elif key in ("require_dp", "require_secure", "allow_code"):
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
