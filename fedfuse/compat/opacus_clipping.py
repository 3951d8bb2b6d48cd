"""Sums of gradients clipped by example, from Opacus's hooks, for weights that somebody may have chosen against them.

Private names of Opacus 1.6: `NORM_SAMPLERS` (which layers have norms without gradients), `_norm_sample` and
`grad_sample` of a parameter. They replace Opacus's clipping, which multiplies squares in float32: those of small
gradients and large activations vanish, and the example is not clipped at all. Guard: `tests/train/test_privacy.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

LONGEST = 1e30  # of a longer gradient, float32 has no precise share; no training has one
HELD = 2**28  # numbers of plain gradients held at once: 1 GiB

Losses = Callable[[Tensor, Tensor], Tensor]


def hooks_on(model: nn.Module, ghost: bool) -> Any:
    """Hooks that find gradients by example (plain) or their norms (ghost) in every backward pass."""
    if not ghost:
        from opacus.grad_sample.grad_sample_module import GradSampleHooks

        return GradSampleHooks(model)
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleHooksFastGradientClipping

    class Hooks(GradSampleHooksFastGradientClipping):  # type: ignore[misc]
        NORM_SAMPLERS = {nn.Linear: _linear, nn.Embedding: _embedding}

    return Hooks(model, loss_reduction="sum")  # a mean's division may make nothing of what the second pass sees


def plain_sum(losses: Losses, chosen: Sequence[Any], x: Tensor, y: Tensor, clip: float) -> None:
    """Leave in `grad` the sum of gradients by example, each shortened to `clip`.

    What is measured is what is added, so no weights and no rounding make an example add more. An example whose
    gradient is not finite, or longer than `LONGEST`, adds nothing.
    """
    for p in chosen:
        p.grad_sample = None
    losses(x, y).mean().backward()
    norms = _joined([torch.linalg.vector_norm(p.grad_sample.flatten(1), dim=1, dtype=torch.float64) for p in chosen])
    kept = norms <= LONGEST  # false of NaN
    factors = _factors(norms, clip)
    for p in chosen:
        p.grad_sample[~kept] = 0  # 0 times infinity is none
        p.grad = torch.einsum("i,i...", factors.where(kept, 0.0).to(p.dtype), p.grad_sample)


def ghost_sum(losses: Losses, hooks: Any, chosen: Sequence[Any], x: Tensor, y: Tensor, clip: float) -> None:
    """The same from norms of one backward pass and a second one over the losses, each by its factor.

    Rows that would add nothing are left out of both. The second pass rounds anew: with
    weights chosen for it, what cancels in the first need not in the second, so this is for weights that are trusted.
    """
    while len(x):
        for p in chosen:
            p._norm_sample = None
        found = losses(x, y)
        found.sum().backward(retain_graph=True)
        norms = _joined([p._norm_sample.double() for p in chosen])
        kept = (norms <= LONGEST) & found.detach().isfinite()
        if kept.all():
            break
        x, y = x[kept], y[kept]
    for p in chosen:
        p.grad = torch.zeros_like(p)
    if not len(x):
        return
    hooks.disable_hooks()
    (_factors(norms, clip).to(found.dtype) * found).sum().backward()
    hooks.enable_hooks()
    if not all(bool(p.grad.isfinite().all()) for p in chosen):
        for p in chosen:
            p.grad = torch.zeros_like(p)


def _joined(norms: Sequence[Tensor]) -> Tensor:
    return torch.stack([norm.to(norms[0].device) for norm in norms]).norm(dim=0)


def _factors(norms: Tensor, clip: float) -> Tensor:
    return (clip / (norms + 1e-6)).clamp(max=1.0)  # as Opacus has it


def _linear(layer: nn.Linear, activations: Sequence[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Norms of Σ_t g_t a_tᵀ over an example's places t: products of four float32 numbers stay within float64."""
    n = len(backprops)
    g, a = (v.reshape(n, -1, v.shape[-1]).double() for v in (backprops, activations[0]))
    out: dict[Any, Tensor] = {}
    if layer.weight.requires_grad:
        out[layer.weight] = ((g @ g.mT) * (a @ a.mT)).sum((1, 2)).clamp(min=0).sqrt()
    if layer.bias is not None and layer.bias.requires_grad:
        out[layer.bias] = g.sum(1).norm(dim=1)
    return out


def _embedding(layer: nn.Embedding, activations: Sequence[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    from opacus.grad_sample.embedding_norm_sample import compute_embedding_norm_sample

    found: dict[nn.Parameter, Tensor] = compute_embedding_norm_sample(layer, list(activations), backprops.double())
    return found
