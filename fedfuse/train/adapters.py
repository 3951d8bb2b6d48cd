"""Low-rank adapters over linear layers: W = W₀ + Δ + s·B A (LoRA) and W = W₀ + s·B R A (LoRA-SB).

W₀ is d × k (outputs × inputs), B d × r, A r × k, R r × r, s = α / r. W₀ is frozen. LoRA (Hu et al. 2021,
arXiv 2106.09685) trains B and A; LoRA-SB (arXiv 2411.19557) trains R alone, in a fixed basis (B, A). Δ is
what a federation has folded into the base so far; it exists where a strategy asks for it. What is trained are
weights of child `nn.Linear` layers, as differential privacy by Opacus needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedfuse.compat.torch_norms import BATCH_NORMS
from fedfuse.errors import UserError
from fedfuse.models.parts import HEADS
from fedfuse.wire.records import Arrays

PEFT = "base_model.model."  # what peft puts before every name
VOCABULARY = ("lm_head", "embed_out", "cls")  # output layers over a vocabulary: neither adapted nor trained


def is_projection(module: nn.Module) -> bool:
    """Whether a module is x ↦ x·W₀ᵀ + b: `nn.Linear`, or `Conv1D` of Hugging Face (which stores W₀ᵀ)."""
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


class Adapted(nn.Module):
    """A frozen linear layer and what is added to its weight.

    Parameters
    ----------
    base : nn.Module
        `nn.Linear` or Hugging Face's `Conv1D`; its parameters are frozen.
    rank : int
        r, at most min(d, k).
    scale : float
        s.
    dropout : float
        Of the adapter's input.
    delta : bool
        Whether the layer has a buffer Δ (d × k, zero), for what a federation folds into W₀.

    Raises
    ------
    UserError
        If the rank exceeds the layer's, or the weight is quantised.
    """

    def __init__(
        self, base: nn.Module, rank: int, scale: float, dropout: float = 0.0, delta: bool = False, name: str = "layer"
    ) -> None:
        super().__init__()
        weight = base.weight
        assert isinstance(weight, Tensor)
        self.quantized = not weight.is_floating_point()  # its weight is packed, and answers only by what it does
        if self.quantized and not type(base).__module__.startswith("bitsandbytes"):
            raise UserError(f"{name}: the weight is quantised ({weight.dtype}); allowed is a base by model.quantize")
        self.transposed = not isinstance(base, nn.Linear)
        if isinstance(base, nn.Linear):
            self.outputs, self.inputs = base.out_features, base.in_features
        else:
            self.outputs, self.inputs = tuple(weight.shape)[::-1]
        if not 1 <= rank <= min(self.outputs, self.inputs):
            raise UserError(
                f"strategy.rank={rank}: {name} is {self.outputs} × {self.inputs}; allowed: 1 to "
                f"{min(self.outputs, self.inputs)}"
            )
        self.base, self.rank, self.scale = base, rank, float(scale)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32  # also under a bf16 base
        for parameter in base.parameters():
            parameter.requires_grad_(False)
        self.delta: Tensor | None
        kept = torch.float32 if self.quantized else weight.dtype
        self.register_buffer("delta", torch.zeros(self.outputs, self.inputs, dtype=kept) if delta else None)

    linear = staticmethod(F.linear)  # by what x passes what the adapter holds; of many clients at once, by theirs

    def adapt(self, x: Tensor) -> Tensor:
        """What the adapter adds to the output, without s."""
        raise NotImplementedError

    def product(self) -> Tensor:
        """s·B A or s·B R A (d × k)."""
        raise NotImplementedError

    def update(self) -> Tensor:
        """ΔW (d × k): Δ + s·B A."""
        return self.product() if self.delta is None else self.product() + self.delta

    def forward(self, x: Tensor) -> Tensor:
        """x·(W₀ + Δ + s·B A)ᵀ + b, in the base's dtype."""
        out = self.base(x)
        if self.delta is not None:
            out = out + self.linear(x.to(self.delta.dtype), self.delta).to(out.dtype)
        added = self.adapt(self.dropout(x).to(self.dtype))
        return out + (added if self.scale == 1 else self.scale * added).to(out.dtype)

    @property
    def weight(self) -> Tensor:
        """W₀ (d × k), a view."""
        return self.stored.T if self.transposed else self.stored

    @property
    def stored(self) -> Tensor:
        """The base's weight as it is stored.

        Raises
        ------
        UserError
            If it is quantised.
        """
        if self.quantized:
            raise UserError(
                "model.quantize: the base's weights are asked for, which it keeps packed; allowed here: none"
            )
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight


