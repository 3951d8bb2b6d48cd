"""Texts of unequal lengths in one batch are as the texts one by one, whatever the architecture."""

from __future__ import annotations

import pytest
import torch

from fedfuse.config.schema import ModelConfig
from fedfuse.errors import UserError
from fedfuse.train.scores import scored
from fedfuse.train.task import IGNORED, task_loss

transformers = pytest.importorskip("transformers", reason="the extra `lm` is not installed")

from fedfuse.models.language import attended, build  # noqa: E402

SIZE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32}
LLAMA = {**SIZE, "vocab_size": 50, "intermediate_size": 40, "num_key_value_heads": 2}
CONFIGS = {
    "qwen2": lambda: transformers.Qwen2Config(**LLAMA),  # names no padding token
    "llama": lambda: transformers.LlamaConfig(**LLAMA),
    "smollm2": lambda: transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True, pad_token_id=2, eos_token_id=2),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=50, n_positions=32, n_embd=24, n_layer=2, n_head=4,
                                            bos_token_id=49, eos_token_id=49),  # padded by its end of text
    "bert": lambda: transformers.BertConfig(vocab_size=50, intermediate_size=40, **SIZE),
}  # fmt: skip
PADS = {"qwen2": 0, "llama": 0, "smollm2": 2, "gpt2": 49, "bert": 0}
TEXTS = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15], [16, 2, 0, 17, 49]]  # padding tokens inside a text are its own
CAUSAL = ["qwen2", "llama", "smollm2", "gpt2"]


def batch(pad: int, length: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.full((len(TEXTS), length), pad)
    y = torch.full_like(x, IGNORED)
    for i, text in enumerate(TEXTS):
        x[i, : len(text)] = y[i, : len(text)] = torch.tensor(text)
    return x, y


@pytest.fixture
def built(tmp_path):
    def make(shape: str, name: str, **more):
        torch.manual_seed(0)
        config = CONFIGS[shape]()
        kind = transformers.AutoModelForCausalLM if name == "causal_lm" else (
            transformers.AutoModelForSequenceClassification)  # fmt: skip
        config.num_labels = 3
        kind.from_config(config).save_pretrained(tmp_path / shape)
        return build(name, (9,), 50 if name == "causal_lm" else 3,
                     ModelConfig(path=str(tmp_path / shape), **more), PADS[shape])  # fmt: skip

    return make


@pytest.mark.parametrize("shape", CONFIGS)
def test_a_class_does_not_depend_on_the_batch(shape: str, built) -> None:
    model = built(shape, "text_classifier").double().eval()
    assert model.model.config.pad_token_id == PADS[shape]
    x, _ = batch(PADS[shape])
    with torch.no_grad():
        together = model(x)
        alone = torch.cat([model(torch.tensor([text])) for text in TEXTS])
        own = model.model(input_ids=torch.tensor(TEXTS[:1])).logits  # as transformers has it, for one text
    assert together.shape == (4, 3)
    assert (together - alone).abs().max() < 1e-6  # outputs are float32
    assert (alone[:1] - own).abs().max() < 1e-6
    x[0, 0] = 20
    assert not torch.equal(model(x)[0], together[0])  # a text's own tokens count


@pytest.mark.parametrize("shape", CAUSAL)
def test_next_tokens_loss_and_gradient_do_not_depend_on_the_batch(shape: str, built) -> None:
    model = built(shape, "causal_lm").double().eval()
    x, y = batch(PADS[shape])
    together = model(x)
    losses = []
    for i, text in enumerate(TEXTS):
        alone = torch.tensor([text])
        logits = model(alone)
        assert (logits - together[i : i + 1, : len(text)]).abs().max() < 1e-6
        losses.append(task_loss(logits.double(), alone) * (len(text) - 1) if len(text) > 1 else 0.0)
    places = sum(len(text) - 1 for text in TEXTS)
    assert abs(task_loss(together.double(), y) - sum(losses) / places) < 1e-6
    other = x.clone()
    other[y == IGNORED] = 33  # whatever fills the end
    assert torch.equal(task_loss(model(other).double(), y), task_loss(together.double(), y))
    grads = [torch.autograd.grad(task_loss(model(part).double(), y), [*model.parameters()][2]) for part in (x, other)]
    assert torch.equal(*(g for (g,) in grads))
    few = scored(lambda part: model(part).detach(), x, y, 50, 7)
    assert abs(few["loss"] - task_loss(together.double(), y).item()) < 1e-6  # places left out count nowhere


def test_only_the_end_is_padding() -> None:
    x = torch.tensor([[1, 0, 2, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1]])
    assert attended(x, 0).tolist() == [[True] * 3 + [False] * 2, [True] + [False] * 4, [True] * 5]


def test_a_padding_token_that_the_model_does_not_know(built) -> None:
    with pytest.raises(UserError, match="the data are padded by token 50, the model knows 50"):
        build("causal_lm", (9,), 50, ModelConfig(), 50)


@pytest.mark.parametrize("shape", ["qwen2", "bert"])
def test_a_base_in_bf16_keeps_its_head_in_float32(shape: str, built) -> None:
    model = built(shape, "text_classifier", dtype="bf16").eval()
    dtypes = {name.split(".")[1]: p.dtype for name, p in model.named_parameters()}
    assert dtypes.pop("score" if shape == "qwen2" else "classifier") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}
    x, _ = batch(PADS[shape])
    found = model(x)
    assert found.dtype == torch.float32 and (found - built(shape, "text_classifier").eval()(x)).abs().max() < 0.05
    with pytest.raises(UserError, match="model.dtype='half' is not known"):
        built(shape, "text_classifier", dtype="half")


def test_gradient_checkpointing_gives_the_same_gradient(built) -> None:
    x, y = batch(0)
    grads = []
    for again in (False, True):
        model = built("llama", "causal_lm", gradient_checkpointing=again).train()
        task_loss(model(x), y).backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))
