"""Distributions of next tokens: merged over groups, compressed to the k likeliest with the rest, coarsened to bytes.

Everywhere place j holds the distribution of token j itself, not of the one after it: a language model's logits are
shifted once, by whoever has them (`shifted`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

NO_BYTE = 256  # the bucket of tokens that spell nothing
NOBODY = -1  # an id that is none
TINY = 1e-30  # least probability whose logarithm is taken


def chain(log_p: Tensor, tokens: Tensor) -> Tensor:
    """log P_j(token_j) at each place, of (L, V) and (L,)."""
    return log_p.gather(-1, tokens[..., None])[..., 0]


def merged(log_p: Tensor, tokens: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Distributions of groups of tokens, Π_{a≤j<b} P_j(token_j) · P_b(y), and in a last column what is left to 1.

    The tokens of a group up to its last are as they are in the text; what varies is the last one, y. That sums to the
    probability of the group's beginning, not to 1. It is not renormalised: the last column holds the probability of
    every other beginning, so that a row is a distribution.

    Parameters
    ----------
    log_p : Tensor
        Logarithms (L × V); place j is of token j.
    tokens : Tensor
        The text's tokens (L,).
    first, last : Tensor
        Of each group (G,).

    Returns
    -------
    Tensor
        Logarithms (G × (V + 1)).
    """
    before = torch.cat([log_p.new_zeros(1), chain(log_p, tokens).cumsum(0)])
    beginning = before[last] - before[first]
    beginning = torch.where(first == last, 0.0, beginning)  # the empty product, without rounding
    other = (-torch.expm1(beginning)).clamp_min(TINY).log()
    return torch.cat([log_p[last] + beginning[:, None], other[:, None]], 1)


def compress(log_p: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k likeliest of each place: probabilities (…, k), falling, and ids (…, k) int64; what they leave is the rest.

    With fewer than k columns, the others have probability 0 and the id −1.
    """
    top = log_p.topk(min(k, log_p.shape[-1]), dim=-1)
    p, ids = top.values.exp(), top.indices
    if (missing := k - p.shape[-1]) > 0:
        p = torch.cat([p, p.new_zeros(*p.shape[:-1], missing)], -1)
        ids = torch.cat([ids, ids.new_full((*ids.shape[:-1], missing), NOBODY)], -1)
    return p, ids


def id_type(vocabulary: int) -> torch.dtype:
    """The smallest type that ids travel as: two bytes up to 2¹⁵ of them, else four."""
    return torch.int16 if vocabulary <= 2**15 else torch.int32


def with_rest(p: Tensor) -> Tensor:
    """Probabilities (N × k) and in a last column what they leave of 1."""
    return torch.cat([p, (1 - p.sum(-1, keepdim=True)).clamp_min(0)], -1)


def bucketed(log_p: Tensor, ids: Tensor, first: Tensor | None = None) -> Tensor:
    """Log-probabilities of given ids (N × k) and in a last column of all others together: logits of k + 1 buckets.

    Parameters
    ----------
    log_p : Tensor
        (N × V), normalised.
    ids : Tensor
        (N × k), no id twice in a row. −1 is nobody, with a probability of 0; below that an id names a next byte, by
        `byte_ids`, and so do all of its row.
    first : Tensor, optional
        Where ids may name bytes: the byte that each token starts with (V,).
    """
    bytewise = (ids < NOBODY).any(1)
    if first is None or not bool(bytewise.any()):
        return _buckets(log_p, ids)
    out = log_p.new_empty(len(log_p), ids.shape[1] + 1)
    out[~bytewise] = _buckets(log_p[~bytewise], ids[~bytewise])
    out[bytewise] = _buckets(coarse(log_p[bytewise], first), byte_ids(ids[bytewise]))
    return out


def _buckets(log_p: Tensor, ids: Tensor) -> Tensor:
    nobody, width = ids == NOBODY, log_p.shape[1]
    kept = log_p.gather(1, ids.clamp_min(0)).masked_fill(nobody, math.log(TINY))
    named = torch.zeros(len(log_p), width + 1, dtype=torch.bool, device=log_p.device)  # the last column is nobody's
    named = named.scatter(1, torch.where(nobody, width, ids), True)[:, :width]
    others = log_p.masked_fill(named, math.log(TINY)).logsumexp(1, keepdim=True)
    return torch.cat([kept, others], 1)


def byte_ids(ids: Tensor) -> Tensor:
    """Bytes as ids that no token has, −2 − byte, and back; −1 stays."""
    return torch.where(ids == NOBODY, NOBODY, -2 - ids)


def remapped(p: Tensor, ids: Tensor, to: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities of the ids that others map to; what maps nowhere is left to the rest.

    Parameters
    ----------
    p, ids : Tensor
        (N × k); an id of −1 is nobody.
    to : Tensor
        Map of ids, (V,); −1 for nowhere.

    Returns
    -------
    Tensor
        p and ids (N × k), as `gathered` has them.
    """
    return gathered(p, torch.where(ids == NOBODY, NOBODY, to[ids.clamp_min(0)]))


def gathered(p: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Equal ids of a row become one, with their sum: (N × k), falling, what is empty at the end."""
    nobody = ids == NOBODY
    p = p.masked_fill(nobody, 0)
    alike = (ids[:, :, None] == ids[:, None, :]) & ~nobody[:, :, None]
    total = (alike * p[:, None, :]).sum(-1)
    again = alike.tril(-1).any(-1)  # met before in this row
    total, ids = total.masked_fill(again, 0), ids.masked_fill(again, NOBODY)
    order = total.sort(dim=1, descending=True, stable=True).indices
    return total.gather(1, order), ids.gather(1, order)


def first_bytes(pieces: Sequence[bytes]) -> Tensor:
    """The byte that each token starts with, (V,) int64; `NO_BYTE` for those that spell nothing."""
    return torch.tensor([piece[0] if piece else NO_BYTE for piece in pieces], dtype=torch.int64)


def coarse(log_p: Tensor, first: Tensor) -> Tensor:
    """Log-probabilities of the next byte, (N × 257): tokens that start with it together, from (N × V)."""
    p = log_p.exp()
    return p.new_zeros(len(p), NO_BYTE + 1).index_add(1, first, p).clamp_min(TINY).log()


def bits(log_p: Tensor, tokens: Tensor, counted: Tensor) -> Tensor:
    """Bits of each row's text, float64 (rows,): −Σ log₂ P_j(token_j) over the places that count.

    Over the row's bytes it compares models whatever their tokenisers; over tokens it would not.

    Parameters
    ----------
    log_p : Tensor
        (rows × L × V).
    tokens, counted : Tensor
        (rows × L); whether a place counts.
    """
    found = chain(log_p.double(), tokens.clamp_min(0))
    return -(found * counted).sum(-1) / math.log(2)
