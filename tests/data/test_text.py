"""`data=text`: rows of tokens, what of them counts, and bytes; by closed form on bytes, and on a trained tokenizer."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from fedfuse.config.schema import DataConfig, PartitionConfig, TransferConfig
from fedfuse.data import prepare
from fedfuse.data.load import load
from fedfuse.data.token_rows import rows_of
from fedfuse.data.tokenize import Bytes, Tokenizer, tokenizer_of
from fedfuse.errors import UserError
from fedfuse.train.scores import scored
from fedfuse.train.task import IGNORED, trimmed
from tests.data.test_alignment import byte_level

SAID = "Ära: naïve 日本 👍 end"


def text(root: Path, **given) -> DataConfig:
    extra = {"tokenizer": "bytes", "length": 8, **given.pop("extra", {})}
    return DataConfig(name="text", root=str(root), extra=extra, **given)


def folder(root: Path) -> Path:
    (root / "a.txt").write_text("abcdefghijklmnop")
    (root / "b.txt").write_text("xyz")
    return root


def test_every_byte_is_predicted_once_whatever_the_length() -> None:
    for length in (2, 3, 7, 64):
        rows = list(rows_of([SAID, "z", ""], Bytes(), length, windows=True))
        for number, said in enumerate((SAID, "z")):
            own = [row for row in rows if row.text == number]
            told = [i for row in own for i, wanted in zip(row.ids, row.wanted, strict=True) if wanted]
            assert bytes(told) == said.encode()
            assert sum(row.byte_count for row in own) == len(said.encode())
        assert not [row for row in rows if row.text == 2]  # an empty text has nothing to predict
        assert all(len(row.ids) <= length and not row.wanted[0] for row in rows)


def test_a_cut_text_is_one_row_and_counts_what_is_left() -> None:
    (row,) = rows_of([SAID], Bytes(), 6, windows=False)
    assert row.byte_count == 5
    assert bytes(row.ids[1:]) == SAID.encode()[:5]


def test_rows_are_padded_at_their_end_and_padding_does_not_count(tmp_path: Path) -> None:
    found = load(text(folder(tmp_path), test_fraction=0.0))
    assert found.train.inputs.tolist()[-1] == [0, *b"xyz", 0, 0, 0, 0]
    assert found.train.wanted is not None
    assert found.train.wanted[-1].tolist() == [False, True, True, True] + [False] * 4
    assert found.train.lengths.tolist() == [8, 8, 3, 4]  # 0 and 7 bytes, the last of them and 7 more, and 2
    assert found.train.byte_counts is not None
    assert found.train.byte_counts.tolist() == [7, 7, 2, 3]
    assert found.train.texts is not None
    assert found.train.texts.tolist() == [0, 0, 0, 1]
    assert found.group_names == ("a.txt", "b.txt")
    assert found.pad == 0
    assert found.next_token


def test_labels_ignore_padding_and_bytes_follow_the_split(tmp_path: Path) -> None:
    config = text(folder(tmp_path), test_fraction=0.0, validation=0.0, personal_test=0.0)
    data = prepare(config, PartitionConfig(name="natural"), TransferConfig(size=0), None, 0)
    x, y = data.tensors(1, "train")
    assert y.tolist() == [[IGNORED, *b"xyz", *[IGNORED] * 4]]
    assert x.shape == (1, 8)
    assert [data.byte_count("train", client) for client in (0, 1)] == [16, 3]
    assert data.byte_count("global") is None
    assert data.byte_count("personal", 0) == 0


def test_clients_by_field_by_role_and_by_topic(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "author": "ab"[i % 2], "about": "pqr"[i % 3]} for i in range(60)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "test.jsonl").write_text(json.dumps(rows[0]))
    found = load(text(tmp_path, groups="author", extra={"length": 16}))
    assert found.group_names == ("a", "b")
    assert found.test is not None
    assert len(found.test) == 1
    by_topic = text(tmp_path, targets="about", extra={"length": 16})
    skewed = prepare(by_topic, PartitionConfig(alpha=0.01, min_size=1), TransferConfig(size=0), 3, 0)
    labels = [np.bincount(skewed.split(client, "train").targets, minlength=3) for client in range(3)]
    assert max(counts.max() / counts.sum() for counts in labels) > 0.9  # Dirichlet over the topic
    play = tmp_path / "play"
    play.mkdir()
    (play / "play.txt").write_text("A:\nIs it so?\nIs it?\n\nB:\nIt is.\n\nA:\nGood.\n")
    roles = load(text(play, groups="role", test_fraction=0.0, extra={"length": 32}))
    assert roles.group_names == ("A", "B")
    assert roles.train.groups is not None
    assert [bytes(row[1:n].tolist()).decode() for row, n in zip(roles.train.inputs, roles.train.lengths, strict=True)] \
        == ["Is it so?\nIs it?", "It is.", "Good."]  # fmt: skip
    assert roles.train.groups.tolist() == [0, 1, 0]


def test_a_list_of_texts_is_as_many_and_small_clients_are_left_out(tmp_path: Path) -> None:
    rows = [{"role": "A", "lines": ["one", "two"]}, {"role": "B", "lines": ["three"]}]
    (tmp_path / "roles.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = load(text(tmp_path, inputs="lines", groups="role", test_fraction=0.0, extra={"least": 2}))
    assert found.group_names == ("A",)
    assert len(found.train) == 2


def test_two_tokens_are_a_row(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcd" * 9)
    assert load(text(tmp_path, test_fraction=0.0, extra={"length": 2})).shape == (2,)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"extra": {"tokenizer": None}}, "needs data.extra.tokenizer=<directory of the model>, or bytes"),
        ({"extra": {"tokenizer": "nowhere"}}, "data.extra.tokenizer=nowhere is not a directory"),
        ({"extra": {"length": 1}}, "data.extra.length=1: a next token needs at least 2"),
        ({"extra": {"long": "wrap"}}, "data.extra.long=wrap; allowed: windows, cut"),
        ({"extra": {"widows": 1}}, "data.extra.widows is unknown"),
        ({"extra": {"least": 99}}, "no client has 99 rows"),
        ({"groups": "author"}, "data.groups=author: .* is plain text; allowed: file, role"),
        ({"groups": "role"}, "data.groups=role: .* has no line that is a name and a colon"),
        ({"targets": "about"}, "data.targets=about: .* is plain text and has no fields"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(given, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said) as caught:
        load(text(folder(tmp_path), **given))
    assert "\n" not in str(caught.value)


def test_files_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="expected UTF-8 text"):
        load(text(tmp_path))
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(UserError, match="no text under"):
        load(text(tmp_path))
    (tmp_path / "a.txt").unlink()
    (tmp_path / "b.jsonl").write_text('{"text": 5}')
    with pytest.raises(UserError, match="'text' is no text"):
        load(text(tmp_path))
    (tmp_path / "b.jsonl").write_text('{"text": "\\ud800"}')
    with pytest.raises(UserError, match="not Unicode"):
        load(text(tmp_path))


@pytest.mark.parametrize(("label", "group"), [("", "a"), (None, "a"), (float("nan"), "a"), ("x", "")])
@pytest.mark.parametrize("layout", ["jsonl", "parquet"])
def test_an_example_without_a_label_is_no_class_of_its_own(layout, label, group, tmp_path: Path) -> None:
    rows = [{"text": f"w {i}", "label": "xy"[i % 2], "site": "ab"[i % 2]} for i in range(20)]
    rows[7] |= {"label": label, "site": group}
    if layout == "jsonl":
        (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    else:
        if label is not None and not isinstance(label, str):
            pytest.skip("a column of texts has no NaN")
        pl.DataFrame(rows).write_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match="example 8 has no "):
        load(DataConfig(name=layout, root=str(tmp_path), groups="site"))


def test_what_is_lost_of_texts_to_classify_is_told(tmp_path: Path) -> None:
    """Of texts that differ past `data.extra.length` alone, all are the same example."""
    rows = [{"text": "same " * 64 + str(i % 2), "label": i % 2} for i in range(9)] + [{"text": " ", "label": 1}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    said = load(DataConfig(name="jsonl", root=str(tmp_path), extra={"text": "tokens"})).notes
    assert said == (
        "train split: data.extra.length=64: 9 of 10 texts are longer and lose their end",
        "train split: 1 of 10 texts are empty",
    )
    whole = load(DataConfig(name="jsonl", root=str(tmp_path), extra={"text": "tokens", "length": 65}))
    assert whole.notes == said[1:]
    assert load(DataConfig(name="jsonl", root=str(tmp_path))).notes == said[1:]  # counts have no length


def test_texts_that_are_left_out_are_told(tmp_path: Path) -> None:
    (folder(tmp_path) / "c.txt").write_text(" \n")
    assert load(text(tmp_path)).notes == ("1 of 3 texts are left out: empty, or without a token to predict",)
    (tmp_path / "test.txt").write_text("")  # the test set was cut from the training texts instead
    with pytest.raises(UserError, match="no test text has a token to predict"):
        load(text(tmp_path))


def test_a_mark_before_a_file_is_no_part_of_it(tmp_path: Path) -> None:
    """As Windows' editors write it: in JSON lines it was an error in Python's words, in plain text a token."""
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfxyz")
    assert load(text(tmp_path, test_fraction=0.0)).train.inputs.tolist() == [[0, *b"xyz", 0, 0, 0, 0]]
    for i, suffix in enumerate(("jsonl", "csv")):
        (tmp_path / str(i)).mkdir()
        lines = {"jsonl": '{"x": 1, "y": "a"}\n{"x": 2, "y": "b"}', "csv": "x,y\n1,a\n2,b"}[suffix]
        (tmp_path / str(i) / f"train.{suffix}").write_text(lines, encoding="utf-8-sig")
        found = load(DataConfig(name=suffix, root=str(tmp_path / str(i)), test_fraction=0.0))
        assert found.classes == ("a", "b")


@pytest.mark.parametrize("layout", ["jsonl", "parquet"])
def test_how_many_tokens_there_are_is_known(layout: str, tmp_path: Path) -> None:
    rows = [{"text": f"some {i}", "label": i % 2} for i in range(9)]
    if layout == "jsonl":
        (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    else:
        pl.DataFrame(rows).write_parquet(tmp_path / "train.parquet")
    (tmp_path / "own").mkdir()
    byte_level().save(str(tmp_path / "own" / "tokenizer.json"))
    own = Tokenizer(str(tmp_path / "own"))
    for extra, known in (
        ({"text": "tokens", "buckets": 64}, 64),
        ({"tokenizer": str(own.path)}, len(own.names)),
        ({"tokenizer": str(own.path)}, len(own.names)),  # from the cache
        ({"text": "counts"}, None),
    ):
        assert load(DataConfig(name=layout, root=str(tmp_path), extra=extra)).vocabulary == known


def test_a_long_text_keeps_the_token_that_ends_it(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Plain
    from tokenizers import models, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c"]
    plain = Plain(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    plain.save(str(tmp_path / "tokenizer.json"))
    rows, cut = Tokenizer(str(tmp_path)).padded(["a b c", "a", ""], 4)
    assert rows.tolist() == [[2, 4, 5, 3], [2, 4, 3, 0], [2, 3, 0, 0]]
    assert cut == 1


def test_half_a_surrogate_pair_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "bad \\ud800", "label": 1}\n{"text": "b", "label": 0}')
    for extra in ({}, {"text": "tokens"}):
        with pytest.raises(UserError, match="a text is not Unicode"):
            load(DataConfig(name="jsonl", root=str(tmp_path), extra=extra))


def test_a_test_set_that_does_not_fit_is_not_cut_from_the_training_texts(tmp_path: Path) -> None:
    for split, prompt in (("train", "a"), ("test", "a" * 99)):
        row = json.dumps({"prompt": prompt, "completion": "b"})
        (tmp_path / f"{split}.jsonl").write_text("\n".join([row] * 8))
    config = DataConfig(name="instruct", root=str(tmp_path), extra={"tokenizer": "bytes", "length": 20})
    with pytest.raises(UserError, match="no test text has a token to predict"):
        load(config)


def test_bits_per_byte_are_of_bytes_not_of_tokens() -> None:
    """Two tokenisations of one text under models that give the text one probability: equal bits per byte."""
    one, two = torch.tensor([[0, 1]]), torch.tensor([[0, 1, 2]])
    flat = lambda x: torch.zeros(*x.shape, 4).double()  # noqa: E731 - each token has probability 1/4
    fine = scored(flat, two, two, 4, byte_count=4)
    assert math.isclose(fine["bits_per_byte"], 2 * 2 / 4)
    coarse = scored(lambda x: torch.zeros(*x.shape, 16).double(), one, one, 16, byte_count=4)
    assert math.isclose(coarse["bits_per_byte"], fine["bits_per_byte"])
    assert coarse["loss"] > fine["loss"]
    assert "bits_per_byte" not in scored(flat, two, two, 4)
    assert "exact_match" not in fine
    assert math.isnan(scored(flat, two, torch.full_like(two, IGNORED), 4, 0)["bits_per_byte"])


def test_no_text_at_all_has_no_score() -> None:
    none = torch.zeros(0, 5, dtype=torch.int64)
    found = scored(lambda x: torch.zeros(*x.shape, 4), none, none, 4, byte_count=0)
    assert all(math.isnan(found[key]) for key in ("accuracy", "loss", "perplexity", "bits_per_byte"))


def test_exact_match_is_of_prompted_texts_word_for_word() -> None:
    x = torch.tensor([[5, 6, 1, 2], [5, 6, 1, 3], [5, 6, 1, 0]])
    y = torch.tensor([[IGNORED, IGNORED, 1, 2], [IGNORED, IGNORED, 1, 3], [IGNORED, IGNORED, 1, IGNORED]])
    says = torch.tensor([[0, 1, 2, 0]] * 3)  # what is likeliest after each place
    found = scored(lambda part: torch.nn.functional.one_hot(says[: len(part)], 8).double(), x, y, 8, 5)
    assert found["exact_match"] == 2 / 3
    assert found["accuracy"] == 4 / 5


def test_trailing_places_that_count_nowhere_are_left_out() -> None:
    y = torch.tensor([[IGNORED, 1, IGNORED, IGNORED], [IGNORED, 1, 2, IGNORED]])
    labels, x = trimmed(y, torch.arange(8).view(2, 4))
    assert labels.shape == x.shape == (2, 3)
    whole = torch.tensor([[IGNORED, 1, 2]])
    assert trimmed(whole)[0] is whole
    assert trimmed(torch.full((1, 5), IGNORED))[0].shape == (1, 2)
    classes = torch.tensor([IGNORED])
    assert trimmed(classes)[0] is classes


def test_bytes_of_a_trained_tokenizer_are_those_of_the_text(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="the extra `lm` is not installed")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator([SAID, "the cat the dog"], trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    found = tokenizer_of(str(tmp_path))
    assert (found.pad, found.bos, found.eos) == (0, 0, 0)
    for said in (SAID, "the cat", "👍👍", " \n "):
        ((ids, ends),) = found.spans([said])
        assert ends[-1] == len(said.encode())
        assert ends == sorted(ends)
        assert found.text(ids) == said
        for length in (2, 5, 64):
            rows = list(rows_of([said], found, length, windows=True))
            assert sum(row.byte_count for row in rows) == len(said.encode())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": {"content": "t"}, "bos_token": None}))
    named = tokenizer_of(str(tmp_path))
    assert named.pad == named.spans(["t"])[0][0][0]
    assert named.bos == 0
