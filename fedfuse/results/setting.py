"""What distinguishes runs: repeats of one configuration, strategies, and differences that are not theirs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from fedfuse.config.keys import leaves, said
from fedfuse.errors import printable
from fedfuse.results.run_data import RunRecord

# Keys that by the platform's promises cannot change a result, or only name places.
WITHOUT_EFFECT = (
    "seed",
    "out",
    "overwrite",
    "runtime",
    "tracking",
    "audit",
    "search.edges",
    "hydra",
    "data.root",
    "data.download",
    "evaluate.every",
    "evaluate.batch_size",
    "evaluate.validation",
)
# Of those, the ones that still change how long a run takes or at which rounds it is scored.
RUNTIME = ("name", "workers", "device", "server_device", "address")
LONGEST = 60  # letters of a value
EDGE = " (an end of what was searched: a better value may lie beyond)"
ON_THE_CLOCK = (*(f"runtime.{key}" for key in RUNTIME), "evaluate.every")


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed.

    Parameters
    ----------
    label
        The strategy's name, with the hyper-parameters that set it apart where the name alone does not.
    setting
        Everything else in which the compared groups differ, as `key=value, …`; empty where nothing does.
    runs
        One finished run per seed, in seed order.
    unfinished
        Runs that go on, failed or were interrupted. They enter no mean.
    """

    label: str
    setting: str
    strategy: str
    runs: tuple[RunRecord, ...]
    unfinished: tuple[RunRecord, ...] = ()

    @property
    def name(self) -> str:
        """Its label, and its setting where there are several."""
        return with_setting(self.label, self.setting)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of the finished runs."""
        return tuple(run.seed for run in self.runs)


def with_setting(label: str, setting: str) -> str:
    """Name a strategy in one of several settings."""
    return f"{label} at {setting}" if setting else label


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Turn nested groups into dotted keys; lists stay values. `strategy: x` reads as `strategy.name: x`."""
    return {"strategy.name" if key == "strategy" else key: value for key, value in leaves(config) if value != {}}


def _flat(run: RunRecord) -> dict[str, Any]:
    """A run's configuration, what the user's own data held, and what its code was: names of neither tell."""
    flat = flatten(run.config)
    if flat.get("data.layout", "builtin") != "builtin" and (content := str(run.environment.get("data", ""))[:12]):
        flat["data.content"] = content
    return flat | {f"{name}.code": value for name, value in hashes_in(run.environment).items()}


def hashes_in(environment: Mapping[str, Any]) -> dict[str, str]:
    """The sha256 of a run's code, by what it is for; nothing where none is kept."""
    code = environment.get("code")
    return {str(name): str(value) for name, value in code.items()} if isinstance(code, Mapping) else {}


def group(runs: Iterable[RunRecord]) -> tuple[list[Group], list[str]]:
    """Gather repeats of one configuration.

    Returns
    -------
    groups
        In the order of setting, then strategy name.
    notes
        One line per run left out because another has the same configuration and seed.
    """
    notes: list[str] = []
    by_config: dict[str, dict[int, RunRecord]] = {}
    flats: dict[str, dict[str, Any]] = {}
    for run in runs:
        flat = {key: value for key, value in _flat(run).items() if not _within(key, WITHOUT_EFFECT)}
        key = repr(sorted((name, repr(value)) for name, value in flat.items()))
        flats[key] = flat
        seeds = by_config.setdefault(key, {})
        other = seeds.get(run.seed)
        if other is None:
            seeds[run.seed] = run
            continue
        kept, dropped = (run, other) if run.summary and not other.summary else (other, run)
        seeds[run.seed] = kept
        notes.append(f"{dropped.dir} left out: same configuration and seed as {kept.dir}")

    distinct = _differing(flats.values())
    tuned = _tuned(flats.values())
    outside = [name for name in distinct if not name.startswith("strategy.") and name not in tuned]
    settings = {key: _say(flat, outside) for key, flat in flats.items()}
    groups = []
    for key, flat in flats.items():
        name = str(flat.get("strategy.name", "?"))
        peers = [
            other
            for place, other in flats.items()
            if settings[place] == settings[key] and str(other.get("strategy.name", "?")) == name
        ]
        hyper = [part for part in _differing(peers) if part.startswith("strategy.") or part in tuned]
        label = " ".join([name, *(f"{part.removeprefix('strategy.')}={_value(flat, part)}" for part in hyper)])
        ordered = [run for _, run in sorted(by_config[key].items())]
        groups.append(
            Group(
                label,
                settings[key],
                name,
                tuple(run for run in ordered if run.status == "finished"),
                tuple(run for run in ordered if run.status != "finished"),
            )
        )
    return sorted(groups, key=lambda one: (one.setting, one.label)), notes


