"""What stands on the report page, put together from gathered evidence."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from fedfuse.config.clock_keys import MANY
from fedfuse.config.idle import holds
from fedfuse.config.keys import said
from fedfuse.config.schema import Config, PartitionConfig, known
from fedfuse.errors import UserError, printable
from fedfuse.results import curves, figures, leaks, parameters, sections, texts, virtual, wording
from fedfuse.results.curves import Series
from fedfuse.results.measures import Measures, gather, label_counts, similarities
from fedfuse.results.rerun import reproduce
from fedfuse.results.run_data import RunRecord
from fedfuse.results.setting import Group, flatten, group
from fedfuse.results.table import TEXTS, WHEN, Row, against_nothing_sent, notes, row

MOST_SETTINGS = 6  # that get figures; hundreds of settings would otherwise make a page nobody opens
MOST_MAPS = 6
MOST_SWEPT = 6
MOST_TIMELINES = 6  # of strategies


@dataclass
class Page:
    """Everything the template shows, unescaped except for figures."""

    title: str
    subtitle: str
    made: str
    counts: str
    notes: list[str]
    settings: list[dict[str, Any]]
    swept: list[dict[str, Any]]
    maps: list[dict[str, Any]]
    similarity: list[dict[str, Any]]
    answers: sections.Table | None
    runs: sections.Table
    skipped: list[str]
    shared: list[tuple[str, str]]
    environment: list[tuple[str, str]]
    details: list[dict[str, Any]]
    rows: list[Row]  # the comparison, for the other formats


def build(runs: Sequence[RunRecord], skipped: Sequence[str] = ()) -> tuple[Page, list[RunRecord], list[str]]:
    """Gather what the page shows.

    Returns
    -------
    page, runs, skipped
        The content, the runs in it, and `skipped` with the runs that turned out to be unreadable.

    Raises
    ------
    UserError
        There is no run to show.
    """
    skipped = list(skipped)
    evidence: dict[Path, Measures] = {}
    for run in runs:
        try:
            evidence[run.dir] = gather(run)
        except UserError as error:
            skipped.append(str(error))
    runs = [run for run in runs if run.dir in evidence]
    if not runs:
        raise UserError("no run to report on: " + ("; ".join(skipped[:3]) or "no directory was given"))
    places = run_names(runs)
    groups, _ = group(runs)
    names = list(dict.fromkeys(one.label for one in groups))
    everywhere: list[tuple[Group, Series]] = []
    for one in groups:
        done, open_ = ([evidence[run.dir] for run in part] for part in (one.runs, one.unfinished))
        everywhere.append((one, Series(names.index(one.label), one.label, tuple(done), tuple(open_))))
    settings = list(dict.fromkeys(one.setting for one in groups))
    parts = []
    every: list[Row] = []
    rows_of: dict[int, Row] = {}
    for k, setting in enumerate(settings):
        part = [(one, series) for one, series in everywhere if one.setting == setting]
        rows = [row(one) for one, _ in part]
        every += rows
        rows_of |= {id(one): its for (one, _), its in zip(part, rows, strict=True)}
        parts.append(_section(k, setting, part, rows, drawn=k < MOST_SETTINGS))
    lines = notes(runs) + _unequal_partitions(evidence.values(), places)
    if len(settings) > MOST_SETTINGS:
        lines.append(f"{len(settings)} settings: figures are drawn for the first {MOST_SETTINGS}, tables for all.")
    shared, own = _configurations(runs)
    page = Page(
        title=_title(names),
        subtitle=_subtitle(runs),
        made=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC by fedfuse {_version()}",
        counts=_counts(runs, skipped),
        notes=[printable(line) for line in lines],
        settings=parts,
        swept=_swept(everywhere, rows_of),
        maps=_maps(everywhere),
        similarity=_similarity(everywhere),
        answers=texts.answers(runs, places),
        runs=sections.runs([(series, one.setting) for one, series in everywhere], list(evidence.values()), places),
        skipped=[printable(line) for line in skipped],
        shared=shared,
        environment=_environment(runs),
        details=[
            {
                "name": printable(f"{places[run.dir]}: {run.strategy}, seed {run.seed}, {run.status}"),
                "command": printable(reproduce(run)),
                "config": own[k],
            }
            for k, run in enumerate(runs)
        ],
        rows=every,
    )
    return page, runs, skipped


def _section(
    k: int, setting: str, part: Sequence[tuple[Group, Series]], rows: Sequence[Row], drawn: bool
) -> dict[str, Any]:
    """Return what stands under one setting."""
    groups, series = [one for one, _ in part], [one for _, one in part]
    return {
        "title": f"Setting: {printable(setting)}" if setting else "Comparison",
        "verdicts": sections.verdicts(rows, groups) + against_nothing_sent([run for one in groups for run in one.runs]),
        "table": sections.comparison(rows, groups, series),
        "texts": texts.scores(groups),
        "intervals": sections.intervals(rows),
        "best": sections.best(rows),
        "legend": [{"index": one.index, "label": printable(one.label), "press": True} for one in series],
        "figures": _figures(k, series) if drawn else [],
        "targets": sections.to_targets(series),
        "virtual": virtual.table(series),
        "tests": sections.tests(groups),
        "leaks": leaks.table(series),
        "leaking": _leaking(k, series) if drawn else [],
    }


def _figures(k: int, series: Sequence[Series]) -> list[dict[str, Any]]:
    shown: list[tuple[str, str | None, str, list[dict[str, Any]]]] = []
    brackets = wording.BRACKETS if any(not one.finished for one in series) else ""
    for name, metric in (("Global", "accuracy/global"), ("Personal", "accuracy/personal")):
        tag = metric.partition("/")[2]
        shown.append((f"{name} accuracy by round", curves.by_round(series, metric, f"f{k}r{tag}"), wording.BAND, []))
        shown.append((f"{name} accuracy by bytes", curves.by_bytes(series, metric, f"f{k}b{tag}"), wording.BYTES, []))
        timed = curves.by_virtual_time(series, metric, f"f{k}v{tag}")
        shown.append((f"{name} accuracy by virtual time", timed, wording.BAND, []))
        if name == "Global":
            spread = figures.client_spread(series, f"f{k}c")
            shown.append(("Clients, one by one", spread, wording.CLIENTS + brackets, []))
    for metric in TEXTS:
        title, tag = wording.worded(metric).capitalize(), metric.partition("/")[2]
        shown.append((f"{title}, by round", curves.by_round(series, metric, f"f{k}n{tag}"), wording.BAND, []))
    shown.append(("Training loss by round", curves.by_round(series, "loss/train", f"f{k}l"), wording.BAND, []))
    bars, phases = figures.time_breakdown(series, f"f{k}t")
    legend = [{"index": i, "label": printable(name), "press": False} for i, name in enumerate(phases)]
    finals = {metric for one in series for run in one.everything for metric in run.run.final}
    learns = wording.LESSON if any(f"accuracy/personal_{moment}" in finals for moment in WHEN) else ""
    shown.append(("Where the time went", bars, wording.TIME + learns + brackets, legend))
    shown.append(("Staleness", virtual.staleness(series, f"f{k}y"), virtual.STALE, []))
    shown.append(("Fairness by speed", virtual.fairness(series, f"f{k}g"), virtual.FAIR, []))
    for i, one in enumerate(series[:MOST_TIMELINES]):
        drawn = virtual.timeline(one, f"f{k}u{i}")
        shown.append((f"A round of {one.label}", drawn, virtual.TIMELINE, []))
    return [_shown(title, drawing, caption, legend) for title, drawing, caption, legend in shown if drawing]


def _leaking(k: int, series: Sequence[Series]) -> list[dict[str, Any]]:
    shown = [("Membership", leaks.curves(series, f"f{k}o"), leaks.CURVE)]
    for i, one in enumerate(series[:MOST_MAPS]):
        shown.append((f"Painted from soft labels: {one.label}", leaks.paintings(one, f"f{k}q{i}"), leaks.PAINTED))
    return [_shown(title, drawing, caption) for title, drawing, caption in shown if drawing]


def _shown(title: str, drawing: str, caption: str, legend: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    from markupsafe import Markup

    # Drawn by matplotlib and taken apart and written again by fedfuse.results.svg, which escapes text.
    return {
        "title": printable(title),
        "svg": Markup(drawing),
        "caption": printable(caption),
        "legend": list(legend),
    }


def _swept(everywhere: Sequence[tuple[Group, Series]], rows: Mapping[int, Row]) -> list[dict[str, Any]]:
    """Return, per swept key, figures of accuracy over its values."""
    found = parameters.over_parameters([(one, series.index, rows[id(one)]) for one, series in everywhere])
    shown = []
    for k, one in enumerate(found[:MOST_SWEPT]):
        drawings = [(title, parameters.draw(one, metric, f"w{k}{metric[-1]}")) for metric, title in one.titles.items()]
        legend = [{"index": line.index, "label": printable(line.label), "press": True} for line in one.lines]
        figures = [_shown(title, drawing, wording.SWEPT) for title, drawing in drawings if drawing]
        if figures:
            shown.append({"title": printable(one.title), "legend": legend, "figures": figures})
    return shown


def _maps(everywhere: Sequence[tuple[Group, Series]]) -> list[dict[str, Any]]:
    """Draw the label counts of the first seed of each setting (strategies share them)."""
    shown: dict[tuple[str, Any], dict[str, Any]] = {}
    for one, series in everywhere:
        for run in series.everything[:1]:
            key = (one.setting, run.partition_hash)
            if run.partition_hash is None or key in shown or len(shown) >= MOST_MAPS:
                continue
            clients, labels, counts = label_counts(run.run)
            drawing = figures.label_map(clients, labels, counts, f"p{len(shown)}")
            total, least = int(counts.sum()), int(counts.sum(axis=1).min()) if len(clients) else 0
            caption = f"Seed {run.run.seed}: {total} examples, the smallest client has {least}."
            caption += " Blank: none." if len(labels) > 1 else ""
            what = "Training examples by client" + (" and label" if len(labels) > 1 else "")
            title = ", ".join(part for part in (what, one.setting) if part)
            shown[key] = _shown(title, drawing, caption)
    return list(shown.values())


def _similarity(everywhere: Sequence[tuple[Group, Series]]) -> list[dict[str, Any]]:
    """Draw logged similarity matrices of the first run of each strategy that logs any."""
    shown: list[dict[str, Any]] = []
    for one, series in everywhere:
        if len(shown) >= MOST_MAPS:
            break
        for run in series.everything[:1]:
            matrices = similarities(run.run)
            if matrices:
                drawing = figures.similarity_maps(matrices, f"m{len(shown)}")
                title = ", ".join(part for part in (f"Similarity of clients: {one.label}", one.setting) if part)
                caption = f"Seed {run.run.seed}. {wording.SIMILARITY}"
                shown.append(_shown(title, drawing, caption))
    return shown


def _unequal_partitions(evidence: Iterable[Measures], places: Mapping[Path, str]) -> list[str]:
    """Say where runs of one configuration of data and one seed did not see the same partition."""
    seen: dict[str, dict[int, str]] = {}
    for one in evidence:
        if one.partition_hash is None:
            continue
        flat = flatten(one.run.config)
        key = repr(
            [(name, flat[name]) for name in sorted(flat) if name.startswith(("data.", "partition.", "transfer."))]
        )
        key += f"{flat.get('clients')} {one.run.seed}"
        seen.setdefault(key, {})[one.partition_hash] = places[one.run.dir]
    return [
        f"Not the same partition although seed and data agree: {', '.join(sorted(runs.values()))}"
        for runs in seen.values()
        if len(runs) > 1
    ]


def _configurations(runs: Sequence[RunRecord]) -> tuple[list[tuple[str, str]], list[list[tuple[str, str]]]]:
    """Split configurations into what all runs share and what each has of its own."""
    flats = [flatten(run.config) for run in runs]
    same = {key: value for key, value in flats[0].items() if all(key in f and f[key] == value for f in flats)}
    own = [[(printable(key), _text(value)) for key, value in f.items() if key not in same] for f in flats]
    return [(printable(key), _text(value)) for key, value in same.items()], own


def _environment(runs: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """Return each entry's values over all runs."""
    flats = [flatten(run.environment) for run in runs]
    for flat in flats:
        flat.pop("command", None)  # what was typed for a whole sweep; each run's own command stands below
        flat.pop("code.strategy", None)  # one for each strategy; runs of one strategy by other code are told apart
    keys = dict.fromkeys(key for flat in flats for key in flat)
    found = []
    for key in keys:
        values = list(dict.fromkeys(_text(flat[key]) for flat in flats if key in flat))
        found.append(
            (
                printable(key),
                " | ".join(values[:5]) + (f" | … {len(values) - 5} more" if len(values) > 5 else ""),
            )
        )
    return found


