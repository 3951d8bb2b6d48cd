"""Contestants of `fedfuse bench`: each runs in a process of its own and plays as many rounds as it is told to.

Protocol: a contestant prints `ready`; for every line it reads, a number, it plays so many rounds and prints
`seconds <float>`, what one took.
`python -m fedfuse.bench.play SIDE WORKLOAD CLIENTS` starts one; the sides are those of
`fedfuse.bench.suite.SIDES`.
"""

from __future__ import annotations

import atexit
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COHORT = 50  # clients of a round
EXAMPLES = 50  # of a client


@dataclass(frozen=True)
class Workload:
    """What every client does: a model, the shape of its examples, and whether it trains (batch 10, one epoch)."""

    model: str  # or several, parted by +, which clients have in turn
    shape: tuple[int, ...]
    trains: bool
    strategy: str = "fedavg"  # another: all clients take part

    def cohort(self, clients: int) -> int:
        """Clients of a round."""
        return COHORT if self.strategy == "fedavg" else clients

    def architectures(self, clients: int) -> tuple[str, ...]:
        """Each client's."""
        names = self.model.split("+")
        return tuple(names[client % len(names)] for client in range(clients))


WORKLOADS = {
    "noop": Workload("fedfuse.bench.contestants:linear", (3072,), False),  # 30,730 parameters, 123 kB
    "noop-large": Workload("cnn_large", (1, 28, 28), False),  # 1,663,370 parameters, 6.65 MB
    "logistic": Workload("fedfuse.bench.contestants:linear", (784,), True),  # 7,850 parameters
    "mlp": Workload("fedfuse.bench.contestants:hidden", (784,), True),  # 16,705 parameters
    "cnn": Workload("cnn_large", (1, 28, 28), True),
    "fedmd-mlp": Workload("mlp_small+mlp+mlp_wide", (784,), True, "fedmd"),
    "knfu-mlp": Workload("mlp_small+mlp+mlp_wide", (784,), True, "knfu"),
    "fedmd": Workload("cnn", (1, 28, 28), True, "fedmd"),
    "dsfl": Workload("cnn", (1, 28, 28), True, "dsfl"),
    "knfu": Workload("cnn", (1, 28, 28), True, "knfu"),
    "fed-sb": Workload("causal_lm", (32,), True, "fed_sb"),
}


def linear(shape: tuple[int, ...], classes: int) -> Any:
    """Logistic regression."""
    from torch import nn

    layer = nn.Linear(math.prod(shape), classes)
    return layer if len(shape) == 1 else nn.Sequential(nn.Flatten(), layer)


def hidden(shape: tuple[int, ...], classes: int) -> Any:
    """A network with one hidden layer."""
    from fedfuse.models.feedforward import mlp

    return mlp(shape, classes, 1, None, hidden=(21,))


def pool(workload: Workload) -> tuple[Any, Any]:
    """Examples that all clients draw from: float32 inputs and labels."""
    import numpy as np

    draw = np.random.default_rng(0)
    x = draw.standard_normal((20 * EXAMPLES, *workload.shape), dtype=np.float32)
    return x, draw.integers(0, 10, len(x))


def start_of(client: int) -> int:
    """First row of a client's examples in the pool."""
    return client % 20 * EXAMPLES


def build(workload: Workload, name: str | None = None) -> Any:
    """The workload's model; of several, the one named."""
    from fedfuse import models
    from fedfuse.config.schema import ModelConfig

    return models.build(name or workload.model, shape=workload.shape, classes=10, config=ModelConfig(), seed=0)


# --- fedfuse ----------------------------------------------------------------------------------------------


def scenario_of(workload: Workload, clients: int, cohort: int = COHORT, *words: str) -> Any:
    """A scenario over the pool; clients share rows, so that a hundred thousand need no memory."""
    import numpy as np

    from fedfuse.config.compose import compose
    from fedfuse.core.scenario import Scenario
    from fedfuse.data.dataset import Dataset, Examples
    from fedfuse.data.federated import FederatedData

    settings = [
        "strategy=fedavg", f"clients={clients}", f"participation={cohort / clients}", "train.epochs=1",
        "train.batch_size=10", "train.lr=0.05", "train.momentum=0", "rounds=100000",
    ]  # fmt: skip
    x, y = pool(workload)
    kind = "image" if len(workload.shape) == 3 else "features"
    dataset = Dataset("synthetic", Examples(x, y), None, tuple("0123456789"), kind)
    first = np.array([start_of(client) for client in range(clients)])
    offsets = np.stack([first, first + EXAMPLES, first + EXAMPLES, first + EXAMPLES], axis=1)
    data = FederatedData(dataset, np.arange(len(y)), offsets, None)
    return Scenario(compose([*settings, *words]), data, workload.architectures(clients))


