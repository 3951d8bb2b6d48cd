"""Several runs, one after another on shared workers; an interrupted sweep goes on where it stopped."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fedfuse.compose import compose, expand
from fedfuse.config import Config
from fedfuse.errors import UserError, WorldError
from fedfuse.experiment import as_yaml, load_config, resume, run
from fedfuse.results.run import find
from fedfuse.results.table import print_table


def sweep(overrides: Sequence[str], started: float | None = None, report: bool = False) -> Path:
    """Run every combination that comma lists span, each in a directory of its own below `out`.

    A run that is finished is not repeated, one that was interrupted is resumed; all are checked before any begins.

    Raises
    ------
    UserError
        If a configuration cannot be carried out, or `out` holds runs of another configuration.
    WorldError
        If some runs failed; the others are finished.
    """
    started = time.time() if started is None else started
    jobs = expand([o for o in overrides if not o.startswith("out=")])
    out = next((o.split("=", 1)[1] for o in reversed(overrides) if o.startswith("out=")), "")
    root = Path(out) if out else Path("runs") / time.strftime("%Y%m%d-%H%M%S-compare")
    varied = [i for i in range(len(jobs[0])) if len({job[i] for job in jobs}) > 1] if jobs[0] else []
    plans: list[tuple[Path, Config]] = []
    for job in jobs:
        config = compose(job)
        path = root / folder(config, [job[i] for i in varied])
        config.out = str(path)
        plans.append((path, config))
    for path, config in plans:
        if (path / "config.yaml").exists() and as_yaml(load_config(path)) != as_yaml(config) and not config.overwrite:
            raise UserError(f"out={path}: holds a run of another configuration; choose another or say overwrite=true")
    console, failed = Console(highlight=False), []
    for path, config in plans:
        try:
            if (path / "summary.json").exists() and not config.overwrite:
                console.print(f"{path}: finished already", markup=False)
            elif (path / "config.yaml").exists() and not config.overwrite:
                resume(path)
            else:
                run(config, started)
        except WorldError as error:
            console.print(f"{path}: {error}", markup=False, style="red")
            failed.append(str(path))
        started = time.time()
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


def folder(config: Config, varied: Sequence[str]) -> str:
    """Name of a run's directory below the sweep's: strategy, then what varies beside it, then the seed."""
    parts = [config.strategy.name]
    parts += [v for v in varied if not v.startswith(("strategy=", "seed="))]
    parts.append(f"seed={config.seed}")
    return "/".join([parts[0], ",".join(re.sub(r"[^\w.=+-]", "_", part) for part in parts[1:])])
