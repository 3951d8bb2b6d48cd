"""Tuning before a comparison: every strategy gets as many trials, scored on the clients' validation split.

A space is written in Hydra's grammar: `train.lr='tag(log,interval(0.001,0.1))' train.epochs='choice(1,2,5)'
search.trials=20`; comma lists stay the sweep. Trials of one strategy follow each other, so that each knows the ones
before; strategies are tuned side by side. What Optuna suggests depends on the seed and on earlier trials alone, so a
search that was interrupted comes to the same end as one that was not. Where choices have no more points than there are
trials, each point is tried once, in order.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from fedfuse.config import registry
from fedfuse.config.compose import compose, strategy_of
from fedfuse.config.files import write_text
from fedfuse.config.hydra_words import parsed
from fedfuse.core.devices import device_of
from fedfuse.errors import UserError, WorldError, first_line
from fedfuse.results.run_data import load
from fedfuse.results.setting import EDGE
from fedfuse.runs.combinations import without_seed
from fedfuse.runs.own_code import changed, hashes_of
from fedfuse.runs.parallel import Track, drive, shared_out

if TYPE_CHECKING:
    import optuna

SCORE = "accuracy/validation"
FOLDER = ".search"  # reports skip what starts with a dot: trials are no results
Key = tuple[str, ...]


def space(overrides: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Part the search space from the other words; empty without `search.trials`.

    Returns
    -------
    words, space
        The space as its text by key.

    Raises
    ------
    UserError
        If there are trials but no space, or Optuna is not installed.
    """
    from hydra.core.override_parser.types import ChoiceSweep, Sweep

    if not any(word.startswith("search.trials=") and not word.endswith("=null") for word in overrides):
        return list(overrides), {}
    words, found = [], {}
    for word in overrides:
        key, _, text = word.partition("=")
        try:
            value = parsed(word).value()
        except Exception as error:
            raise UserError(f"{word!r}: not of the form key=value ({first_line(error)})") from error
        if isinstance(value, Sweep) and not (isinstance(value, ChoiceSweep) and value.simple_form):
            found[key] = text
        else:
            words.append(word)
    if not found:
        raise UserError("search.trials: nothing to search; give a space, like train.lr='interval(0.001,0.1)'")
    if find_spec("optuna") is None:
        raise UserError("search.trials: needs optuna, not installed; pip install 'fedfuse[search]'")
    return words, found


def tune(jobs: Sequence[Sequence[str]], space: Mapping[str, str], root: Path, console: Console) -> dict[Key, list[str]]:
    """Tune every combination, at the first of its seeds, and return the best values as overrides.

    A trial that fails (say, one that diverged) is spent; the budget is the same for all.

    Parameters
    ----------
    jobs : sequence of sequence of str
        Overrides of the runs that are to be compared.
    space : mapping of str to str
        From `space`. A `strategy.<hyper>` is searched for the strategies that have it.
    root : Path
        Keeps the trials' run directories and Optuna's journal below `.search`, and `search.csv`.

    Raises
    ------
    UserError
        If the space does not fit, or `root` holds another search.
    WorldError
        If all trials of a combination failed.
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    first: dict[Key, Sequence[str]] = {}
    for job in jobs:
        first.setdefault(without_seed(job), job)
    plans = [_Plan(key, job, _own(space, job)) for key, job in first.items()]
    for plan in plans:  # several settings of one strategy are told apart by what not all have
        own = [word for word in plan.key if not all(word in other.key for other in plans)]
        plan.name = " ".join([plan.base.strategy.name, *(word for word in own if not word.startswith("strategy="))])
    if unused := set(space) - {name for plan in plans for name in plan.space}:
        raise UserError(f"{min(unused)}: no compared strategy has this key")
    (root / FOLDER).mkdir(parents=True, exist_ok=True)
    storage = JournalStorage(JournalFileBackend(str(root / FOLDER / "journal")))
    for plan in plans:
        plan.open(storage, root / FOLDER)
    runtime = shared_out(plans[0].base, len(plans))
    console.print(f"search: {len(plans)} × {plans[0].trials} trials on the clients' validation split")
    share = runtime.gpu_fraction if device_of(plans[0].base) == "cuda" else 0.0
    drive([plan.track(replace(runtime), console) for plan in plans], runtime, share)
    write_text(root / "search.csv", _table(plans))
    best = {plan.key: plan.best() for plan in plans}
    for plan in plans:
        for edge in plan.edges():
            console.print(f"note: {plan.name}: {edge}={plan.study.best_params[edge]}{EDGE}", markup=False)
    return best


def _own(space: Mapping[str, str], job: Sequence[str]) -> dict[str, str]:
    """The part of the space that a job's strategy has."""
    hyper = {f"strategy.{field.name}" for field in fields(registry.schema(strategy_of(job) or "fedavg"))}
    return {key: text for key, text in space.items() if not key.startswith("strategy.") or key in hyper}


