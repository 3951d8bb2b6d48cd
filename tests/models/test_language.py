"""Hugging Face models from local directories, tokenised text, and federated language modelling."""

from __future__ import annotations

import gzip
import json
import math
import os
from pathlib import Path

import pytest
import torch

from fedfuse.config.schema import ModelConfig
from fedfuse.errors import UserError
from fedfuse.train.scores import scored, scores
from fedfuse.train.task import IGNORED, check_order, task_loss

transformers = pytest.importorskip("transformers", reason="the extra `lm` is not installed")

from fedfuse.data.tokenize import Tokenizer, windows  # noqa: E402
from fedfuse.models.from_directory import halves  # noqa: E402
from fedfuse.models.language import build  # noqa: E402

SHARED = Path(os.environ.get("FEDFUSE_DATA", Path(__file__).parents[2] / ".." / "shared" / "data")).parent
STORIES = SHARED / "models" / "stories260K"
SHAKESPEARE = SHARED / "data" / "tiny_shakespeare"
needs_stories = pytest.mark.skipif(
    not (STORIES.exists() and SHAKESPEARE.exists()), reason="no stories260K and tiny_shakespeare beside the project"
)


def test_next_token_loss_shifts_by_one_and_ignores_padding() -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 5, generator=draw, dtype=torch.float64)
    labels = torch.tensor([[1, 2, 3, 4], [0, 1, IGNORED, IGNORED]])
    log = logits.log_softmax(-1)
    want = -(log[0, 0, 2] + log[0, 1, 3] + log[0, 2, 4] + log[1, 0, 1]) / 4
    assert abs(task_loss(logits, labels) - want) < 1e-12
    found = scored(lambda x: logits[x[:, 0]], torch.tensor([[0], [1]]), labels, 5)
    assert abs(found["loss"] - want.item()) < 1e-9
    assert abs(found["perplexity"] - math.exp(want)) < 1e-6


def test_scoring_classes_is_as_it_was() -> None:
    logits, y = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    assert scored(lambda x: logits, torch.zeros(6, 2), y, 3) == scores(logits, y, 3)


def test_next_tokens_that_are_no_numbers_are_wrong_and_said() -> None:
    """torch's argmax names the first NaN; -inf is a token that the model excludes, and a number."""
    tokens = torch.zeros(4, 3, dtype=torch.int64)
    logits = torch.tensor([0.0, -1.0, -torch.inf]).repeat(4, 3, 1)
    logits[1, :2], logits[2, 0, 1], logits[3, 2] = torch.nan, torch.inf, torch.nan  # the last place predicts nothing
    found = scored(lambda x: logits[: len(x)], tokens, tokens, 3)
    assert (found["accuracy"], found["undefined"]) == (5 / 8, 3 / 8)
    assert "undefined" not in scored(lambda x: logits[:1], tokens[:1], tokens[:1], 3)


def test_small_models_and_their_shapes() -> None:
    x = torch.tensor([[3, 4, 5, 0], [6, 7, 0, 0]])
    causal = build("causal_lm", (4,), 20, ModelConfig())
    assert causal(x).shape == (2, 4, 20)
    texts = build("text_classifier", (4,), 3, ModelConfig()).eval()
    assert texts(x).shape == (2, 3)
    longer = torch.cat([x, torch.zeros(2, 5, dtype=torch.int64)], 1)
    with torch.no_grad():
        assert torch.allclose(texts(x), texts(longer), atol=1e-5)  # padding is not attended to


def test_a_small_classifier_reads_beyond_the_first_token() -> None:
    """With BERT's spread, of a width of 768, all that followed moved its logits by 5e-5, and dropout by 3e-2."""
    torch.manual_seed(0)
    texts = build("text_classifier", (16,), 2, ModelConfig())
    x = torch.randint(1, 1000, (100, 16))
    x[:, 0] = 7
    with torch.no_grad():
        logits = texts(x)
        assert logits.std(0).min() > 0.01
        assert torch.equal(logits, texts(x))


