"""The mathematics of adapters by one name: the layers, which of their arrays travel, ranks cut and padded, folding.

A strategy says `from fedfuse import lora` and names what it uses: `lora.part("lora_B")`, `lora.cut(arrays, rank)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedfuse.train.adapters import HEADS, Adapted, LoRA, LoRASB, adapted, in_parts, inject, layer_names, orthonormal
from fedfuse.train.stack import compact, deltas, empty, fold, increments
from fedfuse.train.svd import leading
from fedfuse.wire.records import Arrays, Layout, Scope, Spec

__all__ = [
    "LoRA", "LoRASB", "adapted", "at_most", "compact", "cut", "deltas", "empty", "equip", "fold", "in_parts",
    "increments", "is_head", "layer_names", "leading", "orthonormal", "pad", "part", "rank_of",
]  # fmt: skip


def equip(
    model: nn.Module,
    hyper: Any,
    layer: type[Adapted] = LoRA,
    trains: tuple[str, ...] = ("lora_A", "lora_B"),
    **options: Any,
) -> nn.Module:
    """Put adapters into a model; `trains` names their trained parts, the others are fixed."""
    scale = 1.0 if hyper.alpha is None else hyper.alpha / hyper.rank
    options |= {"rank": hyper.rank, "scale": scale, "dropout": hyper.dropout}
    model = inject(model, layer, hyper.targets, head=hyper.head != "frozen", **options)
    for name, parameter in model.named_parameters():
        if ".lora_" in name and not in_parts(name, trains):
            parameter.requires_grad_(False)
    return model


def is_head(name: str) -> bool:
    """Whether an array of a state dict belongs to a classification head (and not to an adapter of it)."""
    return in_parts(name, HEADS) and ".lora_" not in name and ".basis_" not in name and not name.endswith(".delta")


def part(*kinds: str, head: bool = True) -> Spec:
    """Spec of parts of the model: adapters' arrays of these kinds (`lora_A`, …), and the head if it is aggregated."""

    def spec(scope: Scope) -> Layout:
        with_head = head and scope.hyper.head == "aggregated"
        return {
            name: how
            for name, how in scope.model.items()
            if (in_parts(name, kinds) and not is_head(name)) or (with_head and is_head(name))
        }

    return spec


def at_most(spec: Spec) -> Spec:
    """The same arrays with a rank below or equal: rows of A and columns of B may be fewer."""

    def loose(scope: Scope) -> Layout:
        out: Layout = {}
        for name, (dtype, (*sizes,)) in spec(scope).items():
            if in_parts(name, ("lora_A", "lora_R")):
                sizes[0] = -sizes[0]
            if in_parts(name, ("lora_B", "lora_R")):
                sizes[1] = -sizes[1]
            out[name] = dtype, tuple(sizes)
        return out

    return loose


def rank_of(hyper: Any, client: int) -> int:
    """r_i of a client."""
    return hyper.ranks[client % len(hyper.ranks)] if hyper.ranks else hyper.rank


def confine(model: nn.Module, rank: int) -> None:
    """No gradient beyond a client's rank: there is none on its own, but a private step adds noise to every number."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and in_parts(name, ("lora_A", "lora_R")):
            parameter.grad[rank:] = 0
        if parameter.grad is not None and in_parts(name, ("lora_B", "lora_R")):
            parameter.grad[:, rank:] = 0


def cut(arrays: Mapping[str, Tensor], rank: int) -> Arrays:
    """Leading rows of A, columns of B, block of R; other arrays as they are."""
    out: Arrays = {}
    for name, value in arrays.items():
        if in_parts(name, ("lora_A", "lora_R")):
            value = value[:rank]
        if in_parts(name, ("lora_B", "lora_R")):
            value = value[:, :rank]
        out[name] = value.contiguous()
    return out


def pad(arrays: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> Arrays:
    """Undo `cut`: zeros where a smaller rank has nothing. An adapter with zero rows and columns has that rank."""
    out: Arrays = {}
    for name, value in arrays.items():
        whole = torch.zeros_like(like[name], dtype=value.dtype)
        whole[tuple(slice(size) for size in value.shape)] = value
        out[name] = whole
    return out
