"""The mean cross-entropy of a batch from its rows' losses, added up in the order in which torch adds them on a CPU.

A client that trains beside others then reports the loss, to the last bit, that it would report alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 8  # partial sums that torch keeps, each of 16 of those before (of more where a batch has over 2³² rows)
STEP = 4


def added_in_order(rows: Tensor) -> Tensor:
    """Means (N,) of rows' losses (N, B), as `cross_entropy` gives them for each batch alone."""
    batch = rows.shape[1]
    if rows.device.type != "cpu" or rows.dtype != torch.float32:
        return rows.mean(1)
    partial = [torch.zeros(len(rows)) for _ in range(LEVELS)]
    for i, column in enumerate(rows.T.contiguous()):
        partial[0] = partial[0] + column
        for level in range(LEVELS - 1):
            if i & (((1 << STEP) - 1) << (level * STEP)):
                break
            partial[level + 1] = partial[level + 1] + partial[level]
            partial[level] = torch.zeros(len(rows))
    total = torch.zeros(len(rows))
    for one in partial:
        total = total + one
    return total / batch
