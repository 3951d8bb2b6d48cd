"""Distillation as a contest: a round of FedMD, DS-FL or KnFu on our runtimes, and the bare torch work of its steps.

A round, for every client, whose model is its own: distil last round's soft labels on the transfer set (1,000 rows, one
epoch), train on private examples (50, batch 10, one epoch), predict the transfer set; then the server's aggregation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedfuse.bench.contestants import EXAMPLES, Workload, build, pool, rounds_of, start_of

ROWS = 1000  # |D_t|
BATCH = 64  # of the distillation


def scenario_of(workload: Workload, clients: int, *more: str) -> Any:
    """All clients take part, over a pool they share and a transfer set of noise."""
    import numpy as np

    from fedfuse.config.compose import compose
    from fedfuse.core.scenario import Scenario
    from fedfuse.data.dataset import Dataset, Examples
    from fedfuse.data.federated import FederatedData

    batch = {"fedmd": "digest_batch", "knfu": "finetune_batch", "dsfl": "distill_batch"}[workload.strategy]
    words = [
        f"strategy={workload.strategy}", f"strategy.{batch}={BATCH}", "distil.epochs=1", f"clients={clients}",
        "rounds=100000", "train.epochs=1", "train.batch_size=10", "train.lr=0.05", "train.momentum=0",
        "distil.optimizer=sgd",
    ]  # fmt: skip
    x, y = pool(workload)
    kind = "image" if len(workload.shape) == 3 else "features"
    dataset = Dataset("synthetic", Examples(x, y), None, tuple("0123456789"), kind)
    first = np.array([start_of(client) for client in range(clients)])
    offsets = np.stack([first, first + EXAMPLES, first + EXAMPLES, first + EXAMPLES], axis=1)
    transfer = Examples(shared(workload), np.full(ROWS, -1))
    data = FederatedData(dataset, np.arange(len(y)), offsets, transfer)
    return Scenario(compose([*words, *more]), data, workload.architectures(clients))


def shared(workload: Workload) -> Any:
    """Inputs of the transfer set, float32."""
    import numpy as np

    return np.random.default_rng(1).standard_normal((ROWS, *workload.shape), dtype=np.float32)


def fedfuse_side(workload: Workload, clients: int, grid: str, *words: str) -> Callable[[], None]:
    """The strategy as users run it, without evaluation and the run directory."""
    from fedfuse.config import registry

    return rounds_of(registry.entry(workload.strategy), scenario_of(workload, clients, *words), grid)


def plain_side(workload: Workload, clients: int) -> Callable[[], None]:
    """The limit: one thread, one network whose weights are swapped, and no federation around it."""
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    from fedfuse.compat.torch_lists import copy_all

    torch.set_num_threads(1)
    names, method = workload.architectures(clients), workload.strategy
    networks = {name: build(workload, name) for name in names}
    x, y = map(torch.from_numpy, pool(workload))
    public = torch.from_numpy(shared(workload))
    kept = {
        name: [*net.parameters(), *filter(Tensor.is_floating_point, net.buffers())] for name, net in networks.items()
    }
    owned = [[v.detach().clone() for v in kept[name]] for name in (*names, names[0])]  # the last is the server's
    lessons: list[Any] = [None] * clients
    draw = torch.Generator().manual_seed(0)

    def wake(who: int) -> Any:
        name = names[who % clients]
        with torch.no_grad():
            copy_all(kept[name], owned[who])
        return networks[name]

    def rest(who: int) -> None:
        with torch.no_grad():
            copy_all(owned[who], kept[names[who % clients]])

    def steps(model: Any, inputs: Any, size: int, loss: Callable[[Any, Any], Any]) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, fused=True)
        for rows in torch.randperm(len(inputs), generator=draw).split(size):
            optimizer.zero_grad()
            loss(model(inputs[rows]), rows).backward()
            optimizer.step()

    def to(labels: Any) -> Callable[[Any, Any], Any]:
        return lambda z, rows: F.cross_entropy(z, labels[rows])

    def learn(model: Any, lesson: Any) -> None:
        if method == "fedmd":
            steps(model, public, BATCH, lambda z, rows: F.l1_loss(z, lesson[rows]))
        elif method == "dsfl":
            steps(model, public, BATCH, to(lesson))
        else:
            steps(model, public, BATCH, lambda z, rows: F.kl_div(z.log_softmax(1), lesson[rows], reduction="batchmean"))

    def answers(model: Any) -> Any:
        model.eval()
        with torch.no_grad():
            z = torch.cat([model(part) for part in public.split(512)])
        model.train()
        return z if method == "fedmd" else z.softmax(1)

    def play() -> None:
        said = []
        for client in range(clients):
            model = wake(client)
            if lessons[client] is not None:
                learn(model, lessons[client])
            first = start_of(client)
            own, labels = x[first : first + EXAMPLES], y[first : first + EXAMPLES]
            steps(model, own, 10, to(labels))
            said.append(answers(model))
            rest(client)
        heard = torch.stack(said)
        if method == "knfu":
            p = heard.mean(1)
            divergence = (p[:, None] * (p[:, None] / p[None]).log()).sum(-1)
            mixed = (-10 * divergence).softmax(1) @ heard.flatten(1)
            lessons[:] = mixed.view_as(heard).unbind(0)
        else:
            mean = heard.mean(0)
            lessons[:] = [(mean / 0.1).softmax(1) if method == "dsfl" else mean] * clients
        if method == "dsfl":
            learn(wake(clients), lessons[0])
            rest(clients)

    return play
