"""Strategies side by side, with intervals over seeds: on screen and as CSV, Markdown or LaTeX."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from fedfuse.errors import listed, printable
from fedfuse.results.run_data import RunRecord
from fedfuse.results.setting import Group, differences, group, tuning, with_setting
from fedfuse.results.statistics import Interval, all_pairs, few_seeds_note, mean_interval, paired

if TYPE_CHECKING:
    from rich.console import Console

METRICS = {
    "accuracy/global": "global %",
    "accuracy/personal": "personal %",
    "accuracy/personal_worst10": "worst 10 %",
}
TEXTS = {"bits_per_byte/global": "bits/byte global", "bits_per_byte/personal": "bits/byte personal"}  # where texts are
BEST = ("accuracy/global", "accuracy/personal")
NARROW = 100  # letters that a table takes where its numbers leave it the choice: settings wrap
HONEST = "accuracy/personal_honest"  # of a run with clients that lie: the mean over the others
MOST_AGAINST = 10  # strategies, of a sentence


@dataclass(frozen=True)
class Row:
    """One strategy in one setting.

    Parameters
    ----------
    final
        Per metric, mean and t interval over seeds after the last round.
    bootstrap
        The same with a bootstrap interval.
    best
        Per metric, mean over seeds of the best evaluated round. Never the result.
    up_mb, down_mb
        Mean training payload per run in 10⁶ bytes.
    setup_mb
        Mean payload per run of set-up phases and one-off topics, both ways; in neither of the two.
    seconds
        Mean wall-clock time per run.
    trained, trained_at_server
        Mean number of examples a run, each as often as it passed forward and backward, at clients and at the server.
    failures
        Replies that failed or were rejected, over all seeds.
    cohort_complete
        Whether no client was left out of any round.
    unfinished
        Runs without a last round; they enter no figure of this row.
    global_of
        Whose models `accuracy/global` scores, `server` or `clients` (then it is a mean); empty where no run says.
    liars
        Whether clients lie in its runs.
    """

    strategy: str
    setting: str
    seeds: tuple[int, ...]
    final: dict[str, Interval]
    bootstrap: dict[str, Interval]
    best: dict[str, Interval]
    up_mb: float
    down_mb: float
    setup_mb: float
    seconds: float
    trained: float
    trained_at_server: float
    failures: int
    cohort_complete: bool
    unfinished: int
    global_of: str = ""
    liars: bool = False

    def share(self, metric: str, decimals: int = 2) -> str:
        """Write the result of a metric.

        † where clients' own models give it in the place of a server's; how many seeds it rests on, where some gave no
        value.
        """
        value = self.final[metric]
        text = percent(value, decimals)
        if value.n == 0:
            return text
        mark = " †" if metric == BEST[0] and self.global_of == "clients" else ""
        return text + mark + (f" [n = {value.n}]" if value.n < self.n else "")

    @property
    def n(self) -> int:
        """Number of seeds."""
        return len(self.seeds)


def compare(runs: Sequence[RunRecord]) -> list[Row]:
    """Return one row per strategy (and setting, where runs differ in more than strategy and seed)."""
    return [row(one) for one in group(runs)[0]]


def row(one: Group) -> Row:
    """Summarise the repeats of one configuration."""
    values = {name: [run.final.get(name, math.nan) for run in one.runs] for name in (*METRICS, *TEXTS)}
    final = {name: mean_interval(found) for name, found in values.items()}
    return Row(
        strategy=one.label,
        setting=one.setting,
        seeds=one.seeds,
        final={name: found.within(0, 1) if name in METRICS else found for name, found in final.items()},
        bootstrap={name: mean_interval(found, "bootstrap") for name, found in values.items()},
        best={name: mean_interval([run.best.get(name, math.nan) for run in one.runs]).within(0, 1) for name in BEST},
        up_mb=_mean(one.runs, "traffic", "up_bytes") / 1e6,
        down_mb=_mean(one.runs, "traffic", "down_bytes") / 1e6,
        setup_mb=_mean(one.runs, "traffic", "setup_bytes") / 1e6,
        seconds=_mean(one.runs, "seconds", "rounds"),
        trained=_examples(one.runs, "clients"),
        trained_at_server=_examples(one.runs, "server"),
        failures=sum((run.failures or {}).get(what, 0) for run in one.runs for what in ("replies", "rejected")),
        cohort_complete=all((run.summary or {}).get("cohort_complete", True) for run in one.runs),
        unfinished=len(one.unfinished),
        global_of=next((str(run.summary.get("global_of", "")) for run in one.runs if run.summary), ""),
        liars=any(HONEST in run.final for run in one.runs),
    )


def notes(runs: Sequence[RunRecord], known: Collection[str] = ()) -> list[str]:
    """Return what a reader of the table has to know: differences, doubles, unfinished runs, how few seeds.

    What runs say of themselves, and is `known`, is left out.
    """
    groups, lines = group(runs)
    differing = "; ".join(differences(runs))
    lines = ([f"Not only strategy and seed differ: {differing}"] if differing else []) + tuning(runs) + lines
    for one in groups:
        for run in one.unfinished:
            why = f": {run.failure}" if run.failure else ""
            lines.append(f"{run.dir} left out: {run.status} after round {run.stand}{why}")
    lines += _trained(groups) + _moments(groups) + _honest(groups) + _without_spread(groups)
    lines += _told(runs, groups, known)
    counts = {len(one.runs) for one in groups if one.runs}
    if len(counts) > 1:
        lines.append(f"Strategies have between {min(counts)} and {max(counts)} seeds; tests pair shared seeds only.")
    few = few_seeds_note(max(counts)) if counts else ""
    return [*lines, few] if few else lines


def _trained(groups: Sequence[Group]) -> list[str]:
    """How much each strategy computed, where they differ by more than a hundredth: rounds and epochs do not tell."""
    parts = []
    for where in ("clients", "server"):
        told = {one.name: _examples(one.runs, where) / 1e3 for one in groups}
        told = {name: value for name, value in told.items() if not math.isnan(value)}
        if len(told) > 1 and max(told.values()) > 1.01 * min(told.values()):
            shown = (f"{name} {amount(value)}" for name, value in told.items() if value or where == "clients")
            parts.append(f"at the {where} {', '.join(shown)}")
    return [f"Not the same amount of training, in thousands of examples a run, each as often as it was trained on: "
            f"{'; '.join(parts)}"] if parts else []  # fmt: skip


WHEN = {"received": "after they took in the newest lesson", "trained": "as training left them"}


def _moments(groups: Sequence[Group]) -> list[str]:
    """Where clients have two models after a round: which of them is shown, and what the other scores."""
    lines = []
    for shown, other in (("received", "trained"), ("trained", "received")):
        if listed := _means(groups, f"accuracy/personal_{other}"):
            lines.append(
                f"evaluate.moment={shown}: clients are shown {WHEN[shown]}; personal accuracy {WHEN[other]}: {listed}"
            )
    return lines


def _honest(groups: Sequence[Group]) -> list[str]:
    """Where clients lie: the personal accuracy of the others, which the table's column does not tell."""
    listed = _means(groups, HONEST)
    return [f"personal accuracy without the clients that lie: {listed}"] if listed else []


