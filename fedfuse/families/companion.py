"""What strategies share whose clients keep a network of their own beside a common one, its companion, that travels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import nn

from fedfuse.core.client import FusionClient
from fedfuse.core.shares import Metrics, Records
from fedfuse.core.workspace import Workspace
from fedfuse.families.averaging import AveragingStrategy
from fedfuse.models.pair import joined, paired, private_part, shared_arrays, shared_part
from fedfuse.wire.knowledge import Item, Topic
from fedfuse.wire.records import Arrays


class CompanionClient(FusionClient):
    """Client half: its model is a pair of networks; a subclass says by `mutual` how they learn from each other.

    Class attributes
    ----------------
    averaged : str
        What the companion is called: the topic, the record, and the hyper-parameter that names its architecture.

    Attributes
    ----------
    start : dict of str to Tensor
        The companion as it was sent.
    """

    averaged: ClassVar[str]
    start: Arrays

    @classmethod
    def equip(cls, model: nn.Module, hyper: Any, build: Callable[[str], nn.Module]) -> nn.Module:
        """Add the companion."""
        return paired(model, getattr(hyper, cls.averaged), build)

    def receive(self, knowledge: Mapping[str, Item]) -> None:
        """Take the companion; the own network is private."""
        self.start = knowledge[self.averaged].arrays
        self.load(joined(self.state.get("own") or private_part(self.weights()), self.start))

    def mutual(self) -> Metrics:
        """Train both networks."""
        raise NotImplementedError

    def fit(self) -> Metrics:
        """Train both networks on private data; keep the own one."""
        metrics = self.mutual()
        self.state["own"] = private_part(self.weights())
        return metrics

    def share(self) -> Records:
        """The companion alone."""
        return {self.averaged: shared_part(self.weights())}


class CompanionStrategy(AveragingStrategy):
    """Server half: the mean of the companions. Own networks may be of any architecture."""

    heterogeneous = True
    bare = True
    uncovered = "trains on private examples with a loss of its own"

    def __init__(self, hyper: Any, workspace: Workspace) -> None:
        super().__init__(hyper, workspace)
        workspace.build(getattr(hyper, self.averaged))  # says now if there is no such architecture

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "topics" not in vars(cls):
            cls.topics = {cls.averaged: Topic("state", shared_arrays)}
        if "records" not in vars(cls):
            cls.records = {cls.averaged: shared_arrays}

    def begin(self) -> None:
        """Publish the initial companion."""
        self.publish(self.averaged, shared_part(self.workspace.initial(self.architecture)))

    def server_models(self) -> dict[str, tuple[str, Arrays]]:
        """The companion: the one network that all clients have made together."""
        return {self.averaged: (getattr(self.hyper, self.averaged), self.published(self.averaged))}
