"""Rows of bytes read by a tokenizer of one's own: every wanted byte is predicted once, whatever a row's edge cuts."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

tokenizers = pytest.importorskip("tokenizers", reason="the extra `lm` is not installed")

from fedfuse.data.dataset import IGNORED  # noqa: E402
from fedfuse.data.own_tokenizer import OwnTokenizer, characters, own_tokenizer, spelt  # noqa: E402
from tests.data.test_alignment import byte_level, wordpiece  # noqa: E402

TEXTS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30)


@cache
def own(kind: str) -> OwnTokenizer:
    import tempfile

    folder = tempfile.mkdtemp()
    (byte_level() if kind == "bpe" else wordpiece()).save(f"{folder}/tokenizer.json")
    return OwnTokenizer(folder)


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
@settings(max_examples=60, deadline=None)
@example(text="\x80\r", start=1, length=2)  # half a character, then a blank
@given(text=TEXTS, start=st.integers(0, 5), length=st.integers(1, 20))
def test_every_byte_of_a_row_is_in_one_token(kind, text, start, length) -> None:
    raw = text.encode()[start : start + length]
    if not raw:
        return
    ids, ends = own(kind).encode(raw)
    if not ids:
        return  # blanks alone, which WordPiece does not see
    assert len(ids) == len(ends)
    assert ends == sorted(ends)
    assert ends[-1] == len(raw)
    if kind == "bpe":
        assert b"".join(own(kind).pieces[i] for i in ids) == raw


@settings(max_examples=100, deadline=None)
@given(text=TEXTS, start=st.integers(0, 5), length=st.integers(0, 20))
def test_a_row_is_cut_into_an_edge_characters_and_an_edge(text, start, length) -> None:
    raw = text.encode()[start : start + length]
    front, whole, back = characters(raw)
    assert front + whole + back == raw
    whole.decode()
    assert len(front) <= 3
    assert len(back) <= 3


def test_edges_by_hand() -> None:
    smile = "🙂".encode()
    assert characters(b"a" + smile[:2]) == (b"", b"a", smile[:2])
    assert characters(smile[1:] + b"b") == (smile[1:], b"b", b"")
    assert characters(smile) == (b"", smile, b"")
    assert characters(b"") == (b"", b"", b"")
    assert characters(b"\xff\xfe\xff\xfe\xff") == (b"\xff\xfe\xff\xfe\xff", b"", b"")


def test_only_what_is_wanted_is_read() -> None:
    made = own("bpe")
    x = torch.zeros(2, 8, dtype=torch.int64)
    x[0, :6], x[1, :3] = torch.tensor(list(b"xthe c")), torch.tensor(list(b"to "))
    wanted = torch.zeros(2, 8, dtype=torch.bool)
    wanted[0, 1:6], wanted[1, :3] = True, True  # the first row goes on from its "x"
    found = made.read(x, wanted)
    for row, raw in enumerate((b"the c", b"to ")):
        counted = found.y[row] != IGNORED
        assert b"".join(made.pieces[i] for i in found.y[row][counted]) == raw
        assert torch.equal(found.x[row][counted], found.y[row][counted])
        assert found.ends[row][counted][-1] == len(raw)
        assert found.ends[row, 0] == 0
        assert bool((found.ends[row].diff() >= 0).all())
    assert found.x[:, 0].tolist() == [made.bos] * 2
    assert found.y[:, 0].tolist() == [IGNORED] * 2
    nothing = made.read(x[:0], wanted[:0])
    assert nothing.x.shape == (0, 2)


def test_what_tokens_spell() -> None:
    pieces = dict(zip(own("bpe").tokenizer.names, own("bpe").pieces, strict=True))
    assert pieces["Ġ"] == b" "
    assert {pieces[name] for name in pieces if len(name) == 1} == {bytes([i]) for i in range(256)}
    words = dict(zip(own("wordpiece").tokenizer.names, own("wordpiece").pieces, strict=True))
    assert words["[UNK]"] == b""
    assert all(words[name] == name[2:].encode() for name in words if name.startswith("##"))

    class Sentencepiece:
        names = ("<unk>", "<0x0A>", "▁the", "a")
        _tokenizer = byte_level()

    assert spelt(Sentencepiece()) == (b"", b"\n", b" the", b"a")


def test_a_directory_without_a_tokenizer_reads_bytes(tmp_path: Path) -> None:
    assert own_tokenizer(str(tmp_path)) is None