def fedfuse_side(
    workload: Workload, clients: int, grid: str, cohort: int = COHORT, *words: str, device: str = "cpu"
) -> Callable[[], None]:
    """FedAvg on FedFuse's own runtimes."""
    from fedfuse.config import registry
    from fedfuse.core.client import FusionClient

    scenario, entry = scenario_of(workload, clients, cohort, *words), registry.entry("fedavg")
    if not workload.trains:

        class Idle(FusionClient):
            """Sends back what it was sent."""

            def fit(self) -> dict[str, float | int]:
                return {"num-examples": EXAMPLES}

        entry = entry._replace(client=Idle)
    return rounds_of(entry, scenario, grid, device)


def rounds_of(entry: Any, scenario: Any, grid: str, device: str = "cpu") -> Callable[[], None]:
    """Rounds of a strategy on `inline` or `ray`, without commits and evaluation."""
    from fedfuse.compat.flower_identity import claim_identity
    from fedfuse.core.build import build_strategy
    from fedfuse.core.loop import Federation
    from fedfuse.core.node import place
    from fedfuse.engines.grid import LocalGrid
    from fedfuse.engines.inline import InlineGrid
    from fedfuse.wire.client_store import ClientStore

    claim_identity()
    folder = tempfile.TemporaryDirectory(prefix="fedfuse-bench-")
    atexit.register(folder.cleanup)
    store = ClientStore(Path(folder.name))
    if grid == "inline":
        transport: LocalGrid = InlineGrid(place(entry, scenario, store, device=device))
    else:
        from fedfuse.engines.ray import RayGrid

        transport = RayGrid(entry, scenario, store.directory, len(os.sched_getaffinity(0)), device)
    federation = Federation(build_strategy(entry, scenario), transport, 100000)
    federation.strategy.ensure_begun()

    def play() -> None:
        federation.done += 1
        federation.play(federation.done, "train")
        federation.collect(federation.done)
        federation.strategy.outbox.traffic.take_rows()
        federation.rows, federation.timing = [], []

    play.strategy = federation.strategy  # type: ignore[attr-defined]
    return play


# --- a plain loop -----------------------------------------------------------------------------------------


def plain_side(workload: Workload, clients: int, cohort: int = COHORT, device: str = "cpu") -> Callable[[], None]:
    """The limit: one thread, one model, no federation around it."""
    import torch
    import torch.nn.functional as F

    from fedfuse.compat.torch_lists import add_all, copy_all

    torch.set_num_threads(1)
    model = build(workload).to(device)
    x, y = (torch.from_numpy(one).to(device) for one in pool(workload))
    params = list(model.parameters())
    common = [p.detach().clone() for p in params]
    draw = torch.Generator().manual_seed(0)

    def play() -> None:
        total = [torch.zeros_like(p) for p in common]
        for client in torch.randperm(clients, generator=draw)[:cohort].tolist():
            with torch.no_grad():
                copy_all(params, common)
            if workload.trains:
                optimizer = torch.optim.SGD(params, lr=0.05, fused=True)
                first = start_of(client)
                for rows in (torch.randperm(EXAMPLES, generator=draw) + first).to(device).split(10):
                    optimizer.zero_grad()
                    F.cross_entropy(model(x[rows]), y[rows]).backward()
                    optimizer.step()
            with torch.no_grad():
                add_all(total, params, alpha=1 / cohort)
        common[:] = total

    return play


