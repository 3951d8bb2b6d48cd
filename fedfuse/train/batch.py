"""One step of training: a batch's gradient, whole or in parts, and the learning rate of that step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedfuse.errors import UserError
from fedfuse.train.packed import packed
from fedfuse.train.task import IGNORED, trimmed


def sizes_of(n: int, size: int, least: int = 2) -> list[int]:
    """Return the rows in each batch of an epoch, or part of a batch; a last one below `least` joins the one before."""
    sizes = [size] * (n // size)
    tail = n % size
    if tail and sizes and tail < least:
        sizes[-1] += tail
    elif tail:
        sizes.append(tail)
    return sizes


def count_of(n: int, size: int, least: int = 2) -> int:
    """Batches of an epoch, `len(sizes_of(…))`, however many: what somebody else claims to have is not laid out."""
    whole, tail = divmod(n, size)
    return whole + int(tail >= least or (tail > 0 and whole == 0))


def backward(
    call: Callable[[Tensor], Any],
    loss: Callable[[Any, Any, Tensor], Tensor],
    batch: tuple[Tensor, Tensor | None, Tensor],
    micro_batch: int | None = None,
    trim: bool = False,
    pack: bool = False,
) -> Tensor:
    """Add the gradients of a batch's mean loss, and return that loss.

    Parameters
    ----------
    call, loss
        `loss(call(x), y, rows)`.
    batch
        x, y and rows.
    micro_batch
        Rows that pass through the network at once. Each part's loss is taken to be a mean over its rows, or over its
        tokens that count, and weighs as many: the gradients' sum is the batch's.
    trim
        Leave out the last places that count in no row; `loss` must not look at `rows`.
    pack
        Put texts together in rows (`fedfuse.train.packed`), those that pass at once; `loss` must not look at `rows`.

    Raises
    ------
    UserError
        If the loss is no scalar tensor with gradients.
    """
    x, y, rows = batch
    if trim and y is not None:
        y, x = trimmed(y, x)

    def lost(x: Tensor, y: Tensor | None, rows: Tensor) -> Tensor:
        if pack and y is not None and y.ndim == 2:
            x, y = packed(x, y)
        return loss(call(x), y, rows)

    if micro_batch is None or micro_batch >= len(rows):
        value = lost(x, y, rows)
        try:
            cast(Any, value).backward()
        except (AttributeError, RuntimeError) as error:
            check_loss(value, error)
            raise
        return value.detach()
    parts = sizes_of(len(rows), micro_batch)
    labels = [None] * len(parts) if y is None else y.split(parts)
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for part, own, some, share in zip(x.split(parts), labels, rows.split(parts), _shares(parts, labels), strict=True):
        if share:  # there may be no token that counts
            value = lost(part, own, some)
            try:
                value = share * value
                cast(Any, value).backward()
            except (AttributeError, RuntimeError, TypeError) as error:
                check_loss(value, error)
                raise
            total += value.detach()
    return total


def check_loss(value: Any, error: Exception) -> None:
    """Say what is wrong with a loss that gave no gradients, if it is the loss.

    Raises
    ------
    UserError
        Naming what it is and what is needed.
    """
    if not isinstance(value, Tensor):
        what = f"{value!r:.40}"
    elif value.numel() != 1:
        what = f"a tensor of shape {tuple(value.shape)}"
    elif not value.requires_grad:
        what = "a tensor that depends on nothing that is trained"
    else:
        return
    raise UserError(f"the loss of a batch is {what}; a scalar tensor with gradients is needed") from error


def _shares(sizes: Sequence[int], labels: Sequence[Tensor | None]) -> list[float]:
    """What each part of a batch weighs in the batch's mean: its rows, or its tokens that count."""
    counts = [
        size if own is None or own.ndim == 1 else int((own[:, 1:] != IGNORED).sum())
        for size, own in zip(sizes, labels, strict=True)
    ]
    return [count / max(1, sum(counts)) for count in counts]


@contextlib.contextmanager
def rates(
    optimizer: torch.optim.Optimizer, rate: Callable[[int, int], float] | None
) -> Iterator[Callable[[int, int], None]]:
    """Give a function that sets the rates of step k of K to `rate(k, K)` times what they were; they are put back."""
    before = [group["lr"] for group in optimizer.param_groups]

    def put(step: int, steps: int) -> None:
        if rate is not None:
            for group, base in zip(optimizer.param_groups, before, strict=True):
                group["lr"] = base * rate(step, steps)

    try:
        yield put
    finally:
        for group, base in zip(optimizer.param_groups, before, strict=True):
            group["lr"] = base


@contextlib.contextmanager
def only(model: nn.Module, wanted: Sequence[nn.Parameter]) -> Iterator[None]:
    """Freeze what else of a model is trained, for a while."""
    chosen = {id(p) for p in wanted}
    frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
