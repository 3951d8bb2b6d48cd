"""A base in 8 or 4 bits: what transformers is told, what adapters do on it, and where it is refused."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fedfuse.config.compose import compose
from fedfuse.config.schema import ModelConfig
from fedfuse.core.fit import _check_precision
from fedfuse.errors import UserError
from fedfuse.train.adapters import LoRA, inject, merge, peft_state

transformers = pytest.importorskip("transformers", reason="the extra `lm` is not installed")

from fedfuse.models.language import build  # noqa: E402

HAS_BITS = importlib.util.find_spec("bitsandbytes") is not None
needs_gpu = pytest.mark.skipif(
    not (HAS_BITS and torch.cuda.is_available()), reason="needs a GPU and bitsandbytes, and here is not both"
)


def tiny() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


class Packed(nn.Linear):
    """As bitsandbytes' layers are: a linear layer whose weight is bytes in a shape of their own."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__(like.in_features, like.out_features, bias=False)
        self.scale = like.weight.detach().abs().max() / 127
        whole = (like.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(whole.reshape(-1, 1), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.scale * self.weight.view(self.out_features, -1).float()).T


Packed.__module__ = "bitsandbytes.nn.modules"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A machine that seems to have a GPU and bitsandbytes; what models are asked for with."""
    asked: list[dict[str, Any]] = []

    def given(path, **options):
        asked.append(options)
        model = tiny()
        for layer in model.model.layers:
            layer.self_attn.q_proj = Packed(layer.self_attn.q_proj)
        return model, {"missing_keys": set(), "mismatched_keys": set()}

    known = importlib.util.find_spec
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name == "bitsandbytes" else known(name))
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", given)
    return asked


def test_what_transformers_is_told(gpu, tmp_path) -> None:
    (tmp_path / "config.json").write_text("{}")
    build("causal_lm", (8,), 64, ModelConfig(path=str(tmp_path), quantize="4bit", dtype="bf16"))
    build("causal_lm", (8,), 64, ModelConfig(path=str(tmp_path), quantize="8bit"))
    build("causal_lm", (8,), 64, ModelConfig(path=str(tmp_path)))
    four, eight, plain = gpu
    bits = four["quantization_config"]
    assert {"lm_head", "score", "classifier"} <= set(bits.llm_int8_skip_modules)
    assert (bits.load_in_4bit, bits.load_in_8bit) == (True, False)
    assert (bits.bnb_4bit_quant_type, bits.bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)
    assert bits.bnb_4bit_use_double_quant
    assert four["device_map"] == eight["device_map"] == {"": 3}
    assert (four["dtype"], eight["dtype"]) == (torch.bfloat16, torch.float32)
    bits = eight["quantization_config"]
    assert (bits.load_in_4bit, bits.load_in_8bit) == (False, True)
    assert not {"quantization_config", "device_map", "dtype"} & set(plain)
    assert (plain["local_files_only"], plain["trust_remote_code"]) == (True, False)
    assert not four["trust_remote_code"]


def test_adapters_over_packed_weights(gpu, tmp_path) -> None:
    (tmp_path / "config.json").write_text("{}")
    model = build("causal_lm", (8,), 64, ModelConfig(path=str(tmp_path), quantize="4bit"))
    before = model(torch.arange(8)[None]).detach()
    inject(model, LoRA, "q_proj", rank=2, scale=1.0, delta=True)
    layer = model.model.model.layers[0].self_attn.q_proj
    assert (layer.outputs, layer.inputs) == (64, 64)
    assert layer.delta.dtype == torch.float32
    assert torch.equal(model(torch.arange(8)[None]), before)  # B is zero
    with torch.no_grad():
        layer.lora_B.weight.normal_()
        layer.delta.normal_()
    x = torch.randn(3, 64)
    want = layer.base(x) + x @ layer.delta.T + x @ layer.lora_A.weight.T @ layer.lora_B.weight.T
    assert torch.allclose(layer(x), want, atol=1e-5)
    model(torch.arange(8)[None]).sum().backward()
    assert layer.lora_A.weight.grad.abs().sum() > 0
    assert layer.base.weight.grad is None
    layer.delta.zero_()
    assert len(peft_state(model)[0]) == 2
    with pytest.raises(UserError, match="the base's weights are asked for, which it keeps packed; allowed here: none"):
        merge(model)


def test_where_there_is_no_gpu_no_package_or_no_directory_it_is_refused(tmp_path, gpu, monkeypatch) -> None:
    with pytest.raises(UserError, match=r"model\.quantize: model\.path=.* has no config\.json"):
        build("causal_lm", (8,), 64, ModelConfig(path=str(tmp_path), quantize="4bit"))
    with pytest.raises(UserError, match=r"model\.quantize=4bit: there is no model\.path to quantise"):
        build("causal_lm", (8,), 64, ModelConfig(quantize="4bit"))
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else known(name))
    with pytest.raises(UserError, match=r"model\.quantize=8bit needs bitsandbytes: pip install bitsandbytes$"):
        build("causal_lm", (8,), 64, ModelConfig(path=str(tmp_path), quantize="8bit"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"model\.quantize=4bit needs a GPU, and there is none; allowed here: none$"):
        build("causal_lm", (8,), 64, ModelConfig(path=str(tmp_path), quantize="4bit"))
    with pytest.raises(UserError, match=r"model\.quantize=2bit"):
        compose(("model=hf", "model.path=x", "model.quantize=2bit"))
    with pytest.raises(UserError, match=r"model\.quantize=4bit does nothing here: it goes with model=hf"):
        compose(("model.quantize=4bit",))
    other = nn.Linear(4, 4)
    other.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UserError, match="the weight is quantised"):
        LoRA(other, 2, 1.0)


def test_a_strategy_that_trains_the_base_is_refused() -> None:
    words = ("data=sst2", "model=hf", "model.path=x", "model.quantize=4bit")
    model = nn.Linear(2, 2)
    for more, right in ((("strategy=fedit",), True), (("strategy=fedavg",), False)):
        stub: Any = SimpleNamespace(scenario=SimpleNamespace(config=compose((*words, *more))), name="fedavg")
        if right:
            _check_precision(stub, model)
            continue
        with pytest.raises(UserError, match=r"model\.quantize=4bit: strategy=fedavg trains the base; allowed"):
            _check_precision(stub, model)
        stub.scenario.config.model.lora_rank = 4
        _check_precision(stub, model)


@needs_gpu
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_quantised_model_learns_by_its_adapters(bits, tmp_path) -> None:
    tiny().save_pretrained(tmp_path)
    model = build("causal_lm", (8,), 64, ModelConfig(path=str(tmp_path), quantize=bits))
    inject(model, LoRA, "q_proj,v_proj", rank=2, scale=1.0)
    model = model.to("cuda")
    x = torch.arange(8, device="cuda")[None]
    whole = tiny().to("cuda")(x).logits
    assert (model(x) - whole).abs().max() < 0.2 * whole.abs().max()
    trained = [p for p in model.parameters() if p.requires_grad]
    step = torch.optim.AdamW(trained, lr=0.05)
    losses = []
    for _ in range(20):
        value = nn.functional.cross_entropy(model(x)[0, :-1], x[0, 1:])
        step.zero_grad()
        value.backward()
        step.step()
        losses.append(value.item())
    assert losses[-1] < losses[0]
