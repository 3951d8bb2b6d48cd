"""The tables of the report page, as plain values; the template makes them markup and escapes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fedfuse.errors import printable
from fedfuse.results import wording
from fedfuse.results.curves import Series
from fedfuse.results.measures import Measures
from fedfuse.results.setting import Group
from fedfuse.results.statistics import Interval, all_pairs, average_ranks, few_seeds_note
from fedfuse.results.table import BEST, METRICS, TEXTS, Row, amount, any_setup, decimal, foot, percent, scores
from fedfuse.results.target import reach, targets


@dataclass(frozen=True)
class Cell:
    """What is read and what is sorted by; `series` puts a colour before the text."""

    text: str
    sort: str = ""
    series: int | None = None


@dataclass(frozen=True)
class Column:
    """Name of a column; `word` for text, else numbers."""

    name: str
    word: bool = False


@dataclass(frozen=True)
class Table:
    """A sortable table of the page."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    id: str = ""


def word(text: str, series: int | None = None) -> Cell:
    """Return a cell of text."""
    return Cell(printable(text), printable(text), series)


def number(value: float, text: str | None = None) -> Cell:
    """Return a cell of a number; NaN is shown as a dash and sorts last."""
    if math.isnan(value):
        return Cell("–")
    return Cell(amount(value) if text is None else text, repr(float(value)))


def _share(value: Interval) -> Cell:
    return number(value.mean, percent(value))


def columns(*names: str) -> tuple[Column, ...]:
    """Return columns; a name that starts with `:` holds words."""
    return tuple(Column(name.removeprefix(":"), name.startswith(":")) for name in names)


def comparison(rows: Sequence[Row], groups: Sequence[Group], series: Sequence[Series]) -> Table:
    """Return the main table: accuracy after the last round, spread over clients, ranks, cost, failures."""
    ranks = {metric: average_ranks(scores([one for one in groups if one.runs], metric)) for metric in BEST}
    lines, setup, ranked = [], any_setup(rows), len(rows) > 1
    for row, one in zip(rows, series, strict=True):
        spreads = [float(np.nanstd(list(run.clients.values()))) for run in one.finished if run.clients]
        rank = [ranks[metric][0].get(row.strategy, math.nan) for metric in BEST if ranked]
        lines.append(
            (
                word(row.strategy, one.index),
                number(row.n, str(row.n)),
                *(number(row.final[metric].mean, row.share(metric)) for metric in METRICS),
                number(100 * float(np.mean(spreads)) if spreads else math.nan),
                *(number(value, f"{value:.2f}") for value in rank),
                number(row.up_mb),
                number(row.down_mb),
                *([number(row.setup_mb)] if setup else []),
                number(row.seconds),
                number(row.failures, str(row.failures) + ("" if row.cohort_complete else " *")),
            )
        )
    names = list(METRICS.values())
    spread = "spread over clients"
    heads = columns(
        ":strategy",
        "n",
        *names,
        spread,
        *(["rank global", "rank personal"] if ranked else []),
        "up MB",
        "down MB",
        *(["set-up MB"] if setup else []),
        "seconds",
        "failed",
    )
    on = " and ".join(sorted({f"{ranks[metric][1]} seed{'s' * (ranks[metric][1] != 1)}" for metric in BEST}))
    note = " ".join(
        [foot(rows, texts=False), wording.SPREAD, *([wording.RANK.format(seeds=on)] if ranked else []), wording.FAILED]
    )
    return Table("After the last round", heads, tuple(lines), note, "comparison")


def intervals(rows: Sequence[Row]) -> Table:
    """Return every headline metric with both intervals."""
    lines = []
    for row in rows:
        for metric in METRICS:
            t, boot = row.final[metric], row.bootstrap[metric]
            lines.append(
                (
                    word(row.strategy),
                    word(METRICS[metric].removesuffix(" %") if metric in BEST else METRICS[metric]),
                    number(t.n, str(t.n)),
                    number(t.mean, percent(Interval(t.mean, None, None, t.n))),
                    *(_end(end) for end in (t.low, t.high, boot.low, boot.high)),
                )
            )
    heads = columns(":strategy", ":accuracy", "n", "mean", "t low", "t high", "bootstrap low", "bootstrap high")
    return Table("Intervals", heads, tuple(lines), wording.INTERVALS)


