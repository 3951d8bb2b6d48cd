"""Arrays on the wire: Flower records to tensors and back, what they must look like, their size and hash."""

from __future__ import annotations

import hashlib
import json
import struct
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from math import isfinite, prod
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.lib import format as npy

from fedfuse.compat.flower_records import LiveArray, dtype_name, entries, live_tensor, trusted
from fedfuse.errors import UserError, nearest
from fedfuse.wire.one_pass import finite

# tensors made of a message's memory are read, never written
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

Arrays = dict[str, torch.Tensor]
Shape = tuple[int, ...]
Layout = dict[str, tuple[str, Shape]]  # array name -> (dtype, shape); a negative size -n means "at most n"


class InvalidArrays(ValueError):
    """Arrays that are not what the contract says: wrong names, shapes, dtypes, or not finite."""


def record(arrays: Mapping[str, torch.Tensor]) -> ArrayRecord:
    """Wrap tensors as a Flower `ArrayRecord` without copying (CPU) or serialising them."""
    plain = {k: v.detach().cpu() if v.requires_grad or not v.is_cpu else v for k, v in arrays.items()}
    return trusted(ArrayRecord, {name: LiveArray(value) for name, value in plain.items()})


def resting(arrays: Mapping[str, torch.Tensor]) -> ArrayRecord:
    """Wrap tensors as `record` does, but leave them on their device, where they are summed, or copied if asked for."""
    return trusted(ArrayRecord, {name: LiveArray(value.detach()) for name, value in arrays.items()})


def measured(metrics: Mapping[str, Any], whose: str) -> MetricRecord:
    """A client's metrics as a Flower record; one number of NumPy's or torch's is Python's then, and a bool 0 or 1.

    Raises
    ------
    UserError
        For a name that is no text, or a value that is no number; `whose` says who gave it.
    """
    if all(type(value) in (int, float) and type(name) is str for name, value in metrics.items()):
        return trusted(MetricRecord, dict(metrics))  # as nearly always
    plain: dict[str, Any] = {}
    for name, value in metrics.items():
        found = plain[name] = [_number(one) for one in value] if isinstance(value, list) else _number(value)
        kinds = {type(one) for one in found} if isinstance(found, list) else {type(found)}
        if not isinstance(name, str) or kinds not in ({int}, {float}, set()):
            raise UserError(f"{whose}: metric {name!r} is {value!r:.40}, a {type(value).__name__}; allowed: a text as "
                            f"its name, and an int, a float, a bool, a NumPy number or 0-d tensor, or a list of ints "
                            f"or of floats")  # fmt: skip
    return trusted(MetricRecord, plain)


def _number(value: Any) -> Any:
    single = isinstance(value, np.generic | np.ndarray | torch.Tensor) and value.ndim == 0
    value = value.item() if single else value
    return int(value) if isinstance(value, bool) else value


def arrays_in(content: RecordDict) -> dict[str, ArrayRecord]:
    """The array records of a message (Flower's `array_records` builds a checked mirror at every look)."""
    return {name: value for name, value in entries(content).items() if isinstance(value, ArrayRecord)}


def config_in(content: RecordDict, name: str = "config") -> Mapping[str, Any] | None:
    """What a message's config record of that name says, if there is one; not to be written to."""
    found = entries(content).get(name)
    return entries(found) if isinstance(found, ConfigRecord) else None


NUMBERS = frozenset(torch.from_numpy(np.zeros(1, kind)).dtype for kind in ("?", *"bhilq", *"BHIL", *"efd"))


