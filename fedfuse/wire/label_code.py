"""Soft labels as few bits: quantised so that rows stay distributions, and coded losslessly, whole or as a delta.

Sattler et al., "CFD", IEEE TNSE 2022, arXiv 2012.00632. A row is one flag (unchanged?) and its entries, each among what
the row's sum leaves possible, so that every byte string decodes to valid rows; one that is not what the coder writes is
refused.
"""

from __future__ import annotations

import struct

import numpy as np
import torch
from torch import Tensor

from fedfuse.wire.arithmetic_code import Counts, Decoder, Encoder
from fedfuse.wire.records import InvalidArrays

BITS = (1, 2, 3, 4, 5, 6, 7, 8, 32)
_HEADER = struct.Struct("<BIH")  # bits, and 64 if a delta; rows; classes


def quantise(p: Tensor, bits: int) -> Tensor:
    """Constrained uniform quantisation Q_b, as integer levels.

    Parameters
    ----------
    p : Tensor
        Probabilities (n × C).
    bits : int
        b from 1 to 8; the levels of a row sum to L = 2^b − 1.

    Returns
    -------
    Tensor
        uint8 (n × C); levels / L is the L1-nearest such row. The units that rounding down leaves over go to the
        largest remainders, at a tie to the lower class.
    """
    whole = 2**bits - 1
    scaled = p.double() / p.double().sum(1, keepdim=True) * whole
    floor = scaled.floor()
    left = whole - floor.sum(1, keepdim=True)
    rank = (floor - scaled).argsort(dim=1, stable=True).argsort(dim=1)
    return (floor + (rank < left)).to(torch.uint8)


def encode(levels: Tensor, bits: int, previous: Tensor | None = None) -> bytes:
    """Code levels (n × C uint8), or probabilities (float32) if b = 32; with `previous`, only the rows that differ."""
    if bits == 32:
        return levels.cpu().contiguous().numpy().astype("<f4").tobytes()
    whole, classes = 2**bits - 1, levels.shape[1]
    coder, flags, models = Encoder(), Counts(2), [Counts(whole + 1) for _ in range(classes)]
    same = (levels == previous).all(1).tolist() if previous is not None else None
    for i, row in enumerate(levels.tolist()):
        if same is not None:
            coder.encode(int(not same[i]), flags)
            if same[i]:
                continue
        left = whole
        for c in range(classes - 1):  # the last entry is what is left
            coder.encode(row[c], models[c], left + 1)
            left -= row[c]
    return coder.finish()


def decode(data: bytes, rows: int, classes: int, bits: int, previous: Tensor | None = None) -> Tensor:
    """Undo `encode`.

    Raises
    ------
    InvalidArrays
        If `data` is not what `encode` writes.
    """
    if bits == 32:
        if len(data) != 4 * rows * classes:
            raise InvalidArrays(f"code: {len(data)} bytes for {rows} × {classes} floats")
        floats = np.frombuffer(data, "<f4").astype(np.float32).reshape(rows, classes)
        if not np.isfinite(floats).all():
            raise InvalidArrays("code: not finite")
        return torch.from_numpy(floats)
    whole = 2**bits - 1
    coder, flags, models = Decoder(data), Counts(2), [Counts(whole + 1) for _ in range(classes)]
    levels = [] if previous is None else previous.tolist()
    for i in range(rows):
        if previous is not None and not coder.decode(flags):
            continue
        row, left = [], whole
        for c in range(classes - 1):
            row.append(coder.decode(models[c], left + 1))
            left -= row[-1]
        row.append(left)
        levels[i : i + 1] = [row]
    out = torch.tensor(levels, dtype=torch.uint8).reshape(rows, classes)
    if encode(out, bits, previous) != data:
        raise InvalidArrays("code: not what the coder writes")
    return out


def probabilities(levels: Tensor, bits: int) -> Tensor:
    """Rows that sum to 1, float32."""
    return levels if bits == 32 else (levels.double() / (2**bits - 1)).float()


def bytes_of(code: Tensor) -> bytes:
    """Return the bytes of a uint8 array."""
    return code.cpu().numpy().tobytes()


def code_of(data: bytes) -> Tensor:
    """Return bytes as the uint8 array that travels."""
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())


def pack(levels: Tensor, bits: int, previous: Tensor | None = None) -> Tensor:
    """`encode` with a header, as the array that goes down."""
    header = _HEADER.pack(bits + 64 * (previous is not None), *levels.shape)
    return code_of(header + encode(levels, bits, previous))


def unpack(code: Tensor, previous: Tensor | None = None) -> tuple[Tensor, int]:
    """Undo `pack`: levels (or float rows) and b."""
    data = bytes_of(code)
    if len(data) < _HEADER.size:
        raise InvalidArrays("code: too short for its header")
    kind, rows, classes = _HEADER.unpack_from(data)
    bits, delta = kind % 64, kind >= 64
    if bits not in BITS or (delta and (previous is None or previous.shape != (rows, classes))):
        raise InvalidArrays("code: a header that does not fit")
    return decode(data[_HEADER.size :], rows, classes, bits, previous if delta else None), bits
