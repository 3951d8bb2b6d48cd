"""From Python: `fedfuse.run({...})`, `fedfuse.compare({...})` and `fedfuse.load(directory, …)`."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from fedfuse.errors import UserError
from fedfuse.results.run_data import RunRecord, find
from fedfuse.results.run_data import load as load_kept
from fedfuse.runs.from_python import merged, overrides

if TYPE_CHECKING:
    from torch import Tensor, nn


class Run:
    """A finished or interrupted run.

    Attributes
    ----------
    dir : Path
    config, summary : dict
    """

    def __init__(self, kept: RunRecord, allow_code: bool = False) -> None:
        self._kept, self._allow_code = kept, allow_code
        self.dir, self.config, self.summary = kept.dir, kept.config, kept.summary or {}

    @property
    def metrics(self) -> pl.DataFrame:
        """Rows (round, scope, client, split, metric, value), and virtual_s where the run has a clock."""
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

    def __repr__(self) -> str:
        return f"Run({str(self.dir)!r}: {self._said()})"

    def _said(self) -> str:
        name, seed = self.config["strategy"]["name"], self.config["seed"]
        if not self.summary:
            kept = self._kept
            why = f": {kept.failure}" if kept.failure else ""
            return f"{name}, seed {seed}, {kept.status} after round {kept.rounds_done} of {kept.rounds}{why}"
        final = self.summary["final"]
        told = [
            f"{label} {100 * value:.1f} %"
            for label, key in (("global", "accuracy/global"), ("personal", "accuracy/personal"))
            if (value := final.get(key)) is not None
        ]
        return f"{name} on {self.summary['data']}, seed {seed}, {self.summary['rounds_done']} rounds: {', '.join(told)}"

    def _repr_html_(self) -> str:
        rows = {"run": self._said(), "directory": self.dir, "digest": self.digest}
        notes = [("note", note) for note in self.summary.get("notes", ())]
        cells = [f"<tr><th>{escape(k)}</th><td>{escape(str(v))}</td></tr>" for k, v in [*rows.items(), *notes]]
        return f"<table>{''.join(cells)}</table>"

    def model(self, client: int | None = None) -> nn.Module:
        """The server's final model, or the one a client ends with.

        Raises
        ------
        UserError
            If there is no such model.
        """
        from fedfuse.runs.export import rebuild

        return rebuild(self.dir, client, self._allow_code)[0]

    def predict(self, inputs: Any, client: int | None = None) -> Tensor:
        """Logits for raw inputs, preprocessed as in training.

        Parameters
        ----------
        inputs : ndarray
            Examples as the data set holds them (uint8 images NCHW, float32 features, int64 tokens).

        Raises
        ------
        UserError
            If there is no such model, or the inputs have another shape than the data set's.
        """
        from fedfuse.runs.export import rebuild
        from fedfuse.train.training import predict

        model, scenario = rebuild(self.dir, client, self._allow_code)
        dataset, given = scenario.data.dataset, np.asarray(inputs)
        if given.ndim != 1 + len(dataset.shape) or (dataset.kind != "tokens" and given.shape[1:] != dataset.shape):
            wanted = ", ".join(map(str, ("n", *dataset.shape)))
            raise UserError(f"predict: inputs have shape {given.shape}; ({wanted}) is needed")
        return predict(model, dataset.tensor(given))


class Runs:
    """Several runs.

    Attributes
    ----------
    runs : list of Run
    skipped : list of str
        A line for each directory that could not be read.
    report : Path or None
        The page, where one was written.
    """

    def __init__(
        self, kept: list[RunRecord], skipped: list[str], report: Path | None = None, allow_code: bool = False
    ) -> None:
        self._kept, self.skipped, self.report = kept, skipped, report
        self.runs = [Run(one, allow_code) for one in kept]

    def __len__(self) -> int:
        return len(self.runs)

    def __iter__(self) -> Iterator[Run]:
        return iter(self.runs)

    def __getitem__(self, i: int) -> Run:
        return self.runs[i]

    @property
    def metrics(self) -> pl.DataFrame:
        """One frame over all runs: their rows, behind (run, strategy, seed)."""
        frames = [
            one.metrics.select(
                pl.lit(str(one.dir)).alias("run"),
                pl.lit(one.config["strategy"]["name"]).alias("strategy"),
                pl.lit(one.config["seed"]).alias("seed"),
                pl.all(),
            )
            for one in self.runs
            if one.summary
        ]
        # a clock adds a column, null where a run has none
        return pl.concat(frames, how="diagonal") if frames else pl.DataFrame()

    def table(self) -> pl.DataFrame:
        """A row per strategy and setting: seeds, mean accuracies in per cent with the ends of their intervals, MB."""
        from fedfuse.results.table import compare as rows

        out = []
        for row in rows(self._kept):
            line: dict[str, Any] = {"strategy": row.strategy, "setting": row.setting, "seeds": row.n}
            for name, value in row.final.items():
                ends = [None if end is None else 100 * end for end in (value.low, value.high)]
                line |= {name: 100 * value.mean, f"{name}/low": ends[0], f"{name}/high": ends[1]}
            line |= {"up_mb": row.up_mb, "down_mb": row.down_mb, "setup_mb": row.setup_mb}
            out.append({**line, "seconds": row.seconds})
        return pl.DataFrame(out)

    def __repr__(self) -> str:
        return f"{len(self.runs)} runs\n{self._printed()}"

    def _printed(self) -> str:
        from rich.console import Console

        from fedfuse.results.table import print_table

        console = Console(width=110, file=io.StringIO(), highlight=False)
        print_table(self._kept, console)
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]

    def _repr_html_(self) -> str:
        lines = [f"<p>{len(self.runs)} runs</p>", _html(self.table())]
        return "".join([*lines, f"<p>report: {escape(str(self.report))}</p>"] if self.report else lines)


def load(*directories: str | os.PathLike[str], allow_code: bool = False) -> Any:
    """Read run directories.

    Parameters
    ----------
    *directories
    allow_code : bool
        Whether code that their configurations name may run, which it takes to build their models: not a stranger's.

    Returns
    -------
    Run or Runs
        The run, where one run directory is named; else every run at or below the directories.

    Raises
    ------
    UserError
        If there is none.
    """
    if len(directories) == 1:
        path = Path(directories[0])
        if (path / "config.yaml").exists() or not path.is_dir():
            return Run(load_kept(path), allow_code)
    kept, skipped = find(directories)
    if not kept:
        raise UserError("; ".join(skipped) or "fedfuse.load: needs at least one directory")
    return Runs(kept, skipped, allow_code=allow_code)


def run(settings: Mapping[str, Any] | None = None, *, quiet: bool = True, **more: Any) -> Run:
    """Run one experiment.

    Parameters
    ----------
    settings : mapping
        Keys as on the command line, dotted or nested: ``{"strategy": "knfu", "strategy.beta": 5, "rounds": 3}``.
        `strategy` may be a class that `@strategy` registered, `model` a callable that returns an `nn.Module`, `loss` a
        class of `nn.Module`, `data` arrays `(x, y)`, a torch `Dataset`, or `{"train": …, "test": …}` of these. Such
        runs go on only from the program that has these things.
    quiet : bool
        Print no progress.
    **more
        Keys without a dot, as words: ``fedfuse.run(strategy="knfu", rounds=3)``.

    Raises
    ------
    UserError
        For a wrong key or value.
    WorldError
        If the run failed; it can be resumed.
    """
    from fedfuse.config.compose import compose_one
    from fedfuse.runs.experiment import run as run_experiment

    config = compose_one(overrides(merged(settings, more)))
    return Run(load_kept(run_experiment(config, quiet=quiet)), allow_code=True)


def compare(settings: Mapping[str, Any] | None = None, *, quiet: bool = True, **more: Any) -> Runs:
    """Run a sweep and write its report, as `fedfuse compare` does.

    Parameters
    ----------
    settings : mapping
        As of `run`; a list is swept: ``{"strategy": ["local", "knfu"], "seed": [0, 1, 2]}``. For a key that takes a
        list itself, a list of lists is.
    quiet : bool
        Print nothing.
    **more
        Keys without a dot, as words.

    Raises
    ------
    UserError
        For a wrong key or value; nothing was run then.
    WorldError
        If some runs failed; the others are finished, and the same call goes on.
    """
    from rich.console import Console

    from fedfuse.runs.sweep import sweep

    words = overrides(merged(settings, more), swept=True)
    root = sweep(words, report=True, console=Console(highlight=False, quiet=quiet))
    kept, skipped = find([root])
    return Runs(kept, skipped, root / "report.html", allow_code=True)


def _html(frame: pl.DataFrame) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in frame.columns)
    lines = ("".join(f"<td>{escape(_cell(value))}</td>" for value in row) for row in frame.iter_rows())
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _cell(value: Any) -> str:
    return "–" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