class LoRA(Adapted):
    """W₀ + s·B A. A starts as `nn.Linear` does (Kaiming, a = √5), B at zero, as in peft."""

    def __init__(self, base: nn.Module, rank: int, scale: float, **options: Any) -> None:
        super().__init__(base, rank, scale, **options)
        self.lora_A = nn.Linear(self.inputs, rank, bias=False, dtype=self.dtype)
        self.lora_B = nn.Linear(rank, self.outputs, bias=False, dtype=self.dtype)
        nn.init.zeros_(self.lora_B.weight)

    def adapt(self, x: Tensor) -> Tensor:
        """B A x."""
        return self.lora_B(self.lora_A(x))

    def product(self) -> Tensor:
        """s·B A (d × k)."""
        return self.scale * (self.lora_B.weight @ self.lora_A.weight)


class LoRASB(Adapted):
    """W₀ + s·B R A with B (`basis_B`) and A (`basis_A`) frozen buffers, and R (`lora_R`) trained.

    B has orthonormal columns and A orthonormal rows, random ones until `set_basis`; R is zero, so that the layer
    starts as its base.
    """

    basis_A: Tensor
    basis_B: Tensor

    def __init__(self, base: nn.Module, rank: int, scale: float, **options: Any) -> None:
        super().__init__(base, rank, scale, **options)
        self.register_buffer("basis_B", orthonormal(self.outputs, rank, self.dtype))
        self.register_buffer("basis_A", orthonormal(self.inputs, rank, self.dtype).T.contiguous())
        self.lora_R = nn.Linear(rank, rank, bias=False, dtype=self.dtype)
        nn.init.zeros_(self.lora_R.weight)

    def adapt(self, x: Tensor) -> Tensor:
        """B R A x."""
        return self.linear(self.lora_R(self.linear(x, self.basis_A)), self.basis_B)

    def product(self) -> Tensor:
        """s·B R A (d × k)."""
        return self.scale * (self.basis_B @ self.lora_R.weight @ self.basis_A)


def orthonormal(
    rows: int, columns: int, dtype: torch.dtype = torch.float32, generator: torch.Generator | None = None
) -> Tensor:
    """A random matrix with orthonormal columns, by default from torch's global generator; R's diagonal is positive."""
    q, r = torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64, generator=generator))
    return (q * torch.where(r.diagonal() < 0, -1.0, 1.0)).to(dtype).contiguous()


# --- into a model and out of it ---------------------------------------------------------------------------


def in_parts(name: str, parts: Iterable[str]) -> bool:
    """Whether a dotted name passes through a module of one of these names."""
    return not set(name.split(".")).isdisjoint(parts)


def targets(model: nn.Module, pattern: str = "auto") -> list[str]:
    """Names of the layers that a pattern means.

    Parameters
    ----------
    pattern : str
        `auto`: every linear layer but heads and output layers over a vocabulary. Otherwise comma-separated shell
        patterns, each matched against the whole dotted name and its end (`q_proj,v_proj`, `layer.*.query`).

    Raises
    ------
    UserError
        If nothing matches, or a matched layer shares its weight with another module.
    """
    layers = {name: module for name, module in model.named_modules() if is_projection(module)}
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    shared = {name for name, module in layers.items() if owners[id(module.weight)] > 1}
    if pattern == "auto":
        chosen = [n for n in layers if n not in shared and not in_parts(n, (*HEADS, *VOCABULARY))]
    else:
        wanted = [part.strip() for part in pattern.split(",") if part.strip()]
        chosen = [n for n in layers if any(fnmatchcase(n, w) or fnmatchcase(n, f"*.{w}") for w in wanted)]
    if not chosen:
        known = ", ".join(list(layers)[:8]) or "none"
        raise UserError(f"strategy.targets={pattern}: matches no linear layer of the model; its linear layers: {known}")
    if tied := [name for name in chosen if name in shared]:
        raise UserError(
            f"strategy.targets={pattern}: {tied[0]} shares its weight with another layer and cannot be adapted"
        )
    return chosen