def differences(runs: Sequence[RunRecord]) -> list[str]:
    """Name every key, other than strategy, its hyper-parameters and the seed, in which `runs` differ.

    Returns
    -------
    list of str
        One line per key: its values, with the number of runs that have each.
    """
    flats = [_flat(run) for run in runs]
    tuned, lines = _tuned(flats), []
    for name in _differing(flats):
        if name in tuned:
            continue
        clock = _within(name, ON_THE_CLOCK)
        if name.startswith("strategy.") or (_within(name, WITHOUT_EFFECT) and not clock):
            continue
        counts: dict[str, int] = {}
        for flat in flats:
            value = _value(flat, name)
            counts[value] = counts.get(value, 0) + 1
        shown = sorted(counts.items())
        listed = ", ".join(f"{value} ({count} runs)" for value, count in shown[:8])
        more = f", … {len(shown) - 8} more values" if len(shown) > 8 else ""
        effect = " (changes times or scored rounds, not results)" if clock else ""
        lines.append(f"{_key(name)}: {listed}{more}{effect}".replace("(1 runs)", "(1 run)"))
    return lines


def tuning(runs: Sequence[RunRecord]) -> list[str]:
    """Say, for every key that a search tuned, what each strategy got; one line per key."""
    lines = []
    flats = [flatten(run.config) for run in runs]
    for name in sorted(_tuned(flats) & {name for flat in flats for name in flat} - {"search.keys"}):
        values: dict[str, list[str]] = {}
        for flat in flats:
            if name in flat and flat.get("search.keys"):
                found = values.setdefault(str(flat.get("strategy.name", "?")), [])
                edges = flat.get("search.edges")
                value = _value(flat, name) + (EDGE if isinstance(edges, list) and name in edges else "")
                found += [value] if value not in found else []
        trials = sorted({str(flat.get("search.trials")) for flat in flats if flat.get("search.keys")})
        listed = "; ".join(f"{strategy} {', '.join(found)}" for strategy, found in values.items())
        lines.append(
            f"Tuned on the clients' validation split, {' / '.join(trials)} trials a strategy: {_key(name)}: {listed}"
        )
    return lines


def swept(flats: Iterable[Mapping[str, Any]]) -> list[str]:
    """Keys that a sweep may have varied: those that can change a result, beside strategy, seed and what was tuned.

    A strategy's hyper-parameter counts if runs of one strategy differ in it.
    """
    flats = list(flats)
    tuned, found = _tuned(flats), []
    for name in _differing(flats):
        if name == "strategy.name" or name in tuned or _within(name, WITHOUT_EFFECT):
            continue
        values: dict[str, set[str]] = {}
        for flat in flats:
            if name in flat:
                values.setdefault(str(flat.get("strategy.name")), set()).add(repr(flat[name]))
        if not name.startswith("strategy.") or any(len(seen) > 1 for seen in values.values()):
            found.append(name)
    return found


def _tuned(flats: Iterable[Mapping[str, Any]]) -> set[str]:
    """Keys that a search chose, so that they belong to the strategy like its hyper-parameters."""
    listed = [flat.get("search.keys") for flat in flats]
    found = {str(key) for keys in listed if isinstance(keys, list) for key in keys}
    return found | {f"{key}.name" for key in found} | {"search.keys"} if found else set()


def _differing(flats: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the keys whose value is not the same everywhere; a missing key differs from a present one."""
    flats = list(flats)
    names = dict.fromkeys(name for flat in flats for name in flat)
    return [name for name in names if len({repr(flat.get(name, ...)) for flat in flats}) > 1]


def _within(name: str, keys: Iterable[str]) -> bool:
    return any(name == key or name.startswith(f"{key}.") for key in keys)


def _say(flat: Mapping[str, Any], names: Iterable[str]) -> str:
    return ", ".join(f"{_key(name)}={_value(flat, name)}" for name in names)


def _key(name: str) -> str:
    return name.removesuffix(".name")


def _value(flat: Mapping[str, Any], name: str) -> str:
    if name not in flat:
        return "absent"
    text = printable(said(flat[name]))
    if len(text) <= LONGEST:
        return text
    return f"{text[:20]}…{text[-30:]} #{sha256(text.encode()).hexdigest()[:6]}"  # two that are cut alike stay two
