"""What strategies that exchange adapters share: hyper-parameters, what travels, both halves.

All clients of an architecture hold the same frozen base W₀ (equal seeded weights, or the same checkpoint); it
never travels. Adapters start equal too, drawn from the run's seed. Heads (`head`, `classifier`, `score`,
`fc`) are trained beside the adapters: aggregated with them, or personal and kept by each client, or frozen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from fedfuse.config.registry import hyper
from fedfuse.core.client import FusionClient
from fedfuse.core.shares import Metrics, Records, Share, Shares
from fedfuse.core.strategy import FusionStrategy
from fedfuse.errors import UserError
from fedfuse.families.lora import at_most, cut, is_head, part, rank_of
from fedfuse.train.adapters import in_parts
from fedfuse.wire.knowledge import Item, Topic
from fedfuse.wire.records import Arrays, Scope, layout_of
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