def _end(value: float | None) -> Cell:
    return Cell("–") if value is None else number(value, f"{100 * value:.2f}")


def best(rows: Sequence[Row]) -> Table:
    """Return the best evaluated rounds, apart from the result."""
    lines = [
        (word(row.strategy), number(row.n, str(row.n)), *(_share(row.best[name]) for name in BEST)) for row in rows
    ]
    return Table(
        "Best round",
        columns(":strategy", "n", "best global %", "best personal %"),
        tuple(lines),
        wording.BEST,
    )


def to_targets(series: Sequence[Series]) -> Table | None:
    """Return rounds, seconds and bytes to target accuracies, global and personal."""
    lines = []
    timed = any(len(run.virtual_seconds) for one in series for run in one.finished)
    for metric in BEST:
        for target in targets([run for one in series for run in one.finished], metric):
            for one in series:
                if not one.finished:
                    continue
                cost = reach(one.finished, metric, target)
                lines.append(
                    (
                        word(one.label, one.index),
                        word(metric.partition("/")[2]),
                        number(target, f"{100 * target:.0f} %"),
                        number(cost.reached, f"{cost.reached} of {cost.n}"),
                        number(cost.rounds),
                        number(cost.seconds),
                        number(cost.megabytes),
                        *([number(cost.virtual)] if timed else []),
                    )
                )
    if not lines:
        return None
    heads = columns(
        ":strategy", ":test set", "target", "reached by", "rounds", "seconds", "MB", *(["virtual s"] if timed else [])
    )
    return Table("To a target accuracy", heads, tuple(lines), wording.TARGETS, "targets")


def tests(groups: Sequence[Group]) -> Table | None:
    """Return paired tests of all pairs of strategies on shared seeds, Holm-corrected per test set."""
    groups = [one for one in groups if one.runs]
    lines = []
    most = 0
    for metric in BEST:
        for (a, b), one in all_pairs(scores(groups, metric)).items():
            if one.n == 0 and not one.unpaired:
                continue
            most = max(most, one.n)
            half = one.difference.half_width
            shown = f"{100 * one.difference.mean:+.2f}".replace("-", "−") + (
                f" ± {100 * half:.2f}" if half is not None else ""
            )
            ps = (one.t_p, one.t_holm, one.signed_rank_p, one.signed_rank_holm)
            unused = f"unpaired seeds {', '.join(map(str, one.unpaired))}" if one.unpaired else ""
            lines.append(
                (
                    word(metric.partition("/")[2]),
                    word(f"{a} − {b}"),
                    number(one.n, str(one.n)),
                    number(one.difference.mean, shown),
                    *(number(p, probability(p)) for p in ps),
                    word("; ".join(part for part in (one.note, unused) if part)),
                )
            )
    if not lines:
        return None
    note = f"{wording.TESTS} {few_seeds_note(most)}"
    names = (
        ":test set",
        ":pair",
        "n",
        "difference",
        "t p",
        "t p, Holm",
        "signed rank p",
        "signed rank p, Holm",
        ":note",
    )
    return Table("Paired tests over seeds", columns(*names), tuple(lines), note, "tests")


