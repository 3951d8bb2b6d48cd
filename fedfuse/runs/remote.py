"""A run on one of Flower's runtimes, seen from its server: meet the nodes, play the rounds, keep the run directory."""

from __future__ import annotations

import os
import tempfile
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedfuse.compat.flower_arrays import limit_arrays
from fedfuse.compat.quiet import QUIET
from fedfuse.config import registry
from fedfuse.config.files import write_text
from fedfuse.config.message import as_json, for_sites
from fedfuse.config.schema import Config
from fedfuse.core.build import build_strategy
from fedfuse.core.devices import server_device_of
from fedfuse.core.loop import Federation
from fedfuse.core.scenario import prepare_scenario
from fedfuse.core.threads import single_thread
from fedfuse.data.dataset import SPLITS
from fedfuse.errors import UserError, WorldError
from fedfuse.network.app import SiteApp
from fedfuse.network.audit import Audit
from fedfuse.network.exchange import Patience
from fedfuse.network.handshake import differences, identity
from fedfuse.network.own_data import counts_of, server_scenario, task_of
from fedfuse.network.policy import Policy
from fedfuse.network.remote_grid import RemoteGrid
from fedfuse.network.roster import Roster
from fedfuse.network.site import Site, SiteConfig
from fedfuse.network.sizes import UNKNOWN, largest_array
from fedfuse.runs.directory import RunDirectory
from fedfuse.runs.listeners import callbacks
from fedfuse.runs.tables import write_rows


def serve(
    grid: Grid,
    config: Config,
    directory: RunDirectory,
    patience: Patience,
    *,
    resumed: bool = False,
    quiet: bool = False,
    own: bool = False,
    say: Any = print,
    over: threading.Event | None = None,
    roster: Roster | None = None,
    audit: Audit | None = None,
) -> Federation:
    """Play what is left of a run over Flower's grid; the directory has been created or reopened.

    Parameters
    ----------
    own : bool
        The clients are sites with data of their own; the server's `data=` is the task's reference (class list,
        global test set) and is not dealt.
    over : threading.Event, optional
        Set once the grid has ended: Flower's would wait, in a thread that keeps the process from ending.
    roster : Roster, optional
        Which key may be which client; None where nodes prove none.
    audit : Audit, optional
        Where is noted who took part.

    Raises
    ------
    UserError
        If the configuration cannot be carried out.
    WorldError
        If not all clients join, in a phase too few succeed, or the server's disk fails.
    """
    try:
        with directory.keeping_why("the run can be resumed"):
            adapter = RemoteGrid(grid, {}, patience, say, over, roster)
            return _serve(adapter, config, directory, resumed, quiet, own, audit)
    finally:
        limit_arrays(UNKNOWN)


def _serve(
    adapter: RemoteGrid,
    config: Config,
    directory: RunDirectory,
    resumed: bool,
    quiet: bool,
    own: bool,
    audit: Audit | None,
) -> Federation:
    single_thread()
    entry = registry.entry(config.strategy.name)
    if entry.client.partly_labelled:
        raise UserError(
            f"strategy={entry.name} asks an annotator for labels, and a site has none: it runs in simulation only"
        )
    scenario = prepare_scenario(config)
    run_id = _kept(directory.path / "run_id", uuid.uuid4().hex)
    attempt = int(_kept(directory.path / "attempt", "0")) + 1
    write_text(directory.path / "attempt", str(attempt))
    task = task_of(scenario) if own else ""
    setting: dict[str, Any] = {"config": as_json(for_sites(config)), "run": run_id, "attempt": attempt, "task": task}
    adapter.setting = ConfigRecord(setting)
    counts: dict[int, list[int]] = {}

    def check(hello: Mapping[str, Any]) -> list[str]:
        client = int(hello["client"])
        wanted = identity(scenario, client, entry.name)
        if own:
            counts[client] = wanted["examples"] = counts_of(hello)
            if entry.server.transfer == "none":
                wanted["transfer"] = hello.get("transfer")  # nobody uses it; sites have none
        return differences(wanted, dict(hello))

    if own:
        check_own(config)
    else:
        build_strategy(entry, scenario)  # what does not fit is said before anybody is asked
    adapter.join(scenario.clients, check)
    if audit is not None:
        nodes = {str(client): [node, adapter.examples[client]] for client, node in sorted(adapter.nodes.items())}
        audit.add("clients", run=run_id, strategy=entry.name, attempt=attempt, node_and_examples=nodes)
    if own:
        counts |= {client: [0, 0, 0] for client in range(scenario.clients) if client not in adapter.nodes}
        scenario = server_scenario(scenario, counts)
        write_rows(directory.path / "partition.parquet", "partition", _split_rows(counts))
    strategy = build_strategy(entry, scenario, server_device_of(config))
    strategy.deployed = directory.deployed
    limit_arrays(largest_array(strategy))
    federation = Federation(strategy, adapter, config.rounds, callbacks(config, directory, quiet))
    if resumed:
        directory.restore(federation)
    strategy.run_id = run_id
    federation.run()
    return federation


