"""How often tensors have been written to in place.

Private name of torch, which its notes on autograd describe: `Tensor._version`. It grows with every write in place, to
a tensor or to a view of it; `.data` and NumPy pass it by. Reading takes 70 ns an array. If the name is gone, nobody is
told of such a write. Guard: `tests/compat/test_torch.py`.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def writes(tensors: Iterable[Tensor]) -> int:
    """Writes in place to any of these so far; 0 where torch does not count them."""
    found = 0
    try:
        for value in tensors:  # a plain loop: every client of every round passes here twice
            found += value._version
        return found
    except (AttributeError, RuntimeError):  # a tensor of inference mode, which may be written to by nobody else
        return 0
