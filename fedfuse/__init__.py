"""FedFuse: federated knowledge fusion. One algorithm file, every runtime, same bits, honest comparison."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "FusionClient": "fedfuse.core.client",
    "FusionStrategy": "fedfuse.core.strategy",
    "Share": "fedfuse.core.strategy",
    "Shares": "fedfuse.core.strategy",
    "Topic": "fedfuse.wire.knowledge",
    "Item": "fedfuse.wire.knowledge",
    "arrays": "fedfuse.wire.records",
    "model_arrays": "fedfuse.wire.records",
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