def test_what_bad_models_get(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.path=.* is not a directory"):
        build("causal_lm", (8,), 20, ModelConfig(path=str(tmp_path / "no")))
    with pytest.raises(UserError, match=r"expected config.json"):
        build("causal_lm", (8,), 20, ModelConfig(path=str(tmp_path)))
    with pytest.raises(UserError, match="reads tokens"):
        build("causal_lm", (1, 8, 8), 20, ModelConfig())
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded as causal_lm"):
        build("causal_lm", (8,), 20, ModelConfig(path=str(tmp_path)))


def test_a_saved_model_comes_back_and_has_bounds(tmp_path: Path) -> None:
    first = build("causal_lm", (8,), 20, ModelConfig())
    first.model.save_pretrained(tmp_path)
    again = build("causal_lm", (8,), 20, ModelConfig(path=str(tmp_path)))
    x = torch.randint(0, 20, (2, 8))
    assert torch.allclose(first(x), again(x))
    with pytest.raises(UserError, match="exceed the model's context of 64"):
        build("causal_lm", (65,), 20, ModelConfig(path=str(tmp_path)))
    with pytest.raises(UserError, match="the model knows 20"):
        build("causal_lm", (8,), 21, ModelConfig(path=str(tmp_path)))


@pytest.mark.parametrize("name", ["causal_lm", "text_classifier"])
@pytest.mark.parametrize(("change", "said"), [
    (lambda w: {k: v for k, v in w.items() if "layers.1." not in k}, "it lacks 9 of the model's weights"),
    (lambda w: {f"module.{k}": v for k, v in w.items()}, "it lacks"),
    (lambda w: w | {"model.norm.weight": w["model.norm.weight"][:5]}, r"model.norm.weight is \(5,\) there"),
    (lambda w: w | {"model.norm.weight": w["model.norm.weight"] * float("nan")}, "model.norm.weight holds what is no"),
])  # fmt: skip
def test_a_directory_that_lacks_weights_is_refused_and_not_filled_by_chance(change, said, name, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    build("causal_lm", (8,), 20, ModelConfig()).model.save_pretrained(tmp_path)
    build(name, (8,), 20, ModelConfig(path=str(tmp_path)))  # a classifier's own head may be missing
    file = tmp_path / "model.safetensors"
    changed = {key: value.contiguous() for key, value in change(load_file(file)).items()}
    save_file(changed, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"model\.path=.* cannot be loaded as {name}: {said}"):
        build(name, (8,), 20, ModelConfig(path=str(tmp_path)))


def test_a_model_that_reads_what_it_is_to_predict_is_refused() -> None:
    class Both(torch.nn.Module):
        def __init__(self, ahead: float) -> None:
            super().__init__()
            self.table, self.ahead = torch.nn.Embedding(20, 20), ahead

        def forward(self, x):
            z = self.table(x)
            return z.cumsum(1) + self.ahead * z.mean(1, keepdim=True)

    for length in (1, 2, 5, 64):
        check_order(Both(0.0), "custom", length, 20)
    for length in (2, 5, 64):
        with pytest.raises(UserError, match="model=custom reads the tokens that it is to predict"):
            check_order(Both(0.1), "custom", length, 20)


@pytest.mark.parametrize(("file", "key", "value", "said"), [
    ("model.safetensors.index.json", "weight_map", {"lm_head.weight": "../other.safetensors"}, "no file of this"),
    ("adapter_config.json", "base_model_name_or_path", "/other", "a base of its own"),
    ("config.json", "attn_implementation", "somebody/code", "code of a hub"),
    ("config.json", "text_config", {"_attn_implementation": "somebody/code"}, "code of a hub"),
])  # fmt: skip
def test_a_model_directory_leads_to_nothing_elsewhere(
    file: str, key: str, value: object, said: str, tmp_path: Path
) -> None:
    build("causal_lm", (8,), 20, ModelConfig()).model.save_pretrained(tmp_path)
    path = tmp_path / file
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), key: value}))
    with pytest.raises(UserError, match=said):
        build("causal_lm", (8,), 20, ModelConfig(path=str(tmp_path)))


