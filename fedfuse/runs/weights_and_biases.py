"""`tracking=wandb`: a run in Weights & Biases, offline unless `$WANDB_MODE` says otherwise."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fedfuse.core.evaluation import Row
from fedfuse.results.setting import flatten
from fedfuse.runs.tracker import Tracker, label

_OPEN: dict[str, Any] = {}  # this process's runs that were not finished: their ids are taken until they are


class Wandb(Tracker):
    """A run of Weights & Biases, in `wandb/` of the run directory; `wandb sync` sends it there.

    Parameters
    ----------
    path : Path
    project : str
        Its name for a group of runs.
    """

    def __init__(self, path: Path, project: str) -> None:
        super().__init__(path)
        self.project = project
        self.mode = os.environ.get("WANDB_MODE") or "offline"

    def open(self, run_id: str) -> int:
        """Begin the run: anew offline, whose files cannot be asked what they hold; online where it was."""
        import wandb

        if run_id in _OPEN:  # of a run that was broken off
            _OPEN.pop(run_id).finish()
        if self.mode == "offline":
            shutil.rmtree(self.path / "wandb", ignore_errors=True)
        quiet: dict[str, Any] = {"silent": True, "console": "off", "disable_git": True, "disable_code": True}
        self.run = wandb.init(
            mode=self.mode,  # type: ignore[arg-type]
            dir=str(self.path),
            project=self.project,
            id=run_id,
            name="/".join(self.path.parts[-2:]),
            config=flatten(yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))),
            resume=None if self.mode == "offline" else "allow",
            reinit="create_new",
            settings=wandb.Settings(**quiet, disable_job_creation=True, x_disable_stats=True),
        )
        _OPEN[run_id] = self.run
        return int(self.run.step) - 1  # its next step, 0 for a run that begins

    def tell(self, round: int, rows: Sequence[Row]) -> None:
        """Log a step. Matrices have n² entries each round; they are for the report page."""
        self.run.log({label(row): row[-1] for row in rows if row[1] != "matrix"}, step=round, commit=True)

    def close(self) -> None:
        """Mark the run finished."""
        _OPEN.pop(str(self.run.id), None)
        self.run.finish()