def _means(groups: Sequence[Group], metric: str) -> str:
    """A metric's mean over seeds, of each group that has one."""
    told = {one.name: mean_interval([run.final.get(metric, math.nan) for run in one.runs]) for one in groups}
    return "; ".join(f"{name} {100 * found.mean:.1f} %" for name, found in told.items() if found.n)


def _without_spread(groups: Sequence[Group]) -> list[str]:
    """Which intervals have no length: ± 0.0 looks like the surest of all figures and rests on a tie."""
    told = []
    for one in groups:
        for name, head in METRICS.items():
            found = mean_interval([run.final.get(name, math.nan) for run in one.runs])
            if found.half_width == 0:
                told.append(f"{one.name}, {head.removesuffix(' %') if name in BEST else head}")
    why = "the same value in every seed, so an interval without length, which says nothing of other seeds"
    return [f"{why}: {'; '.join(told)}"] if told else []


def _told(runs: Sequence[RunRecord], groups: Sequence[Group], known: Collection[str], most: int = 20) -> list[str]:
    """What runs say of themselves, each line once, with the runs that say it; a setting where not all of them do."""
    names = {run.dir: one.name for one in groups for run in one.runs}
    alike = Counter((run.strategy, run.seed) for run in runs if run.summary)
    found: dict[str, list[RunRecord]] = {}
    for run in runs:
        for note in dict.fromkeys((run.summary or {}).get("notes") or ()):
            if note not in known:
                found.setdefault(str(note), []).append(run)
    lines = []
    for note, tellers in found.items():
        told = Counter((run.strategy, run.seed) for run in tellers)
        who: dict[str, None] = {}  # in order, each once
        for run in tellers:
            all_do = told[run.strategy, run.seed] == alike[run.strategy, run.seed]
            who[f"{run.strategy if all_do else names.get(run.dir, run.strategy)}, seed {run.seed}"] = None
        lines.append(f"{note} [{'; '.join(list(who)[:4])}{'; …' if len(who) > 4 else ''}]")
    return lines[:most] + ([f"… and {len(lines) - most} notes more, in summary.json"] if len(lines) > most else [])


