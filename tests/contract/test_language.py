"""Adapter strategies on a causal model and a classifier, of texts of unequal length: same bits over a wire; DP."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fedfuse.config import registry
from fedfuse.config.compose import compose
from fedfuse.core.silence import unheard
from fedfuse.errors import UserError
from tests.contract.test_matrix import Crash
from tests.federations import QUICK, federation, play

pytest.importorskip("transformers", reason="the extra `lm` is not installed")

ADAPTERS = [name for name in registry.listed() if "targets" in registry.entry(name).hyper.__dataclass_fields__]
COMMON = (
    "clients=2", "partition=iid", "rounds=2", "runtime.name=inline", "transfer.size=4", "train.epochs=1",
    "train.batch_size=8", "train.optimizer=adamw", "train.lr=0.02", "data.limit=24", "data.test_limit=6",
    "evaluate.every=2", "model=hf",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    rows = [{"text": "ab " * (1 + i % 4) + "cd" * (i % 2), "label": i % 2} for i in range(60)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def base(folder: Path, kind: str) -> tuple[str, ...]:
    if kind == "causal":
        own: tuple[str, ...] = ("data=text", "data.extra.tokenizer=bytes", "data.extra.length=20")
    else:
        own = ("data=jsonl", "data.extra.text=tokens", "data.extra.length=6", "data.extra.buckets=64")
    return (*COMMON, f"data.root={folder}", *(f"++{word}" if "extra" in word else word for word in own))


RANK = "strategy.rank=4"


@pytest.mark.parametrize("kind", ["causal", "classifier"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_on_texts_give_the_same_bits_over_a_wire(name: str, kind: str, folder: Path) -> None:
    words = [RANK]
    if name == "fisher" and kind == "causal":
        with pytest.raises(UserError, match=r"strategy\.labels=expected: a token for each of a vocabulary is too many"):
            play(name, RANK, base=base(folder, kind))
        words.append("strategy.labels=data")
    if name == "regmean" and kind == "causal":  # adapters have no Gram of their own, and there is no head beside them
        with pytest.raises(UserError, match=r"strategy\.layers=auto: no such layer"):
            play(name, RANK, base=base(folder, kind))
        return
    found = play(name, *words, base=base(folder, kind))
    assert found.digest == play(name, *words, base=base(folder, kind), grid="serial").digest
    last = found.federation.history[-1]
    key = "bits_per_byte/personal" if kind == "causal" else "accuracy/personal"
    assert last[key] == last[key]
    arrays = [key for item in found.strategy.board.items.values() for key in item.arrays]
    assert not any(key.endswith("base.weight") for key in arrays)


@pytest.mark.parametrize("name", [name for name in sorted(registry.listed()) if name not in ADAPTERS])
def test_a_strategy_learns_next_tokens_or_refuses_them_before_a_round(name: str, folder: Path) -> None:
    """Ten once failed at the clients, in the terms of arrays."""
    words = [word for word in QUICK.get(name, ()) if "labelled" not in word]
    try:
        done = play(name, "rounds=1", *words, base=base(folder, "causal"))
    except UserError:
        return
    assert done.digest  # and every client answered


@pytest.mark.parametrize("name", ["flora", "rolora"])
def test_a_head_that_the_model_has_not_is_not_missed(name: str, folder: Path) -> None:
    assert unheard(play(name, RANK, base=base(folder, "causal")).strategy) == []


@pytest.mark.parametrize("name", ["fedit", "fed_sb", "flora", "hetlora"])
def test_what_becomes_of_a_head_is_not_asked_where_there_is_none(name: str, folder: Path) -> None:
    for head in ("frozen", "personal"):
        with pytest.raises(UserError, match=rf"strategy\.head={head}: model=causal_lm has no classification head"):
            play(name, RANK, f"strategy.head={head}", base=base(folder, "causal"))


def test_a_small_classifier_has_as_many_embeddings_as_there_are_tokens(folder: Path) -> None:
    """It had 32,768, which travelled both ways in every round."""
    model = play("fedavg", "rounds=1", base=base(folder, "classifier")).strategy.model
    assert [len(value) for key, value in model.items() if "word_embeddings" in key] == [64]


def test_a_companion_reads_what_the_data_are(folder: Path) -> None:
    companion = play("fml", "rounds=1", base=base(folder, "classifier")).strategy.server_models()["meme"][1]
    assert any("embedding" in key for key in companion)
    with pytest.raises(UserError, match="model=mlp takes numbers, and data=jsonl gives tokens"):
        play("fml", "strategy.meme=mlp", base=base(folder, "classifier"))


def test_a_companion_starts_from_the_pretrained_weights_too(folder: Path, tmp_path: Path) -> None:
    import transformers

    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    saved = transformers.BertModel(transformers.BertConfig(vocab_size=256, **size), add_pooling_layer=False)
    saved.save_pretrained(tmp_path)
    with federation("fml", f"model.path={tmp_path}", base=base(folder, "classifier")) as (built, _):
        built.strategy.ensure_begun()
        meme = built.strategy.published("meme")
    assert all(torch.equal(meme[f"model.bert.{name}"], value) for name, value in saved.named_parameters())


def test_a_pretrained_model_that_forgets_is_told(folder: Path, tmp_path: Path) -> None:
    import transformers

    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=256, **size)).save_pretrained(tmp_path)
    words = ("fedavg", f"model.path={tmp_path}", "rounds=1", "train.epochs=1", "train.optimizer=sgd")

    def told(rate: float) -> bool:
        done = play(*words, f"train.lr={rate}", base=base(folder, "causal"))
        return any("worse than the one it started from" in note for note in done.notes)

    assert not told(0.05)
    assert told(50)


def test_a_text_run_resumes_to_the_same_bits(folder: Path, tmp_path: Path) -> None:
    words = ("strategy.rank=4", "train.max_steps=2", "train.schedule=cosine", "train.micro_batch=3")
    crashed = federation("fedit", *words, base=base(folder, "causal"), path=tmp_path / "run", callbacks=(Crash(1),))
    with crashed as (again, _), pytest.raises(KeyboardInterrupt):
        again.run()
    resumed = play("fedit", *words, base=base(folder, "causal"), path=tmp_path / "run").digest
    assert resumed == play("fedit", *words, base=base(folder, "causal")).digest


def test_privacy_hides_a_text_and_not_a_window(folder: Path) -> None:
    pytest.importorskip("opacus", reason="the extra `privacy` is not installed")
    long = [word for word in base(folder, "causal") if "length" not in word]
    private = ("strategy.rank=4", "privacy.noise=1", "rounds=1")
    with pytest.raises(UserError, match=r"what is hidden is a text, and data=text has .* set data.extra.long=cut"):
        play("fedit", *private, base=(*long, "++data.extra.length=6"))
    with pytest.raises(UserError, match="gradients by example need the activations"):
        play("fedit", *private, "model.gradient_checkpointing=true", base=base(folder, "causal"))
    cut = play("fedit", *private, base=(*long, "++data.extra.length=6", "++data.extra.long=cut"))
    rows = cut.federation.scenario.data.dataset.train
    assert len(set(rows.texts.tolist())) == len(rows)
    assert not any("windows" in note for note in cut.notes)


def test_an_example_weighs_as_much_whatever_its_length(folder: Path) -> None:
    """DP's unit is a text: its loss is a mean over its own tokens, so a batch's padding changes no text's gradient."""
    import torch

    from fedfuse.train.task import IGNORED, task_losses, trimmed

    draw = torch.Generator().manual_seed(0)
    logits, y = torch.randn(2, 6, 9, generator=draw), torch.randint(0, 9, (2, 6), generator=draw)
    y[0, 3:] = IGNORED
    alone = task_losses(logits[:1, :3], y[:1, :3])
    assert torch.equal(task_losses(logits, y)[:1], alone)
    labels, part = trimmed(y[:1], logits[:1])
    assert labels.shape == (1, 3)
    assert torch.equal(task_losses(part, labels), alone)


