"""From a configuration to a checked data set."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json

from fedfuse.config.catalogue import LAYOUTS, SOURCES
from fedfuse.config.schema import DataConfig
from fedfuse.data.build import strata_of, stratified
from fedfuse.data.dataset import PARTS, Dataset, Examples, check
from fedfuse.data.locations import root_of
from fedfuse.errors import UserError, nearest

LARGE = 100.0  # features beyond it are told: at usual rates a step on them is far too long
ROOTLESS = ("digits", "custom", "mixed")


def load(config: DataConfig) -> Dataset:
    """Read the data set that `config` names, limited as it says.

    Raises
    ------
    UserError
        For an unknown name or layout, an impossible limit, or files that are missing or damaged.
    """
    if config.layout == "builtin":
        if config.name not in SOURCES:
            raise UserError(f"data={config.name} is unknown; {nearest(config.name, SOURCES)}")
        layout = SOURCES[config.name].layout
    elif config.layout in LAYOUTS:
        layout = config.layout
    else:
        raise UserError(f"data.layout={config.layout} is unknown; {nearest(config.layout, ('builtin', *LAYOUTS))}")
    if not 0 <= config.test_fraction < 1:
        raise UserError(f"data.test_fraction={config.test_fraction}; allowed: 0 ≤ share < 1")
    for key in ("limit", "test_limit"):
        value = getattr(config, key)
        if value is not None and value < 1:
            raise UserError(f"data.{key}={value}; allowed: null or a positive number of examples")
    reader = importlib.import_module(f"fedfuse.data.read_{layout}")
    root = None if layout in ROOTLESS else root_of(config)
    dataset = check(reader.read(config, root))
    if config.layout != "builtin":  # its place may stay, whatever is in it
        notes = (*dataset.notes, *_unscaled(dataset))
        dataset = dataclasses.replace(dataset, content=content_of(dataset), notes=notes)
    if dataset.provided is not None:
        if config.limit is not None or config.test_limit is not None:
            raise UserError(f"data.limit: data={config.name} comes partitioned and is never cut again; allowed: null")
        return dataset
    return dataclasses.replace(
        dataset,
        train=limited(dataset.train, config.limit, config.name, "limit"),
        test=None if dataset.test is None else limited(dataset.test, config.test_limit, config.name, "test_limit"),
    )


def limited(examples: Examples, count: int | None, *purpose: object) -> Examples:
    """Keep at most `count` rows, classes and groups in proportion; the same rows whatever the run's seed."""
    if count is None or count >= len(examples):
        return examples
    return examples.take(stratified(strata_of(examples.targets, examples.groups), count, *purpose))


def _unscaled(dataset: Dataset) -> list[str]:
    inputs = dataset.train.inputs
    if dataset.kind != "features" or not inputs.size:
        return []
    low, high = float(inputs.min()), float(inputs.max())
    if max(-low, high) <= LARGE:
        return []
    return [
        f"inputs reach from {low:g} to {high:g} and are taken as they are: bring each column to a scale of about 1, or "
        "training may learn nothing, or end in what is no number"
    ]


def content_of(dataset: Dataset) -> str:
    """Return sha256 over all rows and the names of classes and groups: equal where a run would see the same."""
    digest = hashlib.sha256(json.dumps([dataset.classes, dataset.group_names]).encode())
    for examples in (dataset.train, dataset.test):
        for part in PARTS if examples is not None else ():
            array = getattr(examples, part)
            if array is not None:
                digest.update(f"{part} {array.dtype.str} {array.shape}\n".encode())
                digest.update(array.data)
    if dataset.provided is not None:
        digest.update(dataset.provided.offsets.data)
    return digest.hexdigest()
