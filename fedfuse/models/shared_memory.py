"""One copy of a frozen base per machine: its weights are mapped from a file that all processes share.

The file lies in the user's cache under the hash of its content, so that a base is written once and never mistaken for
another. Pages are mapped privately: a process that writes to them (merging an adapter) gets its own copy.
"""

from __future__ import annotations

import contextlib
import ctypes
import os

from torch import nn

from fedfuse.errors import WorldError
from fedfuse.wire.records import sha_arrays

LEAST = 32 * 2**20  # bytes of frozen weights below which a copy per process is cheaper than a file


def share(model: nn.Module, names: frozenset[str]) -> int:
    """Replace the named frozen parameters (on the CPU) by mapped ones with the same values.

    Returns
    -------
    int
        Bytes that are shared; 0 where the base is small.

    Raises
    ------
    WorldError
        If the file cannot be written, or is not what was written.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    from fedfuse.data.cache import cache_directory

    found = {n: p for n, p in model.named_parameters() if n in names and p.device.type == "cpu"}
    size = sum(p.numel() * p.element_size() for p in found.values())
    if size < LEAST:
        return 0
    arrays = {name: parameter.detach().contiguous() for name, parameter in found.items()}
    key = sha_arrays({f"{n} {a.dtype}": a.float() for n, a in arrays.items()})
    folder = cache_directory() / "bases"
    path, partial = folder / f"{key}.safetensors", folder / f".{key}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            save_file(arrays, partial)
            os.replace(partial, path)
        with safe_open(path, framework="pt") as file:
            mapped = {name: file.get_tensor(name) for name in found}
    except Exception as error:
        partial.unlink(missing_ok=True)
        raise WorldError(f"{path}: the frozen base cannot be kept there ({error})") from error
    if sha_arrays({f"{n} {a.dtype}": a.float() for n, a in mapped.items()}) != key:
        raise WorldError(f"{path}: is not the base it is named after; delete it")
    for name, parameter in found.items():
        parameter.data = mapped[name]
    arrays.clear()
    give_back()
    return size


def give_back() -> None:
    """Return freed pages to the system, which glibc would keep: a replaced copy's, those between two states."""
    with contextlib.suppress(OSError, AttributeError):  # other C libraries have no such call
        ctypes.CDLL(None).malloc_trim(0)
