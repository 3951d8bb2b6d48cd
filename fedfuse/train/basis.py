"""The basis (B, A) of LoRA-SB: where it comes from, how much of a matrix it captures, its hash.

LoRA-SB (arXiv 2411.19557) takes the r leading singular triples of the first full fine-tuning step, −η·sign(Σ
g) in the released code: B = U_r, R₀ = S_r, A = V_rᵀ. LoRA-XS (arXiv 2405.17604) takes those of W₀; random
orthonormal ones need no data. Singular vectors are those of `strategy.svd`, and their signs fixed, so that
equal matrices give equal bases; large layers by a seeded random projection (`fedfuse.train.svd`). Only one layer's
matrix is there at a time, and none where thin factors say the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedfuse.errors import UserError
from fedfuse.models.in_place import evaluating
from fedfuse.train.adapters import LoRASB, adapted, layer_names, orthonormal
from fedfuse.train.svd import Factors, leading, of_factors, square_norm
from fedfuse.wire.records import Arrays, Layout, Scope, sha_arrays

INITS = ("raw_grad", "sign_grad", "weight_svd", "random_orthonormal")


def first_step(gradient: Tensor, init: str, rate: float) -> Tensor:
    """The matrix whose leading directions make the basis: −η·g, or −η·sign(g) as Adam's first step is."""
    return -rate * (gradient.sign() if init == "sign_grad" else gradient)


def first_steps(
    gradients: Mapping[str, Tensor | Factors], init: str, rate: float
) -> Iterator[tuple[str, Tensor | Factors]]:
    """Each layer's first step, one after the other; of factors it is factors, unless it is a matrix of signs."""
    for name, gradient in gradients.items():
        if isinstance(gradient, Tensor):
            yield name, first_step(gradient, init, rate)
        elif init == "sign_grad":
            yield name, first_step(gradient[0] @ gradient[1], init, rate)
        else:
            yield name, (-rate * gradient[0], gradient[1])


def energy(matrix: Tensor, b: Tensor, a: Tensor) -> float:
    """Share of ‖M‖² that lies in the span of B and A: ‖Bᵀ M Aᵀ‖² / ‖M‖², for orthonormal B and A."""
    whole = matrix.double().square().sum()
    kept = (b.double().T @ matrix.double() @ a.double().T).square().sum()
    return (kept / whole).item() if whole > 0 else 0.0


def basis_of(
    matrices: Mapping[str, Tensor] | Iterable[tuple[str, Tensor | Factors]], rank: int, way: str = "exact"
) -> tuple[Arrays, Arrays, dict[str, float]]:
    """Bases of named matrices, or of products of factors.

    Parameters
    ----------
    way
        As `fedfuse.train.svd.leading` takes it.

    Returns
    -------
    arrays
        `<layer>.basis_B` and `<layer>.basis_A`, float32.
    latents
        `<layer>.lora_R.weight` = diag(S_r), float32.
    energies
        Captured energy by layer.
    """
    arrays: Arrays = {}
    latents: Arrays = {}
    captured: dict[str, float] = {}
    for name, matrix in matrices.items() if isinstance(matrices, Mapping) else matrices:
        u, s, vt = leading(matrix, rank, way) if isinstance(matrix, Tensor) else of_factors(matrix, rank)
        arrays[f"{name}.basis_B"], arrays[f"{name}.basis_A"] = u.float().contiguous(), vt.float().contiguous()
        latents[f"{name}.lora_R.weight"] = s.diag().float()
        whole = square_norm(matrix).item()
        captured[name] = (
            energy(matrix, u, vt) if isinstance(matrix, Tensor) else s.square().sum().item() / (whole or 1.0)
        )
    return arrays, latents, captured


def basis_in(model: nn.Module) -> Arrays:
    """The basis that a model holds, `<layer>.basis_B` and `<layer>.basis_A`, copied."""
    out: Arrays = {}
    for name, module in adapted(model).items():
        if isinstance(module, LoRASB):
            out[f"{name}.basis_B"], out[f"{name}.basis_A"] = module.basis_B.clone(), module.basis_A.clone()
    return out


def public_basis(
    model: nn.Module,
    init: str,
    rank: int,
    delta: Mapping[str, Tensor] | None = None,
    draw: torch.Generator | None = None,
    way: str = "exact",
) -> Arrays:
    """A basis that no example is needed for, `<layer>.basis_B` and `<layer>.basis_A`, float32.

    Parameters
    ----------
    init
        `weight_svd`: leading directions of W₀ + Δ; otherwise random orthonormal ones.
    delta
        Δ of each layer, `<layer>.delta`; default 0.
    draw
        What random ones are drawn from.
    way
        As `fedfuse.train.svd.leading` takes it.
    """
    if init == "weight_svd":
        weights = ((name, layer.weight.detach()) for name, layer in adapted(model).items())
        if delta is not None:
            weights = ((name, weight + delta[f"{name}.delta"]) for name, weight in weights)
        return basis_of(weights, rank, way)[0]
    found: Arrays = {}
    for name, layer in adapted(model).items():
        found[f"{name}.basis_B"] = orthonormal(layer.outputs, rank, generator=draw)
        found[f"{name}.basis_A"] = orthonormal(layer.inputs, rank, generator=draw).T.contiguous()
    return found


