"""What server and node must agree on before they compute together, as hashes in one query."""

from __future__ import annotations

import hashlib
from importlib import metadata
from typing import Any

from fedfuse.core.scenario import Scenario
from fedfuse.core.workspace import Workspace
from fedfuse.wire.records import sha_arrays


def identity(scenario: Scenario, client: int, strategy: str) -> dict[str, Any]:
    """Describe one client's experiment.

    Returns
    -------
    dict
        strategy, version, examples (train, validation, personal test), and sha256 of the class list, of the
        preprocessing, of the transfer set's inputs in order, and of the architecture with its initial weights.
    """
    data, architecture = scenario.data, scenario.architectures[client]
    return {
        "client": client,
        "strategy": strategy,
        "version": metadata.version("fedfuse"),
        "examples": [int(n) for n in data.sizes()[client]],
        "classes": _hash("\n".join(data.dataset.classes)),
        "preprocessing": _hash(data.dataset.preprocessing()),
        "transfer": data.transfer_hash(),
        "architecture": _hash(architecture + sha_arrays(Workspace(scenario).initial(architecture))),
    }


def differences(server: dict[str, Any], node: dict[str, Any]) -> list[str]:
    """Say in words where a node's answer is not what the server expects; empty if they agree."""
    wrong = []
    for key, wanted in server.items():
        got = node.get(key)
        if key == "client" or got == wanted:
            continue
        wrong.append(f"{key}: the node has {_short(got)}, the server {_short(wanted)}")
    return wrong


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
