"""What a sweep's words span: each run with the words that apply to it, and what was left out of which.

A setting that only some of the compared strategies know, or that does something with some of the swept words only,
goes to those runs; a line says where it does not. `strategy.<name>.<hyper>` is meant for one strategy alone.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from fedfuse.audits.possible import reason
from fedfuse.config import registry
from fedfuse.config.compose import compose, expand, strategy_of, typed
from fedfuse.config.idle import Idle, idle
from fedfuse.config.schema import Config
from fedfuse.core.build import build_strategy
from fedfuse.core.scenario import prepare_scenario
from fedfuse.core.strategy import FusionStrategy
from fedfuse.data import FederatedData, prepare
from fedfuse.errors import UserError

Look = TypeVar("Look")


@dataclass
class Combination:
    """One run of a sweep.

    Attributes
    ----------
    words : list of str
        What applies to it, as for a single run.
    varied : list of str
        Those of the words that differ between runs.
    config : Config
    """

    words: list[str]
    varied: list[str]
    config: Config


def without_seed(job: Sequence[str]) -> tuple[str, ...]:
    """What runs have in common that differ in the seed alone."""
    return tuple(word for word in job if not word.startswith("seed="))


def composed(job: Sequence[str], known: dict[tuple[str, ...], Config]) -> Config:
    """Compose a run's configuration; runs that differ in the seed alone take Hydra's time once.

    Raises
    ------
    UserError
        For a mistake in it.
    """
    seeds = [word.removeprefix("seed=") for word in job if word.startswith("seed=")]
    key = without_seed(job)
    if key not in known or not all(seed.isdecimal() for seed in seeds):
        known[key] = compose(job)
    config = copy.deepcopy(known[key])
    config.seed = int(seeds[-1]) if seeds and seeds[-1].isdecimal() else config.seed
    return config


def combine(words: Sequence[str]) -> tuple[list[Combination], list[str]]:
    """Expand a sweep's words.

    Returns
    -------
    runs
        None twice: values of a setting that does nothing in a run do not multiply it.
    notes
        A line for each word that some runs go without.

    Raises
    ------
    UserError
        For a mistake in any of them, and for a word that no run can use.
    """
    jobs, known = expand(words), dict[tuple[str, ...], Config]()
    varies = [len({job[i] for job in jobs}) > 1 for i in range(len(words))]
    own = _Own(jobs)
    out: dict[tuple[str, ...], Combination] = {}
    used: set[str] = set()
    lost: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))  # word, why: in how many runs
    for job in jobs:
        kept, reasons = own.of(job)
        words_kept = [word for word in kept if word]
        while True:
            try:
                config, refused = composed(words_kept, known), None
                said = idle(config, typed=typed(words_kept))
            except Idle as error:
                refused = error
                said = dict(zip(error.keys, str(error).split("; "), strict=False))
            for i, word in enumerate(kept):
                key = word.split("=")[0].lstrip("+~")
                why = said.get(key) or said.get(f"{key}.name")
                if word and why and key != "strategy":
                    kept[i], reasons[i] = "", why.split("does nothing here: ")[-1]
            if (fewer := [word for word in kept if word]) == words_kept:
                if refused is not None:
                    raise refused
                break
            words_kept = fewer
        for i in range(len(job)):
            if kept[i]:
                used.add(words[i])
            else:
                lost[words[i]][reasons[i]] += 1
        differ = [kept[i] for i in range(len(words)) if varies[i] and kept[i]]
        out.setdefault(tuple(words_kept), Combination(words_kept, differ, config))
    for word, varied in zip(words, varies, strict=True):
        if word in lost and word not in used and varied:
            raise UserError(f"{word} does nothing in any of these runs: {'; '.join(lost[word])}")
    notes = [
        f"{word}: left out of {sum(why.values())} of {len(jobs)} runs ({'; '.join(why)})" for word, why in lost.items()
    ]
    if twice := len(jobs) - len(set(map(tuple, jobs))):
        notes.append(f"{twice} of {len(jobs)} runs are named twice, and run once")
    return list(out.values()), notes


class _Own:
    """Which of a job's words its strategy can use."""

    def __init__(self, jobs: Sequence[Sequence[str]]) -> None:
        names = sorted({strategy_of(job) or "fedavg" for job in jobs})
        self.hypers = {name: {field.name for field in fields(registry.schema(name))} for name in names}

    def without(self, hyper: str) -> set[str]:
        """The strategies that do not know a setting, if any other does."""
        unknown = {name for name, hypers in self.hypers.items() if hyper not in hypers}
        return unknown if len(unknown) < len(self.hypers) else set()

    def of(self, job: Sequence[str]) -> tuple[list[str], dict[int, str]]:
        """The job's words, "" in place of those that are not for it, and why."""
        name, kept, why = strategy_of(job) or "fedavg", [], dict[int, str]()
        for i, word in enumerate(job):
            key, _, value = word.partition("=")
            parts = key.split(".")
            if parts[0] == "strategy" and len(parts) == 3 and parts[1] in registry.listed():
                if parts[1] not in self.hypers:
                    raise UserError(f"{key}: {parts[1]} is not among the compared: {', '.join(self.hypers)}")
                if parts[1] != name:
                    word, why[i] = "", f"it is {parts[1]}'s"
                else:
                    word = f"strategy.{parts[2]}={value}"
            elif parts[0] == "strategy" and len(parts) == 2 and name in self.without(parts[1]):
                word, why[i] = "", f"{name} has no such setting"
            kept.append(word)
        return kept, why


