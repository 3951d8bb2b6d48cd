"""Texts as rows of tokens of one length: which tokens are to be predicted, and how many bytes they stand for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedfuse.data.dataset import Examples


@dataclass(frozen=True)
class Row:
    """One row before it is padded.

    Attributes
    ----------
    ids : list of int
        Tokens; the first is never predicted.
    wanted : list of bool
        Of each token, whether it is to be predicted.
    byte_count : int
        UTF-8 bytes that the wanted tokens stand for.
    text : int
        Number of the text it was cut from.
    """

    ids: list[int]
    wanted: list[bool]
    byte_count: int
    text: int


def rows_of(texts: Sequence[str], tokenizer: Any, length: int, windows: bool) -> Iterator[Row]:
    """Cut texts into rows of at most `length` tokens.

    Before each text stands the tokenizer's `bos`, so that its first token is predicted too. A row that goes on with a
    text begins with the token before it, which it only reads: every token of a text is predicted once, and the
    rows' byte counts sum up to the text's bytes (without a `bos`, to those after its first token).

    Parameters
    ----------
    texts
    tokenizer
        As `fedfuse.data.tokenize.tokenizer_of` gives it.
    length
        Tokens a row, at least 2.
    windows
        Whether a longer text goes on in further rows; else its rest is left out.
    """
    for number, (ids, ends) in enumerate(tokenizer.spans(texts)):
        if tokenizer.bos is not None:
            ids, ends = [tokenizer.bos, *ids], [0, *ends]
        for start in range(0, max(1, len(ids) - 1), length - 1):
            part = ids[start : start + length]
            if len(part) < 2:
                break
            yield Row(part, [False] + [True] * (len(part) - 1), ends[start + len(part) - 1] - ends[start], number)
            if not windows:
                break


def padded(rows: Sequence[Row], length: int, pad: int, targets: np.ndarray, groups: np.ndarray | None) -> Examples:
    """Rows as arrays, short ones filled with `pad` at their end.

    Parameters
    ----------
    targets, groups : ndarray of int64, shape (n,)
        Of each row.
    """
    inputs = np.full((len(rows), length), pad, dtype=np.int64)
    wanted = np.zeros((len(rows), length), dtype=bool)
    for i, row in enumerate(rows):
        inputs[i, : len(row.ids)] = row.ids
        wanted[i, : len(row.ids)] = row.wanted
    counts = np.array([row.byte_count for row in rows], dtype=np.int64)
    return Examples(inputs, targets, groups, wanted, counts, np.array([row.text for row in rows], dtype=np.int64))
