"""What examples say of a network's weights: the Fisher information's diagonal, Gram matrices of layers' inputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedfuse.errors import UserError
from fedfuse.models.in_place import evaluating
from fedfuse.train.task import task_loss
from fedfuse.wire.records import Arrays


def fisher(model: nn.Module, x: Tensor, y: Tensor, *, expected: bool = True) -> Arrays:
    """Mean over the examples of the squared gradient of each one's log-likelihood, by trained parameter, float64.

    The square is of one example's gradient: a batch's mean gradient vanishes at an optimum, and its square with it.

    Parameters
    ----------
    model
        In evaluation mode meanwhile; what is frozen is left out.
    x, y
        Examples (n, …) and labels (n), or the tokens themselves (n, T).
    expected
        The Fisher information, Σ_c p(c|x)·(∂ log p(c|x)/∂θ)²; else the empirical one, of the given labels.

    Returns
    -------
    dict
        Zeros where there is no example.
    """
    named = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in named.items()}

    def answer(values: Arrays, one: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        logits: Tensor = torch.func.functional_call(model, values, (one[None],))
        log_p = logits.log_softmax(1)[0] if expected else -task_loss(logits, label[None])[None]
        return log_p, log_p.detach().exp() if expected else torch.ones_like(log_p)

    slopes = torch.func.jacrev(answer, has_aux=True)
    with evaluating(model), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # attention, class by class: no faster by hand
        for rows in torch.arange(len(x)).split(_rows_at_once(model, x, total)) if len(x) else ():
            if x.is_floating_point():
                found, weights = torch.func.vmap(slopes, (None, 0, 0))(named, x[rows], y[rows])
            else:  # language models branch on what they read, which vmap cannot follow
                found, weights = slopes(named, x[rows[0]], y[rows[0]])
            for name, gradient in found.items():
                squares = gradient.square().reshape(-1, *total[name].shape)
                total[name] += torch.tensordot(weights.flatten(), squares, 1)
    return {name: value / max(1, len(x)) for name, value in total.items()}


_ROOM = 2**22  # numbers in the gradients that are held at once


def _rows_at_once(model: nn.Module, x: Tensor, parameters: Arrays) -> int:
    if not x.is_floating_point():
        return 1
    with torch.no_grad():
        outputs = model(x[:1]).shape[1]
    return max(1, _ROOM // (outputs * sum(value.numel() for value in parameters.values())))


def inputs_of(layer: nn.Module, x: Tensor) -> Tensor:
    """The rows (n × k) that a layer's weight as a matrix, `weight.flatten(1)` (d × k), is applied to."""
    if isinstance(layer, nn.Conv2d):
        shape: Any = (layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        return F.unfold(x, *shape).transpose(1, 2).flatten(0, 1)
    return x.flatten(0, -2)


def check_layer(name: str, layer: nn.Module) -> None:
    """Refuse a layer that is no one matrix applied to rows.

    Raises
    ------
    UserError
        Naming the layer, and what is allowed.
    """
    plain = isinstance(layer, nn.Linear) or (
        isinstance(layer, nn.Conv2d)
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
    )
    if not plain:
        raise UserError(
            f"layer {name} is {type(layer).__name__}: a Gram matrix needs nn.Linear, or nn.Conv2d without groups and "
            f"with numbers of zeros as padding"
        )


def grams(
    model: nn.Module, layers: Sequence[str], predict: Callable[[Tensor], Tensor], x: Tensor
) -> dict[str, tuple[Tensor, int]]:
    """XᵀX (k × k, float64) of each layer's inputs over all rows of x, and how many rows they are.

    Parameters
    ----------
    model
    layers
        Dotted names, each of which `check_layer` lets pass.
    predict
        Runs the model in evaluation mode.
    x
        Examples.

    Returns
    -------
    dict
        Zeros where there is no example.
    """
    found: dict[str, tuple[Tensor, int]] = {}
    hooks = []
    for name in layers:
        layer: Any = model.get_submodule(name)
        size = layer.weight.flatten(1).shape[1]
        found[name] = torch.zeros(size, size, dtype=torch.float64, device=layer.weight.device), 0

        def note(module: nn.Module, given: tuple[Any, ...], _: Any, name: str = name) -> None:
            rows = inputs_of(module, given[0]).double()
            gram, count = found[name]
            found[name] = gram + rows.T @ rows, count + len(rows)

        hooks.append(layer.register_forward_hook(note))
    try:
        if len(x):
            predict(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def packed(gram: Tensor) -> Tensor:
    """The upper triangle of a symmetric matrix, row by row: d·(d + 1)/2 numbers."""
    return gram[torch.triu_indices(len(gram), len(gram)).unbind()]


def unpacked(triangle: Tensor) -> Tensor:
    """Undo `packed`."""
    size = int((2 * len(triangle)) ** 0.5)
    gram = torch.zeros(size, size, dtype=triangle.dtype, device=triangle.device)
    gram[torch.triu_indices(size, size).unbind()] = triangle
    return gram + gram.triu(1).T
