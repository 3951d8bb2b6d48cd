"""Texts as they lie in files: a folder of plain text, or JSON lines; each with its client and its topic."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedfuse.config.schema import DataConfig
from fedfuse.data.columns import column_of
from fedfuse.data.inflate import gunzipped
from fedfuse.data.locations import split_files
from fedfuse.data.read_jsonl import lines
from fedfuse.errors import UserError

PLAIN = (".txt", ".txt.gz", ".md")
ROWS = (".jsonl", ".jsonl.gz", ".json.gz")
TEXT = ("text", "content", "lines", "sentence", "document")  # usual names of the field that holds it
SPEAKER = re.compile(r"([^\n:]{1,60}):\n(.*)", re.DOTALL)  # a block of a play: who speaks, and what


@dataclass(frozen=True)
class Document:
    """A text, or a row that says more than one.

    Attributes
    ----------
    text : Any
        The text; for instructions, the whole row of the file.
    group : str or None
        Its client.
    topic : str or None
        What it is dealt by.
    where : str
        File and line, for messages.
    """

    text: Any
    group: str | None
    topic: str | None
    where: str


def documents(config: DataConfig, root: Path, extra: dict[str, Any], whole: bool = False) -> dict[str, list[Document]]:
    """Read what lies under `root`, by split: "train", and "test" where a file's name says so.

    Clients are by `data.groups`: a field of JSON lines; `file`; or `role`, who speaks in plain text written as a play.
    Without it, plain text is by file, and JSON lines have no clients of their own. `data.targets` is a field to deal
    by. A field that holds a list of texts makes a document of each.

    Parameters
    ----------
    whole
        Take rows of JSON lines as they are, instead of one field; plain text is refused then.

    Raises
    ------
    UserError
        Where a file, a line or a field is missing or damaged.
    """
    files = split_files(root, config.name, ROWS if whole else (*ROWS, *PLAIN), extra)
    found = {}
    for split, paths in (("train", files["train"] or files["other"]), ("test", files["test"])):
        found[split] = [document for path in paths for document in _of_file(config, path, root, whole)]
    if not any(document.text for document in found["train"]):
        raise UserError(f"data={config.name}: no text under {root}")
    return found


def _of_file(config: DataConfig, path: Path, root: Path, whole: bool) -> Iterator[Document]:
    name = path.name if root.is_file() else str(path.relative_to(root))
    if path.name.endswith(PLAIN) and not whole:
        yield from _plain(config, path, name)
        return
    rows = lines(path)
    present = list(rows[0])
    by_file = config.groups == "file" and "file" not in present
    field = None if whole else column_of(config.inputs, TEXT, present, "inputs", path)
    group = None if by_file or not config.groups else column_of(config.groups, (), present, "groups", path)
    topic = column_of(config.targets, (), present, "targets", path) if config.targets else None
    for number, row in enumerate(rows, start=1):
        for wanted in (field, group, topic):
            if wanted is not None and row.get(wanted) is None:
                raise UserError(f"{path}: example {number} has no {wanted!r}")
        own = name if by_file else None if group is None else str(row[group])
        about = None if topic is None else str(row[topic])
        for text in _texts(row, field, path, number):
            yield Document(text, own, about, f"{path}: example {number}")


def _texts(row: dict[str, Any], field: str | None, path: Path, number: int) -> Sequence[Any]:
    if field is None:
        return [row]
    value = row[field]
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{path}: example {number}: {field!r} is no text, and no list of texts")
    return texts


def _plain(config: DataConfig, path: Path, name: str) -> Iterator[Document]:
    if config.targets:
        raise UserError(f"data.targets={config.targets}: {path} is plain text and has no fields; allowed: null")
    try:
        raw = gunzipped(path).read() if path.suffix == ".gz" else path.read_bytes()
        text = raw.decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); expected UTF-8 text") from None
    if config.groups in (None, "file"):
        yield Document(text if text.strip() else "", name, None, str(path))
        return
    if config.groups != "role":
        raise UserError(f"data.groups={config.groups}: {path} is plain text; allowed: file, role")
    speeches = [SPEAKER.fullmatch(block.strip()) for block in re.split(r"\n\s*\n", text)]
    if not any(speeches):
        raise UserError(f"data.groups=role: {path} has no line that is a name and a colon before what is said")
    for speech in speeches:
        if speech is not None:
            yield Document(speech[2], speech[1].strip(), None, str(path))
