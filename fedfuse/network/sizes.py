"""How large what came by wire may become: known before it is inflated, not after it has filled the memory.

Flower's arrays travel as chunks that an index lists; an index of nine kilobytes can name one chunk four thousand times.
"""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from typing import Any

from flwr.app import Array
from flwr.supercore.inflatable.inflatable_object import get_object_body, get_object_children_ids_from_object_content

from fedfuse.core.strategy import FusionStrategy
from fedfuse.deploy.processes import MEMORY
from fedfuse.wire.records import InvalidArrays, layout_nbytes

SLACK = 2**20  # bytes: headers, names, framing
UNKNOWN = 2**31  # bytes of a record whose layout no strategy declares
PARTS = 100_000  # chunks of an array

_largest = UNKNOWN


def limit_arrays(most: int) -> None:
    """Refuse arrays of more than `most` bytes, from now on and in this process, before they are put together."""
    global _largest
    _largest = most
    if Array.inflate.__func__ is not _capped:  # type: ignore[attr-defined]
        Array.inflate = classmethod(_capped)  # type: ignore[assignment, method-assign]


_usual = Array.inflate.__func__  # type: ignore[attr-defined]


def _capped(kind: type[Array], content: bytes, children: Any = None) -> Array:
    indices = json.loads(get_object_body(content, kind))["arraychunk_ids"]
    known = get_object_children_ids_from_object_content(content)
    if len(indices) > PARTS:
        raise InvalidArrays(f"an array of {len(indices)} parts; allowed are {PARTS}")
    sizes = {key: len(chunk.data) for key, chunk in (children or {}).items()}
    total = sum(sizes[known[i]] for i in indices)
    if total > _largest:
        raise InvalidArrays(f"an array of {total} bytes; allowed are {_largest}")
    made: Array = _usual(kind, content, children)
    return made


def largest_array(strategy: FusionStrategy) -> int:
    """Bytes that a record of a strategy's can have at most, of any client and phase, as it travels."""
    kind, most = type(strategy), 0
    for name in [name for name in dir(kind) if name == "records" or name.startswith("records_")]:
        for spec in getattr(kind, name).values():
            if spec is None:
                return UNKNOWN
            for client in range(strategy.scenario.clients):
                most = max(most, layout_nbytes(spec(strategy.residents.scope(client, strategy.hyper))))
    return 2 * most + SLACK


def limit_memory() -> None:
    """Let this process take no more memory than its environment says; what needs more fails, and nothing else does."""
    megabytes = os.environ.get(MEMORY, "")
    if megabytes:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + int(megabytes) * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
