"""What strategies share that merge weights: task vectors of whole networks, or of adapters over a frozen base.

θ₀ is the round's broadcast, θ_k what client k makes of it, and τ_k = θ_k − θ₀ its task vector. On adapters θ is what
is trained and travels, LoRA's A and B and the head, each array by itself: the product B A is never merged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedfuse.config.registry import hyper
from fedfuse.core.shares import Share, Shares
from fedfuse.errors import UserError
from fedfuse.families import lora
from fedfuse.families.averaging import AnchoredClient, AveragingStrategy
from fedfuse.models import parts
from fedfuse.wire.records import Arrays, Layout, Scope
from fedfuse.wire.sums import Sum

# λ·K where merging is repeated: 1 is the mean; the papers' 2 to 3, of one merge, diverges after some rounds on digits
REPEATED = 1.2
SHORTER = 0.3  # λ where a whole step of the papers' would be repeated in every round


@dataclass(frozen=True)
class MergingHyper:
    """Hyper-parameters of every strategy that merges weights.

    Raises
    ------
    UserError
        If a setting of adapters is given and there are none.
    """

    rank: int | None = hyper(
        None, "r: adapters of this rank and the head are trained and merged; null: the whole network", low=1
    )
    alpha: float | None = hyper(None, "α in the adapters' scale s = α/r; null: r, so s = 1", above=0)
    targets: str = hyper("auto", "adapted layers, patterns of dotted names; auto: every linear layer but heads")

    dropout: ClassVar[float] = 0.0
    head: ClassVar[str] = "aggregated"

    def __post_init__(self) -> None:
        if self.rank is None and self.alpha is not None:
            raise UserError(f"strategy.alpha={self.alpha} goes with adapters: set strategy.rank")
        if self.rank is None and self.targets != "auto":
            raise UserError(f"strategy.targets={self.targets} goes with adapters: set strategy.rank")


@dataclass(frozen=True)
class StepHyper(MergingHyper):
    """Hyper-parameters of a strategy whose paper merges once, and whose merge is repeated here."""

    lam: float | None = hyper(
        None, "λ, factor on the step to what is merged; null: 1 in a run of one round (paper), else 0.3 (ours)", above=0
    )


class MergingClient(AnchoredClient):
    """Client half: trains what it was sent, on a network or on adapters, and sends it back."""

    @staticmethod
    def equip(model: nn.Module, hyper: Any, build: Callable[[str], nn.Module]) -> nn.Module:
        """Add adapters, where a rank says so."""
        return model if hyper.rank is None else lora.equip(model, hyper)


class MergingStrategy(AveragingStrategy):
    """Server half: publishes θ₀ plus what `merge` makes of the task vectors; buffers are averaged by examples.

    A client without examples has no task.
    """

    @property
    def sums(self) -> Mapping[str, str | None]:
        """None: merging looks at all task vectors side by side."""
        return {}

    @property
    def merged(self) -> list[str]:
        """Names of the arrays that are merged: parameters that travel, without buffers."""
        return parameters(self.workspace.model(self.architecture), self.workspace.initial(self.architecture))

    @property
    def lam(self) -> float:
        """λ of `StepHyper`: as said, else the papers' 1 of one merge, and less where rounds repeat it."""
        said: float | None = self.hyper.lam
        if said is not None:
            return said
        return 1.0 if self.scenario.config.rounds == 1 else SHORTER

    def planned(self) -> str:
        """λ, where it is null."""
        follows = isinstance(self.hyper, StepHyper) and self.hyper.lam is None
        return f"strategy.lam=null is 1 in a run of one round, {SHORTER} in one of several" if follows else ""

    def vectors(self, shares: Iterable[Share]) -> tuple[list[Arrays], Arrays]:
        """Task vectors τ_k in float64, of clients with examples, and the mean of the buffers."""
        start, names, taught, rest = self.model, self.merged, list[Arrays](), Sum()
        parameters = parts.parameters(self.workspace.model(self.architecture))
        for share in shares:
            if not share.examples:
                continue
            end = share.records["model"]
            taught.append({name: end[name].double() - start[name].double() for name in names})
            rest.add(share.group, parts.without(end, parameters), share.examples)
        return taught, rest.mean()

    def merge(self, vectors: Sequence[Arrays]) -> Arrays:
        """One vector made of τ_1, …, τ_K, by name, in float64."""
        raise NotImplementedError

    def fuse(self, shares: Shares) -> None:
        """θ ← θ₀ + merge(τ_1, …, τ_K)."""
        vectors, buffers = self.vectors(shares)
        self.publish("model", {**self.moved(self.merge(vectors)), **buffers})

    def fuse_sum(self, shares: Shares, factor: float | None) -> None:
        """θ ← θ₀ + λ Σ_k τ_k, of the record `model` summed with weight 1; λ of None is `REPEATED`/K."""
        mean, (total, count), start = shares.mean("model"), shares.total("model"), self.model
        lam = REPEATED / count if factor is None else factor
        by = {name: lam * (total[name] - count * start[name].double()) for name in self.merged}
        self.publish("model", {**mean, **self.moved(by)})

    def moved(self, by: Arrays) -> Arrays:
        """θ₀ plus a vector, in the dtype that travels."""
        start = self.model
        out = {name: (start[name].double() + value).to(start[name].dtype) for name, value in by.items()}
        return parts.with_tied(self.workspace.model(self.architecture), out)


def parameters(module: nn.Module, there: Iterable[str]) -> list[str]:
    """Names of a model's parameters among those that travel, a tied one once: it moves once."""
    known = set(there)
    return [name for name, _ in module.named_parameters() if name in known]


def parameter_arrays(scope: Scope) -> Layout:
    """Spec: the arrays that are merged."""
    return {name: scope.model[name] for name in parameters(scope.module, scope.model)}


def rest_arrays(scope: Scope) -> Layout:
    """Spec: the arrays that are not merged, a model's buffers."""
    merged = set(parts.parameters(scope.module))
    return {name: layout for name, layout in scope.model.items() if name not in merged}


def flat(vectors: Sequence[Arrays]) -> Tensor:
    """Task vectors as the rows of one matrix (K × P)."""
    return torch.stack([torch.cat([value.flatten() for value in vector.values()]) for vector in vectors])


def shaped(values: Tensor, like: Arrays) -> Arrays:
    """A row of `flat` as arrays again."""
    pieces = values.split([value.numel() for value in like.values()])
    return {name: piece.view_as(like[name]) for name, piece in zip(like, pieces, strict=True)}


def largest(scores: Tensor, fraction: float) -> Tensor:
    """Mask of the round(fraction·n) greatest of n scores, at least one; of equal scores the first.

    Parameters
    ----------
    scores : Tensor
        Of any shape.
    fraction : float
        In (0, 1].
    """
    count = max(1, round(fraction * scores.numel()))
    order = scores.flatten().argsort(descending=True, stable=True)[:count]
    return torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device).scatter(0, order, True).view_as(scores)
