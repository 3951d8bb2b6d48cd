"""A strategy made to be disturbed: every client keeps books, and the books must agree with the server's.

Client i adds an amount to its own total and sends that amount; the server adds up what it accepted. However many
replies are lost or refused, the totals of the states that the server believes in must equal the server's.
Beside the books it uses each kind of topic: a state, a lesson for one client, and a fold that skips versions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fedfuse import FusionClient, FusionStrategy, Item, Metrics, Records, Shares, Topic, arrays, hyper
from fedfuse.config import registry
from fedfuse.config.registry import Entry


def grown(value: dict[str, torch.Tensor], increment: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A fold that does not commute: half of what was, plus an outer product."""
    return {"w": value["w"] * 0.5 + increment["a"][:, None] * increment["a"][None]}


@dataclass(frozen=True)
class LedgerHyper:
    """How often the base grows."""

    every: int = hyper(2, "rounds between two increments of the base", low=1)


class LedgerClient(FusionClient):
    """Keeps its own total, and traces of all that it took in."""

    def receive(self, knowledge: Mapping[str, Item]) -> None:
        if "base" in knowledge:
            self.base = knowledge["base"].arrays["w"]
        if "advice" in knowledge:
            seen = self.state.setdefault("advice", {"versions": [], "sum": torch.zeros(1, dtype=torch.float64)})
            seen["versions"] = [*seen["versions"], knowledge["advice"].version]
            seen["sum"] = seen["sum"] + knowledge["advice"].arrays["v"].double()

    def fit(self) -> Metrics:
        amount = torch.randint(1, 1000, (1,), generator=self.generator("amount")).double() + self.base.sum().double()
        self.state["total"] = self.state.get("total", torch.zeros(1, dtype=torch.float64)) + amount
        self.state["fits"] = self.state.get("fits", 0) + 1
        self.amount = amount
        return {"num-examples": len(self.x)}

    def share(self) -> Records:
        return {"entry": {"amount": self.amount}}

    def evaluate(self) -> tuple[Records, Metrics]:
        return {}, {"personal/fits": self.state.get("fits", 0)}


class Ledger(FusionStrategy):
    """Adds up what it accepted."""

    topics = {
        "base": Topic("fold", arrays(w=(6, 6)), grown, arrays(a=(6,))),
        "advice": Topic("lesson", arrays(v=(1,))),
    }
    records = {"entry": arrays(amount=("float64", 1))}

    def begin(self) -> None:
        self.publish("base", {"w": torch.zeros(6, 6)})

    def fuse(self, shares: Shares) -> None:
        books = self.state.setdefault("books", {})
        for share in shares:
            amount = share.records["entry"]["amount"]
            books[str(share.client)] = books.get(str(share.client), torch.zeros(1, dtype=torch.float64)) + amount
            self.publish("advice", {"v": amount.float()}, to=share.client)
        if self.round % self.hyper.every == 0:
            self.publish("base", {"a": torch.randn(6, generator=self.generator("base"))})


def enter(
    monkeypatch: pytest.MonkeyPatch,
    server: type[Any] = Ledger,
    client: type[Any] = LedgerClient,
    hyper: type[Any] = LedgerHyper,
    name: str = "ledger",
) -> str:
    """Register a strategy for the length of one test."""
    monkeypatch.setitem(registry.registered, name, Entry(name, server, client, hyper, ""))
    return name


Drop = Callable[[Any, Any], bool]


def losing(*lost: tuple[int, int]) -> Drop:
    """Replies to training messages that never arrive: (round, client)."""

    def drop(message: Any, reply: Any) -> bool:
        if not message.metadata.message_type.startswith("train"):
            return False
        return (message.content["run"]["round"], message.metadata.dst_node_id - 1) in lost

    return drop
