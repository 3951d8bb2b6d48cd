"""Flower's arrays as they are put together from what came by wire, with a limit before, not after.

An array travels as chunks that an index lists; an index of nine kilobytes can name one chunk four thousand times.
Internal names of Flower 1.41: `Array.inflate` is replaced, `get_object_body` and
`get_object_children_ids_from_object_content` of `flwr.supercore.inflatable.inflatable_object` are used. It buys that a
node cannot fill the server's memory. Without the names nothing is capped here, which is said, and only the process's
own
limit of memory (`deploy server --memory`) is left. Guard: `tests/deploy/test_hostile_node.py`.
"""

from __future__ import annotations

import json
from typing import Any

from flwr.app import Array

PARTS = 100_000  # chunks of an array

_largest = 2**63
_usual: Any = getattr(Array.inflate, "__func__", None)


def limit_arrays(most: int) -> None:
    """Refuse arrays of more than `most` bytes, from now on and in this process, before they are put together."""
    global _largest
    _largest = most
    try:
        from flwr.supercore.inflatable import inflatable_object as found

        assert _usual is not None
        body, children = found.get_object_body, found.get_object_children_ids_from_object_content
    except (ImportError, AttributeError, AssertionError):
        print("fedfuse: this Flower's arrays cannot be capped before they are put together", flush=True)
        return

    def capped(kind: type[Array], object_content: bytes, parts: Any = None, **more: Any) -> Array:
        parts = more.get("children", parts)
        indices, known = json.loads(body(object_content, kind))["arraychunk_ids"], children(object_content)
        if len(indices) > PARTS:
            raise ValueError(f"an array of {len(indices)} parts; allowed are {PARTS}")
        sizes = {key: len(chunk.data) for key, chunk in (parts or {}).items()}
        total = sum(sizes[known[i]] for i in indices)
        if total > _largest:
            raise ValueError(f"an array of {total} bytes; allowed are {_largest}")
        made: Array = _usual(kind, object_content, parts)
        return made

    Array.inflate = classmethod(capped)  # type: ignore[assignment, method-assign]
