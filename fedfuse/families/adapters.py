"""What strategies that exchange adapters share: hyper-parameters, what travels, both halves.

All clients of an architecture hold the same frozen base W₀ (equal seeded weights, or the same checkpoint); it
never travels. Adapters start equal too, drawn from the run's seed. Heads (`head`, `classifier`, `score`,
`fc`) are trained beside the adapters: aggregated with them, or personal and kept by each client, or frozen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedfuse.config.registry import hyper
from fedfuse.core.client import FusionClient, Metrics, Records
from fedfuse.core.strategy import FusionStrategy, Share, Shares
from fedfuse.errors import UserError
from fedfuse.train.adapters import HEADS, Adapted, LoRA, in_parts, inject
from fedfuse.wire.knowledge import Item, Topic
from fedfuse.wire.records import Arrays, Layout, Scope, Spec, layout_of
from fedfuse.wire.sums import Sum


@dataclass(frozen=True)
class AdapterHyper:
    """Hyper-parameters of every strategy that exchanges adapters."""

    rank: int = hyper(8, "r, rank of the adapters", low=1)
    alpha: float | None = hyper(None, "α in the scale s = α/r; null: 2r", above=0)
    targets: str = hyper("auto", "adapted layers, patterns of dotted names; auto: every linear layer but heads")
    dropout: float = hyper(0.0, "dropout of the adapters' inputs", low=0, high=0.9)
    head: str = hyper("aggregated", "classification heads", choices=("aggregated", "personal", "frozen"))
    weighting: str = hyper("examples", "weights p_i: by examples n_i, or all alike", choices=("examples", "uniform"))


@dataclass(frozen=True)
class RankedHyper(AdapterHyper):
    """Hyper-parameters where clients may differ in rank."""

    ranks: list[int] | None = hyper(  # noqa: RUF009 - a dataclass field
        None, "r_i of the clients, dealt round-robin, each at most `rank`; null: all alike"
    )


def equip(
    model: nn.Module,
    hyper: Any,
    layer: type[Adapted] = LoRA,
    trains: tuple[str, ...] = ("lora_A", "lora_B"),
    default_scale: float = 2.0,
    **options: Any,
) -> nn.Module:
    """Put adapters into a model; `trains` names their trained parts, the others are fixed."""
    scale = default_scale if hyper.alpha is None else hyper.alpha / hyper.rank
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


class AdapterClient(FusionClient):
    """Holds the common base with adapters; what it keeps to itself lies in its state.

    Attributes
    ----------
    own : tuple of str
        Kinds of adapter arrays that stay with the client; a personal head does so too.
    """

    own: ClassVar[tuple[str, ...]] = ()

    def receive(self, knowledge: Mapping[str, Item]) -> None:
        """Take over what is common, then what is the client's own."""
        for item in knowledge.values():
            self.load(item.arrays, strict=False)
        self.restore()

    def restore(self) -> None:
        """Put back what the client keeps to itself."""
        if "own" in self.state:
            self.load(self.state["own"], strict=False)

    def fit(self) -> Metrics:
        """Train adapters and head."""
        metrics = self.train()
        self.keep()
        return metrics

    def keep(self) -> None:
        """Store what the client keeps to itself."""
        own = {n: v for n, v in self.weights().items() if in_parts(n, self.own) and not is_head(n)}
        if self.hyper.head == "personal":
            own |= {n: v for n, v in self.weights().items() if is_head(n)}
        if own:
            self.state["own"] = own

    def parts(self, *kinds: str, head: bool = True) -> Arrays:
        """What `part` says, of this client's model."""
        scope = Scope({}, layout_of(values := self.weights()), self.hyper)
        return {name: values[name] for name in part(*kinds, head=head)(scope)}

    def share(self) -> Records:
        """Everything that is trained and not the client's own."""
        return {"adapter": self.parts("lora_A", "lora_B")}


class AdapterStrategy(FusionStrategy):
    """Server half: the common adapters are the topic `adapter`; every client starts from the seed's."""

    heterogeneous = False

    @property
    def sums(self) -> dict[str, str | None]:
        """The weighted mean is all that is needed."""
        return {"adapter": self.weight}

    @property
    def weight(self) -> str | None:
        """The metric that weighs clients."""
        return "num-examples" if self.hyper.weighting == "examples" else None

    def weight_of(self, share: Share) -> float:
        """p_i before normalisation."""
        return float(share.examples) if self.hyper.weighting == "examples" else 1.0

    def parts(self, *kinds: str, head: bool = True) -> Arrays:
        """What `part` says, of the initial model."""
        initial = self.residents.initial(self.architecture)
        return {name: initial[name] for name in part(*kinds, head=head)(self.residents.scope(0, self.hyper))}

    def begin(self) -> None:
        """Check the ranks and publish the initial adapters and head."""
        self.check_ranks()
        self.publish_initial()

    def publish_initial(self) -> None:
        """Publish version 0."""
        self.publish("adapter", self.parts("lora_A", "lora_B"))

    def check_ranks(self) -> None:
        """Refuse ranks that are not between 1 and `rank`.

        Raises
        ------
        UserError
            Naming the rank.
        """
        for rank in getattr(self.hyper, "ranks", None) or ():
            if not 1 <= rank <= self.hyper.rank:
                raise UserError(f"strategy.ranks has {rank}: allowed are 1 to strategy.rank={self.hyper.rank}")

    def publish_cut(self, topic: str, whole: Arrays) -> None:
        """Publish arrays to all or, where ranks differ, to each client its leading rank of them."""
        if not getattr(self.hyper, "ranks", None):
            self.publish(topic, whole)
            return
        for client in range(self.scenario.clients):
            self.publish(topic, cut(whole, rank_of(self.hyper, client)), to=client)

    def fuse(self, shares: Shares) -> None:
        """Weighted mean of what clients trained."""
        self.publish("adapter", shares.mean("adapter"))

    def mean(self, shares: Iterable[tuple[Share, Arrays]]) -> tuple[Arrays, list[Share]]:
        """Weighted mean of arrays made from shares, in float64 and client order; and the shares without arrays."""
        total, seen = Sum(), []
        for share, arrays in shares:
            total.add(share.group, arrays, self.weight_of(share))
            seen.append(Share(share.client, {}, share.metrics))
        return total.mean(), seen

    def state_of_model(self) -> Arrays:
        """All arrays of the common model but the frozen base: initial ones under what is published."""
        arrays = dict(self.residents.initial(self.architecture))
        for (_, to), item in self.board.items.items():
            if not to:
                arrays |= {name: value for name, value in item.arrays.items() if name in arrays}
        return arrays

    def server_models(self) -> dict[str, tuple[str, Arrays]]:
        """The common model; none if heads are personal."""
        if self.hyper.head == "personal":
            return {}
        return {"model": (self.architecture, self.state_of_model())}


class RankedStrategy(AdapterStrategy):
    """Server half where ranks may differ: keeps the adapter of full rank, sends each client its rank of it."""

    topics = {"adapter": Topic("state", at_most(part("lora_A", "lora_B")))}
    records = {"adapter": at_most(part("lora_A", "lora_B"))}
    sums = {}

    def publish_initial(self) -> None:
        """Version 0, cut to each client's rank."""
        self.publish_whole(self.parts("lora_A", "lora_B"))

    def publish_whole(self, whole: Arrays) -> None:
        """Keep the whole, and send each client its rank of it."""
        self.state["whole"] = whole
        self.publish_cut("adapter", whole)

    def state_of_model(self) -> Arrays:
        """The model of full rank."""
        return super().state_of_model() | self.state["whole"]
