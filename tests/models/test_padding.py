"""Texts of unequal lengths in one batch are as the texts one by one, whatever the architecture."""

from __future__ import annotations

import pytest
import torch

from fedfuse.config.schema import ModelConfig
from fedfuse.errors import UserError
from fedfuse.train.batch import backward
from fedfuse.train.packed import check, packed
from fedfuse.train.scores import scored
from fedfuse.train.task import IGNORED, task_loss, task_step

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
    assert found.dtype == torch.float32
    assert (found - built(shape, "text_classifier").eval()(x)).abs().max() < 0.05
    with pytest.raises(UserError, match=r"model.dtype='half' is not known"):
        built(shape, "text_classifier", dtype="half")


def test_gradient_checkpointing_gives_the_same_gradient(built) -> None:
    x, y = batch(0)
    grads = []
    for again in (False, True):
        model = built("llama", "causal_lm", gradient_checkpointing=again).train()
        task_loss(model(x), y).backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def prompted() -> tuple[torch.Tensor, torch.Tensor]:
    """A batch whose first and fourth text begin with prompts, and whose last has nothing to learn."""
    x, y = batch(0)
    more = torch.tensor([[18, 19] + [0] * 7])
    x = torch.cat([x, more, x[:1]])
    y = torch.cat([y, more.masked_fill(more == 0, IGNORED), torch.full_like(y[:1], IGNORED)])
    y[0, :3] = y[3, :2] = IGNORED
    return x, y


@pytest.mark.parametrize("shape", CAUSAL)
def test_texts_packed_into_rows_have_the_loss_and_the_gradient_of_the_texts_one_by_one(shape: str, built) -> None:
    model = built(shape, "causal_lm").double().eval()
    x, y = prompted()
    rows, labels = packed(x, y)
    assert labels.shape == (3, 7)  # of six texts, with 7, 1, 3, 5, 2 tokens and none to read: 7, 5 + 2 and 3
    assert int((labels[:, 1:] != IGNORED).sum()) == int((y[:, 1:] != IGNORED).sum()) == 4 + 2 + 3 + 1
    learned, places = [p for p in model.parameters() if p.requires_grad], 0
    total = [torch.zeros_like(p) for p in learned]
    alone = 0.0
    for i, text in enumerate([*TEXTS, [18, 19]]):
        wanted = y[i : i + 1, : len(text)]
        count = int((wanted[:, 1:] != IGNORED).sum())
        if count:
            loss = task_loss(model(torch.tensor([text])).double(), wanted) * count
            total = [t + g for t, g in zip(total, torch.autograd.grad(loss, learned), strict=True)]
            alone, places = alone + loss.item(), places + count
    for micro in (None, 2):
        model.zero_grad()
        found = backward(model, task_step, (x, y, torch.arange(6)), micro, trim=True, pack=True)
        assert abs(found.item() - alone / places) < 1e-6  # logits are float32
        assert max((p.grad - t / places).abs().max().item() for p, t in zip(learned, total, strict=True)) < 1e-6
    # whatever stands in another text of the row changes no logit of this one
    first, other = model(rows), rows.clone()
    other[1, 0, :5] = 33  # the longer of two texts
    assert torch.equal(model(other)[1, 5:], first[1, 5:])
    assert not torch.equal(model(other)[1, :5], first[1, :5])
    check(model, shape, 50)


def test_what_stands_where_in_packed_rows() -> None:
    x = torch.tensor([[11, 12, 0, 0], [21, 22, 23, 24], [31, 32, 0, 0], [41, 0, 0, 0]])
    y = torch.tensor([[11, 12, -100, -100], [21, -100, 23, 24], [-100, 32, -100, -100], [-100] * 4])
    rows, labels = packed(x, y)
    assert rows[:, 0].tolist() == [[21, 22, 23, 24], [11, 12, 31, 32]]
    assert rows[:, 1].tolist() == [[0, 1, 2, 3], [0, 1, 0, 1]]
    assert labels.tolist() == [[-100, -100, 23, 24], [-100, 12, -100, 32]]
    rows, labels = packed(x[:3:2, :3], y[:3:2, :3])  # as long as the longest, and no longer
    assert rows.shape == (2, 2, 2)
    three = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]])
    rows, labels = packed(three, torch.where(three == 0, -100, three))
    assert rows[1].tolist() == [[6, 7, 8, 1, 1], [0, 1, 2, 0, 1]]  # what fills the end is a text of its own
    assert labels[1].tolist() == [-100, 7, 8, -100, -100]
    nothing, none = packed(x, torch.full_like(y, -100))
    assert nothing[:, 0].tolist() == x.tolist()
    assert bool((none == -100).all())


def test_a_model_that_looks_across_texts_is_refused() -> None:
    class Running(torch.nn.Module):
        packs = True

        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(50, 50)

        def forward(self, x):
            return self.table(x[:, 0] if x.ndim == 3 else x).cumsum(1)

    with pytest.raises(UserError, match=r"data.packing=true: model=custom looks across the texts of a row; allowed"):
        check(Running(), "custom", 50)
    Running.packs = False
    with pytest.raises(UserError, match=r"data.packing=true: model=custom takes a row for one text; allowed: false"):
        check(Running(), "custom", 50)


@pytest.mark.parametrize(("leak", "refused"), [(0.005, False), (0.015, True)])
def test_how_much_a_model_may_look_across_is_told_by_its_greatest_logit(leak: float, refused: bool) -> None:
    """Half precision rounds by less than a hundredth; what is more is another text's doing."""

    class Leaking(torch.nn.Module):
        packs = True

        def __init__(self) -> None:
            super().__init__()
            self.one = torch.nn.Parameter(torch.tensor(200.0))

        def forward(self, x):
            out = torch.ones(len(x), x.shape[-1], 2) * torch.stack([self.one, self.one / 1000])
            if x.ndim == 3:
                out[:, -1, 0] += leak * self.one
            return out

    if refused:
        with pytest.raises(UserError, match="looks across"):
            check(Leaking(), "custom", 50)
    else:
        check(Leaking(), "custom", 50)