class _Plan:
    """The search of one combination."""

    def __init__(self, key: Key, job: Sequence[str], space: dict[str, str]) -> None:
        self.key, self.space, self.name = key, space, ""
        self.job = [*job, "evaluate.validation=true", f"search.keys=[{','.join(space)}]"]
        self.distributions = {name: distribution(name, text) for name, text in space.items()}
        ends = {name: _end(found) for name, found in self.distributions.items()}
        self.base = compose([*self.job, *_words(ends)])  # a value that cannot be is refused now
        self.trials = int(self.base.search.trials or 1)
        self.points = grid(self.distributions, self.trials)
        self.trials = len(self.points) or self.trials
        if not self.base.data.validation > 0:
            raise UserError(f"data.validation={self.base.data.validation}: a search needs a validation split; allowed: "
                            f"more than 0")  # fmt: skip
        if not self.base.stop.on:  # only the end counts
            self.job += [f"evaluate.every={self.base.rounds}", "evaluate.seconds=null"]

    def open(self, storage: optuna.storages.BaseStorage, folder: Path) -> None:
        """Make the study, or find it."""
        import optuna

        name = ",".join(self.key)
        self.study = optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)
        setting = json.dumps({"space": self.space, "seed": self.base.seed}, sort_keys=True)
        if self.study.user_attrs.setdefault("setting", setting) != setting:
            raise UserError(
                f"out={folder.parent}: holds a search over {self.study.user_attrs['setting']}; choose another"
            )
        self.study.set_user_attr("setting", setting)
        code = hashes_of(self.base)
        if other := changed(self.study.user_attrs.get("code", code), code):
            raise UserError(
                f"out={folder.parent}: holds a search by other code of the {' and the '.join(other)}; "
                f"remove {folder}, choose another out, or bring the code back"
            )
        self.study.set_user_attr("code", code)
        for point in self.points:
            self.study.enqueue_trial(point, skip_if_exists=True)
        self.folder = folder / "-".join([self.base.strategy.name, _short(name)])

    def track(self, runtime: Any, console: Console) -> Track:
        """Trials one after another; first those that were begun and not finished."""
        import optuna
        from optuna.trial import TrialState

        if not self.space:
            return  # nothing of this strategy is searched
        begun = self.study.get_trials(states=(TrialState.RUNNING,))
        while True:
            if begun:
                trial: Any = begun.pop(0)
            elif (spent := sum(one.state != TrialState.WAITING for one in self.study.trials)) < self.trials:
                random = [self.base.seed, spent]
                seed = int.from_bytes(_digest(repr(random))[:4], "little")
                self.study.sampler = optuna.samplers.TPESampler(seed=seed)
                trial = self.study.ask(self.distributions)
            else:
                return
            config = compose([*self.job, *_words(trial.params)])
            config.runtime, config.out = runtime, str(self.folder / f"trial-{trial.number}")
            summary = Path(config.out) / "summary.json"
            error = None if summary.exists() else (yield config)
            score = math.nan if error else load(config.out).final.get(SCORE, math.nan)
            if math.isnan(score):
                self.study.tell(trial.number, state=TrialState.FAIL)
            else:
                self.study.tell(trial.number, score)
            said = str(error) if error else f"{100 * score:.2f} %"
            named = " ".join(_words(trial.params))
            console.print(f"{self.name} trial {trial.number}: {named}: {said}", markup=False)

    def best(self) -> list[str]:
        """Overrides of the best trial, the first of equals."""
        keys = f"search.keys=[{','.join(self.space)}]"
        if not self.space:
            return [keys]
        try:
            found = [*_words(self.study.best_trial.params), keys]
        except ValueError as error:
            raise WorldError(f"search: all trials of {','.join(self.key)} failed") from error
        return [*found, f"search.edges=[{','.join(edges)}]"] if (edges := self.edges()) else found

    def edges(self) -> list[str]:
        """Keys whose best value is the least or the largest that could be chosen, where another was tried beside it."""
        tried = {name: {trial.params.get(name) for trial in self.study.trials} for name in self.distributions}
        best = self.study.best_params
        return [name for name, kind in self.distributions.items() if best[name] in _ends(kind) and len(tried[name]) > 1]


