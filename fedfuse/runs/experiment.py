"""One run from a checked configuration: scenario, strategy, grid and callbacks put together."""

from __future__ import annotations

import itertools
import os
import time
from dataclasses import replace
from pathlib import Path

from fedfuse.audits.possible import check_audits
from fedfuse.compat.flower_identity import claim_identity
from fedfuse.config import registry
from fedfuse.config.dotted import code
from fedfuse.config.registry import Entry
from fedfuse.config.schema import Config, RuntimeConfig
from fedfuse.core.build import build_strategy
from fedfuse.core.devices import device_of, server_device_of
from fedfuse.core.loop import Federation
from fedfuse.core.node import Node, place
from fedfuse.core.scenario import Scenario, prepare_scenario
from fedfuse.core.strategy import FusionStrategy
from fedfuse.core.threads import single_thread
from fedfuse.core.timed import build_clock
from fedfuse.core.virtual_clock import VirtualClock
from fedfuse.engines.grid import LocalGrid
from fedfuse.engines.inline import InlineGrid
from fedfuse.errors import UserError
from fedfuse.runs.configuration import address_of, known_config
from fedfuse.runs.directory import RunDirectory
from fedfuse.runs.environment import check_content
from fedfuse.runs.further import make_room
from fedfuse.runs.interrupt import Interrupt
from fedfuse.runs.listeners import callbacks
from fedfuse.runs.own_code import go_on_with
from fedfuse.runs.tracking import check as check_tracking


def workers_of(config: Config, clients: int) -> int:
    """Number of actors: as asked for, else min(cores, clients)."""
    return config.runtime.workers or max(1, min(len(os.sched_getaffinity(0)), clients))


def build_grid(entry: Entry, scenario: Scenario, directory: RunDirectory) -> LocalGrid:
    """The grid that `runtime=` names.

    Raises
    ------
    UserError
        If there is no such runtime.
    """
    runtime, device = scenario.config.runtime, device_of(scenario.config)
    if runtime.name == "inline":
        node: Node = place(entry, scenario, directory.clients, device=device, retries=runtime.retries)
        return InlineGrid(node, runtime.reverse)
    if runtime.name == "ray":
        from fedfuse.engines.ray import RayGrid

        workers = workers_of(scenario.config, scenario.clients)
        return RayGrid(entry, scenario, directory.clients.directory, workers, device, runtime.retries, runtime.address)
    raise UserError(f"runtime={runtime.name}: unknown; allowed: inline, ray, flower")


