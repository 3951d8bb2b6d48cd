"""`--dry-run`: what a run would do, without doing it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from rich.console import Console

from fedfuse.audits.possible import check_audits
from fedfuse.config import registry
from fedfuse.config.schema import Config
from fedfuse.core.build import build_strategy
from fedfuse.core.devices import server_device_of
from fedfuse.core.fit import remarks
from fedfuse.core.scenario import counted, prepare_scenario
from fedfuse.core.shares import declared
from fedfuse.core.strategy import FusionStrategy
from fedfuse.core.timed import build_clock, shape
from fedfuse.data.dataset import Dataset
from fedfuse.errors import listed
from fedfuse.models.in_place import frozen
from fedfuse.runs.configuration import as_yaml
from fedfuse.runs.experiment import workers_of
from fedfuse.wire.records import layout_nbytes


def preview(config: Config) -> None:
    """Print the resolved configuration, partition sizes, parameters, bytes per round and memory.

    Bytes are upper bounds where a strategy's records have an open size.
    """
    console = Console(highlight=False, soft_wrap=True)
    scenario = prepare_scenario(config)
    entry = registry.entry(config.strategy.name)
    strategy = build_strategy(entry, scenario, server_device_of(config))
    check_audits(strategy, config.audit)
    console.print(as_yaml(config), markup=False)
    sizes = np.diff(scenario.data.offsets, axis=1)
    console.print(f"data: {scenario.data.dataset.name}, {counted(scenario.clients)}, {scenario.classes} classes")
    console.print(f"  {found(scenario.data.dataset)}", markup=False)
    for i, split in enumerate(("train", "validation", "personal test")):
        column = sizes[:, i]
        console.print(f"  {split}: {column.sum()} examples, {column.min()} to {column.max()} a client")
    transfer = scenario.data.transfer
    console.print(f"  transfer set: {0 if transfer is None else len(transfer)}")
    for note in (*scenario.data.notes, *remarks(strategy)):
        console.print(f"  note: {note}", markup=False)
    total = 0  # bytes of a worker's models: what changes and its initial values, and what is frozen
    for name in sorted(set(scenario.architectures)):
        layout, model = strategy.workspace.layout(name), strategy.workspace.resident(name)
        count = sum(int(np.prod(shape)) for _, shape in layout.values())
        fixed = frozen(model)
        base = [parameter for key, parameter in model.named_parameters() if key in fixed]
        size = sum(parameter.nbytes for parameter in base)
        total += 2 * layout_nbytes(layout) + size
        over = f", over {sum(map(torch.numel, base)):,} frozen ones, {size:,} bytes" if base else ""
        console.print(f"model {name}: {count:,} parameters and buffers, {layout_nbytes(layout):,} bytes{over}")
    up, down = bytes_a_round(strategy)
    console.print(f"round: {counted(scenario.cohort_size)}, up {up:,.0f} bytes, down {down:,.0f} bytes (at most)")
    if (clock := build_clock(strategy)) is not None:
        for line in shape(strategy, clock):
            console.print(line, markup=False)
    data = scenario.data.dataset.train.inputs.nbytes
    workers = 1 if config.runtime.name == "inline" else workers_of(config, scenario.clients)
    console.print(
        f"memory: data {data:,} bytes once a machine; {counted(workers, 'worker')} with {total:,} bytes of models each"
    )


def found(dataset: Dataset) -> str:
    """What inputs, classes and groups the data turned out to have."""
    train, test = dataset.train, dataset.test
    told = [f"inputs: {train.inputs.dtype} {dataset.shape} {dataset.kind}"]
    if dataset.next_token:
        told.append(f"vocabulary: {len(dataset.classes)} tokens")
    else:
        told.append(f"classes: {listed(dataset.classes, 5)} ({len(dataset.classes)})")
    if dataset.group_names is not None:
        told.append(f"groups: {listed(dataset.group_names, 5)} ({len(dataset.group_names)})")
    return "; ".join([*told, f"global test: {0 if test is None else len(test)} examples"])


def bytes_a_round(strategy: FusionStrategy) -> tuple[float, float]:
    """Bytes that a round sends up and down at most: all phases of the longest round, and records at their largest.

    Each phase may bring what the one before it has published.
    """
    scenario = strategy.scenario
    rounds = {strategy.phases(round) for round in range(1, min(scenario.config.rounds, 1_000) + 1)}
    phases = max(rounds, key=len)
    up = down = 0
    for client in range(scenario.clients):
        scope = strategy.workspace.scope(client, scenario.config.strategy)
        for phase, times in Counter(phases).items():
            specs = declared(strategy, phase).values()
            up += times * sum(layout_nbytes(spec(scope)) for spec in specs if spec is not None)
        for topic in type(strategy).topics.values():
            spec = topic.increment or topic.arrays
            down += layout_nbytes(spec(scope)) if spec is not None and not topic.once else 0
    share = scenario.cohort_size / scenario.clients
    return up * share, down * share * len(phases)