def distribution(name: str, text: str) -> optuna.distributions.BaseDistribution:
    """Optuna's distribution for a text in Hydra's grammar.

    Raises
    ------
    UserError
        If it is none.
    """
    from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, QuotedString, RangeSweep
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value: Any = parsed(f"{name}={text}").value()
    log = "log" in getattr(value, "tags", ())
    try:
        if isinstance(value, ChoiceSweep):
            return CategoricalDistribution([v.text if isinstance(v, QuotedString) else v for v in value.list])  # type: ignore[misc]
        if isinstance(value, IntervalSweep):
            low, high = value.start, value.end
            if isinstance(low, int) and isinstance(high, int):
                return IntDistribution(low, high, log=log)
            return FloatDistribution(float(low), float(high), log=log)  # type: ignore[arg-type]
        if isinstance(value, RangeSweep):
            return CategoricalDistribution([int(v) if isinstance(v, int) else float(v) for v in value.range()])
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}={text}: {error}") from error
    raise UserError(f"{name}={text}: allowed are interval(low,high), range(from,to,step), choice(a,b,…), tag(log,…)")


def grid(found: Mapping[str, optuna.distributions.BaseDistribution], trials: int) -> list[dict[str, Any]]:
    """All points of a space of choices, the last key's fastest; none if there are more of them than trials."""
    choices: list[Any] = [getattr(one, "choices", ()) for one in found.values()]
    if not choices or not all(choices) or math.prod(map(len, choices)) > trials:
        return []
    return [dict(zip(found, values, strict=True)) for values in itertools.product(*choices)]


def _end(found: Any) -> Any:
    return found.choices[0] if hasattr(found, "choices") else found.low


def _ends(found: Any) -> set[float]:
    """The least and the largest number of a space; none of words, or of two choices, which both are ends."""
    if (choices := getattr(found, "choices", None)) is None:
        return {found.low, found.high}
    numbers = [value for value in choices if isinstance(value, int | float) and not isinstance(value, bool)]
    return {min(numbers), max(numbers)} if len(numbers) > 2 else set()


def _words(params: Mapping[str, Any]) -> list[str]:
    return [f"{key}={'null' if value is None else value}" for key, value in params.items()]


def _digest(text: str) -> bytes:
    import hashlib

    return hashlib.sha256(text.encode()).digest()


def _short(text: str) -> str:
    return _digest(text).hex()[:8]


def _table(plans: Sequence[_Plan]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["strategy", "trial", "state", SCORE, "values", "combination"])
    for plan in plans:
        for trial in plan.study.trials:
            score = "" if trial.value is None else trial.value
            row = [plan.base.strategy.name, trial.number, trial.state.name.lower(), score]
            writer.writerow([*row, " ".join(_words(trial.params)), " ".join(plan.key)])
    return out.getvalue()