def tensors(content: ArrayRecord) -> Arrays:
    """Return the record's arrays as tensors; they may share memory with the message and must not be written to."""
    out: Arrays = {}
    for name, array in entries(content).items():
        live = live_tensor(array)
        if live is not None:
            if live.dtype not in NUMBERS:
                raise InvalidArrays(f"array {name!r} has dtype {dtype_name(live.dtype)}; only numbers are taken")
            out[name] = live.contiguous()
            continue
        value = plain_numpy(name, array)
        if value.dtype.kind not in "fiub":
            raise InvalidArrays(f"array {name!r} has dtype {value.dtype}; only numbers are taken")
        if not value.dtype.isnative:
            value = value.astype(value.dtype.newbyteorder("="))
        try:
            out[name] = torch.from_numpy(np.ascontiguousarray(value).reshape(value.shape))
        except TypeError as error:
            raise InvalidArrays(f"array {name!r} has dtype {value.dtype}; torch has no such type") from error
    return out


def plain_numpy(name: str, array: Array) -> np.ndarray:
    """Read a Flower array that came by wire; nothing is allocated that its header alone asks for.

    Raises
    ------
    InvalidArrays
        If it is no `.npy` of numbers, or says another size than it has.
    """
    if "live" in array.__dict__:
        return array.numpy()
    if array.stype != "numpy.ndarray":
        raise InvalidArrays(f"array {name!r} is encoded as {array.stype[:40]!r}; only 'numpy.ndarray' is taken")
    try:
        buffer = BytesIO(array.data)
        version = npy.read_magic(buffer)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read(buffer, max_header_size=10_000)
        if dtype.hasobject:
            raise ValueError("it holds objects")
        start, count = buffer.tell(), prod(shape)
        if count * dtype.itemsize != len(array.data) - start:
            raise ValueError(f"it has {len(array.data) - start} bytes and says {count} of {dtype}")
        flat = np.frombuffer(array.data, dtype, count, start)
        return flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)
    except Exception as error:
        raise InvalidArrays(f"array {name!r} cannot be read: {error}") from error


def nbytes(arrays: Mapping[str, Any]) -> int:
    """Payload of tensors or Flower arrays in bytes, without framing."""
    total = 0
    for value in arrays.values():
        if isinstance(value, torch.Tensor):
            total += value.numel() * value.element_size()
        else:
            total += int(np.prod(value.shape, dtype=np.int64)) * np.dtype(value.dtype).itemsize
    return total


def listed_nbytes(metrics: Mapping[str, Any]) -> int:
    """Payload of the lists among metrics in bytes, eight a number: a list is an array under another name."""
    return 8 * sum(len(value) for value in metrics.values() if isinstance(value, list))


# --- what arrays must look like ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Scope:
    """The sizes a symbolic shape may name, for one client."""

    dims: Mapping[str, int]  # classes, transfer, examples, features
    model: Layout  # layout of the client's architecture
    hyper: Any = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    module: Any = None  # the architecture's resident model, where a layout depends on what its arrays are for


Spec = Callable[[Scope], Layout]


def dimension(scope: Scope, size: int | str) -> int:
    """Resolve one size: a number, the name of a scope dimension, or `<=` before one of them (returned negative)."""
    if isinstance(size, int):
        return size
    if size.startswith("<="):
        most = size[2:].strip()
        return -(int(most) if most.isdecimal() else abs(dimension(scope, most)))
    if size in scope.dims:
        return scope.dims[size]
    if not hasattr(scope.hyper, size):
        known = [*scope.dims, *(vars(scope.hyper) if hasattr(scope.hyper, "__dict__") else ())]
        raise UserError(f"a layout names the size {size!r}: unknown; {nearest(size, known)}")
    return int(getattr(scope.hyper, size))


def arrays(**shapes: tuple[int | str, ...]) -> Spec:
    """Spec of named arrays.

    Sizes are numbers, `classes`, `clients`, `transfer` (rows of the transfer set), `subset` (those of a lesson),
    `examples` (the client's training examples), `features` (feature_dim), a hyper-parameter's name, or `<=` before any
    of them; a leading dtype name such as `"int64"` replaces float32.

    Example: ``arrays(p=("transfer", "classes"))``.
    """

    def spec(scope: Scope) -> Layout:
        layout: Layout = {}
        for name, shape in shapes.items():
            dtype = "float32"
            if shape and isinstance(shape[0], str) and shape[0] in _DTYPES:
                dtype, shape = shape[0], shape[1:]
            layout[name] = (dtype, tuple(dimension(scope, size) for size in shape))
        return layout

    return spec