def _text(value: Any) -> str:
    return printable(said(value), 500)


def run_names(runs: Sequence[RunRecord]) -> dict[Path, str]:
    """Name each run by its directory below the last one that holds them all."""
    if len(runs) < 2:
        return {run.dir: run.dir.name for run in runs}
    shared = os.path.commonpath([run.dir.absolute() for run in runs])
    return {run.dir: os.path.relpath(run.dir.absolute(), shared) for run in runs}


def _title(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"FedFuse: {printable(names[0])}"
    listed = ", ".join(printable(name) for name in names[:6])
    return f"FedFuse: {listed}" + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _subtitle(runs: Sequence[RunRecord]) -> str:
    flats = [flatten(run.config) for run in runs]
    for run, flat in zip(runs, flats, strict=True):
        if not _by_alpha(run.config.get("partition", {})):
            flat.pop("partition.alpha", None)
        if isinstance(pool := flat.get("model.pool"), list) and pool:  # then `model.name` is nobody's
            flat["model.name"] = " + ".join(map(str, pool[:4])) + (" + …" if len(pool) > 4 else "")
    parts = []
    for key in (
        "data.name",
        "partition.name",
        "partition.alpha",
        "model.name",
        "clients",
        "rounds",
        "until.seconds",
        "participation",
    ):
        found = [flat[key] for flat in flats if flat.get(key) is not None and (key, flat[key]) != ("rounds", MANY)]
        values = list(dict.fromkeys(map(_text, found)))
        if values:
            parts.append(f"{key.removesuffix('.name')} {' / '.join(values[:4])}{' / …' if len(values) > 4 else ''}")
    return ", ".join(parts)


def _by_alpha(partition: Mapping[str, Any]) -> bool:
    """Whether anything was dealt by α, as the schema says of it; where it cannot be told, of an older run, it was."""
    try:
        config = Config(partition=PartitionConfig(**partition))
    except TypeError:
        return True
    return holds(known()["partition.alpha"].only, config)


def _counts(runs: Sequence[RunRecord], skipped: Sequence[str]) -> str:
    states = [run.status for run in runs]
    parts = [f"{len(runs)} run{'s' if len(runs) != 1 else ''}"]
    parts += [f"{states.count(state)} {state}" for state in ("running", "stopped", "interrupted") if state in states]
    parts += [f"{len({run.seed for run in runs})} seed{'s' if len({run.seed for run in runs}) != 1 else ''}"]
    return ", ".join([*parts, *([f"{len(skipped)} skipped"] if skipped else [])])


def _version() -> str:
    try:
        return metadata.version("fedfuse")
    except metadata.PackageNotFoundError:
        return "(not installed)"