def foot(rows: Sequence[Row], texts: bool = True) -> str:
    """Explain what stands in the table of `rows`, and nothing else; without `texts`, bits per byte stand elsewhere."""
    shown = [(one, one.final[name]) for one in rows for name in METRICS]
    told = any_texts(rows)
    accuracy = f"Accuracy{' of next tokens' if told else ''} after the last round"
    if any(value.half_width is not None for _, value in shown):
        accuracy += ", mean ± half-width of the 95 % t interval over n seeds"
    elif any(one.n > 1 for one in rows):
        accuracy += ", mean over n seeds"
    if any(0 < value.n < one.n for one, value in shown):
        accuracy += ", [n = …] where fewer gave a value"
    own = any(one.global_of == "clients" for one in rows)
    parts = [
        f"global: {'all test texts' if told else 'official test split, class-averaged'}, by the server's model"
        + (" or, where it has none (†), the mean over clients' own" if own else ""),
        "personal: mean over clients on their own test examples"
        + (", of those that lie (attack=) too" if any(one.liars for one in rows) else ""),
        "worst 10 %: mean of the lowest ⌈N/10⌉ clients",
    ]
    if texts and told:
        parts.append("bits/byte: the loss of the tokens predicted over the UTF-8 bytes they stand for, less is better")
    if any(_cut(value) for _, value in shown):
        parts.append("x (low–high): that interval, where it was cut at 0 or 100 %")
    setup = "; set-up MB: what is sent once, both ways, which up and down leave out" if any_setup(rows) else ""
    return (
        f"{accuracy}. {'; '.join(parts)}. MB: 10⁶ bytes of payload a run, up and down for training{setup}. "
        "seconds: a run's rounds, without its start."
    )


def print_table(runs: Sequence[RunRecord], console: Console | None = None, known: Collection[str] = ()) -> None:
    """Print the comparison of `runs` as plain text, the best rounds apart from the result.

    Parameters
    ----------
    runs
        Finished or not; unfinished ones are named below the table.
    console
        Where to; standard output by default.
    known
        What runs say of themselves and has been printed already.
    """
    from rich.console import Console
    from rich.segment import Segments
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    rows = compare(runs)
    headers, cells = grid(rows, decimals=1)
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    longest = max((len(word) for one in rows for word in one.setting.split()), default=0)
    needed = 0  # letters, where words wrap as far as they may
    for i, name in enumerate(headers):
        words = name in ("strategy", "setting")
        least = min(max(9, longest if name == "setting" else 0), 40)
        head = Text(name.replace("bits/byte ", "bits/byte\n"))
        justify: Literal["left", "right"] = "left" if words else "right"
        table.add_column(head, justify=justify, no_wrap=not words, overflow="fold", min_width=least if words else None)
        needed += 1 + (least if words else max(map(len, [*str(head).splitlines(), *(line[i] for line in cells)])))
    for line in cells:
        table.add_row(*(Text(printable(cell)) for cell in line))
    measured = console.measure(table, options=console.options.update(max_width=200))
    # wider than the screen, its lines go on below: a column that is cut to nothing would be the strategies' names
    width = max(console.width, min(measured.maximum, NARROW), needed)
    options = console.options.update(width=width, max_width=width)
    console.print(Segments(console.render(table, options)), crop=False, soft_wrap=True, end="")
    console.print(Text(foot(rows)), style="dim")
    bests = []
    for one in rows:
        if any(one.best[name].n for name in BEST):
            shares = " / ".join(percent(replace(one.best[name], low=None), 1) for name in BEST)
            bests.append(f"{with_setting(one.strategy, one.setting)} {shares}")
    if bests:
        every = "; ".join(printable(best) for best in bests)
        console.print(Text(f"Best round, not the result (global / personal %): {every}"), style="dim")
    for told in against_nothing_sent(runs):
        console.print(Text(printable(told)))
    for note in notes(runs, known):
        console.print(Text(printable(note)))


