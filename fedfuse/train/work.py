"""Work is counted, not measured: examples that passed through a network, times the FLOPs of one of them.

FLOPs of one example are torch's own count (`FlopCounterMode`) of one pass forward, or forward and backward, made once
for each network in a process; they depend on the network alone, so every process counts alike. Examples that were
trained on are counted always, FLOPs where somebody asks (`counting`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fedfuse.compat.torch_hooks import without_hooks
from fedfuse.models.in_place import evaluating


@dataclass
class Tally:
    """What was counted so far.

    Attributes
    ----------
    examples : int
        That passed forward and backward, each as often as it did.
    flops : int
    unit : int
        FLOPs of one example forward and backward through the network that was trained first; without any training,
        of one example forward.
    """

    in_flops: bool
    examples: int = 0
    flops: int = 0
    unit: int = 0
    trained: bool = False


_tally: ContextVar[Tally | None] = ContextVar("tally", default=None)  # clients that take turns have one each
_known: WeakKeyDictionary[nn.Module, dict[Any, int]] = WeakKeyDictionary()


@contextlib.contextmanager
def counting(in_flops: bool = True) -> Iterator[Tally]:
    """Count what is trained inside, and in FLOPs what is trained and predicted."""
    tally = Tally(in_flops)
    token = _tally.set(tally)
    try:
        yield tally
    finally:
        _tally.reset(token)


@functools.cache
def warm_up() -> None:
    """Count something once: a process's first count has torch import its compiler, seconds that are no client's."""
    _counted(nn.Linear(1, 1), torch.zeros(1, 1), True, None)


def note(
    model: nn.Module,
    x: Tensor,
    rows: int,
    backward: bool,
    forward: Callable[[Tensor], Any] | None = None,
    examples: int | None = None,
) -> None:
    """Count `rows` examples like those of `x` that passed through a network, if anybody counts.

    A `forward` that is a method of the network is counted in its place; any other may look at what it likes. `examples`
    is told in the place of `rows` where that was drawn and stays here.
    """
    tally = _tally.get()
    if tally is None:
        return
    if backward:
        tally.examples += rows if examples is None else examples
    if not rows or not tally.in_flops:
        return
    own = forward if getattr(forward, "__self__", None) is model else None
    one = flops(model, x[:1], backward, own)
    tally.flops += rows * one
    if (backward and not tally.trained) or not tally.unit:
        tally.unit, tally.trained = one, backward


def flops(model: nn.Module, x: Tensor, backward: bool, forward: Callable[[Tensor], Any] | None = None) -> int:
    """FLOPs of one pass of a batch, forward, or forward and backward to what is trained."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) if backward else 0
    key = (tuple(x.shape), str(x.dtype), trained, getattr(forward, "__name__", ""))
    known = _known.setdefault(model.__dict__.get("twin", model), {})  # replicas of a model are counted once
    if key not in known:
        known[key] = _counted(model, x, backward and trained > 0, forward)
    return known[key]


def _counted(model: nn.Module, x: Tensor, backward: bool, forward: Callable[[Tensor], Any] | None) -> int:
    """One pass in evaluation mode, which leaves buffers, gradients and random numbers as they are and calls no hook."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    fork = torch.random.fork_rng(devices=[x.device] if x.is_cuda else [])
    with without_hooks(model), evaluating(model), fork, torch.set_grad_enabled(backward), counter:
        out = (forward or model)(x)
        if backward:
            wanted = [p for p in model.parameters() if p.requires_grad]
            torch.autograd.grad(_scalar(out), wanted, allow_unused=True)
    return int(counter.get_total_flops())


def _scalar(out: Any) -> Tensor:
    if isinstance(out, Tensor):
        return out.sum()
    return torch.stack([_scalar(one) for one in out if one is not None]).sum()
