"""Data sets, partitions, the transfer set and what each client sees of them.

Names are resolved on first use, so that listing what exists imports neither torch nor any data library.
This room may import `config`, `seeding` and `errors`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fedfuse.config.catalogue import names, partition_names

if TYPE_CHECKING:
    from fedfuse.data.dataset import Dataset, Examples, Provided
    from fedfuse.data.federated import FederatedData, prepare
    from fedfuse.data.picture import draw_partition

_HOMES = {
    "Dataset": "dataset",
    "Examples": "dataset",
    "Provided": "dataset",
    "FederatedData": "federated",
    "prepare": "federated",
    "draw_partition": "picture",
}

__all__ = [
    "Dataset",
    "Examples",
    "FederatedData",
    "Provided",
    "draw_partition",
    "names",
    "partition_names",
    "prepare",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"fedfuse.data.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'fedfuse.data' has no attribute {name!r}")
