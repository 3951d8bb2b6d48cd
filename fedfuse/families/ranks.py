"""What strategies share whose clients hold adapters of different rank: each is sent its leading rank of one whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fedfuse.config.registry import hyper
from fedfuse.core.shares import Records, Share, Shares
from fedfuse.errors import UserError
from fedfuse.families import lora
from fedfuse.families.adapters import AdapterClient, AdapterHyper, AdapterStrategy
from fedfuse.wire.knowledge import Item
from fedfuse.wire.records import Arrays


@dataclass(frozen=True)
class RankedHyper(AdapterHyper):
    """Hyper-parameters where clients may differ in rank.

    Raises
    ------
    UserError
        If a rank is not between 1 and `rank`.
    """

    ranks: list[int] | None = hyper(  # noqa: RUF009 - a dataclass field
        None, "r_i of the clients, dealt round-robin, each at most `rank`; null: all alike"
    )

    def __post_init__(self) -> None:
        for rank in self.ranks or ():
            if not 1 <= rank <= self.rank:
                raise UserError(f"strategy.ranks has {rank}: allowed are 1 to strategy.rank={self.rank}")


class RankedClient(AdapterClient):
    """Client half: its model has adapters of the largest rank, zero beyond its own; what is zero stays so."""

    def receive(self, knowledge: Mapping[str, Item]) -> None:
        """Take the leading r_i of the common adapter, padded with zeros."""
        if self.averaged in knowledge:
            sent = lora.cut(knowledge[self.averaged].arrays, self.rank)
            self.load(lora.pad(sent, self.weights()), strict=False)
        self.restore()

    def share(self) -> Records:
        """What is trained, of one's own rank, and the head."""
        return {name: lora.cut(arrays, self.rank) for name, arrays in super().share().items()}


class RankedStrategy(AdapterStrategy):
    """Server half: keeps the adapter of full rank, sends each client its rank of it.

    Class attributes
    ----------------
    kept : str
        What the adapter of full rank is called in the server's state.
    """

    kept: ClassVar[str] = "whole"
    kinds: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")
    sums = {}

    @classmethod
    def layout(cls) -> Any:
        """Spec of what travels both ways: of any rank up to the largest."""
        return lora.at_most(super().layout())

    def publish_initial(self) -> None:
        """Version 0, cut to each client's rank."""
        self.publish_whole(self.parts(*self.kinds))

    def publish_whole(self, whole: Arrays) -> None:
        """Keep the whole, and publish it to all or, where ranks differ, to each client its rank of it."""
        self.state[self.kept] = whole
        if not self.hyper.ranks:
            self.publish(self.averaged, whole)
            return
        for client in range(self.scenario.clients):
            self.publish(self.averaged, lora.cut(whole, lora.rank_of(self.hyper, client)), to=client)

    def padded(self, share: Share) -> Arrays:
        """What a client sent, zero beyond its rank."""
        return lora.pad(share.records[self.averaged], self.state[self.kept])

    def fuse(self, shares: Shares) -> None:
        """Weighted mean of what clients sent, zero beyond their ranks."""
        self.publish_whole(self.mean((share, self.padded(share)) for share in shares))

    def state_of_model(self) -> Arrays:
        """The model of full rank."""
        return super().state_of_model() | self.state.get(self.kept, {})