def check_own(config: Config) -> None:
    """Refuse what cannot be done with data that the server does not see.

    Raises
    ------
    UserError
        Naming the key and what is allowed.
    """
    if config.clients is None:
        raise UserError("clients=null: with --own-data the number of sites is needed, for example clients=3")
    if config.data.target is not None:
        raise UserError(
            f"data.target={config.data.target}: with --own-data each site has its own data and the server no domain "
            "of theirs; allowed: null, and transfer.source=<name of a data set> for an unlabelled set that all have"
        )
    if registry.entry(config.strategy.name).server.transfer != "none" and config.transfer.source == "holdout":
        raise UserError(
            f"transfer.source=holdout: strategy={config.strategy.name} needs a transfer set that every site has; "
            "with --own-data allowed are noise and the name of a data set"
        )


def _split_rows(counts: Mapping[int, list[int]]) -> list[tuple[int, str, str, int]]:
    return [(c, split, "", n) for c in sorted(counts) for split, n in zip(SPLITS, counts[c], strict=True)]


def _kept(path: Path, value: str) -> str:
    """The value that an earlier attempt wrote, else this one, written."""
    if path.exists():
        return path.read_text(encoding="utf-8")
    write_text(path, value)
    return value


def run_on_flower(config: Config, directory: RunDirectory, resumed: bool = False) -> Path:
    """`runtime=flower`: Flower's own simulator, for parity checks; the digest is that of `runtime=inline`.

    Parameters
    ----------
    resumed : bool
        The directory has been reopened and goes on after its last complete round.

    Raises
    ------
    WorldError
        If the run failed.
    """
    os.environ.update(QUIET)
    from flwr.simulation import run_simulation

    from fedfuse.engines.cluster import disconnect

    disconnect()  # Flower's actors would wait for ever for cores that our idle workers hold
    if not resumed:
        directory.create(config.overwrite)
    failures: list[BaseException] = []
    server, over = ServerApp(), threading.Event()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            patience = Patience(retries=config.runtime.retries)
            serve(grid, config, directory, patience, resumed=resumed, say=lambda line: None, over=over)
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
            over.set()
            directory.close()
    if failures:
        if isinstance(failures[0], WorldError | UserError):
            raise failures[0]
        raise WorldError(f"Flower's simulator: {type(failures[0]).__name__}: {failures[0]}") from failures[0]
    return directory.path


_hosts: dict[tuple[str, int], Site] = {}


def simulated(sites: Path, store: Path, clients: int, data: str | None) -> ClientApp:
    """A ClientApp that acts as whichever simulated client its node's partition id says."""

    def answer(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        key = (str(sites), client)
        if key not in _hosts:
            _hosts[key] = Site(SiteConfig(client, sites, clients, data, Policy(allow_code=True), store))
        return _hosts[key].handle(message, context.state)

    return SiteApp(answer)
