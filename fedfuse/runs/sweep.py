"""Several runs, side by side on cores of their own; an interrupted sweep goes on where it stopped."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from fedfuse.config.clock_keys import MANY
from fedfuse.config.schema import Config
from fedfuse.core.devices import device_of
from fedfuse.data.load import load as load_data
from fedfuse.errors import UserError, WorldError
from fedfuse.results.run_data import find, load, run_directories
from fedfuse.results.table import print_table
from fedfuse.runs import search, tracking
from fedfuse.runs.checkpoint import changed
from fedfuse.runs.combinations import Combination, combine, composed, possible, share_audits, without_seed
from fedfuse.runs.configuration import as_yaml, load_config
from fedfuse.runs.environment import check_content
from fedfuse.runs.experiment import audited, free
from fedfuse.runs.further import check_further, goes_on
from fedfuse.runs.own_code import check_code
from fedfuse.runs.parallel import Track, drive, shared_out
from fedfuse.runs.preview import bytes_a_round


def sweep(overrides: Sequence[str], report: bool = False, dry: bool = False, console: Console | None = None) -> Path:
    """Run every combination that comma lists span, each in a directory of its own below `out`.

    A run that is finished is not repeated, one that was interrupted is resumed, one with fewer rounds goes on; all are
    checked before any begins.
    With `search.trials` every strategy is tuned before; see `fedfuse.runs.search`. What applies to which run is said
    in `fedfuse.runs.combinations`.

    Parameters
    ----------
    overrides : sequence of str
        As typed.
    report : bool
        Write the report at the end.
    dry : bool
        Only say which runs there would be.
    console : Console, optional
        Where lines go.

    Raises
    ------
    UserError
        If a configuration cannot be carried out, or `out` holds runs of another configuration.
    WorldError
        If some runs failed; the others are finished.
    """
    out = next((o.split("=", 1)[1] for o in reversed(overrides) if o.startswith("out=")), "")
    root = Path(out) if out else free(Path("runs") / time.strftime("%Y%m%d-%H%M%S-compare"))
    words, space = search.space([o for o in overrides if not o.startswith("out=")])
    console = console or Console(highlight=False)
    runs, notes = combine(words)
    for note in notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    if report and len(runs) == 1:
        console.print("note: one run: there is nothing to compare it with; strategy=a,b or seed=0,1 makes several")
    places = [root / folder(run.config, run.varied) for run in runs]
    _check_root(root)
    if dry:
        return _told(runs, places, space, root, console)
    tracking.prepare(runs[0].config.tracking)
    fresh = [run for run, path in zip(runs, places, strict=True) if not (path / "config.yaml").exists()]
    if len({without_seed(run.words) for run in fresh}) > 1:  # one alone is refused at its beginning
        possible(fresh)
    if any(run.config.audit for run in runs):
        for line in share_audits(runs):
            console.print(f"note: {line}", markup=False, soft_wrap=True)
    if space:
        with _interruptible(root):
            tuned = search.tune([run.words for run in runs], space, root, console)
        known: dict[tuple[str, ...], Config] = {}
        for run in runs:
            run.config = composed([*run.words, *tuned[without_seed(run.words)]], known)
    plans: list[tuple[Path, Config]] = []
    for run, path in zip(runs, places, strict=True):
        run.config.runtime = shared_out(run.config, len(runs))
        run.config.out = str(path)
        plans.append((path, run.config))
    _check_places(plans)
    failed: list[str] = []
    runtime = plans[0][1].runtime
    if (runtime.parallel or 1) > 1:
        console.print(f"{len(plans)} runs, {runtime.parallel} at once")
    tally = Tally(len(plans))
    with _interruptible(root):
        drive(
            [_once(path, config, console, failed, tally) for path, config in plans],
            runtime,
            runtime.gpu_fraction if device_of(plans[0][1]) == "cuda" else 0.0,
            console.quiet,
        )
    kept, skipped = find([root])
    print_table(kept, console)
    for line in skipped:
        console.print(f"skipped: {line}", markup=False)
    if report:
        from fedfuse.results.report import report as write_report

        console.print(f"report: {write_report([root], root).path}", markup=False, soft_wrap=True)
    console.print(f"runs: {root}", markup=False, soft_wrap=True)
    if failed:
        raise WorldError(
            f"{len(failed)} of {len(plans)} runs failed: {', '.join(failed)}; the same command resumes them"
        )
    return root


@contextlib.contextmanager
def _interruptible(root: Path) -> Iterator[None]:
    """Say of an interrupt how all of it goes on, not the one run or trial that it met."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"the same command with out={root} goes on") from error


