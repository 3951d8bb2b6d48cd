"""What strategies share whose clients keep a part of the model: the rest is averaged, the part never leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

from torch import nn

from fedfuse.core.client import FusionClient
from fedfuse.core.shares import Metrics, Records
from fedfuse.families.averaging import AveragingStrategy
from fedfuse.models.parts import head, without
from fedfuse.wire.knowledge import Item, Topic
from fedfuse.wire.records import Arrays, Layout, Scope


class Part(NamedTuple):
    """How a model is divided; both halves of a strategy name the same.

    Attributes
    ----------
    kept : str
        What clients keep, as their state calls it.
    shared : str
        What is common: the topic, and the record of it.
    names : callable
        `names(module, hyper)`, the names of the arrays kept.
    """

    kept: str
    shared: str
    names: Callable[[nn.Module, Any], list[str]]

    def layout(self, scope: Scope) -> Layout:
        """Spec: all arrays but those kept."""
        kept = set(self.names(scope.module, scope.hyper))
        return {name: layout for name, layout in scope.model.items() if name not in kept}


HEAD = Part("head", "body", lambda module, hyper: head(module))


class PartClient(FusionClient):
    """Client half: loads what is common over its own part, trains, keeps the part and sends the rest."""

    part: ClassVar[Part] = HEAD

    def receive(self, knowledge: Mapping[str, Item]) -> None:
        """Load what is common, and one's own part."""
        self.load({**knowledge[self.part.shared].arrays, **self.state.get(self.part.kept, {})}, strict=False)

    def fit(self) -> Metrics:
        """Train everything jointly; keep the part."""
        metrics = self.train()
        self.keep()
        return metrics

    def keep(self) -> None:
        """Store the part."""
        weights = self.weights()
        names = self.part.names(self.model, self.hyper)
        if kept := {name: weights[name] for name in names if name in weights}:
            self.state[self.part.kept] = kept

    def share(self) -> Records:
        """Everything but the part."""
        return {self.part.shared: without(self.weights(), self.part.names(self.model, self.hyper))}


class PartStrategy(AveragingStrategy):
    """Server half: the mean of what is common. It has no model to score: that would lack the part."""

    part: ClassVar[Part] = HEAD

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.averaged = cls.part.shared
        cls.topics = {cls.averaged: Topic("state", cls.part.layout)}
        cls.records = {cls.averaged: cls.part.layout}

    def begin(self) -> None:
        """Publish the initial arrays but the part."""
        initial: Arrays = self.workspace.initial(self.architecture)
        names = self.part.names(self.workspace.model(self.architecture), self.hyper)
        self.publish(self.averaged, without(initial, names))
