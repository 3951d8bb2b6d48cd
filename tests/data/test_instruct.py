"""`data=instruct`: what is learned of a prompt with its answer, and of a chat; by bytes, and by a template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedfuse.config.compose import compose
from fedfuse.config.schema import DataConfig
from fedfuse.data.load import load
from fedfuse.errors import UserError

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ENDS = "<|end|>"


def instruct(root: Path, *rows: dict, **extra) -> DataConfig:
    (root / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    extra = {"tokenizer": "bytes", "length": 48, **extra}
    return DataConfig(name="instruct", root=str(root), extra=extra, test_fraction=0.0)


@pytest.fixture
def templated(tmp_path):
    """A byte-level tokenizer with a chat template of its own."""
    tokenizers = pytest.importorskip("tokenizers", reason="the extra `lm` is not installed")
    pytest.importorskip("transformers", reason="the extra `lm` is not installed")
    folder = tmp_path / "model"
    folder.mkdir()
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    special = ["<pad>", "</s>", ENDS, "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator(["yes it is"], trainer)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": "</s>"}))
    return folder


def learned(dataset, row: int = 0) -> list[int]:
    return [int(i) for i in dataset.train.inputs[row][dataset.train.wanted[row]]]


def test_only_the_answer_and_its_end_are_learned_and_its_bytes_counted(tmp_path: Path) -> None:
    found = load(instruct(tmp_path, {"prompt": "Is it so? ", "completion": "Jä"}))
    assert learned(found) == [*"Jä".encode(), 0]
    assert found.train.byte_counts.tolist() == [3]
    assert found.train.lengths.tolist() == [1 + 10 + 3 + 1]
    assert bytes(found.train.inputs[0, 1:11].tolist()) == b"Is it so? "
    assert found.next_token
    assert not found.notes


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"instruction": "Add", "input": "1, 2", "output": "3"}, "Add\n1, 2\n"),
        ({"instruction": "Add", "input": "", "output": "3"}, "Add\n"),
        ({"instruction": "Add", "response": "3"}, "Add\n"),
        ({"question": "1+2=", "answer": "3"}, "1+2="),
    ],
)
def test_the_usual_names(row: dict, asked: str, tmp_path: Path) -> None:
    found = load(instruct(tmp_path, row))
    assert bytes(found.train.inputs[0, 1 : 1 + len(asked)].tolist()).decode() == asked
    assert learned(found) == [ord("3"), 0]


def test_a_chat_is_learned_by_its_answers_alone(tmp_path: Path, templated: Path) -> None:
    turns = [
        ("system", "Be short."),
        ("user", "Is it?"),
        ("assistant", "yes it is"),
        ("user", "Sure?"),
        ("assistant", "ja"),
    ]
    chat = {"messages": [{"role": role, "content": said} for role, said in turns]}
    shared = {
        "conversations": [{"from": {"user": "human", "assistant": "gpt"}.get(r, r), "value": s} for r, s in turns]
    }
    found = load(instruct(tmp_path, chat, shared, tokenizer=str(templated)))
    from fedfuse.data.tokenize import Tokenizer

    tokenizer = Tokenizer(str(templated))
    whole = "".join(f"<|{role}|>{said}<|end|>\n" for role, said in turns)
    for row in (0, 1):
        ids = found.train.inputs[row, : found.train.lengths[row]].tolist()
        assert ids == tokenizer.spans([whole])[0][0][:-1]  # nobody waits for the line's end after the last answer
        end = tokenizer.names.index(ENDS)
        assert learned(found, row) == [
            *tokenizer.spans(["yes it is"])[0][0], end, *tokenizer.spans(["ja"])[0][0], end,
        ]  # fmt: skip
        assert found.train.byte_counts[row] == len("yes it is") + len("ja")
    pair = {"prompt": "Is it?", "completion": "ja"}
    as_chat = load(instruct(tmp_path, pair, tokenizer=str(templated), chat=True))
    ids = as_chat.train.inputs[0, : as_chat.train.lengths[0]].tolist()
    assert ids == tokenizer.spans(["<|user|>Is it?<|end|>\n<|assistant|>ja<|end|>"])[0][0]
    lists = {"prompt": [chat["messages"][1]], "completion": [chat["messages"][4]]}
    assert (
        load(instruct(tmp_path, lists, tokenizer=str(templated))).train.inputs.tolist() == as_chat.train.inputs.tolist()
    )


def test_what_does_not_fit_is_left_out_or_cut_and_both_are_said(tmp_path: Path) -> None:
    config = instruct(
        tmp_path, {"prompt": "x" * 9, "completion": "y"}, {"prompt": "x", "completion": "y" * 9},
        {"prompt": "x", "completion": "y"}, length=6,
    )  # fmt: skip
    found = load(config)
    assert len(found.train) == 2
    assert found.train.byte_counts.tolist() == [4, 1]
    assert learned(found, 0) == [ord("y")] * 4
    assert "of 3 examples 1 were left out" in found.notes[0]
    assert "1 lost the end of their answer" in found.notes[0]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a"}, "example 1 is no instruction; allowed: messages"),
        ({"prompt": "a", "completion": 3}, "'prompt' and 'completion' must both be text"),
        ({"messages": "a"}, "'messages' is no list of messages"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no message of the assistant"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "data.extra.tokenizer=bytes has no chat template"),
        ({"prompt": "a" * 99, "completion": "b"}, "no train text has a token to predict"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(row: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said) as caught:
        load(instruct(tmp_path, row))
    assert "\n" not in str(caught.value)


def test_a_template_that_changes_what_was_said_is_refused(tmp_path: Path, templated: Path) -> None:
    chat = {"messages": [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]}
    about = templated / "tokenizer_config.json"
    about.write_text(json.dumps({"chat_template": "{{ messages | length }}" + TEMPLATE}))
    with pytest.raises(UserError, match="changes earlier messages"):
        load(instruct(tmp_path, chat, tokenizer=str(templated)))
    about.write_text(json.dumps({"chat_template": "{{ raise_exception('no such\nrole') }}"}))
    with pytest.raises(UserError, match=r"the chat template refuses it \(no such\)"):
        load(instruct(tmp_path, chat, tokenizer=str(templated)))
    about.write_text(json.dumps({"chat_template": "{{ ''.__class__.__mro__ }}"}))  # runs in a sandbox
    with pytest.raises(UserError, match="the chat template refuses it"):
        load(instruct(tmp_path, chat, tokenizer=str(templated)))
    (templated / "chat_template.jinja").write_text(TEMPLATE)  # goes before the other
    found = load(instruct(tmp_path, chat, tokenizer=str(templated)))
    assert found.train.byte_counts.tolist() == [2]  # also where the first to speak is the assistant


def test_the_models_own_tokenizer_is_taken_unless_another_is_said() -> None:
    words = ("data=instruct", "data.root=x", "model=hf", "model.path=dir")
    assert compose(words).data.extra["tokenizer"] == "dir"
    assert compose((*words, "data.extra.tokenizer=bytes")).data.extra["tokenizer"] == "bytes"
    assert "tokenizer" not in compose(("data=sst2", "model=hf", "model.path=dir")).data.extra