def inject(
    model: nn.Module, layer: Callable[..., Adapted], pattern: str = "auto", *, head: bool = True, **options: Any
) -> nn.Module:
    """Replace the layers a pattern means by adapted ones, in place; only adapters and the head stay trainable.

    The model gets `frozen`, the names of the parameters that neither change nor travel.

    Parameters
    ----------
    layer : callable
        `LoRA`, `LoRASB`; called with the base layer and `**options` (rank, scale, …).
    head : bool
        Whether classification heads are trained.
    """
    chosen = targets(model, pattern)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name in chosen:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer(model.get_submodule(name), name=name, **options))
    for name, parameter in model.named_parameters():
        if head and in_parts(name, HEADS) and not in_parts(name, ("base",)):
            parameter.requires_grad_(True)
    for module in model.modules():
        if isinstance(module, BATCH_NORMS):  # trains on the statistics that it is evaluated with
            module.still = True  # type: ignore[assignment]
    model.frozen = frozenset(n for n, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad)  # type: ignore[assignment]
    return model


def adapted(model: nn.Module) -> dict[str, Adapted]:
    """The adapted layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapted)}


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Fold every adapter into its base and take it off: a plain model again, in place."""
    for name, module in adapted(model).items():
        module.weight.add_(module.update().to(module.weight.dtype))
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module.base)
    return model


def peft_state(model: nn.Module) -> tuple[Arrays, dict[str, Any]]:
    """Adapters, and heads that are trained beside them, as peft's LoRA has them: a state dict, and its `LoraConfig`.

    s·B R A is written as lora_B = B R, lora_A = A; with `lora_alpha` = s·r the scale is the same.

    Raises
    ------
    UserError
        If a layer has a folded Δ (it is not low-rank: merge it instead), or layers differ in rank or scale.
    """
    found = adapted(model)
    if not found:
        raise UserError("the model has no adapters to export")
    if len({(m.rank, m.scale) for m in found.values()}) > 1:
        raise UserError("adapters of different rank or scale cannot be one peft LoRA")
    state: Arrays = {}
    for name, module in found.items():
        if module.delta is not None and bool((module.delta != 0).any()):
            raise UserError(
                f"{name} holds a folded update that no LoRA of rank {module.rank} can carry: merge it instead"
            )
        b, a = factors(module)
        state[f"{PEFT}{name}.lora_A.weight"] = a.detach().clone()
        state[f"{PEFT}{name}.lora_B.weight"] = b.detach().clone().contiguous()
    one = next(iter(found.values()))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and in_parts(n, HEADS)}
    trained = {n: p for n, p in trained.items() if ".lora_" not in n}
    heads = sorted({n.split(".")[0] for n in trained})
    state |= {f"{PEFT}{n}": p.detach().clone() for n, p in trained.items()}
    leaves = {name.rpartition(".")[2] for name in found}
    meant = {n.removesuffix(".base") for n, m in model.named_modules() if is_projection(m) and ".lora_" not in n}
    short = {name for name in meant if name.rpartition(".")[2] in leaves} == set(found)
    return state, {
        "r": one.rank,
        "lora_alpha": one.scale * one.rank,
        "target_modules": sorted(leaves if short else found),
        "fan_in_fan_out": one.transposed,
        "modules_to_save": heads or None,
    }


def factors(module: Adapted) -> tuple[Tensor, Tensor]:
    """B (d × r) and A (r × k) whose product, times s, is the adapter's; for LoRA-SB B stands for B R."""
    if isinstance(module, LoRA):
        return module.lora_B.weight, module.lora_A.weight
    assert isinstance(module, LoRASB)
    return module.basis_B @ module.lora_R.weight, module.basis_A


def layer_names(keys: Iterable[str], suffix: str) -> Iterator[str]:
    """Layers among the names of a state dict: those with `<layer>.<suffix>`."""
    end = f".{suffix}"
    for key in keys:
        if key.endswith(end):
            yield key.removesuffix(end)