def verdicts(rows: Sequence[Row], groups: Sequence[Group]) -> list[str]:
    """Say in a sentence per test set who is best, by how much, and whether the seeds can tell it apart.

    Of texts bits per byte come first: they compare models whose tokenizers differ, which shares of tokens do not.
    """
    lines = []
    for metric in (*TEXTS, *BEST):
        of_bits = metric in TEXTS
        scored = (row for row in rows if not math.isnan(row.final[metric].mean))
        ranked = sorted(scored, key=_descending(metric), reverse=of_bits)
        if len(ranked) < 2:
            continue
        first, second = ranked[:2]
        what = metric.partition("/")[2].capitalize() + (" test, bits per byte" if of_bits else " test accuracy")
        names = {row.strategy for row in ranked}
        if lost := without_result([one for one in groups if one.label in names], metric):
            lines.append(f"{what}: not compared, since {printable('; '.join(lost))}.")
            continue
        top = first.final[metric]
        tied = [row.strategy for row in ranked if math.isclose(row.final[metric].mean, top.mean, abs_tol=1e-12)]
        if len(tied) > 1:
            shared, mean = printable(", ".join(tied)), replace(top, low=None)
            share = f"lowest mean, {decimal(mean)}" if of_bits else f"highest mean, {percent(mean)} %"
            lines.append(f"{what}: {shared} share the {share}.")
            continue
        best = f"is lowest with {decimal(top)}" if of_bits else f"is highest with {percent(top)} %"
        text = f"{what}: {printable(first.strategy)} {best}"
        pairs = all_pairs(scores([one for one in groups if one.runs], metric))
        pair = next(one for both, one in pairs.items() if set(both) == {first.strategy, second.strategy})
        lead = abs(pair.difference.mean)  # of the same seeds, so it is the difference of the means too
        by = f"{lead:.3f} below" if of_bits else f"{100 * lead:.2f} points above"
        text += f" (n = {top.n}), {by} {printable(second.strategy)}"
        if math.isnan(pair.t_holm):
            text += f"; not tested ({pair.note})"
        else:
            told = "the seeds tell them apart" if pair.t_holm < 0.05 else "the seeds cannot tell them apart"
            text += f"; {told} (paired t, Holm-adjusted p = {probability(pair.t_holm)})"
        silent = [printable(one.label) for one in groups if one.label not in names]
        lines.append(text + (f"; without a value: {', '.join(silent)}." if silent else "."))
    return lines


def without_result(groups: Sequence[Group], metric: str) -> list[str]:
    """Say which of all seeds have no final value of `metric` in a group, and why: means over the others favour it."""
    seeds = sorted({run.seed for one in groups for run in (*one.runs, *one.unfinished)})
    told = []
    for one in groups:
        reasons = {run.seed: "stopped" if run.status == "stopped" else "did not finish" for run in one.unfinished}
        values = {run.seed: run.final.get(metric, math.nan) for run in one.runs}
        missing: dict[str, list[str]] = {}
        for seed in seeds:
            if not math.isfinite(values.get(seed, math.nan)):
                why = "gave no value" if seed in values else reasons.get(seed, "left no result")
                missing.setdefault(why, []).append(str(seed))
        told += [
            f"seed{'s' if len(which) > 1 else ''} {', '.join(which)} of {one.label} {why}"
            for why, which in missing.items()
        ]
    return told


def _descending(metric: str) -> Callable[[Row], float]:
    return lambda row: -row.final[metric].mean


def probability(p: float) -> str:
    """Write a p-value."""
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}" if p < 0.01 else f"{p:.3f}"


def runs(series: Sequence[tuple[Series, str]], evidence: Sequence[Measures], places: Mapping[Path, str]) -> Table:
    """Return one line per run, unfinished ones too."""
    place = {run.run.dir: one for one, _ in series for run in one.everything}
    setting = {run.run.dir: text for one, text in series for run in one.everything}
    settings = len(set(setting.values())) > 1
    lines = []
    for one in evidence:
        run, owner = one.run, place.get(one.run.dir)
        if owner is None:
            continue
        summary = run.summary or {}
        seconds = sum(one.phases.values()) if one.phases else math.nan  # with checkpoints, as in the table above
        finals = [run.final.get(metric, math.nan) for metric in METRICS]
        lines.append(
            (
                word(places[run.dir]),
                word(owner.label, owner.index),
                *([word(setting[run.dir])] if settings else []),
                number(run.seed, str(run.seed)),
                word(run.status),
                number(run.rounds_done, str(run.rounds_done) if run.until_s else run.stand),
                *(number(value, f"{100 * value:.2f}") for value in finals),
                number(one.cumulative_bytes[-1] / 1e6),
                number(seconds),
                word(str(summary.get("digest") or "")[:12]),
            )
        )
    names = [
        ":run",
        ":strategy",
        *([":setting"] if settings else []),
        "seed",
        ":status",
        "rounds",
        *METRICS.values(),
    ]
    heads = columns(*names, "MB", "seconds", ":digest")
    return Table("Every run", heads, tuple(lines), wording.RUNS, "runs")
