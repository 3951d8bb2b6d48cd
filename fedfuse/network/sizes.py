"""How large what came by wire may become, and how much memory a task may take."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from fedfuse.core.strategy import FusionStrategy
from fedfuse.network.site_config import MEMORY
from fedfuse.wire.records import layout_nbytes

SLACK = 2**20  # bytes: headers, names, framing
UNKNOWN = 2**31  # bytes of a record whose layout no strategy declares


def largest_array(strategy: FusionStrategy) -> int:
    """Bytes that a record of a strategy's can have at most, of any client and phase, as it travels."""
    kind, most = type(strategy), 0
    for name in [name for name in dir(kind) if name == "records" or name.startswith("records_")]:
        for spec in getattr(kind, name).values():
            if spec is None:
                return UNKNOWN
            for client in range(strategy.scenario.clients):
                most = max(most, layout_nbytes(spec(strategy.workspace.scope(client, strategy.hyper))))
    return min(2 * most + SLACK, UNKNOWN)


def limit_memory() -> None:
    """Let this process take no more memory than its environment says; what needs more fails, and nothing else does."""
    megabytes = os.environ.get(MEMORY, "")
    if megabytes:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + int(megabytes) * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
