"""Columns of tables: which one holds what, and numbers or text in them as arrays."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedfuse.config.schema import DataConfig
from fedfuse.data.inflate import check_room
from fedfuse.data.tokenize import Tokenizer, encoded
from fedfuse.errors import UserError

INPUTS = ("img", "image", "images", "inputs", "features", "x", "text", "sentence")
TARGETS = ("label", "labels", "targets", "target", "y", "fine_label")

ALL = "*"  # of `data.inputs`


def column_of(named: str | None, guesses: Sequence[str], present: Sequence[str], key: str, where: object) -> str:
    """Return the column to use: the one the user named, else the first usual name.

    Raises
    ------
    UserError
        Where there is none.
    """
    candidates = [named] if named else [name for name in guesses if name in present]
    if not candidates or candidates[0] not in present:
        wanted = f"no column {named!r}" if named else "no column of a usual name"
        raise UserError(f"{where}: {wanted}; set data.{key}=<one of {', '.join(present)}>")
    return candidates[0]


def several(config: DataConfig, present: Sequence[str], where: object) -> list[str]:
    """The columns that together are an example's input, where `data.inputs` is `*` or names several; else none.

    Raises
    ------
    UserError
        Where one of them is not there, and where nothing is asked for and no column has a usual name.
    """
    asked = config.inputs
    if asked is None and not set(INPUTS) & set(present):
        label = config.targets or next((name for name in TARGETS if name in present), None)
        offered = ", ".join(name for name in present if name != label)
        raise UserError(
            f"{where}: no column of a usual name; set data.inputs=<one of {offered}>, or data.inputs=* "
            "for all columns of numbers but the labels'"
        )
    if asked is None or asked in present or (asked != ALL and "," not in asked):
        return []
    if asked != ALL:
        return [column_of(name.strip(), (), present, "inputs", where) for name in asked.split(",")]
    label = column_of(config.targets, TARGETS, present, "targets", where)
    return [name for name in present if name not in (label, config.groups)]


def check_apart(config: DataConfig, target: str, where: object) -> None:
    """Refuse labels among the inputs, which a model would read off.

    Raises
    ------
    UserError
    """
    asked = config.inputs or ""
    if target in (asked, *(name.strip() for name in asked.split(","))):
        raise UserError(f"{where}: data.inputs={asked}: {target!r} holds the labels; allowed are others")


WORD = re.compile(r"\w+|[^\w\s]")


def text_inputs(
    texts: Sequence[str], form: str, size: int, length: int, where: str, most: int
) -> tuple[np.ndarray, int]:
    """Turn texts into numbers without a vocabulary file: words are hashed (CRC-32), so any machine agrees.

    The second value is how many texts lose their end.

    Parameters
    ----------
    form : {"counts", "tokens"}
        Unit-length word counts, float32 (n, size), or word ids, int64 (n, length), 0 past the text's end.
    size : int
        Number of hash buckets.
    length : int
        Words kept, for tokens.
    where : str
        Named in errors.
    most : int
        Bytes that the numbers may take.

    Raises
    ------
    UserError
        For another form, or where they take more.
    """
    if form not in ("counts", "tokens"):
        raise UserError(f"data.extra.text={form!r}; allowed: counts, tokens")
    if size < 2:
        raise UserError(f"data.extra.buckets={size}: the first is for no word; allowed is a whole number from 2 on")
    check_room(where, len(texts) * (8 * length if form == "tokens" else 4 * size), most)
    encoded(texts)
    hashed = [[1 + zlib.crc32(word.encode()) % (size - 1) for word in WORD.findall(text.lower())] for text in texts]
    if form == "tokens":
        tokens = np.zeros((len(hashed), length), dtype=np.int64)
        for row, words in enumerate(hashed):
            tokens[row, : min(length, len(words))] = words[:length]
        return tokens, sum(len(words) > length for words in hashed)
    counts = np.zeros((len(hashed), size), dtype=np.float32)
    for row, words in enumerate(hashed):
        np.add.at(counts[row], words, 1.0)
    counts /= np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-12)
    return counts, 0


TEXT_OPTIONS = {"text": "counts", "buckets": 1024, "length": 64, "tokenizer": None}


def column_inputs(
    values: Sequence[Any] | np.ndarray, extra: Mapping[str, Any], where: str, most: int
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Turn a column of numbers, lists of numbers or texts into an array of inputs.

    Parameters
    ----------
    most : int
        Bytes that texts may take as numbers.

    Returns
    -------
    inputs : ndarray
    notes : tuple of str
        What is lost of texts.

    Raises
    ------
    UserError
        Where rows differ in length or are neither numbers nor text, or texts take more than there is room for.
    """
    if not isinstance(values, np.ndarray) and len(values) and all(isinstance(value, str) for value in values):
        length = int(extra["length"])
        if extra.get("tokenizer"):
            check_room(where, 8 * len(values) * length, most)
            inputs, cut = Tokenizer(str(extra["tokenizer"])).padded(values, length)
        else:
            inputs, cut = text_inputs(values, str(extra["text"]), int(extra["buckets"]), length, where, most)
        notes = [f"data.extra.length={length}: {cut} of {len(values)} texts are longer and lose their end"] * bool(cut)
        if empty := sum(not value.strip() for value in values):
            notes.append(f"{empty} of {len(values)} texts are empty")
        return inputs, tuple(notes)
    try:
        # an array of texts would give each the room of the longest
        array = np.empty(0, dtype=object) if _with_text(values) else np.asarray(values)
    except ValueError:
        array = np.empty(0, dtype=object)
    if array.dtype.kind not in "iufb" or array.ndim < 1:
        raise UserError(f"{where}: expected text, numbers or lists of numbers of one length")
    return (array[:, None].astype(np.float32) if array.ndim == 1 else array), ()


def _with_text(values: Sequence[Any] | np.ndarray) -> bool:
    """Whether any value is a text, in lists however deep."""
    level = [] if isinstance(values, np.ndarray) else values
    while level:
        kinds = set(map(type, level))
        if str in kinds:
            return True
        level = [item for value in level if isinstance(value, list) for item in value] if list in kinds else []
    return False


def labels_of(values: Sequence[Any] | np.ndarray, where: object) -> np.ndarray:
    """Labels, or groups, as an array: of objects where some are texts, of which the longest may be very long.

    Raises
    ------
    UserError
        Where they are lists, or one is missing: none, the text "", or a NaN among texts.
    """
    if not isinstance(values, np.ndarray) or values.dtype == object:
        lost = (i for i, v in enumerate(values, 1) if v is None or v == "" or (isinstance(v, float) and v != v))
        if first := next(lost, None):
            raise UserError(f"{where}: example {first} has no label, or no group; fill it in, or drop the row")
    if not isinstance(values, np.ndarray) and any(isinstance(value, str | bytes) for value in values):
        return np.array(values, dtype=object)
    try:
        found = np.asarray(values)
    except ValueError:  # lists of several lengths
        found = np.empty((0, 0))
    if found.ndim != 1:
        raise UserError(f"{where}: labels, or groups, are lists; expected one text or number per example")
    return found


def tokens_of(extra: Mapping[str, Any]) -> tuple[int, int]:
    """What fills short texts, as `column_inputs` makes them tokens, and how many tokens there are."""
    if extra.get("tokenizer"):
        tokenizer = Tokenizer(str(extra["tokenizer"]))
        return tokenizer.pad, len(tokenizer.names)
    return 0, int(extra["buckets"])
