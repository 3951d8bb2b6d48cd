"""Whether MKL, which multiplies torch's matrices on x86, rounds alike wherever in memory arrays lie.

Private name of torch 2.13's library: `mkl_serv_cbwr_get`, what MKL's documented `mkl_cbwr_get` is called where MKL is
linked in. It buys a warning where another library had MKL at work before `MKL_CBWR=AUTO` was said. If it is gone,
nobody is warned. Guard: `tests/compat/test_mkl.py`.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

BRANCH, OFF = 1, 1  # what is asked for, and the answer that every other one is better than


def steady() -> bool | None:
    """Whether bits are independent of where arrays lie; None if that cannot be asked."""
    import torch

    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return bool(library.mkl_serv_cbwr_get(BRANCH) != OFF)
    except (OSError, AttributeError):  # another build of torch, without MKL
        return None
