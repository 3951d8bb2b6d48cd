"""FedFuse: federated knowledge fusion. One algorithm file, every runtime, same bits, honest comparison."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "FusionClient": "fedfuse.client",
    "FusionStrategy": "fedfuse.strategy",
    "Share": "fedfuse.strategy",
    "Shares": "fedfuse.strategy",
    "Topic": "fedfuse.knowledge",
    "Item": "fedfuse.knowledge",
    "arrays": "fedfuse.records",
    "model_arrays": "fedfuse.records",
    "UserError": "fedfuse.errors",
    "WorldError": "fedfuse.errors",
    "Run": "fedfuse.api",
    "run": "fedfuse.api",
    "load": "fedfuse.api",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    # torch, flwr and ray take seconds to import: nothing of them is, until something that needs them is asked for
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fedfuse' has no attribute {name!r}")
