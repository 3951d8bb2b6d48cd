"""Rows of UTF-8 bytes as an architecture reads them: by a tokenizer of its own (`data.extra.tokenizer=bytes`)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fedfuse.data.dataset import IGNORED
from fedfuse.data.tokenize import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

NAMES = ("tokenizer.json", "config_tokenizer.json")  # one of them, where a directory has a tokenizer


class Read(NamedTuple):
    """Texts in an architecture's own tokens.

    Attributes
    ----------
    x, y : Tensor of int64, shape (n, L)
        Tokens, a begin-of-text before each, and labels: those to predict, `IGNORED` where there is none.
    ends : Tensor of int64, shape (n, L)
        The byte of its text that each token ends at; of padding, the last one.
    """

    x: Tensor
    y: Tensor
    ends: Tensor


class OwnTokenizer:
    """The tokenizer of a model's directory, over rows of bytes.

    What a row does not ask for (a begin-of-text, the byte that it goes on from, padding) is left out; each row begins
    with the tokenizer's own begin-of-text, so that all of its bytes are predicted. Bytes of a character that a row's
    edge cuts are tokens of their own.

    Attributes
    ----------
    pieces : tuple of bytes
        What each token spells, by id; b"" for special ones.
    """

    def __init__(self, path: str) -> None:
        self.tokenizer = Tokenizer(path)
        self.pieces = spelt(self.tokenizer)
        self._single = {piece: i for i, piece in reversed(list(enumerate(self.pieces))) if len(piece) == 1}
        self.bos = self.tokenizer.bos if self.tokenizer.bos is not None else self.tokenizer.pad

    def encode(self, raw: bytes) -> tuple[list[int], list[int]]:
        """Tokens of bytes, and the byte that each ends at."""
        front, whole, back = characters(raw)
        ids, ends = self.tokenizer.spans([whole.decode("utf-8")])[0] if whole else ([], [])
        edge = [self._single.get(bytes([byte]), self.bos) for byte in front + back]
        start = len(front)
        stops = [*range(1, start + 1), *(start + end for end in ends), *range(len(raw) - len(back) + 1, len(raw) + 1)]
        if stops:
            stops[-1] = len(raw)  # blanks that the tokenizer does not see belong to the token before
        return [*edge[:start], *ids, *edge[start:]], stops

    def read(self, x: Tensor, wanted: Tensor) -> Read:
        """Read rows of bytes (n × T), of which some are wanted (n × T, bool)."""
        import torch

        rows = [self.encode(bytes(row[asked].tolist())) for row, asked in zip(x.cpu(), wanted.cpu(), strict=True)]
        width = max((len(ids) for ids, _ in rows), default=1) + 1
        shape = (len(rows), max(2, width))
        tokens, labels, ends = np.full(shape, self.bos), np.full(shape, IGNORED), np.zeros(shape, dtype=np.int64)
        for i, (ids, stops) in enumerate(rows):
            tokens[i, 1 : len(ids) + 1] = labels[i, 1 : len(ids) + 1] = ids
            ends[i, 1:] = stops[-1] if stops else 0
            ends[i, 1 : len(ids) + 1] = stops
        return Read(*(torch.from_numpy(one.astype(np.int64)) for one in (tokens, labels, ends)))


@cache
def own_tokenizer(path: str) -> OwnTokenizer | None:
    """The tokenizer of a directory; None where it has none, and so reads bytes."""
    return OwnTokenizer(path) if any((Path(path).expanduser() / name).exists() for name in NAMES) else None


def characters(raw: bytes) -> tuple[bytes, bytes, bytes]:
    """Bytes before the first whole character, whole characters, and what is left of one at the end."""
    front = 0
    while front < min(3, len(raw)) and raw[front] & 0xC0 == 0x80:
        front += 1
    for cut in range(4):
        stop = len(raw) - cut
        if stop < front:
            break
        try:
            raw[front:stop].decode("utf-8")
        except UnicodeDecodeError:
            continue
        return raw[:front], raw[front:stop], raw[stop:]
    return raw, b"", b""  # no text at all: byte by byte


def spelt(tokenizer: Any) -> tuple[bytes, ...]:
    """What each token of a vocabulary spells; b"" for special ones.

    Byte-level vocabularies write bytes as letters, sentencepiece writes a blank as ▁ and bytes as <0x0A>, WordPiece
    marks what goes on within a word by ##.
    """
    names: Sequence[str] = tokenizer.names
    plain = tokenizer._tokenizer
    special = {token.content for token in plain.get_added_tokens_decoder().values() if token.special}
    special |= {"<unk>", "<s>", "</s>", "<pad>", "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}
    letters = _letters()
    bytewise = any("Ġ" in name for name in names) and not any("▁" in name for name in names)
    found = []
    for name in names:
        if name in special:
            found.append(b"")
        elif bytewise and all(letter in letters for letter in name):
            found.append(bytes(letters[letter] for letter in name))
        elif len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            found.append(bytes([int(name[3:5], 16)]))
        else:
            found.append(name.removeprefix("##").replace("▁", " ").encode("utf-8"))
    return tuple(found)


def _letters() -> dict[str, int]:
    """Bytes by the letters that byte-level vocabularies write them with: those that show are themselves."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
