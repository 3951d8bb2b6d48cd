"""Reading a pickled dict of arrays without running anything that is in it.

PFLlib stores each client as `np.savez(file, data={"x": …, "y": …})`: a pickled dict inside an object array.
Here no name in the file is ever resolved. The few names that such a file needs are answered by inert
recorders, from which arrays are rebuilt with `np.frombuffer` and plain types only: NumPy's own
`__setstate__` is not called, since a crafted dtype state can make it read raw bytes as object pointers.
What is rebuilt may take no more than there is room for (`fedfuse.data.inflate`): ten bytes of pickle can ask for a
table of 2³² places, and a list of a list of lists that are one and the same has 2ⁿ items.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np

from fedfuse.data.inflate import archive, room
from fedfuse.data.locations import reason_of
from fedfuse.errors import UserError

PLAIN = "biufcSU"


class _Name:
    """Stands for a class that only appears as an argument (ndarray)."""


class _Dtype:
    """Records what `numpy.dtype` was asked for."""

    def __init__(self, code: Any, align: Any = False, copy: Any = True) -> None:
        if not isinstance(code, str):
            raise pickle.UnpicklingError("a dtype that is not named by a string")
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 5 or state[1] not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError("a dtype of unknown form")
        if any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError("a structured dtype")
        self.order = state[1]

    def resolve(self) -> np.dtype:
        dtype = np.dtype(self.code)
        if dtype.kind not in PLAIN + "O" or dtype.fields is not None or dtype.subdtype is not None:
            raise pickle.UnpicklingError(f"dtype {self.code!r}")
        return dtype.newbyteorder(self.order) if self.order in "<>" else dtype  # type: ignore[arg-type]


class _Array:
    """Records an array's state; `resolve` rebuilds it."""

    def __init__(self) -> None:
        self.state: tuple | None = None

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[2], _Dtype):
            raise pickle.UnpicklingError("an array of unknown form")
        self.state = state

    def resolve(self, plain: _Plain) -> Any:
        if self.state is None:
            raise pickle.UnpicklingError("an array without content")
        _, shape, dtype, fortran, content = self.state
        if not isinstance(shape, tuple) or not all(isinstance(size, int) and size >= 0 for size in shape):
            raise pickle.UnpicklingError("an array of unknown shape")
        resolved = dtype.resolve()
        if resolved.kind == "O":
            if not isinstance(content, list):
                raise pickle.UnpicklingError("an object array that holds no list")
            return plain.value(content[0] if shape == () and len(content) == 1 else content)
        if isinstance(content, str):
            content = content.encode("latin1")
        if not isinstance(content, bytes):
            raise pickle.UnpicklingError("an array that holds no bytes")
        plain.take(len(content))
        return np.frombuffer(content, dtype=resolved).reshape(shape, order="F" if fortran else "C")


def _reconstruct(*arguments: Any) -> _Array:
    return _Array()


def _frombuffer(content: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", bytes(content)))
    return array


def _scalar(dtype: Any, content: Any) -> _Array:
    array = _Array()
    array.__setstate__((1, (), dtype, False, content))
    return array


def _encode(text: Any, encoding: Any) -> bytes:
    # How protocol 2 spells bytes.
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("_codecs.encode with an unexpected argument")
    return text.encode("latin1")


ANSWERS: dict[tuple[str, str], Any] = {("numpy", "ndarray"): _Name, ("numpy", "dtype"): _Dtype}
ANSWERS[("_codecs", "encode")] = _encode
for _core in ("numpy.core", "numpy._core"):
    ANSWERS[(f"{_core}.multiarray", "_reconstruct")] = _reconstruct
    ANSWERS[(f"{_core}.multiarray", "scalar")] = _scalar
    ANSWERS[(f"{_core}.numeric", "_frombuffer")] = _frombuffer


class RestrictedUnpickler(pickle.Unpickler):
    """An unpickler that knows plain values and NumPy's arrays, and refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        """Answer a name with its recorder; never import."""
        try:
            return ANSWERS[(module, name)]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None


class _Plain:
    """Rebuilds plain values out of `most` bytes at most: what a file names twice counts twice."""

    def __init__(self, most: int) -> None:
        self.most = self.left = most

    def take(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise pickle.UnpicklingError(f"it takes more than {self.most} bytes")

    def value(self, value: Any) -> Any:
        self.take(8)
        if isinstance(value, _Array):
            return value.resolve(self)
        if isinstance(value, dict):
            if not all(isinstance(key, str) for key in value):
                raise pickle.UnpicklingError("a dict whose keys are not strings")
            return {key: self.value(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(item) for item in value]
        if value is None or isinstance(value, str | bytes | int | float):
            return value
        raise pickle.UnpicklingError(f"an unexpected {type(value).__name__}")


def _walked(content: bytes) -> None:
    """Refuse a pickle whose numbers ask for more than the file has: its reader believes them."""
    for operation, argument, _ in pickletools.genops(content):
        if operation.name in ("LONG_BINPUT", "PUT") and int(argument or 0) > len(content):
            raise pickle.UnpicklingError(f"it numbers a value {argument}")


def read_member(content: bytes, most: int = 2**62) -> Any:
    """Return what one `.npy` member of an archive holds: an array, or the dict in a 0-d object array.

    Raises
    ------
    ValueError, pickle.UnpicklingError
        For anything but plain arrays and dicts of them.
    """
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"npy format {version}")
    _, _, dtype = readers[version](file)
    if not dtype.hasobject:
        file.seek(0)
        return np.lib.format.read_array(file, allow_pickle=False)
    body = content[file.tell() :]
    _walked(body)
    return _Plain(most).value(RestrictedUnpickler(io.BytesIO(body)).load())


def read_client(path: Path) -> dict[str, Any]:
    """Return one client's arrays from a PFLlib `.npz`.

    Raises
    ------
    UserError
        Where the file is missing, damaged, or holds anything but plain data; nothing in it has run then.
    """
    try:
        with archive(path) as file:
            most = room(path)
            members = {name.removesuffix(".npy"): read_member(file.read(name), most) for name in file.namelist()}
        found = members.get("data", members)
        if not isinstance(found, dict) or not {"x", "y"} <= found.keys():
            raise ValueError("no 'x' and 'y'")
        return found
    except FileNotFoundError:
        raise UserError(f"{path} is missing; expected a PFLlib client file") from None
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is refused: {reason_of(error)}; expected a dict of plain arrays x and y") from None
    except Exception as error:  # hostile content can fail in any way; none of it may look like our own fault
        raise UserError(
            f"{path} cannot be read ({reason_of(error)}); expected a dict of plain arrays x and y"
        ) from None
