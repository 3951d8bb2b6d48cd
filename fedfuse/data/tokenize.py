"""Texts to token ids by the tokenizer of a model directory (the extra `lm`), or as their bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedfuse.errors import UserError, first_line


class Tokenizer:
    """A fast tokenizer read from files alone.

    Parameters
    ----------
    path : str
        A directory with `tokenizer.json`, with llama.cpp's `config_tokenizer.json` (`tokens`, `scores`), or with one
        `.gguf` file. Beside `tokenizer.json`, `tokenizer_config.json` names the special tokens.

    Attributes
    ----------
    names : tuple of str
        The vocabulary, by id.
    pad : int
        What fills short texts: the tokenizer's padding token, else its end of text, else 0. Padding is only ever at
        the end, so a text may hold that token itself.
    bos, eos : int or None
        What stands before a text (where the tokenizer has nothing of the kind, its end of text), and after it.
    chat : callable or None
        `chat(messages, ask)`: messages (`role`, `content`) as text by the directory's own template, which
        `transformers` runs in a sandbox; with `ask`, an answer's beginning stands at the end. None: it has none.
    """

    chat: Callable[[list[dict[str, str]], bool], str] | None = None

    def __init__(self, path: str) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise UserError("data.extra.tokenizer needs tokenizers: pip install 'fedfuse[lm]'") from error
        root = Path(path).expanduser()
        if not root.is_dir():
            raise UserError(f"data.extra.tokenizer={path} is not a directory")
        self.path = root
        special: dict[str, str] = {}
        try:
            if (root / "tokenizer.json").exists():
                self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(root / "tokenizer.json"))
                special = _special(root / "tokenizer_config.json")
                self.chat = _template(root, special)
            elif (root / "config_tokenizer.json").exists():
                self._tokenizer = _by_scores(
                    tokenizers, json.loads((root / "config_tokenizer.json").read_text("utf-8"))
                )
            elif len(files := sorted(root.glob("*.gguf"))) == 1:
                self._tokenizer, special, self.chat = _of_gguf(files[0])
            else:
                raise UserError(
                    f"data.extra.tokenizer={path}: expected tokenizer.json, config_tokenizer.json or one .gguf there"
                )
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"data.extra.tokenizer={path} cannot be read: {first_line(error)}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        size = self._tokenizer.get_vocab_size()
        self.names = tuple(self._tokenizer.id_to_token(i) or str(i) for i in range(size))

        def first(*names: str | None) -> int | None:
            known = (self._tokenizer.token_to_id(name) for name in names if name)
            return next((i for i in known if i is not None), None)

        self.eos = first(special.get("eos_token"), "</s>", "<|endoftext|>", "<|im_end|>", "[SEP]")
        self.bos = first(special.get("bos_token"), "<s>", "[CLS]", "<|endoftext|>")
        self.bos = self.eos if self.bos is None else self.bos
        pad = first(special.get("pad_token"), "[PAD]", "<pad>", "<|endoftext|>")
        self.pad = pad if pad is not None else self.eos if self.eos is not None else 0

    def spans(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """Token ids of each text without special tokens, and how many of its UTF-8 bytes end with each token.

        What the tokenizer leaves out (white space) counts to the token after it, at the end to the last one: the
        last number is the text's size.

        Raises
        ------
        UserError
            For text that is not Unicode.
        """
        whole = encoded(texts)
        found = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        out = []
        for text, raw, one in zip(texts, whole, found, strict=True):
            # characters to bytes: where each character ends
            ends = np.cumsum([0, *(len(character.encode()) for character in text)])
            sizes = np.maximum.accumulate([int(ends[stop]) for _, stop in one.offsets] or [0]).tolist()
            if one.ids:
                sizes[-1] = len(raw)
            out.append((one.ids, sizes[: len(one.ids)]))
        return out

    def text(self, ids: Sequence[int]) -> str:
        """The text of some tokens, special ones left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def ids(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        """Token ids of each text.

        Raises
        ------
        UserError
            For text that is not Unicode.
        """
        encoded(texts)
        return [found.ids for found in self._tokenizer.encode_batch(list(texts), add_special_tokens=special)]

    def padded(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, int]:
        """Token ids, int64 (n, length), filled with `pad`; and how many texts lose their end.

        What the tokenizer puts after a text ([SEP]) stands after a shorter one, too.

        Raises
        ------
        UserError
            For text that is not Unicode.
        """
        encoded(texts)
        self._tokenizer.enable_truncation(length)
        try:
            rows = self._tokenizer.encode_batch(list(texts))
        finally:
            self._tokenizer.no_truncation()
        out = np.full((len(texts), length), self.pad, dtype=np.int64)
        for row, found in zip(out, rows, strict=True):
            kept = found.ids[:length]
            row[: len(kept)] = kept
        return out, sum(bool(found.overflowing) or len(found.ids) > length for found in rows)


class Bytes:
    """The tokenizer `bytes`: a text's UTF-8 bytes are its tokens; the byte 0, which texts do not have, is all else."""

    chat = None

    def __init__(self) -> None:
        self.names = tuple(chr(i) if 32 < i < 127 else f"<0x{i:02X}>" for i in range(256))
        self.pad, self.bos, self.eos = 0, 0, 0

    def spans(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """As `Tokenizer.spans`."""
        return [(list(raw), list(range(1, len(raw) + 1))) for raw in encoded(texts)]

    def text(self, ids: Sequence[int]) -> str:
        """The text of some bytes."""
        return bytes(i for i in ids if i).decode(errors="replace")


def encoded(texts: Sequence[str]) -> list[bytes]:
    """Texts as UTF-8.

    Raises
    ------
    UserError
        For half a surrogate pair, which JSON can hold and UTF-8 cannot.
    """
    try:
        return [text.encode() for text in texts]
    except UnicodeEncodeError as error:
        raise UserError(f"a text is not Unicode: {error}") from None


def tokenizer_of(name: str) -> Tokenizer | Bytes:
    """The tokenizer of a directory, or `bytes`."""
    return Bytes() if name == "bytes" else Tokenizer(name)


def windows(tokenizer: Tokenizer | Bytes, texts: Iterable[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Consecutive windows of the joined texts; what is left over at the end is dropped.

    Returns
    -------
    windows : ndarray of int64, shape (n, length)
    byte_counts : ndarray of int64, shape (n,)
        UTF-8 bytes that a window's tokens stand for, all but its first, which nothing predicts.
    """
    found = tokenizer.spans(list(texts))
    joined = [i for ids, _ in found for i in ids]
    sizes = [size for _, ends in found for size in np.diff(ends, prepend=0)]
    count = len(joined) // length
    windows, held = (
        np.array(values[: count * length], dtype=np.int64).reshape(count, length) for values in (joined, sizes)
    )
    return windows, held[:, 1:].sum(1)


def _special(path: Path) -> dict[str, str]:
    """Special tokens by role, from `tokenizer_config.json`; none without it."""
    if not path.exists():
        return {}
    about = json.loads(path.read_text("utf-8"))
    found = {role: about.get(role) for role in ("bos_token", "eos_token", "pad_token")}
    return {role: str(t["content"] if isinstance(t, dict) else t) for role, t in found.items() if t is not None}


def _template(root: Path, special: dict[str, str]) -> Any:
    """The chat template of a directory, if it has one."""
    file, about = root / "chat_template.jinja", root / "tokenizer_config.json"
    if file.exists():
        template: Any = file.read_text("utf-8")
    else:
        template = json.loads(about.read_text("utf-8")).get("chat_template") if about.exists() else None
    if isinstance(template, list):  # several, by name
        template = next((one["template"] for one in template if one.get("name") == "default"), None)
    if template is None:
        return None
    from transformers import PreTrainedTokenizerFast

    return _chat(PreTrainedTokenizerFast(tokenizer_file=str(root / "tokenizer.json"), **special), template)


def _chat(tokenizer: Any, template: str) -> Callable[[list[dict[str, str]], bool], str]:
    def chat(messages: list[dict[str, str]], ask: bool) -> str:
        # a date of today's would make another experiment of it tomorrow
        return str(
            tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=ask, date_string="1 Jan 2025"
            )
        )

    return chat


def _of_gguf(path: Path) -> tuple[Any, dict[str, str], Any]:
    """The tokenizer inside a .gguf file, as transformers reads it."""
    from transformers import AutoTokenizer

    # False, not left out: transformers would ask whoever sits there whether code of the directory may run
    found = AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
    )
    special = {role: getattr(found, role) for role in ("bos_token", "eos_token", "pad_token")}
    chat = None if found.chat_template is None else _chat(found, found.chat_template)
    return found.backend_tokenizer, {role: str(token) for role, token in special.items() if token is not None}, chat


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