_DTYPES = {"float32", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"}


def model_arrays(scope: Scope) -> Layout:
    """Spec of a whole model: the architecture's own names, dtypes and shapes."""
    return scope.model


def layout_of(arrays: Mapping[str, torch.Tensor]) -> Layout:
    """Return the layout of given tensors."""
    return {name: (dtype_name(t.dtype), tuple(t.shape)) for name, t in arrays.items()}


def layout_nbytes(layout: Layout) -> int:
    """Payload of a layout in bytes (its upper bound where a size is open)."""
    return sum(
        int(np.prod([abs(n) for n in shape], dtype=np.int64)) * np.dtype(dtype).itemsize
        for dtype, shape in layout.values()
    )


def validate(name: str, got: Mapping[str, torch.Tensor], layout: Layout | None) -> None:
    """Raise `InvalidArrays` unless `got` has exactly the names, dtypes and shapes of `layout` and is finite."""
    if layout is not None:
        if layout.keys() != got.keys():
            if missing := sorted(set(layout) - set(got)):
                raise InvalidArrays(f"{name}: missing {', '.join(missing[:3])}")
            raise InvalidArrays(f"{name}: unexpected {', '.join(sorted(set(got) - set(layout))[:3])}")
        for key, (dtype, shape) in layout.items():
            tensor = got[key]
            if dtype_name(tensor.dtype) != dtype:
                raise InvalidArrays(f"{name}/{key}: dtype {dtype_name(tensor.dtype)}, expected {dtype}")
            if tensor.shape != shape and not _fits(tensor.shape, shape):
                raise InvalidArrays(f"{name}/{key}: shape {tuple(tensor.shape)}, expected {_pretty(shape)}")
    if getattr(got, "finite", False):  # looked through with others (`fedfuse.wire.rows`)
        return
    if got and next(iter(got.values())).is_cuda and _finite_together(got):
        return
    for key, tensor in got.items():
        if tensor.is_floating_point() and not finite(tensor):
            raise InvalidArrays(f"{name}/{key}: not finite")


def _finite_together(got: Mapping[str, torch.Tensor]) -> bool:
    """Whether all are finite, asked of a GPU in one question; False also where it cannot tell."""
    sums = [t.sum(dtype=torch.float64) for t in got.values() if t.is_floating_point()]
    return not sums or isfinite(torch.stack(sums).sum().item())


def _fits(have: Sequence[int], want: Shape) -> bool:
    return len(have) == len(want) and all(h <= -w if w < 0 else h == w for h, w in zip(have, want, strict=True))


def strays(rows: torch.Tensor) -> torch.Tensor:
    """Which rows (…, C) are no distributions: not all non-negative (NaN is not), or of another sum than 1 ± 10⁻³."""
    return ~((rows >= 0).all(-1) & ((rows.sum(-1, dtype=torch.float64) - 1).abs() <= 1e-3))


def distributions(name: str, rows: torch.Tensor) -> None:
    """Raise `InvalidArrays` unless every row of `rows` (…, C) is a distribution (`strays`)."""
    if count := int(strays(rows).sum()):
        raise InvalidArrays(f"{name}: {count} rows are no distributions")


def _pretty(shape: Shape) -> str:
    return "(" + ", ".join(f"at most {-n}" if n < 0 else str(n) for n in shape) + ")"


# --- hashes -----------------------------------------------------------------------------------------------


def _feed(digest: Any, data: bytes) -> None:
    digest.update(struct.pack("<Q", len(data)))
    digest.update(data)


def sha(records: Mapping[str, Mapping[str, torch.Tensor]]) -> str:
    """Hash named records of arrays: sorted names, dtype, shape and C-order bytes, all length-prefixed and counted.

    Source: semantics.md, "Same bits, exactly".
    """
    digest = hashlib.sha256()
    for record_name in sorted(records):
        content = records[record_name]
        _feed(digest, record_name.encode())
        _feed(digest, struct.pack("<Q", len(content)))  # else an array could be read as more record names
        for name in sorted(content):
            kind, little = _little(content[name].detach().cpu())
            _feed(digest, name.encode())
            _feed(digest, kind.encode())
            _feed(digest, np.asarray(content[name].shape, dtype="<i8").tobytes())
            _feed(digest, little.tobytes())
    return digest.hexdigest()


def _little(value: torch.Tensor) -> tuple[str, np.ndarray]:
    """The name of a tensor's dtype, and its numbers as they lie in little-endian memory."""
    kind = None
    if value.dtype not in NUMBERS and not value.is_complex():  # bfloat16, float8: NumPy has no such type
        kind = dtype_name(value.dtype)
        value = value.contiguous().reshape(-1).view(torch.int16 if value.element_size() == 2 else torch.uint8)
    plain = np.ascontiguousarray(value.numpy())
    little = plain.astype(plain.dtype.newbyteorder("<"), copy=False)
    return kind or little.dtype.str, little


def plain_record(values: Mapping[str, Any]) -> dict[str, Arrays]:
    """Write plain values as a record to be hashed, none if there are none."""
    texts = {
        name: torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        for name, value in values.items()
    }
    return {"plain": texts} if texts else {}


def sha_arrays(content: Mapping[str, torch.Tensor]) -> str:
    """Hash one record of arrays."""
    return sha({"": content})


def digest_of(server: str, clients: Iterable[str]) -> str:
    """Hash the server's sha and the clients' shas in client order: the digest of a run."""
    digest = hashlib.sha256(server.encode())
    for value in clients:
        digest.update(value.encode())
    return digest.hexdigest()


# --- nested state as flat arrays --------------------------------------------------------------------------


_PLAIN = (bool, int, float, str, type(None))


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Path and value of every tensor, plain value and empty dict in nested dicts, in their order.

    Keys are joined by `/`; one that stands in a key itself is written `~1`, and `~` is written `~0` (RFC 6901).

    Raises
    ------
    TypeError
        For a key that is no text, or a value that cannot be kept.
    """
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if not isinstance(key, str):
            raise TypeError(f"state: key {key!r} below {prefix!r} is a {type(key).__name__}; keys are text")
        path = prefix + key.replace("~", "~0").replace("/", "~1")
        if isinstance(value, Mapping):
            found |= leaves(value, path + "/") if value else {path: {}}
            continue
        if isinstance(value, list):
            if strange := [item for item in value if not isinstance(item, _PLAIN)]:
                kind = type(strange[0]).__name__
                raise TypeError(f"state {path!r} is a list holding a {kind}; use a dict of tensors")
        elif not isinstance(value, (torch.Tensor, *_PLAIN)):
            kind = type(value).__name__
            raise TypeError(f"state {path!r} is a {kind}; allowed: tensors; int, float, bool, text, None and "
                            f"lists of these; dicts")  # fmt: skip
        found[path] = value
    return found


def flatten(tree: Mapping[str, Any]) -> tuple[Arrays, dict[str, Any]]:
    """Split nested dicts into flat tensors and a JSON-able rest (`leaves`)."""
    found = leaves(tree)
    flat = {path: value for path, value in found.items() if isinstance(value, torch.Tensor)}
    return flat, {path: value for path, value in found.items() if path not in flat}


def unflatten(found: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `leaves`: the dicts have the order that the paths have."""
    tree: dict[str, Any] = {}
    for path, value in found.items():
        node = tree
        *parents, leaf = (key.replace("~1", "/").replace("~0", "~") for key in path.split("/"))
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = value
    return tree