def test_nobody_is_asked_whether_code_beside_a_tokenizer_may_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedfuse.runs.hand_over import _copy_tokenizer

    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(tmp_path / "a.gguf"), "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", "a"])
    writer.add_token_scores([0.0] * 4)
    writer.add_token_types([2, 3, 3, 1])
    for add in (writer.add_block_count, writer.add_context_length, writer.add_embedding_length, writer.add_head_count):
        add(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    names = {"auto_map": {"AutoTokenizer": ["own.T", "own.T"]}, "tokenizer_class": "T"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    (tmp_path / "own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast as T\n"
    )
    monkeypatch.setattr("builtins.input", lambda prompt="": "y")  # who sits there is tired
    with pytest.raises(UserError, match="cannot be read"):
        Tokenizer(str(tmp_path))
    (tmp_path / "to").mkdir()
    _copy_tokenizer(tmp_path, tmp_path / "to")
    assert not (tmp_path / "ran").exists()


def test_rotary_halves() -> None:
    weight = torch.arange(8.0)[:, None]  # two heads of four rows, pairs (0, 1), (2, 3)
    assert halves(weight, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@needs_stories
def test_stories_tell_what_they_told() -> None:
    model = build("causal_lm", (64,), 512, ModelConfig(path=str(STORIES))).eval()
    tokens = torch.tensor([[1]])
    with torch.no_grad():
        for _ in range(16):
            tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
    tokenizer = Tokenizer(str(STORIES))
    text = "".join(tokenizer.names[i] for i in tokens[0, 1:]).replace("▁", " ").strip()
    assert text.startswith("Once upon a time, there was a little girl named Lily.")
    assert tokenizer.ids(["Once upon a time"])[0] == tokens[0, 1:5].tolist()


def roles(folder: Path) -> Path:
    with gzip.open(folder / "roles.jsonl.gz", "wt", encoding="utf-8") as file:
        for role, word in (("A", "the cat "), ("B", "the dog "), ("C", "a bird "), ("D", "x")):
            file.write(json.dumps({"role": role, "lines": [word * 40] * 4 if word != "x" else ["x"]}) + "\n")
    return folder


def tokenizer(folder: Path) -> Path:
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=60, special_tokens=["<pad>", "<unk>"], show_progress=False)
    made.train_from_iterator(["the cat the dog a bird"] * 4, trainer)
    made.save(str(folder / "tokenizer.json"))
    return folder


def lm(folder: Path, *more: str) -> tuple[str, ...]:
    return (
        "data=tiny_shakespeare", f"data.root={roles(folder)}", f"+data.extra.tokenizer={tokenizer(folder)}",
        "+data.extra.length=8", "partition=natural", "model=causal_lm", "runtime=inline", "rounds=3", "transfer.size=4",
        "train.batch_size=8", "train.optimizer=adamw", "train.lr=0.02", *more,
    )  # fmt: skip


def test_windows_of_roles_count_the_bytes_they_predict(tmp_path: Path) -> None:
    made = Tokenizer(str(tokenizer(tmp_path)))
    texts = ["the cat", "dög the", "a bird the dog"]
    found, counts = windows(made, texts, 3)
    joined = [token for ids in made.ids(texts, special=False) for token in ids]
    assert found.ravel().tolist() == joined[: len(joined) // 3 * 3]
    sizes = [after - before for _, ends in made.spans(texts) for before, after in zip([0, *ends], ends, strict=False)]
    assert sum(sizes) == sum(len(text.encode()) for text in texts)  # ö has two
    assert counts.tolist() == [sizes[i + 1] + sizes[i + 2] for i in range(0, len(joined) // 3 * 3, 3)]
    from tests.federations import federation

    with federation("fedavg", base=lm(tmp_path)) as (built, _):
        data = built.scenario.data
    assert data.byte_count("train", 0) > 7 * len(data.dataset.train.inputs) / 3


def test_roles_are_read_as_bytes_where_no_tokenizer_is_at_hand(tmp_path: Path) -> None:
    from tests.federations import federation

    base = (*lm(tmp_path), "data.extra.tokenizer=bytes")
    with federation("fedavg", base=base) as (built, _):
        data = built.scenario.data
        assert data.dataset.utf8
        assert len(data.dataset.classes) == 256
        plays = gzip.decompress((tmp_path / "roles.jsonl.gz").read_bytes()).splitlines()
        spoken = ["".join(json.loads(play)["lines"]).encode() for play in plays]
        rows = [bytes(row) for row in data.dataset.train.inputs.tolist()]
        assert rows
        assert all(any(said[i : i + 8] == row for said in spoken for i in range(0, len(said), 8)) for row in rows)
        assert data.byte_count("train", 0) == 7 * len(data.rows_of(0, "train"))
        built.run()
    assert math.isfinite(built.history[-1]["accuracy/global"])


@pytest.mark.parametrize("name", ["fed_sb", "fedex_lora", "fedavg"])
def test_federated_language_modelling_on_a_small_model(name: str, tmp_path: Path) -> None:
    from tests.federations import play

    rank = () if name == "fedavg" else ("strategy.rank=8",)
    played = play(name, *rank, base=lm(tmp_path))
    assert played.federation.scenario.clients == 3  # role D has too little to say
    history = [h["accuracy/global"] for h in played.federation.history]
    assert history[-1] > (history[0] if name == "fedavg" else 0)
    assert play(name, *rank, base=lm(tmp_path), grid="serial").digest == played.digest
    arrays = [k for item in played.strategy.board.items.values() for k in item.arrays]
    assert name == "fedavg" or not any(k.endswith("base.weight") or "embed" in k for k in arrays)


def test_roles_need_a_tokenizer_and_words(tmp_path: Path) -> None:
    from tests.federations import scenario_of

    base = lm(tmp_path)
    with pytest.raises(UserError, match=r"data.extra.tokenizer=nowhere is not a directory"):
        scenario_of(
            (
                *(w for w in base if not w.startswith("+data.extra.tokenizer")),
                "strategy=fed_sb",
                "+data.extra.tokenizer=nowhere",
            )
        )
    with pytest.raises(UserError, match="no role has 500 windows"):
        scenario_of((*base, "strategy=fed_sb", "+data.extra.least=500"))


def loss_of(strategy, classes: int) -> float:
    """Next-token loss of the server's model on the global test set."""
    x, y = strategy.workspace.tensors("test")
    architecture, arrays = strategy.server_models()["model"]
    model = strategy.workspace.loaded(architecture, arrays)
    return scored(lambda part: strategy.predict(model, part, 64), x, y, classes)["loss"]


@pytest.mark.parametrize("seed", range(3))
def test_fed_sb_on_language_improves_and_resumes_to_the_same_bits(seed: int, tmp_path: Path) -> None:
    from tests.contract.test_matrix import Crash
    from tests.federations import federation, play

    words, base = ("strategy.rank=8", "rounds=2", f"seed={seed}"), lm(tmp_path)
    with federation("fed_sb", *words, base=base) as (built, _):
        built.strategy.ensure_begun()
        before = loss_of(built.strategy, 60)
        built.run()
        assert loss_of(built.strategy, 60) < before
    crashed = federation("fed_sb", *words, base=base, path=tmp_path / "run", callbacks=(Crash(1),))
    with crashed as (again, _), pytest.raises(KeyboardInterrupt):
        again.run()
    assert play("fed_sb", *words, base=base, path=tmp_path / "run").digest == built.digest


def test_fed_sb_on_language_gives_the_same_bits_on_workers(tmp_path: Path, ray_session) -> None:
    from tests.federations import play

    words = ("strategy.rank=8", "rounds=1")
    assert (
        play("fed_sb", *words, base=lm(tmp_path), grid="ray").digest == play("fed_sb", *words, base=lm(tmp_path)).digest
    )


def test_no_text_at_all_has_no_logits() -> None:
    none = torch.zeros(0, 4, dtype=torch.int64)
    assert build("causal_lm", (4,), 20, ModelConfig())(none).shape == (0, 4, 20)
    assert build("text_classifier", (4,), 3, ModelConfig())(none).shape == (0, 3)


@needs_stories
@pytest.mark.parametrize("seed", [0, 1])
def test_fed_sb_improves_stories_on_shakespeare(seed: int) -> None:
    from tests.federations import federation

    base = (
        "data=tiny_shakespeare", f"data.root={SHAKESPEARE}", f"+data.extra.tokenizer={STORIES}",
        "+data.extra.length=32",
        "+data.extra.roles=4", "+data.extra.least=20", "partition=natural", "model=causal_lm", f"model.path={STORIES}",
        "data.limit=200", "data.test_limit=40", "runtime=inline", "train.batch_size=16", "train.optimizer=adamw",
        "train.lr=0.005", "rounds=2", "transfer.size=4", "strategy.rank=16",
    )  # fmt: skip
    with federation("fed_sb", f"seed={seed}", base=base) as (built, _):
        built.strategy.ensure_begun()
        before = loss_of(built.strategy, 512)
        built.run()
        assert loss_of(built.strategy, 512) < before - 0.05
