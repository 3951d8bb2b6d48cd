"""What strategies that exchange adapters share: hyper-parameters, what travels, both halves.

All clients of an architecture hold the same frozen base W₀ (equal seeded weights, or the same checkpoint); it
never travels. Adapters start equal too, drawn from the run's seed. Heads (`head`, `classifier`, `score`,
`fc`) are trained beside the adapters: aggregated with them, or personal and kept by each client, or frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fedfuse.config.registry import hyper
from fedfuse.core.client import FusionClient
from fedfuse.core.shares import Metrics, Records, Share
from fedfuse.core.workspace import Workspace
from fedfuse.errors import UserError
from fedfuse.families import lora
from fedfuse.families.averaging import AveragingStrategy
from fedfuse.wire.knowledge import Item, Topic
from fedfuse.wire.records import Arrays, Scope, layout_of
from fedfuse.wire.sums import Sum


@dataclass(frozen=True)
class AdapterHyper:
    """Hyper-parameters of every strategy that exchanges adapters."""

    rank: int = hyper(8, "r, rank of the adapters", low=1)
    alpha: float | None = hyper(None, "α in the scale s = α/r; null: r, so s = 1 (papers: r/2 to 2r)", above=0)
    targets: str = hyper("auto", "adapted layers, patterns of dotted names; auto: every linear layer but heads")
    dropout: float = hyper(0.0, "dropout of the adapters' inputs", low=0, high=0.9)
    head: str = hyper("aggregated", "classification heads", choices=("aggregated", "personal", "frozen"))
    weighting: str = hyper("examples", "weights p_i: by examples n_i, or all alike", choices=("examples", "uniform"))


class AdapterClient(FusionClient):
    """Client half: trains adapters over the common base, and sends what it trains and does not keep.

    Class attributes
    ----------------
    trains : tuple of str
        Kinds of adapter arrays that are trained (`lora_A`, `lora_B`); the others stay as the seed drew them.
    own : tuple of str
        Kinds that stay with the client; a personal head does so too.
    averaged : str
        The record that is sent, and the topic that it comes back as.
    folded : str or None
        The topic of what is folded into the base, Δ; None where the base stays W₀.
    """

    trains: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")
    own: ClassVar[tuple[str, ...]] = ()
    averaged: ClassVar[str] = "adapter"
    folded: ClassVar[str | None] = None

    @classmethod
    def equip(cls, model: nn.Module, hyper: Any, build: Callable[[str], nn.Module]) -> nn.Module:
        """LoRA, with what is trained of it; over a base with Δ where updates are folded."""
        return lora.equip(model, hyper, trains=cls.trains, delta=cls.folded is not None)

    @property
    def rank(self) -> int:
        """r_i, where clients may differ in rank; else r."""
        return lora.rank_of(self.hyper, self.client) if getattr(self.hyper, "ranks", None) else int(self.hyper.rank)

    def receive(self, knowledge: Mapping[str, Item]) -> None:
        """Take over what is common, then what is the client's own."""
        for topic, item in knowledge.items():
            self.load(lora.deltas(item.arrays) if topic == self.folded else item.arrays, strict=False)
        self.restore()

    def restore(self) -> None:
        """Put back what the client keeps to itself."""
        if "own" in self.state:
            self.load(self.state["own"], strict=False)

    def fit(self) -> Metrics:
        """Train adapters and head; what lies beyond the client's rank is zero and stays so."""
        rank = self.rank
        more: dict[str, Any] = {}
        if rank != self.hyper.rank:
            more["after_backward"] = lambda model: lora.confine(model, rank)
        metrics = self.train(**more)
        self.keep()
        return metrics

    def keep(self) -> None:
        """Store what the client keeps to itself."""
        own = {n: v for n, v in self.weights().items() if lora.in_parts(n, self.own) and not lora.is_head(n)}
        if self.hyper.head == "personal":
            own |= {n: v for n, v in self.weights().items() if lora.is_head(n)}
        if own:
            self.state["own"] = own

    def parts(self, *kinds: str, head: bool = True) -> Arrays:
        """What `lora.part` says, of this client's model."""
        scope = Scope({}, layout_of(values := self.weights()), self.hyper)
        return {name: values[name] for name in lora.part(*kinds, head=head)(scope)}

    def share(self) -> Records:
        """Everything that is trained and not the client's own."""
        return {self.averaged: self.parts(*(kind for kind in self.trains if kind not in self.own))}


