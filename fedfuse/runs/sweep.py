"""Several runs, side by side on cores of their own; an interrupted sweep goes on where it stopped."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fedfuse.config.compose import compose, expand
from fedfuse.config.schema import Config
from fedfuse.core.devices import device_of
from fedfuse.errors import UserError, WorldError
from fedfuse.results.run_data import find, load
from fedfuse.results.table import print_table
from fedfuse.runs import search, tracking
from fedfuse.runs.checkpoint import changed
from fedfuse.runs.experiment import as_yaml, load_config
from fedfuse.runs.parallel import Track, drive, shared_out


def sweep(overrides: Sequence[str], report: bool = False) -> Path:
    """Run every combination that comma lists span, each in a directory of its own below `out`.

    A run that is finished is not repeated, one that was interrupted is resumed; all are checked before any begins.
    With `search.trials` every strategy is tuned before; see `fedfuse.runs.search`.

    Raises
    ------
    UserError
        If a configuration cannot be carried out, or `out` holds runs of another configuration.
    WorldError
        If some runs failed; the others are finished.
    """
    out = next((o.split("=", 1)[1] for o in reversed(overrides) if o.startswith("out=")), "")
    root = Path(out) if out else Path("runs") / time.strftime("%Y%m%d-%H%M%S-compare")
    words, space = search.space([o for o in overrides if not o.startswith("out=")])
    jobs, console = expand(words), Console(highlight=False)
    varied = [i for i in range(len(jobs[0])) if len({job[i] for job in jobs}) > 1] if jobs[0] else []
    configs = composed(jobs)
    tracking.prepare(configs[0].tracking)
    tuned: dict[tuple[str, ...], list[str]] = {}
    if space:
        tuned = search.tune(jobs, space, root, console)
        configs = composed([[*job, *tuned[search.without_seed(job)]] for job in jobs])
    plans: list[tuple[Path, Config]] = []
    for job, config in zip(jobs, configs, strict=True):
        path = root / folder(config, [job[i] for i in varied])
        config.runtime = shared_out(config, len(jobs))
        config.out = str(path)
        plans.append((path, config))
    for path, config in plans:
        if config.overwrite or not (path / "config.yaml").exists():
            continue
        if different := changed(as_yaml(load_config(path)), as_yaml(config)):
            raise UserError(
                f"out={path}: holds a run of another configuration (this one {different}); "
                f"choose another or say overwrite=true"
            )
    failed: list[str] = []
    runtime = plans[0][1].runtime
    if (runtime.parallel or 1) > 1:
        console.print(f"{len(plans)} runs, {runtime.parallel} at once")
    drive(
        [_once(path, config, console, failed) for path, config in plans],
        runtime,
        runtime.gpu_fraction if device_of(configs[0]) == "cuda" else 0.0,
    )
    runs, skipped = find([root])
    print_table(runs, console)
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


def composed(jobs: Sequence[Sequence[str]]) -> list[Config]:
    """Compose the configurations of runs; those that differ in the seed alone take Hydra's time once.

    Raises
    ------
    UserError
        For a mistake in any of them.
    """
    known: dict[search.Key, Config] = {}
    out = []
    for job in jobs:
        seeds = [word.removeprefix("seed=") for word in job if word.startswith("seed=")]
        key = search.without_seed(job)
        if key not in known or not all(seed.isdigit() for seed in seeds):
            known[key] = compose(job)
        config = copy.deepcopy(known[key])
        config.seed = int(seeds[-1]) if seeds and seeds[-1].isdigit() else config.seed
        out.append(config)
    return out


def _once(path: Path, config: Config, console: Console, failed: list[str]) -> Track:
    """A track of one run, if it is not finished yet."""
    if (path / "summary.json").exists() and not config.overwrite:
        console.print(f"{path}: finished already", markup=False)
        return
    error = yield config
    if error is not None:
        console.print(f"{path}: {error}", markup=False, style="red")
        failed.append(str(path))
    elif (config.runtime.parallel or 1) > 1:
        seconds = (load(path).summary or {})["seconds"]["total"]
        console.print(f"{path}: {seconds:.1f} s", markup=False)


def folder(config: Config, varied: Sequence[str]) -> str:
    """Name of a run's directory below the sweep's: strategy, then what varies beside it, then the seed."""
    parts = [config.strategy.name]
    parts += [v for v in varied if not v.startswith(("strategy=", "seed="))]
    parts.append(f"seed={config.seed}")
    return "/".join([parts[0], ",".join(re.sub(r"[^\w.=+-]", "_", part) for part in parts[1:])])
