"""Texts to model (`data=text`): a folder of plain text or JSON lines, as rows of tokens of a next-token task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedfuse.config.schema import DataConfig
from fedfuse.data.build import codes_of, cut_test, options
from fedfuse.data.cache import key_of, stamps, stored_dataset
from fedfuse.data.dataset import Dataset, Examples
from fedfuse.data.documents import Document, documents
from fedfuse.data.inflate import check_room, room
from fedfuse.data.locations import files_below
from fedfuse.data.token_rows import Row, padded, rows_of
from fedfuse.data.tokenize import Bytes, tokenizer_of
from fedfuse.errors import UserError

OPTIONS = {"tokenizer": None, "length": 128, "long": "windows", "least": 1, "train": None, "test": None}


def read(config: DataConfig, root: Path) -> Dataset:
    """Return the texts as rows of tokens; padding is neither predicted nor counted.

    `data.extra`: `tokenizer` (a model's directory, or `bytes`), `length` (tokens a row), `long` (`windows`: a longer
    text goes on in further rows; `cut`: its rest is left out, so that a row is a text), `least` (rows a natural client
    must have), `train` and `test` (files, where names do not say).

    Raises
    ------
    UserError
        Where a file, a field or the tokenizer is missing or damaged, or no text is left.
    """
    extra = options(config, OPTIONS)
    if extra["long"] not in ("windows", "cut"):
        raise UserError(f"data.extra.long={extra['long']}; allowed: windows, cut")
    windows = extra["long"] == "windows"
    notes = list[str]()

    def rows(found: Sequence[Document], tokenizer: Any, length: int) -> list[Row]:
        made = list(rows_of([document.text for document in found], tokenizer, length, windows))
        if left := len(found) - len({row.text for row in made}):
            notes.append(f"{left} of {len(found)} texts are left out: empty, or without a token to predict")
        return made

    def build() -> Dataset:
        return tokenized(config, root, extra, documents(config, root, extra), rows, notes)

    return kept(config, root, extra, build)


def kept(config: DataConfig, root: Path, extra: dict[str, Any], build: Callable[[], Dataset]) -> Dataset:
    """Return the data set from the user's cache; files and settings that were not there before are tokenised, once."""
    model = Path(str(extra["tokenizer"])).expanduser()
    if extra["tokenizer"] in (None, "bytes") or not model.is_dir():
        return build()
    files = _files(root) + sorted([*model.glob("*token*"), *model.glob("*.gguf"), *model.glob("*.jinja")])
    key = key_of(
        config.name,
        [config.inputs, config.targets, config.groups, config.test_fraction, extra],
        stamps(files),
    )
    return stored_dataset(key, root, build)


def _files(root: Path) -> list[Path]:
    return [root] if root.is_file() else files_below(root)


def tokenized(
    config: DataConfig,
    root: Path,
    extra: dict[str, Any],
    found: dict[str, list[Document]],
    rows: Callable[[Sequence[Document], Any, int], list[Row]],
    notes: Sequence[str] = (),
) -> Dataset:
    """Make the data set of a next-token task from documents.

    Parameters
    ----------
    rows : callable
        `rows(documents, tokenizer, length)`; a row's `text` is the number of its document.
    notes
        What is said of the data once the rows are made.

    Raises
    ------
    UserError
        Without a tokenizer, where no row, or no client with enough of them, is left, or rows take more than there is
        room for.
    """
    if not extra["tokenizer"]:
        raise UserError(f"data={config.name} needs data.extra.tokenizer=<directory of the model>, or bytes")
    length = int(extra["length"])
    if length < 2:
        raise UserError(f"data.extra.length={length}: a next token needs at least 2")
    tokenizer = tokenizer_of(str(extra["tokenizer"]))
    made = {split: rows(part, tokenizer, length) for split, part in found.items()}
    for split, part in made.items():
        if found[split] and not part:  # a test set that is not there must not be cut from the training texts
            raise UserError(
                f"data={config.name} data.extra.length={length}: no {split} text has a token to predict within it"
            )
    taken, most = 9 * length * sum(map(len, made.values())), room(*_files(root))  # a number, and whether it is wanted
    check_room(f"data={config.name} data.extra.length={length}", taken, most)
    topics = _codes(config, found, made, lambda document: document.topic, len(tokenizer.names))
    groups = _codes(config, found, made, lambda document: document.group)
    splits: dict[str, Examples] = {}
    for split, part in made.items():
        if part:
            targets = np.zeros(len(part), dtype=np.int64) if topics is None else topics[0][split]
            own = None if groups is None else groups[0][split]
            splits[split] = padded(part, length, tokenizer.pad, targets, own)
    train, names = splits["train"], None if groups is None else groups[1]
    if groups is not None and int(extra["least"]) > 1:
        train, names = _enough(config, train, groups[1], int(extra["least"]))
        if "test" in splits:  # what is in it need not be a client's
            splits["test"] = Examples(**{**vars(splits["test"]), "groups": None})
    test = splits.get("test")
    if test is None and config.test_fraction > 0:
        train, test = cut_test(config, train)
    return Dataset(
        name=config.name,
        train=train,
        test=test,
        classes=tokenizer.names,
        kind="tokens",
        group_names=names,
        next_token=True,
        pad=tokenizer.pad,
        utf8=isinstance(tokenizer, Bytes),
        notes=tuple(notes),
    )


def _codes(
    config: DataConfig,
    found: dict[str, list[Document]],
    made: dict[str, list[Row]],
    what: Callable[[Document], str | None],
    most: int | None = None,
) -> tuple[dict[str, np.ndarray], tuple[str, ...]] | None:
    """A word of each row's document as numbers, by split; None where documents have none."""
    words = {split: [what(found[split][row.text]) for row in part] for split, part in made.items() if part}
    if any(word is None for part in words.values() for word in part):
        return None
    codes, names = codes_of([np.array(part, dtype=object) for part in words.values()], None)
    if most is not None and len(names) > most:
        raise UserError(f"data.targets={config.targets}: {len(names)} topics; allowed: at most {most}")
    return dict(zip(words, codes, strict=True)), names


def _enough(
    config: DataConfig, examples: Examples, names: tuple[str, ...], least: int
) -> tuple[Examples, tuple[str, ...]]:
    """Leave out natural clients with fewer than `least` rows."""
    assert examples.groups is not None
    count = Counter(examples.groups.tolist())
    kept = [i for i in range(len(names)) if count[i] >= least]
    if not kept:
        raise UserError(f"data={config.name}: no client has {least} rows; lower data.extra.least")
    code = np.full(len(names), -1)
    code[kept] = np.arange(len(kept))
    chosen = examples.take(np.flatnonzero(code[examples.groups] >= 0))
    return Examples(**{**vars(chosen), "groups": code[chosen.groups]}), tuple(names[i] for i in kept)
