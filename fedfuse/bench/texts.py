"""Fed-SB as a contest: all clients fine-tune R over the frozen stories260K, which lies beside `$FEDFUSE_DATA`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedfuse.bench.contestants import EXAMPLES, Workload, rounds_of, start_of

LENGTH, VOCABULARY, RANK = 32, 512, 8
RATE = 0.005


def stories() -> Path:
    """Where stories260K lies."""
    return Path(os.environ.get("FEDFUSE_DATA", "../shared/data")).parent / "models" / "stories260K"


def pool() -> Any:
    """Texts that all clients draw from, of any tokens: (1,000, 32)."""
    import numpy as np

    return np.random.default_rng(0).integers(3, VOCABULARY, (20 * EXAMPLES, LENGTH))


def scenario_of(workload: Workload, clients: int, *more: str) -> Any:
    """All clients take part, over texts they share."""
    import numpy as np

    from fedfuse.config.compose import compose
    from fedfuse.core.scenario import Scenario
    from fedfuse.data.dataset import Dataset, Examples
    from fedfuse.data.federated import FederatedData

    words = [
        f"strategy={workload.strategy}", f"strategy.rank={RANK}", "strategy.init=random_orthonormal",
        f"model={workload.model}", f"model.path={stories()}", f"clients={clients}", "rounds=100000",
        "train.epochs=1", "train.batch_size=10", "train.optimizer=adamw", f"train.lr={RATE}", "transfer.size=0",
    ]  # fmt: skip
    x = pool()
    classes = tuple(map(str, range(VOCABULARY)))
    dataset = Dataset("synthetic", Examples(x, x[:, 0]), None, classes, "tokens", next_token=True)
    first = np.array([start_of(client) for client in range(clients)])
    offsets = np.stack([first, first + EXAMPLES, first + EXAMPLES, first + EXAMPLES], axis=1)
    data = FederatedData(dataset, np.arange(len(x)), offsets, None)
    return Scenario(compose([*words, *more]), data, workload.architectures(clients))


def fedfuse_side(workload: Workload, clients: int, grid: str, *words: str) -> Callable[[], None]:
    """The strategy as users run it, without evaluation and the run directory."""
    from fedfuse.config import registry

    return rounds_of(registry.entry(workload.strategy), scenario_of(workload, clients, *words), grid)


def plain_side(workload: Workload, clients: int) -> Callable[[], None]:
    """The limit: one thread, one model whose R are swapped, and no federation around it."""
    import torch

    from fedfuse.compat.torch_lists import add_all, copy_all
    from fedfuse.config.schema import ModelConfig
    from fedfuse.models.language import build
    from fedfuse.train.adapters import LoRASB, inject
    from fedfuse.train.task import task_loss

    torch.set_num_threads(1)
    model = build(workload.model, (LENGTH,), VOCABULARY, ModelConfig(path=str(stories())))
    inject(model, LoRASB, rank=RANK, scale=1.0).train()
    x, draw = torch.from_numpy(pool()), torch.Generator().manual_seed(0)
    params = [p for p in model.parameters() if p.requires_grad]
    common = [p.detach().clone() for p in params]

    def play() -> None:
        total = [torch.zeros_like(p) for p in common]
        for client in range(clients):
            with torch.no_grad():
                copy_all(params, common)
            optimizer = torch.optim.AdamW(params, lr=RATE, fused=True)
            for rows in (torch.randperm(EXAMPLES, generator=draw) + start_of(client)).split(10):
                optimizer.zero_grad()
                task_loss(model(x[rows]), x[rows]).backward()
                optimizer.step()
            with torch.no_grad():
                add_all(total, params, alpha=1 / clients)
        common[:] = total

    return play