def _check_root(root: Path) -> None:
    """Refuse a directory that is a run, or holds other things than runs."""
    found = next(run_directories(root), None)
    if found == root:
        raise UserError(f"out={root}: is a run itself; choose a directory for the runs of a sweep")
    for child in root.iterdir() if root.is_dir() and not found else ():
        if not OURS.fullmatch(child.name) and not (child.is_dir() and not any(child.iterdir())):
            raise UserError(f"out={root}: holds {child.name}, which is no run; choose another directory")


def _check_places(plans: Sequence[tuple[Path, Config]]) -> None:
    """Refuse to write over runs of another configuration, or of data or code of the user's own as they were."""
    contents: dict[str, str] = {}
    for path, config in plans:
        if config.overwrite or not (path / "config.yaml").exists():
            continue
        began = load_config(path)
        if goes_on(path, config):
            check_further(path, began, config.rounds)
        elif different := changed(as_yaml(began), as_yaml(config)):
            raise UserError(
                f"out={path}: holds a run of another configuration (this one {different}); "
                f"choose another or say overwrite=true"
            )
        elif (path / "summary.json").exists():
            check_code(path, config)
        if config.data.layout != "builtin":
            if (key := repr(config.data)) not in contents:
                contents[key] = load_data(config.data).content
            check_content(path, config, contents[key])


def _told(
    runs: Sequence[Combination], places: Sequence[Path], space: Mapping[str, str], root: Path, console: Console
) -> Path:
    """Say which runs there would be, and what a round of each combination sends."""
    sizes = iter(possible(runs, bytes_a_round))
    sent: dict[tuple[str, ...], tuple[float, float]] = {}
    for run, path in zip(runs, places, strict=True):
        if (key := without_seed(run.words)) not in sent:
            sent[key] = next(sizes)
        up, down = sent[key]
        done = ", finished already" if (path / "summary.json").exists() else ""
        until, rounds = run.config.until.seconds, run.config.rounds
        long = f"{rounds} rounds" if until is None or rounds < MANY else f"{until:g} virtual seconds"
        console.print(
            f"{path}: {long}, a round at most {up:,.0f} bytes up and {down:,.0f} down{done}",
            markup=False,
            soft_wrap=True,
        )
    tuning = f", after a search over {', '.join(space)}" if space else ""
    console.print(f"{len(runs)} runs{tuning}; nothing was run")
    return root


OURS = re.compile(r"\..*|report\.html|table\.(csv|md|tex)")  # of a sweep whose runs all failed


class Tally:
    """How many runs are over, and how long the others may take."""

    def __init__(self, runs: int) -> None:
        self.runs, self.over, self.played, self.started = runs, 0, 0, time.monotonic()

    def count(self, played: bool) -> str:
        """Count a run that is over; return the count, and the time left if there is anything to go by."""
        self.over += 1
        self.played += played
        left = self.runs - self.over
        if not left or not self.played:
            return f"[{self.over}/{self.runs}]"
        seconds = (time.monotonic() - self.started) / self.played * left
        told = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
        return f"[{self.over}/{self.runs}, {told} left at this pace]"


def _once(path: Path, config: Config, console: Console, failed: list[str], tally: Tally) -> Track:
    """A track of one run, if it is not finished yet."""
    if (path / "summary.json").exists() and not config.overwrite and not goes_on(path, config):
        try:
            load(path)  # or it would be left out of the table, though it counts as finished
            audited(path, config, True)  # those that were asked for since
        except (UserError, WorldError) as why:
            console.print(f"{tally.count(False)} {path}: {why}", markup=False, style="red", soft_wrap=True)
            failed.append(str(path))
        else:
            console.print(f"{tally.count(False)} {path}: finished already", markup=False)
        return
    error = yield config
    counted = tally.count(True)
    if error is not None:
        console.print(f"{counted} {path}: {error}", markup=False, style="red", soft_wrap=True)
        failed.append(str(path))
        return
    seconds = (load(path).summary or {})["seconds"]["total"]
    console.print(f"{counted} {path}: {seconds:.1f} s", markup=False)


def folder(config: Config, varied: Sequence[str]) -> str:
    """Name of a run's directory below the sweep's: strategy, then what varies beside it, then the seed."""
    parts = [config.strategy.name]
    parts += [v for v in varied if not v.startswith(("strategy=", "seed="))]
    parts.append(f"seed={config.seed}")
    return "/".join([parts[0], ",".join(re.sub(r"[^\w.=+-]", "_", part) for part in parts[1:])])
