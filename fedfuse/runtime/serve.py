"""The server's side of a run on one of Flower's runtimes: meet the nodes, play the rounds, keep the run directory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedfuse import registry
from fedfuse.config import Config
from fedfuse.directory import RunDirectory, write_text
from fedfuse.errors import UserError, WorldError
from fedfuse.experiment import build_strategy, callbacks, device_of
from fedfuse.federation import Federation
from fedfuse.runtime.app import SiteApp
from fedfuse.runtime.flower import FlowerGrid, Patience
from fedfuse.runtime.hello import differences, identity
from fedfuse.runtime.host import Host, Seat
from fedfuse.runtime.inline import single_thread
from fedfuse.runtime.settings import as_json
from fedfuse.scenario import prepare_scenario


def serve(
    grid: Grid,
    config: Config,
    directory: RunDirectory,
    patience: Patience,
    *,
    resumed: bool = False,
    quiet: bool = False,
    say: Any = print,
) -> Federation:
    """Play what is left of a run over Flower's grid; the directory has been created or reopened.

    Raises
    ------
    WorldError
        If not all clients join, or in a phase too few succeed.
    """
    single_thread()
    entry = registry.entry(config.strategy.name)
    scenario = prepare_scenario(config)
    strategy = build_strategy(entry, scenario, device_of(config))
    adapter = FlowerGrid(grid, {}, patience, say)
    federation = Federation(strategy, adapter, config.rounds, callbacks(config, directory, quiet))
    if resumed:
        directory.restore(federation)
    strategy.run_id = _kept(directory.path / "run_id", strategy.run_id)
    attempt = int(_kept(directory.path / "attempt", "0")) + 1
    write_text(directory.path / "attempt", str(attempt))
    adapter.setting = ConfigRecord({"config": as_json(config), "run": strategy.run_id, "attempt": attempt})

    def check(hello: Mapping[str, Any]) -> list[str]:
        return differences(identity(scenario, int(hello["client"]), entry.name), dict(hello))

    adapter.join(scenario.clients, check)
    federation.run()
    return federation


def _kept(path: Path, value: str) -> str:
    """The value that an earlier attempt wrote, else this one, written."""
    if path.exists():
        return path.read_text(encoding="utf-8")
    write_text(path, value)
    return value


def run_on_flower(config: Config, directory: RunDirectory) -> Path:
    """`runtime=flower`: Flower's own simulator, for parity checks; the digest is that of `runtime=inline`.

    Raises
    ------
    WorldError
        If the run failed.
    """
    os.environ.update(QUIET)
    from flwr.simulation import run_simulation

    directory.create(config.overwrite)
    failures: list[BaseException] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            serve(grid, config, directory, Patience(retries=config.runtime.retries), quiet=False, say=lambda line: None)
        except BaseException as error:
            failures.append(error)

    clients = prepare_scenario(config).clients
    workers = config.runtime.workers or max(1, min(len(os.sched_getaffinity(0)), clients))
    backend: Any = {"init_args": {"num_cpus": workers}, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    with tempfile.TemporaryDirectory() as sites:
        try:
            run_simulation(
                server,
                simulated(Path(sites), directory.clients.directory, clients, config.data.root),
                num_supernodes=clients,
                backend_config=backend,
            )
        except Exception as error:
            failures.append(error)
        finally:
            directory.close()
    if failures:
        if isinstance(failures[0], WorldError | UserError):
            raise failures[0]
        raise WorldError(f"Flower's simulator: {type(failures[0]).__name__}: {failures[0]}") from failures[0]
    return directory.path


QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}

_hosts: dict[tuple[str, int], Host] = {}


def simulated(sites: Path, store: Path, clients: int, data: str | None) -> ClientApp:
    """A ClientApp that acts as whichever simulated client its node's partition id says."""

    def answer(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        key = (str(sites), client)
        if key not in _hosts:
            _hosts[key] = Host(Seat(client, sites, clients, data, store=store))
        return _hosts[key].handle(message)

    return SiteApp(answer)