class AdapterStrategy(AveragingStrategy):
    """Server half: publishes the seed's adapters, and then the weighted mean of what clients make of them.

    Where a subclass says `kinds` or `folded`, its topics and records follow from them unless it says those itself.

    Class attributes
    ----------------
    averaged : str
        The topic, and the record that clients send of it.
    kinds : tuple of str
        The adapter arrays in it: what its clients train and do not keep.
    folded : str or None
        The topic of what is folded into the base, Δ (see `fedfuse.train.stack`); None where the base stays W₀.
    """

    averaged = "adapter"
    kinds: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")
    folded: ClassVar[str | None] = None
    topics = {"adapter": Topic("state", lora.part("lora_A", "lora_B"))}
    records = {"adapter": lora.part("lora_A", "lora_B")}

    def __init__(self, hyper: Any, workspace: Workspace) -> None:
        super().__init__(hyper, workspace)
        usual = type(hyper).head
        if hyper.head != usual and not any(map(lora.is_head, workspace.model(self.architecture).state_dict())):
            raise UserError(
                f"strategy.head={hyper.head}: model={self.architecture} has no classification head; allowed: {usual}"
            )

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        said, spec = vars(cls), cls.layout()
        if "kinds" not in said and "folded" not in said:
            return
        if "topics" not in said:
            folds = {cls.folded: Topic("fold", fold=lora.fold, increment=lora.increments)} if cls.folded else {}
            cls.topics = {cls.averaged: Topic("state", spec), **folds}
        if "records" not in said:
            cls.records = {cls.averaged: spec}

    @classmethod
    def layout(cls) -> Any:
        """Spec of what travels both ways."""
        return lora.part(*cls.kinds)

    def weight_of(self, share: Share) -> float:
        """p_i before normalisation; one who has no examples has nothing to say."""
        return float(share.examples) if self.weight else float(share.examples > 0)

    def parts(self, *kinds: str, head: bool = True) -> Arrays:
        """What `lora.part` says, of the initial model."""
        initial = self.workspace.initial(self.architecture)
        return {name: initial[name] for name in lora.part(*kinds, head=head)(self.workspace.scope(0, self.hyper))}

    @property
    def layers(self) -> dict[str, lora.Adapted]:
        """The adapted layers of the model, by name."""
        return lora.adapted(self.workspace.model(self.architecture))

    def begin(self) -> None:
        """Publish the initial adapters and head, over Δ = 0."""
        self.publish_initial()
        if self.folded:
            self.fold_nothing()

    def fold_nothing(self) -> None:
        """Δ = 0."""
        empty = lora.empty({name: (layer.outputs, layer.inputs) for name, layer in self.layers.items()})
        self.publish(cast(str, self.folded), empty)

    def publish_initial(self) -> None:
        """Publish version 0."""
        self.publish(self.averaged, self.parts(*self.kinds))

    def mean(self, shares: Iterable[tuple[Share, Arrays]]) -> Arrays:
        """Weighted mean of arrays made from shares, in float64 and client order."""
        total = Sum()
        for share, arrays in shares:
            total.add(share.group, arrays, self.weight_of(share))
        return total.mean()

    def weights_of(self, shares: Iterable[Share]) -> list[float]:
        """p_i of the clients, of sum 1."""
        weights = [self.weight_of(share) for share in shares]
        return [weight / sum(weights) for weight in weights]

    def dtype_of(self, share: Share) -> torch.dtype:
        """The dtype of what a client sent."""
        return next(iter(share.records[self.averaged].values())).dtype

    def factors(self, shares: Sequence[Share]) -> Iterator[tuple[str, float, list[Tensor], list[Tensor]]]:
        """Each layer's name, its s, and the clients' B_i (d × r_i) and A_i (r_i × k) in float64.

        Raises
        ------
        ValueError
            If B and A of one client differ in rank.
        """
        for name, layer in self.layers.items():
            bs, as_ = (
                [share.records[self.averaged][f"{name}.lora_{kind}.weight"].double() for share in shares]
                for kind in "BA"
            )
            if any(b.shape[1] != len(a) for b, a in zip(bs, as_, strict=True)):
                raise ValueError(f"{name}: A and B of one client differ in rank")
            yield name, layer.scale, bs, as_

    def fold(self, updates: Iterable[tuple[str, Tensor, Tensor]], dtype: torch.dtype) -> None:
        """Δ ← Δ + B A for each (layer, B, A): publish the factors."""
        increment: Arrays = {}
        for name, b, a in updates:
            increment[f"{name}.B"], increment[f"{name}.A"] = b.to(dtype), a.to(dtype)
        self.publish(cast(str, self.folded), increment)

    def state_of_model(self) -> Arrays:
        """All arrays of the common model but the frozen base: initial ones under what is published, over W₀ + Δ."""
        arrays = dict(self.workspace.initial(self.architecture))
        for (topic, to), item in self.board.items.items():
            if not to:
                found = lora.deltas(item.arrays) if topic == self.folded else item.arrays
                arrays |= {name: value for name, value in found.items() if name in arrays}
        return arrays

    def server_models(self) -> dict[str, tuple[str, Arrays]]:
        """The common model; none if something of it is personal."""
        if self.hyper.head == "personal":
            return {}
        return {"model": (self.architecture, self.state_of_model())}
