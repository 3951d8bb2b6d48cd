"""Adapter layers and bases, in float64 where a closed form exists."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fedfuse.errors import UserError
from fedfuse.train.adapters import LoRA, LoRASB, adapted, inject, merge, peft_state, targets
from fedfuse.train.basis import (
    INITS,
    basis_in,
    basis_of,
    basis_sha,
    check_basis,
    energy,
    first_step,
    gradients,
    leading,
)


class Conv1D(nn.Module):
    """Hugging Face's linear layer: the weight is k × d."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.nf = outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * 0.1)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), Conv1D(5, 11), nn.Tanh(), nn.Linear(11, 3))


def filled(layer, **options):
    model = inject(net().double(), layer, rank=3, scale=0.5, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    return model


@pytest.mark.parametrize("layer", [LoRA, LoRASB])
def test_forward_equals_the_merged_weight_on_layers_that_are_not_square(layer) -> None:
    model = filled(layer)
    x = torch.randn(6, 7, dtype=torch.float64)
    plain = net().double()
    for name, module in adapted(model).items():
        target = plain.get_submodule(name)
        with torch.no_grad():
            delta = module.update()
            target.weight.add_(delta if isinstance(target, nn.Linear) else delta.T)
    assert torch.allclose(model(x), plain(x), atol=1e-12)


@pytest.mark.parametrize("layer", [LoRA, LoRASB])
def test_merge(layer) -> None:
    model = filled(layer, delta=True)
    with torch.no_grad():
        for module in adapted(model).values():
            module.delta.normal_()
    x = torch.randn(6, 7, dtype=torch.float64)
    want = model(x)
    plain = merge(model)
    assert not adapted(plain)
    assert torch.allclose(plain(x), want, atol=1e-12)


def test_adapters_start_as_the_base() -> None:
    x = torch.randn(4, 7)
    for layer in (LoRA, LoRASB):
        assert torch.equal(inject(net(), layer, rank=2, scale=1.0)(x), net()(x))


def test_only_adapters_and_heads_are_trained_and_the_rest_is_frozen() -> None:
    model = nn.ModuleDict({"body": nn.Linear(4, 6), "head": nn.Linear(6, 2), "norm": nn.LayerNorm(6)})
    inject(model, LoRASB, rank=2, scale=1.0)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "body.lora_R.weight",
        "head.weight",
        "head.bias",
    }
    assert model.frozen == {"body.base.weight", "body.base.bias", "norm.weight", "norm.bias"}