def against_nothing_sent(runs: Sequence[RunRecord]) -> list[str]:
    """Say, per test set, what each strategy adds to one that sends nothing, and whether the seeds tell them apart.

    Differences are paired by seed; p-values are adjusted by Holm's rule over all pairs, as in the table of tests.
    """
    lines = []
    groups = [one for one in group(runs)[0] if one.runs]
    for base in groups:
        if not _silent(base):
            continue
        peers = [one for one in groups if one.setting == base.setting]
        others = [one.label for one in peers if not _silent(one)]
        for metric in BEST:
            values = scores(peers, metric)
            adjusted = {frozenset(names): one.t_holm for names, one in all_pairs(values).items()}
            pairs = [(name, paired(values[name], values[base.label])) for name in others]
            pairs = [(name, pair) for name, pair in pairs if pair.n]
            if not pairs:
                continue
            seeds = len({seed for _, pair in pairs for seed in pair.unpaired} | set(values[base.label]))
            said = {
                name: f"{name} {_points(pair.difference)}" + (f" ({pair.n} of {seeds} seeds)" if pair.n < seeds else "")
                for name, pair in pairs
            }
            p_values = {name: adjusted[frozenset((name, base.label))] for name, _ in pairs}
            sure = [name for name, p in p_values.items() if p < 0.05]
            untested = [f"{name} ({pair.note})" for name, pair in pairs if math.isnan(p_values[name])]
            line = f"Against {base.name}, {metric.partition('/')[2]} test, in points: "
            if len(pairs) > MOST_AGAINST:  # more is no sentence
                largest = sorted(sure, key=lambda name: -abs(dict(pairs)[name].difference.mean))
                told = f"the seeds tell {len(sure)} of {len(pairs)} strategies apart (paired t, Holm over all pairs)"
                if len(untested) == len(pairs):  # that none is told apart would be a finding
                    told = f"none of {len(pairs)} strategies tested ({'; '.join(sorted({p.note for _, p in pairs}))})"
                line += told + (": " if sure else "") + listed([said[name] for name in largest], MOST_AGAINST)
                lines.append(f"{line}. The report's table of paired tests has every pair.")
                continue
            line += ", ".join(said.values())
            if len(untested) < len(pairs):
                line += f"; told apart by the seeds: {', '.join(sure) or 'none'} (paired t, Holm over all pairs)"
            if untested and seeds > 1:  # of a single seed a note says that there is no test
                line += f"; not tested: {', '.join(untested)}"
            lines.append(f"{line}.")
    return lines


def _silent(one: Group) -> bool:
    """Whether nothing was sent, set-up included."""
    return not any(_mean(one.runs, "traffic", f"{way}_bytes") for way in ("up", "down", "setup"))


def scores(groups: Sequence[Group], metric: str) -> dict[str, dict[Hashable, float]]:
    """Return final values of `metric` by strategy and seed."""
    return {one.label: {run.seed: run.final.get(metric, math.nan) for run in one.runs} for one in groups}


def _points(value: Interval) -> str:
    half = value.half_width
    return f"{100 * value.mean:+.1f}".replace("-", "−") + ("" if half is None else f" ± {100 * half:.1f}")


def grid(rows: Sequence[Row], decimals: int = 2) -> tuple[list[str], list[list[str]]]:
    """Return headers and cells of the comparison, as text; columns of setting and set-up only where there are any."""
    settings, setup, texts = any(row.setting for row in rows), any_setup(rows), TEXTS if any_texts(rows) else {}
    headers = ["strategy", *(["setting"] if settings else []), "n", *METRICS.values(), *texts.values()]
    headers += ["up MB", "down MB", *(["set-up MB"] if setup else []), "seconds", "failed"]
    cells = []
    for one in rows:
        line = [one.strategy, *([one.setting] if settings else []), str(one.n)]
        line += [*(one.share(name, decimals) for name in METRICS), *(decimal(one.final[name]) for name in texts)]
        line += [amount(one.up_mb), amount(one.down_mb), *([amount(one.setup_mb)] if setup else [])]
        line += [amount(one.seconds)]
        cells.append([*line, str(one.failures) + ("" if one.cohort_complete else "*")])
    return headers, cells


def any_setup(rows: Sequence[Row]) -> bool:
    """Whether set-up cost bytes anywhere, so that the table needs a column for them."""
    return any(one.setup_mb > 0 for one in rows)


def any_texts(rows: Sequence[Row]) -> bool:
    """Whether texts were predicted anywhere, of which the table says bits per byte."""
    return any(one.final[name].n for one in rows for name in TEXTS)


def decimal(value: Interval) -> str:
    """Write a mean with its half-width; the mean alone where there is no interval, a dash where there is no value."""
    if math.isnan(value.mean):
        return "–"
    return f"{value.mean:.3f}" + ("" if value.half_width is None else f" ± {value.half_width:.3f}")


