"""Records as they cross a network: all arrays of a record in one, as safetensors.

Flower carries every array as objects of their own, each with requests that are signed, checked and looked up in the
server's database. One array a record instead costs the same for a model of two layers and one of two hundred.
"""

from __future__ import annotations

import numpy as np
import safetensors.numpy
import safetensors.torch
from flwr.app import Array, ArrayRecord, RecordDict

from fedfuse.wire.records import InvalidArrays, plain_numpy, record

PACKED = "safetensors"  # the one array of a packed record
MOST = 50_000  # arrays of a message: each costs its receiver 50 µs and more, and an empty one its sender 50 bytes


def packed(content: RecordDict) -> RecordDict:
    """Return the content as it is to be sent; what it was made of stays as it is."""
    out = RecordDict()
    for name, value in content.items():
        out[name] = _packed(value) if isinstance(value, ArrayRecord) else value
    return out


def unpacked(content: RecordDict) -> RecordDict:
    """Undo `packed`; a record that came otherwise stays as it is, to be checked like any.

    Raises
    ------
    InvalidArrays
        If a packed record cannot be read, or all together have more than `MOST` arrays.
    """
    out, left = RecordDict(), MOST
    for name, value in content.items():
        if not (isinstance(value, ArrayRecord) and set(value) == {PACKED}):
            out[name] = value
            continue
        whole = plain_numpy(name, value[PACKED])
        if whole.dtype != np.uint8 or whole.ndim != 1:
            raise InvalidArrays(f"{name}: is no safetensors ({whole.dtype} of {whole.ndim} dimensions)")
        inside = whole.tobytes()
        # a header is a brace and one more for each array: counted before anything is made of it
        left -= max(1, inside.count(b"{", 8, 8 + int.from_bytes(inside[:8], "little")) - 1)
        if left < 0:
            raise InvalidArrays(f"{name}: more arrays than a message may have; allowed are {MOST}")
        out[name] = _unpacked(name, inside)
    return out


def _packed(arrays: ArrayRecord) -> ArrayRecord:
    # numbered, because safetensors puts names into an order of its own
    named = {f"{i}/{name}": array.numpy() for i, (name, array) in enumerate(arrays.items())}
    return ArrayRecord({PACKED: Array(np.frombuffer(safetensors.numpy.save(named), np.uint8))})


def _unpacked(name: str, content: bytes) -> ArrayRecord:
    try:
        found = safetensors.torch.load(content)
        order = sorted(found, key=lambda numbered: int(numbered.partition("/")[0]))
    except Exception as error:
        raise InvalidArrays(f"{name}: is no safetensors ({' '.join(str(error).split())[:100]})") from error
    arrays = {numbered.partition("/")[2]: found[numbered] for numbered in order}
    if len(arrays) < len(found):
        raise InvalidArrays(f"{name}: two arrays of one name")
    return record(arrays)
