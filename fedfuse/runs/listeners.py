"""Who listens to a run, in order: evaluation, early stop, the run directory, a tracker, the progress line."""

from __future__ import annotations

from fedfuse.config.schema import Config
from fedfuse.core.callbacks import EarlyStop, Evaluation
from fedfuse.core.loop import Callback
from fedfuse.core.samples import Samples
from fedfuse.runs.directory import RunDirectory
from fedfuse.runs.progress import Progress
from fedfuse.runs.tracking import tracker


def callbacks(config: Config, directory: RunDirectory, quiet: bool) -> list[Callback]:
    """Evaluation first, the commit next, then who reads what was committed; the progress line last."""
    chosen: list[Callback] = [Evaluation(config.evaluate.every, config.evaluate.seconds)]
    if config.stop.on:
        chosen.append(EarlyStop(config.stop.patience, config.stop.seconds))
    if config.evaluate.samples:
        chosen.append(Samples(config.evaluate.samples, config.evaluate.max_tokens, directory.keep_samples))
    chosen.append(directory)
    if (told := tracker(config.tracking, directory.path)) is not None:
        chosen.append(told)
    if not quiet:
        chosen.append(Progress())
    return chosen