def percent(value: Interval, decimals: int = 2) -> str:
    """Write a share as per cent with its half-width; the mean alone where there is no interval.

    An interval that was cut at 0 or 100 % has no one half-width, and is written by its ends.
    """
    if math.isnan(value.mean):
        return "–"
    half = value.half_width
    if _cut(value):
        ends = (f"{100 * float(end):.{decimals}f}" for end in (value.low, value.high))  # type: ignore[arg-type]
        return f"{100 * value.mean:.{decimals}f} ({'–'.join(ends)})"
    return f"{100 * value.mean:.{decimals}f}" + ("" if half is None else f" ± {100 * half:.{decimals}f}")


def _cut(value: Interval) -> bool:
    """Whether an interval was cut at 0 or 100 %, so that its ends are not alike far from the mean."""
    low, high = value.low, value.high
    return low is not None and high is not None and abs(low + high - 2 * value.mean) > 1e-9


def to_csv(rows: Sequence[Row]) -> str:
    """Write full precision, one line per strategy, both intervals."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    parts = ("", "/n", "/t_low", "/t_high", "/boot_low", "/boot_high")
    names, texts = ([f"{name}{part}" for name in group for part in parts] for group in (METRICS, TEXTS))
    best = [f"best:{name}" for name in BEST]
    ends = ["up_mb", "down_mb", "setup_mb", "seconds", "failures", "cohort_complete", "unfinished", "global_of"]
    ends += ["trained", "trained_at_server"]
    writer.writerow(["strategy", "setting", "n", "seeds", *names, *best, *ends, *texts])
    for one in rows:
        values: list[object] = []
        values += _intervals(one, METRICS)
        values += [one.best[name].mean for name in BEST]
        values += [one.up_mb, one.down_mb, one.setup_mb]
        values += [one.seconds, one.failures, one.cohort_complete, one.unfinished, _no_formula(one.global_of)]
        values += [one.trained, one.trained_at_server, *_intervals(one, TEXTS)]
        seeds = " ".join(map(str, one.seeds))
        writer.writerow([_no_formula(one.strategy), _no_formula(one.setting), one.n, seeds, *map(_plain, values)])
    return out.getvalue()


def _intervals(one: Row, names: Collection[str]) -> list[object]:
    """Mean, number of values and both intervals of each metric."""
    both = [(one.final[name], one.bootstrap[name]) for name in names]
    return [value for t, boot in both for value in (t.mean, t.n, t.low, t.high, boot.low, boot.high)]


def to_markdown(rows: Sequence[Row]) -> str:
    """Write a Markdown table with its foot."""
    headers, cells = grid(rows)
    marks = [":--" if name in ("strategy", "setting") else "--:" for name in headers]
    lines = [f"| {' | '.join(line)} |" for line in (headers, marks)]
    lines += [f"| {' | '.join(_markdown(cell) for cell in line)} |" for line in cells]
    return "\n".join(lines) + f"\n\n{foot(rows)}\n"


def to_latex(rows: Sequence[Row]) -> str:
    r"""Write a LaTeX table; needs `\usepackage{booktabs}`."""
    headers, cells = grid(rows)
    columns = "".join("l" if name in ("strategy", "setting") else "r" for name in headers)
    body = [" & ".join(_latex(cell) for cell in line) + r" \\" for line in (headers, *cells)]
    head = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", body[0], r"\midrule"]
    return "\n".join([*head, *body[1:], r"\bottomrule", r"\end{tabular}", f"% {foot(rows)}", ""])


def _number(run: RunRecord, part: str, key: str) -> float:
    values = (run.summary or {}).get(part)
    value = values.get(key) if isinstance(values, dict) else None
    return value if isinstance(value, int | float) else 0


def _mean(runs: Sequence[RunRecord], part: str, key: str) -> float:
    return sum(_number(run, part, key) for run in runs) / len(runs) if runs else math.nan


def _examples(runs: Sequence[RunRecord], where: str) -> float:
    """Mean number of examples trained on; NaN where a run was not counted, as by an older version."""
    counted = all("trained" in (run.summary or {}) for run in runs)
    return _mean(runs, "trained", where) if counted else math.nan


def amount(value: float) -> str:
    """Write a quantity with about three digits; NaN as a dash."""
    if math.isnan(value):
        return "–"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 or value == 0 else f"{value:.2g}"


def _plain(value: object) -> object:
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else value


def _no_formula(text: str) -> str:
    """A name in printable letters that a spreadsheet does not read as a formula."""
    text = printable(text)
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text


def _markdown(text: str) -> str:
    text = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]()#!|~" else letter for letter in text)


def _latex(text: str) -> str:
    special = {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
        "–": "--",
        "…": r"\dots{}",
        "†": r"$\dagger$",
    } | {letter: f"\\{letter}" for letter in "&%$#_{}"}
    return "".join(special.get(letter, letter) for letter in printable(text))