def test_over_the_wire_a_tokenizer_is_a_name_and_never_a_path() -> None:
    from fedfuse.config.allowed import check_texts
    from fedfuse.errors import Refused

    check_texts({"data": {"extra": {"tokenizer": "bytes", "length": 8, "long": "cut"}}})
    for said in ("models", "/etc", "bytes2", "../bytes"):
        with pytest.raises(Refused, match=r"data\.extra\.tokenizer"):
            check_texts({"data": {"extra": {"tokenizer": said}}})
    for key in ("path", "dtype"):
        with pytest.raises(Refused, match=rf"model\.{key}"):
            check_texts({"model": {key: "/etc/passwd"}})


def test_packed_texts_are_learned_as_they_are_one_by_one_and_an_example_stays_an_example(folder: Path) -> None:
    words = (RANK, "train.optimizer=sgd", "rounds=1", "evaluate.every=1")
    apart = play("fedit", *words, base=base(folder, "causal"))
    packed = play("fedit", *words, "data.packing=true", base=base(folder, "causal"))
    assert packed.digest != apart.digest  # other sums, of the same terms
    for one, other in zip(apart.strategy.board.items.values(), packed.strategy.board.items.values(), strict=True):
        for key in one.arrays:
            assert (one.arrays[key] - other.arrays[key]).abs().max() < 1e-5, key
    sizes = packed.federation.scenario.data.sizes()
    assert (sizes == apart.federation.scenario.data.sizes()).all()  # examples are dealt, not rows
    private = ("data.packing=true", RANK, "privacy.noise=1", "rounds=1")
    pytest.importorskip("opacus", reason="the extra `privacy` is not installed")
    with pytest.raises(UserError, match=r"data.packing=true: gradients by example need a text a row; allowed: false"):
        play("fedit", *private, base=base(folder, "causal"))


def test_where_packing_would_do_nothing_it_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"data\.packing=true does nothing here: it goes with data\.layout=text"):
        compose(("data=jsonl", "data.packing=true"))
    with pytest.raises(UserError, match=r"data\.packing=true: model=text_classifier takes a row for one text"):
        play("fedit", RANK, "data.packing=true", "model=text_classifier", base=base(folder, "causal"))
