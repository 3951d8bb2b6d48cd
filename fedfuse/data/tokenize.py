"""Texts to token ids by the tokenizer of a model directory; needs the extra `lm`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedfuse.errors import UserError


class Tokenizer:
    """A fast tokenizer read from files alone.

    Parameters
    ----------
    path : str
        A directory with `tokenizer.json`, or with llama.cpp's `config_tokenizer.json` (`tokens`, `scores`).

    Attributes
    ----------
    names : tuple of str
        The vocabulary, by id.
    pad : int
        What fills short texts: the tokenizer's padding token, else 0.
    """

    def __init__(self, path: str) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise UserError("data.extra.tokenizer needs tokenizers: pip install 'fedfuse[lm]'") from error
        root = Path(path).expanduser()
        if not root.is_dir():
            raise UserError(f"data.extra.tokenizer={path} is not a directory")
        try:
            if (root / "tokenizer.json").exists():
                self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(root / "tokenizer.json"))
            elif (root / "config_tokenizer.json").exists():
                self._tokenizer = _by_scores(
                    tokenizers, json.loads((root / "config_tokenizer.json").read_text("utf-8"))
                )
            else:
                raise UserError(f"data.extra.tokenizer={path}: expected tokenizer.json or config_tokenizer.json there")
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"data.extra.tokenizer={path} cannot be read: {str(error).splitlines()[0]}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        size = self._tokenizer.get_vocab_size()
        self.names = tuple(self._tokenizer.id_to_token(i) or str(i) for i in range(size))
        known = (self._tokenizer.token_to_id(name) for name in ("[PAD]", "<pad>", "<|endoftext|>"))
        self.pad = next((i for i in known if i is not None), 0)

    def ids(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        """Token ids of each text."""
        return [found.ids for found in self._tokenizer.encode_batch(list(texts), add_special_tokens=special)]

    def padded(self, texts: Sequence[str], length: int) -> np.ndarray:
        """Token ids, int64 (n, length), cut at `length` and filled with `pad`."""
        out = np.full((len(texts), length), self.pad, dtype=np.int64)
        for row, found in zip(out, self.ids(texts), strict=True):
            kept = found[:length]
            row[: len(kept)] = kept
        return out

    def windows(self, texts: Iterable[str], length: int) -> np.ndarray:
        """Consecutive windows of the joined texts, int64 (n, length); what is left over at the end is dropped."""
        joined = [i for found in self.ids(list(texts), special=False) for i in found]
        count = len(joined) // length
        return np.array(joined[: count * length], dtype=np.int64).reshape(count, length)


def _by_scores(tokenizers: Any, about: dict[str, Any]) -> Any:
    """A sentencepiece vocabulary as byte-pair merges, best score first; unknown characters fall back to bytes."""
    tokens, scores = about["tokens"], about["scores"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = []
    for i, token in enumerate(tokens):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary and not token.startswith("<"):
                merges.append((-scores[i], i, vocabulary[left], left, right))
    pairs = [(left, right) for *_, left, right in sorted(merges)]
    model = tokenizers.models.BPE(vocab=vocabulary, merges=pairs, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    built = tokenizers.Tokenizer(model)
    steps = tokenizers.normalizers
    built.normalizer = steps.Sequence([steps.Prepend("▁"), steps.Replace(" ", "▁")])
    built.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    return built
