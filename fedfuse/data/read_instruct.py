"""Instructions (`data=instruct`): JSON lines of prompts with answers, or of chats; only the answers are learned.

A line has `messages` (or `conversations`): a list of `role` and `content`, put together by the tokenizer's own chat
template; or `prompt` and `completion`, or one of the usual pairs of names beside them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedfuse.config.schema import DataConfig
from fedfuse.data.build import options
from fedfuse.data.dataset import Dataset
from fedfuse.data.documents import Document, documents
from fedfuse.data.read_text import kept, tokenized
from fedfuse.data.token_rows import Row
from fedfuse.errors import UserError, first_line

OPTIONS = {"tokenizer": None, "length": 256, "chat": False, "least": 1, "train": None, "test": None}
CHATS = ("messages", "conversations")
PAIRS = (("prompt", "completion"), ("instruction", "output"), ("instruction", "response"), ("question", "answer"))
ROLES = {"human": "user", "gpt": "assistant"}  # as ShareGPT names them

Part = tuple[str | int | None, bool, bool]  # text or a token, whether it is learned, whether its bytes count


def read(config: DataConfig, root: Path) -> Dataset:
    """Return the instructions as rows of tokens, one each, of which only answers are predicted.

    An answer is learned with its end (the template's, or the tokenizer's end of text), but bytes are counted of what
    it says alone. A batch is as long as its longest row, or is packed (`data.packing`, `fedfuse.train.packed`).

    `data.extra`: `tokenizer` (a model's directory, or `bytes`), `length` (tokens a row; what is longer loses its end),
    `chat` (true: prompts with answers as chats of two messages, too), `least`, `train` and `test` as for `data=text`.

    Raises
    ------
    UserError
        Where a file or a line is damaged, there is no chat template, or no answer fits.
    """
    extra = options(config, OPTIONS)
    notes = list[str]()

    def rows(given: Sequence[Document], tokenizer: Any, length: int) -> list[Row]:
        made = [_row(i, _parts(document, tokenizer, extra), tokenizer, length) for i, document in enumerate(given)]
        left, cut = sum(row is None for row, _ in made), sum(cut for row, cut in made if row is not None)
        if left or cut:
            notes.append(
                f"data.extra.length={length}: of {len(made)} examples {left} were left out, whose answers begin later, "
                f"and {cut} lost the end of their answer"
            )
        return [row for row, _ in made if row is not None]

    def build() -> Dataset:
        dataset = tokenized(config, root, extra, documents(config, root, extra, whole=True), rows)
        return Dataset(**{**vars(dataset), "notes": tuple(notes)})

    return kept(config, root, extra, build)


def _row(number: int, parts: Iterator[Part], tokenizer: Any, length: int) -> tuple[Row | None, bool]:
    """One example; None where no answer begins within `length`. And whether something was cut off."""
    ids, wanted, counts = list[int](), list[bool](), list[int]()
    for what, learned, counted in parts:
        if isinstance(what, str):
            ((own, ends),) = tokenizer.spans([what])
        else:
            own, ends = ([], []) if what is None else ([what], [0])
        sizes = [after - before for before, after in zip([0, *ends], ends, strict=False)]
        ids += own
        wanted += [learned] * len(own)
        counts += sizes if counted else [0] * len(own)
    total = len(ids)
    ids, wanted, counts = ids[:length], wanted[:length], counts[:length]
    if wanted:
        wanted[0] = False  # there is nothing to predict it from
    if not any(wanted):
        return None, True
    byte_count = sum(size for size, learned in zip(counts, wanted, strict=True) if learned)
    return Row(ids, wanted, byte_count, number), total > length


def _parts(document: Document, tokenizer: Any, extra: dict[str, Any]) -> Iterator[Part]:
    """An example in parts, as a model would see it: what it is asked, and what it then says."""
    row = document.text
    field = next((name for name in CHATS if name in row), None)
    if field is not None:
        return _chat(_messages(row[field], field, document), tokenizer, document, extra)
    for ask, answer in PAIRS:
        if ask in row and answer in row:
            break
    else:
        allowed = ", ".join([*CHATS, *(" with ".join(pair) for pair in PAIRS)])
        raise UserError(f"{document.where} is no instruction; allowed: {allowed}")
    prompt, said = row[ask], row[answer]
    if isinstance(prompt, list) and isinstance(said, list):
        return _chat(_messages([*prompt, *said], ask, document), tokenizer, document, extra)
    if not isinstance(prompt, str) or not isinstance(said, str):
        raise UserError(f"{document.where}: {ask!r} and {answer!r} must both be text, or both lists of messages")
    if ask == "instruction":  # written without the line's end that parts it from the answer
        prompt = "".join(f"{part}\n" for part in (prompt, row.get("input")) if part)
    if extra["chat"]:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": said}]
        return _chat(turns, tokenizer, document, extra)
    return iter(
        [(tokenizer.bos, False, False), (prompt, False, False), (said, True, True), (tokenizer.eos, True, False)]
    )


def _messages(found: Any, field: str, document: Document) -> list[dict[str, str]]:
    """Messages by the names that templates know.

    Raises
    ------
    UserError
        If they are not a list of messages with an answer.
    """
    turns = []
    for message in found if isinstance(found, list) else [None]:
        message = message if isinstance(message, dict) else {}
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise UserError(f"{document.where}: {field!r} is no list of messages, each with role and content as text")
        turns.append({"role": ROLES.get(role, role), "content": content})
    if not any(turn["role"] == "assistant" for turn in turns):
        raise UserError(f"{document.where}: {field!r} has no message of the assistant; there is nothing to learn")
    return turns


def _chat(turns: list[dict[str, str]], tokenizer: Any, document: Document, extra: dict[str, Any]) -> Iterator[Part]:
    """A chat in parts: each answer is what the template adds to the messages before it.

    Raises
    ------
    UserError
        If there is no template, or it writes what came before anew with each message.
    """
    if tokenizer.chat is None:
        raise UserError(f"data.extra.tokenizer={extra['tokenizer']} has no chat template; give prompt and completion")
    done = ""
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        try:
            answered = tokenizer.chat(turns[: i + 1], False)
            asked = tokenizer.chat(turns[:i], True) if i else answered[: max(0, answered.find(turn["content"]))]
        except Exception as error:
            raise UserError(f"{document.where}: the chat template refuses it ({first_line(error)})") from error
        if not asked.startswith(done) or not answered.startswith(asked):
            raise UserError(f"{document.where}: the chat template changes earlier messages, so answers cannot be told")
        yield asked[len(done) :], False, False
        content, end = _split(answered[len(asked) :], turn["content"])
        yield content, True, True
        yield end.rstrip(), True, False
        yield end[len(end.rstrip()) :], False, False  # nobody waits for what comes after the end
        done = answered


def _split(answer: str, content: str) -> tuple[str, str]:
    """An answer into what it says and how the template ends it."""
    for said in (content, content.strip()):
        if answer.startswith(said):
            return said, answer[len(said) :]
    return answer.rstrip(), answer[len(answer.rstrip()) :]