def test_one_sgd_step_is_the_orthogonal_projection_of_the_gradient() -> None:
    """Random orthonormal basis, s = 1: ΔW = −lr·(B Bᵀ) g (Aᵀ A)."""
    model = inject(nn.Sequential(nn.Linear(9, 6, bias=False)).double(), LoRASB, rank=4, scale=1.0)
    (layer,) = adapted(model).values()
    x, y = torch.randn(5, 9, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    weight = layer.weight.clone().requires_grad_(True)
    (g,) = torch.autograd.grad(((x @ weight.T - y) ** 2).mean(), weight)
    ((model(x) - y) ** 2).mean().backward()
    torch.optim.SGD([layer.lora_R.weight], lr=0.3).step()
    b, a = layer.basis_B, layer.basis_A
    assert (layer.product() + 0.3 * b @ b.T @ g @ a.T @ a).abs().max() < 1e-10


def test_gradients_are_those_of_the_base_weights() -> None:
    model = inject(net().double(), LoRASB, rank=2, scale=1.0)
    x, y = torch.randn(10, 7, dtype=torch.float64), torch.randint(0, 3, (10,))
    loss = nn.functional.cross_entropy
    found = gradients(model, lambda i: loss(model(x[i]), y[i]), torch.arange(10), 4)
    plain = net().double()
    loss(plain(x), y, reduction="sum").backward()
    assert torch.allclose(found["0"], plain[0].weight.grad.float(), atol=1e-6)
    assert torch.allclose(found["2"], plain[2].weight.grad.T.float(), atol=1e-6)
    assert not any(m.stored.requires_grad for m in adapted(model).values())


def test_bases_of_every_init_are_orthonormal_and_sign_spreads_the_spectrum() -> None:
    draw = torch.Generator().manual_seed(0)
    g = torch.randn(24, 8, generator=draw) @ torch.randn(8, 40, generator=draw)  # of rank 8
    captured = {}
    for init in INITS[:2]:
        arrays, latents, energies = basis_of({"l": first_step(g, init, 1e-3)}, 8)
        b, a = arrays["l.basis_B"].double(), arrays["l.basis_A"].double()
        assert (b.T @ b - torch.eye(8)).abs().max() < 1e-6
        assert (a @ a.T - torch.eye(8)).abs().max() < 1e-6
        assert (latents["l.lora_R.weight"].diagonal() >= 0).all()
        captured[init] = energies["l"]
        assert abs(energy(first_step(g, init, 1e-3), b, a) - energies["l"]) < 1e-5
    assert captured["raw_grad"] > 0.999
    assert captured["sign_grad"] < 0.9
    assert torch.equal(first_step(g, "sign_grad", 0.5), -0.5 * g.sign())
    u, s, vt = leading(g, 8)
    assert (u * s @ vt - g.double()).abs().max() < 1e-4  # the decomposition of g, not of its transpose


def test_conv1d_stores_the_transpose_and_is_adapted_untransposed() -> None:
    """Defects 7 and 9: transposed residuals fail silently on square layers; here none is square."""
    model = inject(net(), LoRA, "2", rank=2, scale=1.0)
    (layer,) = adapted(model).values()
    assert (layer.outputs, layer.inputs) == (11, 5)
    assert layer.weight.shape == layer.product().shape == (11, 5)


def test_a_basis_stays_float32_under_a_bf16_base() -> None:
    model = inject(net().bfloat16(), LoRASB, rank=2, scale=1.0)
    for module in adapted(model).values():
        assert module.basis_A.dtype == module.basis_B.dtype == module.lora_R.weight.dtype == torch.float32
    out = model(torch.randn(3, 7).bfloat16())
    assert out.dtype == torch.bfloat16


def test_patterns() -> None:
    model = nn.ModuleDict(
        {"enc": nn.ModuleDict({"query": nn.Linear(4, 4), "value": nn.Linear(4, 4)}), "head": nn.Linear(4, 2)}
    )
    assert targets(model) == ["enc.query", "enc.value"]
    assert targets(model, "query") == ["enc.query"]
    assert targets(model, "enc.*") == ["enc.query", "enc.value"]
    assert targets(model, "query, head") == ["enc.query", "head"]


def test_what_bad_input_gets() -> None:
    with pytest.raises(UserError, match="matches no linear layer"):
        inject(net(), LoRA, "nothing", rank=2, scale=1.0)
    with pytest.raises(UserError, match=r"strategy.rank=6: 0 is 5 × 7; allowed: 1 to 5"):
        inject(net(), LoRA, rank=6, scale=1.0)
    tied = nn.ModuleDict({"embed": nn.Embedding(6, 4), "lm_head": nn.Linear(4, 6, bias=False), "body": nn.Linear(4, 4)})
    tied["lm_head"].weight = tied["embed"].weight
    with pytest.raises(UserError, match="shares its weight"):
        targets(tied, "lm_head")
    assert targets(tied) == ["body"]
    quantised = nn.Sequential(nn.Linear(4, 4))
    quantised[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UserError, match="quantised"):
        inject(quantised, LoRA, rank=2, scale=1.0)
    model = inject(net(), LoRASB, rank=2, scale=1.0)
    sha = basis_sha(basis_in(model))
    check_basis(model, sha, "client 3")
    next(iter(adapted(model).values())).basis_A[0, 0] += 1
    with pytest.raises(UserError, match="client 3: its basis has hash"):
        check_basis(model, sha, "client 3")


def small_gpt():
    transformers = pytest.importorskip("transformers", reason="transformers is an optional extra")
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    torch.manual_seed(1)
    return transformers.GPT2LMHeadModel(config)


def test_lora_equals_pefts_step_for_step() -> None:
    peft = pytest.importorskip("peft", reason="peft is an optional extra")
    base = small_gpt()
    ours = inject(copy.deepcopy(base), LoRA, "c_attn", rank=4, scale=2.0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn"], fan_in_fan_out=True)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    state, _ = peft_state(ours)
    peft.set_peft_model_state_dict(theirs, state)
    tokens = torch.randint(0, 50, (3, 12), generator=torch.Generator().manual_seed(0))
    optimizers = [
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2) for model in (ours, theirs)
    ]
    for _ in range(5):
        values = []
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            loss = model(tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            values.append(loss.item())
        assert abs(values[0] - values[1]) < 1e-6
    got, want = peft_state(ours)[0], peft.get_peft_model_state_dict(theirs)
    for name, value in want.items():
        assert torch.allclose(got[name], value, atol=1e-6), name


def test_export_to_peft_gives_the_same_logits(tmp_path) -> None:
    peft = pytest.importorskip("peft", reason="peft is an optional extra")
    base = small_gpt()
    ours = inject(copy.deepcopy(base), LoRASB, "c_attn,c_fc", rank=4, scale=1.0)
    with torch.no_grad():
        for module in adapted(ours).values():
            module.lora_R.weight.normal_(std=0.3)
    state, fields = peft_state(ours)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**fields))
    peft.set_peft_model_state_dict(theirs, state)
    tokens = torch.randint(0, 50, (3, 12))
    ours.eval(), theirs.eval()
    with torch.no_grad():
        assert torch.allclose(ours(tokens).logits, theirs(tokens).logits, atol=1e-5)


def test_a_batchnorm_trains_on_the_statistics_it_is_evaluated_with() -> None:
    """A frozen BatchNorm stays in evaluation mode, so that what is trained is what is scored and sent."""
    from fedfuse.config.schema import TrainConfig
    from fedfuse.train import training

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    plain[1].running_mean.fill_(0.7)
    plain[1].running_var.fill_(3.0)
    model = inject(copy.deepcopy(plain), LoRA, rank=2, scale=0.5, head=False)
    x, y = 5 + torch.randn(9, 7, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 0, 1, 2, 2, 1])
    wanted = nn.functional.cross_entropy(plain.eval()(x), y)  # B = 0: the adapted model is the plain one
    buffers = {k: v.clone() for k, v in model.named_buffers()}

    def loss(logits, labels, rows):
        return nn.functional.cross_entropy(logits, labels)

    first = training.train(model, x, y, loss, TrainConfig(lr=1e-12), (0,), epochs=1, batch_size=100)
    assert first["loss"] == pytest.approx(wanted.item(), rel=1e-9)
    training.train(model, x, y, loss, TrainConfig(lr=0.1), (0,), epochs=3, batch_size=4)
    assert all(torch.equal(v, buffers[k]) for k, v in model.named_buffers())
    assert model[2].training
    assert not model[1].training
    training.predict(model, x)
    assert not model[1].training
