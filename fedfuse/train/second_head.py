"""A second head on a network's features, for the length of one distillation: an objective trains it, nobody else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedfuse.errors import UserError
from fedfuse.seeding import seed_of
from fedfuse.train.objective import Loss


class Heads:
    """A linear head beside a network's own: it reads the features that the own head read last.

    Parameters
    ----------
    model : nn.Module
        With a module `head` and `feature_dim`.
    classes : int
        Columns of the second head.
    *seed_parts
        What its initial weights are drawn from.
    """

    def __init__(self, model: nn.Module, classes: int, *seed_parts: object) -> None:
        head = cast(nn.Module, model.head)
        own = next(head.parameters())
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(*seed_parts, "second head"))
            self.second = nn.Linear(int(cast(Any, model.feature_dim)), classes).to(own.device, own.dtype)
        self._model, self._features = model, torch.empty(0)
        self._hook = head.register_forward_pre_hook(self._look)

    def _look(self, module: nn.Module, given: tuple[Any, ...]) -> None:
        self._features = given[0]

    def __call__(self, logits: Tensor) -> Tensor:
        """The second head's logits of the rows whose own logits these are."""
        out: Tensor = self.second(self._features)
        if len(out) != len(logits):
            raise UserError(f"a second head read {len(out)} rows, the objective compares {len(logits)}")
        return out

    def excess(self, first: Tensor, second: Tensor) -> Tensor:
        """c with ∇second + c·∇first orthogonal to ∇first where the two pull apart; 0 where they do not."""
        params = [p for p in (*self._model.parameters(), *self.second.parameters()) if p.requires_grad]
        options: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        one, other = torch.autograd.grad(first, params, **options), torch.autograd.grad(second, params, **options)
        dot = sum(((a * b).sum() for a, b in zip(one, other, strict=True)), torch.zeros_like(first))
        square = sum((a.square().sum() for a in one), torch.zeros_like(first))
        return torch.where(dot < 0, -dot / square.clamp_min(torch.finfo(square.dtype).tiny), 0.0).detach()

    def beside(self, value: Tensor, logits: Tensor, labels: Tensor | None, gamma: float) -> Tensor:
        """γ·CE of the own head plus the second head's objective, its gradient projected off the cross-entropy's.

        Without labels, or where nothing is trained, the objective alone.
        """
        if labels is None or not value.requires_grad:
            return value
        ce = F.cross_entropy(logits, labels)
        return value + (gamma + self.excess(ce, value)) * ce

    def close(self) -> None:
        """Let go of the network."""
        self._hook.remove()


@contextlib.contextmanager
def attached(
    losses: Sequence[Loss], model: nn.Module, classes: int, *seed_parts: object
) -> Iterator[dict[str, list[nn.Parameter]]]:
    """Give each objective that has a second head its own, and take it away again.

    Parameters
    ----------
    losses
        The objectives of one training, whose state is taken up and kept by `followed` inside.
    model, classes, *seed_parts
        As of `Heads`.

    Yields
    ------
    dict
        `params` for `fedfuse.train.training.train`, or nothing.
    """
    made = []
    for i, loss in enumerate(losses):
        if loss.second_head:
            loss.heads_of = Heads(model, classes, *seed_parts, i)
            made.append(loss.heads_of)
    params = [p for p in model.parameters() if p.requires_grad]
    try:
        yield {"params": [*params, *(p for one in made for p in one.second.parameters())]} if made else {}
    finally:
        for one in made:
            one.close()
        for loss in losses:
            loss.heads_of = None
