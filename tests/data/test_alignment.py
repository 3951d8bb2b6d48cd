"""Two tokenisations of one text: groups cover every byte once, whatever the text and the tokenizers."""

from __future__ import annotations

from functools import cache
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfuse.data.alignment import (
    edit_distance,
    groups,
    nearest_piece,
    same_start,
    vocabulary_map,
)
from fedfuse.data.tokenize import Tokenizer

tokenizers = pytest.importorskip("tokenizers", reason="the extra `lm` is not installed")

CORPUS = ["to be or not to be that is the question", "héllo wörld 日本語 🙂 naïve", "the the the cat sat on the mat"]
TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)


@cache
def byte_level():
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    return made


@cache
def wordpiece():
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]"], show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    return made


@cache
def read_back(how: str) -> Tokenizer:
    """A tokenizer as the platform reads it from a directory."""
    with TemporaryDirectory() as folder:
        (byte_level() if how == "bpe" else wordpiece()).save(f"{folder}/tokenizer.json")
        return Tokenizer(folder)


def by(how: str, text: str) -> np.ndarray:
    raw = text.encode("utf-8")
    if how == "bytes":
        return np.arange(1, len(raw) + 1)
    if how == "characters":
        return np.cumsum([len(character.encode("utf-8")) for character in text], dtype=np.int64)
    return np.array(read_back(how).spans([text])[0][1], dtype=np.int64)


@pytest.mark.parametrize(
    "pair", [("bpe", "wordpiece"), ("bytes", "bpe"), ("wordpiece", "bytes"), ("bpe", "characters")]
)
@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_groups_cover_every_byte_once(pair, text):
    left, right = (by(how, text) for how in pair)
    raw = len(text.encode("utf-8"))
    if not len(left) or not len(right):
        return  # a text of blanks alone, which WordPiece does not see
    found = groups(left, right)
    assert found.ends.tolist() == sorted(set(found.ends.tolist()))
    assert found.ends[-1] == raw  # … and they start at 0 and each where the last one ended: all bytes, once
    for ends, first, last in ((left, found.first, found.last), (right, found.other_first, found.other_last)):
        covered = [i for a, b in zip(first, last, strict=True) for i in range(a, b + 1)]
        assert covered == [i for i in range(len(ends)) if ends[i] > 0]  # every token that spells something, once
        assert (ends[last] == found.ends).all()
    swapped = groups(right, left)
    assert [one.tolist() for one in swapped] == [
        one.tolist() for one in (found.other_first, found.other_last, found.first, found.last, found.ends)
    ]
    inside = set(left[left > 0].tolist()) & set(right[right > 0].tolist())
    assert inside == set(found.ends.tolist())  # as fine as can be


@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_equal_tokenisers_are_aligned_one_by_one(text):
    ends = by("bytes", text)
    found = groups(ends, ends)
    assert found.single.all()
    assert found.first.tolist() == found.other_first.tolist() == list(range(len(ends)))
    mine, theirs = same_start(ends, ends)
    assert mine.tolist() == theirs.tolist() == list(range(len(ends)))


@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_a_start_in_common_is_an_end_in_common_before(text):
    left, right = by("bpe", text), by("bytes", text)
    if not len(left):
        return
    mine, theirs = same_start(left, right)
    starts, others = np.concatenate([[0], left[:-1]]), np.concatenate([[0], right[:-1]])
    assert (starts[mine] == others[theirs]).all()
    assert set(starts[mine].tolist()) == (set(starts[left > starts].tolist()) & set(others.tolist()))


def test_groups_by_hand():
    #        |hel|lo| |world|  against  |hello| w|orld|
    found = groups(np.array([3, 5, 6, 11]), np.array([5, 7, 11]))
    assert found.first.tolist() == [0, 2]
    assert found.last.tolist() == [1, 3]
    assert found.other_first.tolist() == [0, 1]
    assert found.other_last.tolist() == [0, 2]
    assert found.ends.tolist() == [5, 11]
    assert found.single.tolist() == [False, False]
    mine, theirs = same_start(np.array([3, 5, 6, 11]), np.array([5, 7, 11]))
    assert (mine.tolist(), theirs.tolist()) == ([0, 2], [0, 1])


def test_tokens_without_bytes_are_context_or_belong_to_what_they_follow():
    # a begin-of-text symbol, and an emoji whose four pieces are not told apart
    found = groups(np.array([0, 1, 5, 5, 5, 5, 6]), np.array([1, 2, 3, 4, 5, 6]))
    assert (found.first.tolist(), found.last.tolist()) == ([1, 2, 6], [1, 5, 6])
    assert (found.other_first.tolist(), found.other_last.tolist()) == ([0, 1, 5], [0, 4, 5])
    mine, theirs = same_start(np.array([0, 1, 5, 5, 5, 5, 6]), np.array([1, 2, 3, 4, 5, 6]))
    assert (mine.tolist(), theirs.tolist()) == ([1, 2, 6], [0, 1, 5])


def test_what_cannot_be_aligned_is_refused():
    with pytest.raises(ValueError, match="bytes 5 and 6"):
        groups(np.array([2, 5]), np.array([6]))
    with pytest.raises(ValueError, match="nor fall"):
        groups(np.array([3, 2, 5]), np.array([5]))
    with pytest.raises(ValueError, match="negative"):
        groups(np.array([5]), np.array([-1, 5]))
    assert len(groups(np.zeros(0, dtype=int), np.zeros(0, dtype=int)).ends) == 0
    assert len(groups(np.zeros(1, dtype=int), np.zeros(2, dtype=int)).ends) == 0


@settings(max_examples=100, deadline=None)
@given(a=st.binary(max_size=6), b=st.binary(max_size=6), c=st.binary(max_size=6))
def test_edit_distance_is_a_distance(a, b, c):
    assert edit_distance(a, b) == edit_distance(b, a)
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)
    assert abs(len(a) - len(b)) <= edit_distance(a, b) <= max(len(a), len(b))
    for most in (1, 2, 3):
        assert edit_distance(a, b, most) == min(most, edit_distance(a, b)) or edit_distance(a, b, most) >= most


def test_edit_distance_by_hand():
    assert edit_distance(b"kitten", b"sitting") == 3
    assert edit_distance(b"", b"abc") == 3
    assert edit_distance(b"kitten", b"sitting", 2) == 2


def test_maps_between_vocabularies():
    ours, theirs = [b"", b" the", b"t", b"cat"], [b"", b"t", b" ", b"the", b"cats", b"t"]
    assert vocabulary_map(ours, theirs).tolist() == [-1, 3, 1, 4]
    assert len(vocabulary_map(ours, theirs)) == len(ours)  # FedMKT's map had one key more: "total"
    assert nearest_piece(b"zz", [b"", b"ab", b"cd"], {b"ab": 1, b"cd": 2}) == 1  # the first of equals
    assert nearest_piece(b"zz", [b""], {}) == -1
