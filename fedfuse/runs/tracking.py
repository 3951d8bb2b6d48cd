"""Experiment trackers by one word (`tracking=csv|tensorboard|mlflow|wandb`): what a run committed, told to others.

The run directory stays the record. A tracker only reads it: it is told of a round after that round was committed, and
catches up where it was killed or could not be reached, so it never shows a round that a resumed run does not have.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import yaml

from fedfuse.config.schema import TrackingConfig
from fedfuse.core.evaluation import Row
from fedfuse.errors import UserError, first_line
from fedfuse.results.run_data import COLUMNS
from fedfuse.results.setting import flatten
from fedfuse.runs.tracker import Tracker, label
from fedfuse.runs.weights_and_biases import Wandb

NEEDS = {"tensorboard": ("tensorboard",), "mlflow": ("mlflow", "sqlalchemy", "alembic"), "wandb": ("wandb",)}


class Csv(Tracker):
    """`metrics.csv` in the run directory: every row, as in `metrics.parquet`, and grows while the run goes on."""

    def open(self, run_id: str) -> int:
        """Begin the file anew: a killed run may have left half a line."""
        with open(self.path / "metrics.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(COLUMNS["metrics"])
        return -1

    def tell(self, round: int, rows: Sequence[Row]) -> None:
        """Append the rows."""
        with open(self.path / "metrics.csv", "a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)


class TensorBoard(Tracker):
    """Event files in `tensorboard/` of the run directory; `tensorboard --logdir runs` finds those of all runs."""

    def open(self, run_id: str) -> int:
        """Begin the event file anew."""
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(self.path / "tensorboard", ignore_errors=True)
        self.writer = SummaryWriter(str(self.path / "tensorboard"))
        text = (self.path / "config.yaml").read_text(encoding="utf-8")
        self.writer.add_text("config", "    " + text.replace("\n", "\n    "))  # Markdown for: verbatim
        return -1

    def tell(self, round: int, rows: Sequence[Row]) -> None:
        """Add scalars. Matrices have n² entries each round; they are for the report page."""
        for row in rows:
            if row[1] != "matrix":
                self.writer.add_scalar(label(row), row[-1], round)
        self.writer.flush()

    def close(self) -> None:
        """Close the file."""
        self.writer.close()


class Mlflow(Tracker):
    """A run in MLflow.

    Parameters
    ----------
    path : Path
    uri : str, optional
        MLflow's own address of a server or a database; default `$MLFLOW_TRACKING_URI`, else `sqlite:///mlflow.db`.
    experiment : str
        MLflow's name for a group of runs.
    """

    def __init__(self, path: Path, uri: str | None, experiment: str) -> None:
        super().__init__(path)
        self.uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
        self.experiment = experiment

    def connect(self) -> str:
        """Open the store, made where it is missing, and return the experiment's id."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        self.client = MlflowClient(tracking_uri=self.uri)
        found = self.client.get_experiment_by_name(self.experiment)
        return found.experiment_id if found else self.client.create_experiment(self.experiment)

    def open(self, run_id: str) -> int:
        """Find the run, or make it with its configuration as parameters."""
        from mlflow.entities import Param

        experiment = self.connect()
        found = self.client.search_runs([experiment], f"tags.`fedfuse.run_id` = '{run_id}'", max_results=1)
        if found:
            self.run = found[0].info.run_id
            self.client.update_run(self.run, status="RUNNING")
            return int(found[0].data.tags["fedfuse.round"])
        tags = {"fedfuse.run_id": run_id, "fedfuse.round": "-1", "fedfuse.runs.directory": str(self.path)}
        name = "/".join(self.path.parts[-2:])
        self.run = self.client.create_run(experiment, tags=tags, run_name=name).info.run_id
        config = flatten(yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8")))
        params = [Param(_allowed(key), str(value)[:500]) for key, value in config.items() if value is not None]
        for i in range(0, len(params), 100):
            self.client.log_batch(self.run, params=params[i : i + 100])
        return -1

    def tell(self, round: int, rows: Sequence[Row]) -> None:
        """Log metrics (no matrices), then that the round is there."""
        import time

        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(_allowed(label(row)), row[-1], now, round) for row in rows if row[1] != "matrix"]
        for i in range(0, len(metrics), 1000):
            self.client.log_batch(self.run, metrics=metrics[i : i + 1000])
        self.client.set_tag(self.run, "fedfuse.round", str(round))

    def close(self) -> None:
        """Mark the run finished."""
        self.client.set_terminated(self.run)


MAKERS: dict[str, Callable[[Path, TrackingConfig], Tracker]] = {
    "csv": lambda path, _: Csv(path),
    "tensorboard": lambda path, _: TensorBoard(path),
    "mlflow": lambda path, config: Mlflow(path, config.uri, config.experiment),
    "wandb": lambda path, config: Wandb(path, config.experiment),
}


def check(config: TrackingConfig) -> None:
    """Refuse, before anything else is done, a tracker that is not installed or would give a password away.

    Raises
    ------
    UserError
        Saying how to install it, or where the password belongs.
    """
    missing = [name for name in NEEDS.get(config.name, ()) if find_spec(name) is None]
    if missing:
        extra = "wandb" if config.name == "wandb" else "tracking"
        raise UserError(
            f"tracking={config.name}: needs {', '.join(missing)}, not installed; pip install 'fedfuse[{extra}]'"
        )
    try:
        password = urlsplit(config.uri or "").password
    except ValueError as error:
        raise UserError(f"tracking.uri={config.uri}: is no address ({error})") from error
    if password is not None:
        raise UserError(
            "tracking.uri: holds a password, and the report shows the configuration; "
            "set MLFLOW_TRACKING_URI, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, instead"
        )


def prepare(config: TrackingConfig) -> None:
    """Check, and make the database that several processes at once cannot.

    Raises
    ------
    UserError
        If the tracker is not installed or cannot be reached.
    """
    check(config)
    if config.name == "mlflow":
        try:
            Mlflow(Path(), config.uri, config.experiment).connect()
        except Exception as error:
            raise UserError(f"tracking=mlflow: {first_line(error)}") from error


def tracker(config: TrackingConfig, path: Path) -> Tracker | None:
    """The tracker that `tracking=` names, for a run directory; None for `tracking=none`.

    Raises
    ------
    UserError
        If it is not installed.
    """
    check(config)
    return MAKERS[config.name](path, config) if config.name in MAKERS else None


def _allowed(name: str) -> str:
    """A name as MLflow allows it."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:250]