def default_out(config: Config) -> Path:
    """`runs/<time>-<strategy>-<data>-s<seed>`."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return free(Path("runs") / f"{stamp}-{config.strategy.name}-{config.data.name}-s{config.seed}")


def free(path: Path) -> Path:
    """A path that nobody typed, or, where a run of the same second has it, the next: `…-2`, `…-3`."""
    names = (path.with_name(f"{path.name}-{i}") for i in itertools.count(2))
    return next(one for one in itertools.chain([path], names) if not one.exists())


def run(config: Config, started: float | None = None, quiet: bool = False) -> Path:
    """Run one experiment and return its directory.

    Raises
    ------
    UserError
        If the configuration cannot be carried out; nothing is written then.
    WorldError
        If the world failed; the run can be resumed.
    """
    started = time.time() if started is None else started
    check_tracking(config.tracking)
    single_thread()
    claim_identity()
    entry = registry.entry(config.strategy.name)
    scenario = prepare_scenario(config)
    strategy = build_strategy(entry, scenario, server_device_of(config))
    check_audits(strategy, config.audit)
    clock = build_clock(strategy)
    path = Path(config.out) if config.out else default_out(config)
    directory = RunDirectory(path, config, started, config.runtime.state_dir)
    if config.runtime.name == "flower":
        from fedfuse.runs.remote import run_on_flower

        return run_on_flower(config, directory)
    directory.create(config.overwrite, scenario.data.dataset.content)
    return audited(play(entry, strategy, directory, quiet, clock=clock), config, quiet)


def audited(path: Path, config: Config, quiet: bool) -> Path:
    """Make the audits that a configuration asks for and its finished run has not had (`audit=`)."""
    if config.audit:
        from fedfuse.runs.audit import audit, made

        if missing := [name for name in config.audit if name not in made(path)]:
            told = audit(path, missing, allow_code=True)  # whoever began the run has said the same configuration
            if not quiet:
                print(told, end="\n\n")
    return path


def play(
    entry: Entry,
    strategy: FusionStrategy,
    directory: RunDirectory,
    quiet: bool,
    resumed: bool = False,
    clock: VirtualClock | None = None,
) -> Path:
    """Put the grid and the callbacks together, run what is left of the rounds, and end what was started.

    Raises
    ------
    UserError
        If the run cannot begin; a directory that was made for it is taken back.
    WorldError
        If the world failed, a full disk included; the run can be resumed.
    """
    scenario, onwards = strategy.scenario, f"fedfuse resume {directory.path} goes on"
    grid: LocalGrid | None = None
    try:
        with directory.keeping_why(onwards), Interrupt() as interrupt:
            grid = build_grid(entry, scenario, directory)
            listeners = [*callbacks(scenario.config, directory, quiet), interrupt]
            federation = Federation(strategy, grid, scenario.config.rounds, listeners, clock)
            if resumed:
                directory.restore(federation)
                grid.cache.update(strategy.board.items)
            grid.await_workers()
            federation.run()
    except UserError:
        if not resumed:
            directory.discard()
        raise
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(onwards) from error
    finally:
        if grid is not None:
            grid.close()
        directory.close()
    return directory.path


def resume(
    path: Path,
    quiet: bool = False,
    runtime: RuntimeConfig | None = None,
    allow_code: bool | None = None,
    rounds: int | None = None,
) -> Path:
    """Go on after the last complete round of a run directory.

    Parameters
    ----------
    path : Path
    quiet : bool
    runtime : RuntimeConfig, optional
        Where it goes on; default where it began.
    allow_code : bool, optional
        Whether code that its configuration names may run, and addresses be called; without a word, only with `runtime`,
        since the caller has said the same configuration then.
    rounds : int, optional
        How many it shall have; more than it has done even if it has ended.

    Raises
    ------
    UserError
        If it is not a run directory that this version can resume.
    """
    started = time.time()
    if (path / "order.json").exists():
        raise UserError(f"{path}: belongs to a deployment; fedfuse deploy resume {path} goes on")
    allowed = runtime is not None if allow_code is None else allow_code
    config = known_config(path, allowed)
    if not allowed and (asked := address_of(config)):
        raise UserError(
            f"{path}/config.yaml: {asked} is an address that it would call; if you know it, say --allow-code"
        )
    config.runtime = runtime or config.runtime
    with code(allowed):
        return _resumed(path, config, quiet, started, config.rounds if rounds is None else rounds)


def _resumed(path: Path, config: Config, quiet: bool, started: float, rounds: int) -> Path:
    flower = config.runtime.name == "flower"
    if (path / "attempt").exists() and not flower:  # its clients' states, and maybe data, are at the nodes
        raise UserError(f"{path}: was played by a deployment; fedfuse deploy resume {path} goes on")
    single_thread()
    claim_identity()
    entry = registry.entry(config.strategy.name)
    directory = RunDirectory(path, config, started)
    directory.reopen()
    scenario = None
    if not flower:  # whose data are gone, or others: the run stays as it is
        scenario = prepare_scenario(replace(config, rounds=rounds))
        check_content(path, config, scenario.data.dataset.content)
    go_on_with(path, config, directory.clients)
    if rounds != config.rounds:
        config = make_room(path, config, rounds)
        directory.config = config
    if scenario is None:
        from fedfuse.runs.remote import run_on_flower

        return run_on_flower(config, directory, resumed=True)
    strategy = build_strategy(entry, scenario, server_device_of(config))
    played = play(entry, strategy, directory, quiet, resumed=True, clock=build_clock(strategy))
    return audited(played, config, quiet)
