"""Two tokenisations of one text, aligned by byte offsets: where both reach the same byte, a group closes.

A tokenisation is told by its *ends*: the byte of the UTF-8 text that each token ends at, never falling. A token that
adds no byte (a begin-of-text symbol, sentencepiece's first marker) ends where the one before it did; where a character
is cut in pieces that its tokenizer does not tell apart, all of them end where the character does. A tokenizer that
drops bytes (WordPiece's blanks) gives them to the next token, and the last token takes what is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Groups(NamedTuple):
    """Groups of tokens that cover the same bytes, in order: of group g the tokens first[g] … last[g] on each side.

    Attributes
    ----------
    first, last, other_first, other_last : ndarray of int64, shape (groups,)
        Both ends included, on this side and on the other.
    ends : ndarray of int64, shape (groups,)
        The byte that a group ends at; it starts where the group before ends, the first one at byte 0.
    """

    first: np.ndarray
    last: np.ndarray
    other_first: np.ndarray
    other_last: np.ndarray
    ends: np.ndarray

    @property
    def single(self) -> np.ndarray:
        """Which groups are one token on both sides."""
        return (self.first == self.last) & (self.other_first == self.other_last)


def groups(ends: np.ndarray, other: np.ndarray) -> Groups:
    """Align two tokenisations of one text.

    Parameters
    ----------
    ends, other : ndarray of int64, shape (tokens,)
        Where each token ends, in bytes. Both must end at the same byte.

    Returns
    -------
    Groups
        They cover every byte once. Tokens before the first byte (ends of 0) are in no group: they are context.

    Raises
    ------
    ValueError
        If ends fall, or the two texts have not as many bytes.
    """
    for one in (ends, other):
        if len(one) and (int(one[0]) < 0 or bool((np.diff(one) < 0).any())):
            raise ValueError("ends of tokens must not be negative, nor fall")
    length, wanted = (int(one[-1]) if len(one) else 0 for one in (ends, other))
    if length != wanted:
        raise ValueError(f"two tokenisations of one text end at bytes {length} and {wanted}")
    common = np.intersect1d(ends, other)
    common = common[common > 0]
    # the last token that ends there, as what adds no byte belongs to what it follows; the next one starts a group
    last, other_last = (np.searchsorted(one, common, side="right") - 1 for one in (ends, other))
    start, other_start = (np.searchsorted(one, 0, side="right") for one in (ends, other))
    first = np.concatenate([[start], last[:-1] + 1])[: len(common)]
    other_first = np.concatenate([[other_start], other_last[:-1] + 1])[: len(common)]
    return Groups(*(one.astype(np.int64) for one in (first, last, other_first, other_last, common)))


def same_start(ends: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of tokens, one a side, that start at the same byte (and add one): what is predicted there is comparable.

    Returns
    -------
    ndarray of int64, shape (pairs,)
        Tokens of this side, ascending, and their partners of the other.
    """
    starts, others = (np.concatenate([[0], one[:-1]]) if len(one) else one for one in (ends, other))
    real, other_real = np.flatnonzero(ends > starts), np.flatnonzero(other > others)
    _, mine, theirs = np.intersect1d(starts[real], others[other_real], assume_unique=True, return_indices=True)
    return real[mine], other_real[theirs]


def nearest_piece(piece: bytes, others: Sequence[bytes], where: dict[bytes, int]) -> int:
    """The other vocabulary's token of the same bytes, else the one of least edit distance, the first of equals (MinED).

    Parameters
    ----------
    piece : bytes
        What a token spells.
    others : sequence of bytes
        What the other vocabulary's tokens spell; those that spell nothing are passed over.
    where : dict
        `others` by what they spell, the first of equals.
    """
    if piece in where:
        return where[piece]
    best, least = -1, len(piece) + max((len(one) for one in others), default=0) + 1
    for i, one in enumerate(others):
        if one and abs(len(one) - len(piece)) < least and (cost := edit_distance(piece, one, least)) < least:
            best, least = i, cost
    return best


def edit_distance(a: bytes, b: bytes, most: int | None = None) -> int:
    """Insertions, deletions and replacements from one to the other; given up at `most`, which is then the answer."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        above, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (left != right))
        if most is not None and min(row) >= most:
            return most
    return row[-1]


def vocabulary_map(pieces: Sequence[bytes], others: Sequence[bytes]) -> np.ndarray:
    """For each token of one vocabulary its `nearest_piece` in another, int64 (V,); -1 where it has none.

    Parameters
    ----------
    pieces, others : sequence of bytes
        What the tokens spell, by id; b"" for those that spell nothing, which have no partner.
    """
    where: dict[bytes, int] = {}
    for i, one in enumerate(others):
        if one:
            where.setdefault(one, i)
    return np.array([nearest_piece(piece, others, where) if piece else -1 for piece in pieces], dtype=np.int64)
