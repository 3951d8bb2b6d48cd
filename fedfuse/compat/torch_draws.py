"""The first numbers of a permutation by torch, without the rest of it.

`torch.randperm` of a million clients takes 30 ms, and as long again to become a list. It exchanges place i with one of
those from i on, so the first k are settled by its first k draws. What is private is that order of work, and that a draw
is one 32-bit number of the generator (torch 2.7 to 2.13, CPU, fewer than 2³²/20 numbers). `known` tries it once; if it
is not so any more, the whole permutation is drawn. Guard: `tests/compat/test_torch.py`.
"""

from __future__ import annotations

from functools import cache

import torch

MOST = 2**32 // 20  # numbers from which torch draws otherwise


def first_of_permutation(n: int, k: int, draw: torch.Generator) -> list[int]:
    """The first k of `torch.randperm(n, generator=draw)`; the generator is then in another state."""
    if k > n // 4 or n >= MOST or not known():
        return torch.randperm(n, generator=draw)[:k].tolist()
    return _first(n, k, draw)


def _first(n: int, k: int, draw: torch.Generator) -> list[int]:
    pairs = torch.empty((k + 1) // 2, dtype=torch.int64).random_(-(2**63), None, generator=draw)
    draws = [half for pair in pairs.tolist() for half in ((pair >> 32) & 0xFFFFFFFF, pair & 0xFFFFFFFF)]
    moved: dict[int, int] = {}
    out = []
    for i in range(k):
        other = i + draws[i] % (n - i)
        mine = moved.pop(i, i)
        if other == i:
            out.append(mine)
        else:
            out.append(moved.get(other, other))
            moved[other] = mine
    return out


@cache
def known() -> bool:
    """Whether torch permutes as is written here."""
    return all(_first(n, k, torch.Generator().manual_seed(n)) == _whole(n)[:k] for n, k in ((1000, 51), (77, 7)))


def _whole(n: int) -> list[int]:
    return torch.randperm(n, generator=torch.Generator().manual_seed(n)).tolist()
