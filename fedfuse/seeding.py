"""Random choices: every one draws from a generator seeded by what it is for."""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch


def seed_of(*parts: object) -> int:
    """Return a 63-bit seed that depends on `parts` alone (run seed, purpose, client, round, …)."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def generator(*parts: object) -> torch.Generator:
    """Return a CPU torch generator seeded by `parts`."""
    import torch

    return torch.Generator().manual_seed(seed_of(*parts))


def numpy_generator(*parts: object) -> np.random.Generator:
    """Return a NumPy generator seeded by `parts`."""
    import numpy as np

    return np.random.default_rng(seed_of(*parts))


def seed_everything(*parts: object) -> None:
    """Seed Python's, NumPy's and torch's global generators, for code that draws from them (dropout, Flower)."""
    import numpy as np
    import torch

    seed = seed_of(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # not torch.manual_seed: without CUDA in use it formats a stack trace for every call, 1 ms per client
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
