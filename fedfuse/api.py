"""From Python: `fedfuse.run({...})` and `fedfuse.load(run_dir)`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from fedfuse.results.run_data import Run as Kept
from fedfuse.results.run_data import load as load_kept

if TYPE_CHECKING:
    from torch import Tensor, nn


class Run:
    """A finished or interrupted run.

    Attributes
    ----------
    dir : Path
    config, summary : dict
    """

    def __init__(self, kept: Kept) -> None:
        self._kept = kept
        self.dir, self.config, self.summary = kept.dir, kept.config, kept.summary or {}

    @property
    def metrics(self) -> pl.DataFrame:
        """Rows (round, scope, client, split, metric, value)."""
        return self._kept.metrics.collect()

    @property
    def traffic(self) -> pl.DataFrame:
        """Rows (round, client, direction, message, record, bytes)."""
        return self._kept.traffic.collect()

    @property
    def timing(self) -> pl.DataFrame:
        """Rows (round, scope, what, seconds)."""
        return self._kept.timing.collect()

    @property
    def partition(self) -> pl.DataFrame:
        """Rows (client, split, label, examples)."""
        return self._kept.partition.collect()

    @property
    def digest(self) -> str | None:
        """The run's digest."""
        return self.summary.get("digest")

    def model(self, client: int | None = None) -> nn.Module:
        """The server's final model, or the one a client ends with.

        Raises
        ------
        UserError
            If there is no such model.
        """
        from fedfuse.runs.export import rebuild

        return rebuild(self.dir, client)[0]

    def predict(self, inputs: Any, client: int | None = None) -> Tensor:
        """Logits for raw inputs, preprocessed as in training.

        Parameters
        ----------
        inputs : ndarray
            Examples as the data set holds them (uint8 images NCHW, float32 features, int64 tokens).
        """
        from fedfuse.runs.export import rebuild
        from fedfuse.train.training import predict

        model, scenario = rebuild(self.dir, client)
        return predict(model, scenario.data.dataset.tensor(inputs))


def load(directory: str | os.PathLike[str]) -> Run:
    """Read a run directory.

    Raises
    ------
    UserError
        If it is not one.
    """
    return Run(load_kept(directory))


def run(settings: Mapping[str, Any], *, quiet: bool = True) -> Run:
    """Run one experiment.

    Parameters
    ----------
    settings : mapping
        Keys as on the command line, dotted or nested: ``{"strategy": "knfu", "strategy.beta": 5, "rounds": 3}``.
    quiet : bool
        Print no progress.

    Raises
    ------
    UserError
        For a wrong key or value.
    WorldError
        If the run failed; it can be resumed.
    """
    from fedfuse.config.compose import compose
    from fedfuse.runs.experiment import run as run_experiment

    return load(run_experiment(compose(overrides(settings)), quiet=quiet))


def overrides(settings: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Write a mapping as command-line words; `name` inside a group's mapping chooses the group."""
    words = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            inner = dict(value)
            if "name" in inner and not prefix:
                words.append(f"{key}={inner.pop('name')}")
            words += overrides(inner, f"{prefix}{key}.")
        else:
            words.append(f"{prefix}{key}={_word(value)}")
    return words


def _word(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ",".join(_word(v) for v in value) + "]"
    if isinstance(value, str | Path) and any(c in str(value) for c in " ,:=[]{}()'\"$@\\"):
        text = str(value).replace("\\", "\\\\").replace("'", "\\'")
        return f"'{text}'"
    return str(value)