def gradients(
    model: nn.Module, loss: Callable[[Tensor], Tensor], rows: Tensor, batch_size: int, clip: float | None = None
) -> Arrays:
    """Σ over rows of d loss / d W₀ for every adapted layer (d × k, float32), model as it is, without dropout.

    Parameters
    ----------
    loss : callable
        `loss(rows) -> scalar`, the mean loss over some rows.
    rows : Tensor
        Rows to go over, in batches of `batch_size`.
    clip : float, optional
        Largest norm, over all layers together, of a batch's gradient; with batches of one, of an example's.
    """
    layers = adapted(model)
    weights = [module.stored for module in layers.values()]
    total = [torch.zeros_like(w, dtype=torch.float64) for w in weights]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        with evaluating(model):
            for batch in rows.split(batch_size):
                found = torch.autograd.grad(loss(batch) * len(batch), weights, allow_unused=True)
                norm = torch.stack([g.double().norm() for g in found if g is not None]).norm().item() if clip else 0.0
                if clip and not math.isfinite(norm):
                    continue  # 0 times infinity is none, and a sum that is none would tell of one example
                factor = min(1.0, clip / norm) if clip and norm > 0 else 1.0
                for kept, grad in zip(total, found, strict=True):
                    if grad is not None:
                        kept.add_(grad.double(), alpha=factor)
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    return {
        name: (g.T if module.transposed else g).float().contiguous()
        for (name, module), g in zip(layers.items(), total, strict=True)
    }


def sketch(matrix: Tensor, rank: int, way: str = "exact") -> tuple[Tensor, Tensor]:
    """U_q S_q (d × q) and V_qᵀ (q × k), the best factors of rank q, float32."""
    u, s, vt = leading(matrix, rank, way)
    return (u * s).float().contiguous(), vt.float().contiguous()


def gradient_arrays(scope: Scope) -> Layout:
    """Spec of what `told` says, by the hyper-parameters `init_from`, `rank` and `oversample`."""
    out: Layout = {"rows": ("float32", (1,))}
    for name in layer_names(scope.model, "lora_R.weight"):
        d, k = scope.model[f"{name}.basis_B"][1][0], scope.model[f"{name}.basis_A"][1][1]
        if scope.hyper.init_from == "sketch":
            q = min(scope.hyper.rank + scope.hyper.oversample, d, k)
            out |= {f"{name}.U": ("float32", (d, q)), f"{name}.V": ("float32", (q, k))}
        else:
            out[f"{name}.gradient"] = "float32", (d, k)
    return out


def told(found: Mapping[str, Tensor], count: float, width: int | None, way: str = "exact") -> Arrays:
    """A client's gradients as it says them: whole or, of at most `width` triples, as sketches; and its rows."""
    out = {"rows": torch.tensor([count])}
    for name, gradient in found.items():
        if width is None:
            out[f"{name}.gradient"] = gradient
        else:
            out[f"{name}.U"], out[f"{name}.V"] = sketch(gradient, min(width, *gradient.shape), way)
    return out


def joint(everyone: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor | Factors]:
    """G = Σ g_i / Σ rows_i: the gradient over the joined rows of all clients, from what `told` says, float64.

    Sketches stay factors, side by side, as long as these are thinner than the layer.
    """
    total: dict[str, Any] = {}
    rows = 0.0
    for sent in everyone:
        rows += float(sent["rows"])
        for name in layer_names(sent, "gradient"):
            total[name] = total.get(name, 0) + sent[f"{name}.gradient"].double()
        for name in layer_names(sent, "U"):
            total[name] = _beside(total.get(name), sent[f"{name}.U"].double(), sent[f"{name}.V"].double())
    return {
        name: value / rows if isinstance(value, Tensor) else (value[0] / rows, value[1])
        for name, value in total.items()
    }


def _beside(held: Tensor | Factors | None, b: Tensor, a: Tensor) -> Tensor | Factors:
    """M + B A, as factors while they are thinner than the matrix."""
    if isinstance(held, Tensor):
        return held + b @ a
    if held is not None:
        b, a = torch.cat([held[0], b], 1), torch.cat([held[1], a], 0)
    return (b, a) if b.shape[1] < min(len(b), a.shape[1]) else b @ a


def basis_sha(arrays: Mapping[str, Tensor]) -> Tensor:
    """Hash of a basis as 32 bytes."""
    return torch.tensor(list(bytes.fromhex(sha_arrays(arrays))), dtype=torch.uint8)


def check_basis(model: nn.Module, expected: Tensor, where: str) -> None:
    """Refuse a basis other than the server's: averages of R mean nothing across bases.

    Raises
    ------
    UserError
        If the hashes differ.
    """
    own = basis_sha(basis_in(model))
    if not torch.equal(own, expected.cpu()):
        short = [bytes(value.tolist()).hex()[:12] for value in (own, expected.cpu())]
        raise UserError(f"{where}: its basis has hash {short[0]}…, the server's has {short[1]}…; it cannot take part")