def cores_side(name: str, clients: int) -> Callable[[int], None]:
    """A plain loop on every core at once, each with its share of the cohort, nothing exchanged: the cores' limit."""
    loops, cores = [], min(len(os.sched_getaffinity(0)), COHORT)
    for i in range(cores):
        share = COHORT * (i + 1) // cores - COHORT * i // cores
        command = [sys.executable, "-m", "fedfuse.bench.play", f"share-{share}", name, str(clients)]
        loops.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))

    def answers() -> None:
        for loop in loops:
            assert loop.stdout is not None
            if not loop.stdout.readline():
                raise RuntimeError("a plain loop ended")

    def turn(rounds: int) -> None:
        for loop in loops:
            assert loop.stdin is not None
            print(rounds, file=loop.stdin, flush=True)
        answers()

    answers()
    return turn


# --- Flower -----------------------------------------------------------------------------------------------


def client_app(name: str) -> Any:
    """A Flower ClientApp as Flower's tutorials write it."""
    import torch
    import torch.nn.functional as F
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp

    app, workload = ClientApp(), WORKLOADS[name]
    kept: dict[str, torch.Tensor] = {}

    @app.train()
    def train(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        if not workload.trains:
            content = {"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": EXAMPLES})}
            return Message(RecordDict(content), reply_to=message)
        if not kept:
            kept["x"], kept["y"] = map(torch.from_numpy, pool(workload))
        model = build(workload)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())  # type: ignore[union-attr]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        first = start_of(int(context.node_config["partition-id"]))
        for rows in (torch.randperm(EXAMPLES) + first).split(10):
            optimizer.zero_grad()
            F.cross_entropy(model(kept["x"][rows]), kept["y"][rows]).backward()
            optimizer.step()
        content = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": EXAMPLES})}
        return Message(RecordDict(content), reply_to=message)

    return app


def flower_round(workload: Workload, grid: Any, clients: int) -> Callable[[], None]:
    """One round of Flower's own FedAvg over a grid."""
    from flwr.app import ArrayRecord, ConfigRecord
    from flwr.serverapp.strategy import FedAvg

    strategy = FedAvg(fraction_train=COHORT / clients, fraction_evaluate=0, min_available_nodes=clients)
    state: dict[str, Any] = {"arrays": ArrayRecord(build(workload).state_dict()), "round": 0}

    def play() -> None:
        state["round"] += 1
        messages = strategy.configure_train(state["round"], state["arrays"], ConfigRecord(), grid)
        replies = grid.send_and_receive(messages)
        state["arrays"] = strategy.aggregate_train(state["round"], replies)[0]

    return play


def flower_side(name: str, clients: int) -> None:
    """Flower's own simulator."""
    from flwr.app import Context
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        serve(rounds(flower_round(WORKLOADS[name], grid, clients)))

    cores = len(os.sched_getaffinity(0))
    run_simulation(
        server,
        client_app(name),
        clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": cores, "include_dashboard": False, "log_to_driver": False},
        },
    )


def guest_side(name: str, clients: int) -> None:
    """The same Flower app on FedFuse's engine."""
    from fedfuse.compat.flower_identity import claim_identity
    from fedfuse.engines.cluster import connect
    from fedfuse.engines.guest import GuestGrid

    claim_identity()
    cores = len(os.sched_getaffinity(0))
    connect(cores)
    grid = GuestGrid(f"fedfuse.bench.contestants:app_{name.replace('-', '_')}", os.getcwd(), {}, clients, cores)
    serve(rounds(flower_round(WORKLOADS[name], grid, clients)))


def __getattr__(name: str) -> Any:
    if name.startswith("app_"):  # `module:attribute`, as a Flower app names its ClientApp
        return client_app(name.removeprefix("app_").replace("_", "-"))
    raise AttributeError(name)


# --- the protocol -----------------------------------------------------------------------------------------


def serve(turn: Callable[[int], None]) -> None:
    """Play as many rounds as a line of standard input says, and answer with the seconds of one."""
    print("ready", flush=True)
    for line in sys.stdin:
        rounds, started = int(line), time.perf_counter()
        turn(rounds)
        print(f"seconds {(time.perf_counter() - started) / rounds:.6f}", flush=True)


def rounds(play: Callable[[], None]) -> Callable[[int], None]:
    """A turn of a side that plays round by round."""

    def turn(number: int) -> None:
        for _ in range(number):
            play()

    return turn