def possible(runs: Sequence[Combination], look: Callable[[FusionStrategy], Look] | None = None) -> list[Look]:
    """Build each distinct strategy over its data, as a run would, so that none is refused after others have run.

    Parameters
    ----------
    runs : sequence of Combination
    look : callable, optional
        What to find out about each, in order.

    Raises
    ------
    UserError
        Naming the first that cannot run, and how many cannot.
    """
    found: list[Look] = []
    refused: list[str] = []
    last: tuple[str, Any] = ("", None)  # data of the run before: neighbours often share it
    distinct = {without_seed(run.words): run for run in reversed(runs)}
    for run in reversed(distinct.values()):
        config = run.config
        wanted = repr((config.data, config.partition, config.transfer, config.clients, config.seed))
        try:
            data = last[1] if last[0] == wanted else deal(config)
            last = (wanted, data)
            strategy = build_strategy(registry.entry(config.strategy.name), prepare_scenario(config, data))
            if look is not None:
                found.append(look(strategy))
        except UserError as error:
            refused.append(f"{' '.join(run.varied) or config.strategy.name}: {error}")
    if refused:
        rest = f" ({len(refused)} of {len(distinct)} combinations cannot run)" if len(refused) > 1 else ""
        raise UserError(refused[0] + rest)
    return found


def share_audits(runs: Sequence[Combination]) -> list[str]:
    """Leave each run of a sweep the audits (`audit=`) that mean something for it.

    Returns
    -------
    list of str
        A line for each audit that some runs go without.

    Raises
    ------
    UserError
        For an audit that no run has a use for.
    """
    asked = list(dict.fromkeys(name for run in runs for name in run.config.audit))
    found = possible(runs, lambda strategy: {name: reason(strategy, name) for name in asked})
    keys = list(dict.fromkeys(without_seed(run.words) for run in reversed(runs)))[::-1]  # the order of `possible`
    of = dict(zip(keys, found, strict=True))
    lines = []
    for name in asked:
        whys = [of[without_seed(run.words)][name] for run in runs if name in run.config.audit]
        if all(whys):
            raise UserError(f"audit={name} means nothing in any of these runs: {'; '.join(dict.fromkeys(whys))}")
        if lost := [why for why in whys if why]:
            lines.append(
                f"audit={name}: left out of {len(lost)} of {len(whys)} runs ({'; '.join(dict.fromkeys(lost))})"
            )
    for run in runs:
        run.config.audit = [name for name in run.config.audit if not of[without_seed(run.words)][name]]
    return lines


def deal(config: Config) -> FederatedData:
    """A run's data, dealt."""
    return prepare(config.data, config.partition, config.transfer, config.clients, config.seed)
