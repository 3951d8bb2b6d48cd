"""Runs side by side: each lane plays one run after another on cores of its own, so that no core is asked for twice.

A run's digest does not depend on where it runs, so it does not depend on the lanes either.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedfuse.config.schema import Config, RuntimeConfig
from fedfuse.core.devices import device_of
from fedfuse.errors import UserError, WorldError
from fedfuse.runs.experiment import resume, run

Track = Generator[Config, WorldError | None, None]  # yields runs one by one, each after the outcome of the last


def shared_out(config: Config, runs: int) -> RuntimeConfig:
    """Say how each of several runs shall run, and how many at once (`parallel`).

    Parameters
    ----------
    config : Config
        Of any of them. `runtime.parallel` if it says so; else on `runtime=ray` as many as have a core each, and one
        where that could ask too much of the machine: with a GPU, a memory limit or a cluster.
    runs : int

    Raises
    ------
    UserError
        If `runtime.parallel` is set where runs cannot share this machine.
    """
    runtime = config.runtime
    if (runtime.parallel or 1) > 1 and (runtime.name == "flower" or runtime.address is not None):
        what = "runtime=flower" if runtime.name == "flower" else f"runtime.address={runtime.address}"
        raise UserError(f"runtime.parallel={runtime.parallel}: allowed is 1 with {what}, which takes the whole machine")
    alone = runtime.name != "ray" or runtime.address is not None or runtime.memory is not None
    if runtime.parallel is None and (alone or device_of(config) == "cuda"):
        return runtime
    cores = len(os.sched_getaffinity(0))
    each = 1 if runtime.name == "inline" else runtime.workers or 1
    lanes = max(1, min(runtime.parallel or cores, cores // each, runs))
    if lanes == 1:
        return replace(runtime, parallel=1)
    if runtime.name == "ray" and runtime.workers is None:
        each = max(1, min(cores // lanes, config.clients or cores))
    if each == 1:  # an actor for each client's work would be one more process to no gain
        return replace(runtime, name="inline", workers=None, parallel=lanes)
    return replace(runtime, workers=each, parallel=lanes)


def begin(config: Config, started: float | None = None, quiet: bool = False) -> None:
    """Play a run, or what is left of it.

    Raises
    ------
    UserError
        If it cannot be carried out.
    WorldError
        If the world failed; the run can be resumed.
    """
    path = Path(str(config.out))
    if (path / "config.yaml").exists() and not config.overwrite:
        resume(path, quiet, config.runtime, rounds=config.rounds)
    else:
        run(config, started, quiet)


def drive(tracks: Iterable[Track], runtime: RuntimeConfig, share: float = 0.0, quiet: bool = False) -> None:
    """Play tracks to their ends, as many at once as `runtime.parallel` says.

    Parameters
    ----------
    tracks : iterable of Track
    runtime : RuntimeConfig
        From `shared_out`.
    share : float
        Share of a GPU that a lane takes.
    quiet : bool
        Print no progress of a run that is played alone.

    Raises
    ------
    UserError
        If a run cannot be carried out, or a track says so. Runs under way are broken off; they can be resumed.
    """
    if (runtime.parallel or 1) == 1:
        for track in tracks:
            _alone(track, quiet)
        return
    waiting = deque((track, config) for track in tracks if (config := next(track, None)) is not None)
    if waiting:  # Ray is not started for runs that are all finished
        with _lanes(runtime, share) as start:
            _feed(waiting, start, min(len(waiting), int(runtime.parallel or 1)))


def _alone(track: Track, quiet: bool) -> None:
    config = next(track, None)
    while config is not None:
        outcome = None
        try:
            begin(config, quiet=quiet)
        except WorldError as error:
            outcome = error
        config = _after(track, outcome)


def _after(track: Track, outcome: WorldError | None) -> Config | None:
    try:
        return track.send(outcome)
    except StopIteration:
        return None


def _feed(waiting: deque[tuple[Track, Config]], start: Callable[[], Any], count: int) -> None:
    import ray

    lanes = [start() for _ in range(count)]
    busy: dict[Any, tuple[Any, Track]] = {}
    while True:
        while lanes and waiting:
            (track, config), lane = waiting.popleft(), lanes.pop()
            busy[lane.play.remote(config)] = (lane, track)
        if not busy:
            return
        (done,), _ = ray.wait(list(busy), num_returns=1)
        lane, track = busy.pop(done)
        try:
            kind, line = ray.get(done)
        except ray.exceptions.RayError as error:  # its process died: the run can be resumed
            kind, line = "world", f"{type(error).__name__}: the process of this run died"
            lane = start()
        if kind == "user":
            raise UserError(line)
        more = _after(track, WorldError(line) if kind else None)
        if more is not None:
            busy[lane.play.remote(more)] = (lane, track)
        else:
            lanes.append(lane)


class Lane:
    """A process that plays runs."""

    def play(self, config: Config) -> tuple[str, str]:
        """Play one; errors come back as their kind and line, because an actor's own would come with its traceback."""
        try:
            begin(config, quiet=True)
        except UserError as error:
            return "user", str(error)
        except WorldError as error:
            return "world", str(error)
        return "", ""


@contextlib.contextmanager
def _lanes(runtime: RuntimeConfig, share: float) -> Iterator[Callable[[], Any]]:
    """Say how to start a lane. One that runs inline takes its core; one with workers leaves the cores to them."""
    import ray

    from fedfuse.engines.ray import connect, disconnect

    disconnect()  # what an earlier run left idle holds cores, and may be sized otherwise
    each = 1 if runtime.name == "inline" else int(runtime.workers or 1)
    connect(int(runtime.parallel or 1) * each)
    cores = 1 if runtime.name == "inline" else 0
    gpus = share if runtime.name == "inline" else 0.0
    try:
        yield ray.remote(Lane).options(num_cpus=cores, num_gpus=gpus).remote
    finally:
        disconnect()
