"""Flower's own strategies as fusion strategies.

Sampling, commits, resume and traffic are ours, the rule is theirs. Flower's object is built anew each round and
sees the cohort as a grid; what must survive a round lives in `state`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower_strategies

from fedfuse.config.registry import hyper
from fedfuse.core.shares import Metrics, Share, Shares
from fedfuse.core.strategy import FusionStrategy
from fedfuse.core.workspace import Workspace
from fedfuse.engines.grid import LocalGrid
from fedfuse.errors import UserError
from fedfuse.families.averaging import AnchoredClient
from fedfuse.models import parts
from fedfuse.seeding import seed_everything
from fedfuse.train.training import proximal
from fedfuse.wire.records import Arrays, LiveArray, record, tensors


class FlowerClient(AnchoredClient):
    """Trains the received model; honours the configuration keys of Flower's strategies."""

    def fit(self) -> Metrics:
        """Cross-entropy, with FedProx's (μ/2)‖w − w_t‖² where the server sent `proximal-mu`."""
        mu = float(self.config.get("proximal-mu", 0.0))
        return self.train(after_backward=proximal(self.start, mu)) if mu else self.train()


class Cohort(LocalGrid):
    """A grid that shows a Flower strategy this round's nodes and nothing else."""

    def __init__(self, nodes: list[int]) -> None:
        super().__init__(len(nodes))
        self._nodes = nodes

    def get_node_ids(self) -> Iterable[int]:
        """Nodes of the round."""
        return self._nodes


@dataclass(frozen=True)
class FlowerHyper:
    """What every strategy of Flower's takes."""

    min_train_nodes: int = hyper(2, "least clients in a round", low=1)


class FlowerStrategy(FusionStrategy):
    """One of Flower's strategies; a subclass names it.

    Class attributes
    ----------------
    rule : str
        Class of `flwr.serverapp.strategy`; the hyper-parameters are its keyword arguments.
    metrics : dict of str to (float, float)
        What the rule is told of a client beside `num-examples`; it takes no replies of which one says more.
    kept : tuple of str
        Its attributes that must survive a round. FedOpt's `current_arrays` is set from the board each round.
    steps : bool
        Whether the rule makes a step of its own of what the mean moved. It is given the parameters alone then, and
        buffers are averaged: a step beyond the mean makes a running variance negative.

    Raises
    ------
    UserError
        If the cohort is smaller than the rule allows.
    """

    rule: ClassVar[str] = "FedAvg"
    kept: ClassVar[tuple[str, ...]] = ()
    steps: ClassVar[bool] = False
    heterogeneous = False

    def __init__(self, hyper: Any, workspace: Workspace) -> None:
        super().__init__(hyper, workspace)
        least = max(self.hyper.min_train_nodes, self.quorum)
        if self.scenario.cohort_size < least:
            raise UserError(
                f"strategy=flwr_{self.rule.lower()} needs at least {least} clients a round as it is set, "
                f"clients={self.scenario.clients} with participation="
                f"{self.scenario.config.participation} give {self.scenario.cohort_size}"
            )

    def options(self) -> dict[str, Any]:
        """Keyword arguments of the rule."""
        names = (field.name for field in fields(self.hyper))
        return {name: getattr(self.hyper, name) for name in names if name != "name"}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let Flower's rule configure the round; send its keys with our messages."""
        self.ensure_begun()
        self.round = server_round
        cohort = self.plan(server_round)
        nodes = [self.outbox.node_of(client) for client in cohort]
        seed_everything(self.scenario.seed, "flower", server_round)
        keys = ConfigRecord(dict(config))
        with quiet():
            self.inner = getattr(flower_strategies, self.rule)(
                fraction_train=1.0, min_available_nodes=self.hyper.min_train_nodes, **self.options()
            )
            for name in self.kept:
                if name in self.state:
                    setattr(self.inner, name, self.revive(name, self.state[name]))
            model = record(self.ruled(self.model))
            asked = list(self.inner.configure_train(server_round, model, keys, Cohort(nodes)))
        clients = dict(zip(nodes, cohort, strict=True))
        self.asked = {clients[message.metadata.dst_node_id]: message for message in asked}
        return self.messages(cohort, "train", {k: v for k, v in keys.items() if k != "server-round"})

    def fuse(self, shares: Shares) -> None:
        """Give Flower's rule the replies, publish its arrays, and keep what must survive."""
        everyone = [share for share in shares if share.examples > 0]
        replies = [self.reply(share) for share in everyone]
        with quiet():
            arrays, _ = self.inner.aggregate_train(self.round, replies)
        if arrays is None:
            return self.keep_published(self.round, len(replies) + 1)
        new, old = tensors(arrays), self.model
        new = {name: value.reshape(old[name].shape).to(old[name].dtype) for name, value in new.items()}
        weight = sum(share.examples for share in everyone)
        for name, value in old.items():
            if name not in new:  # a counter, or another buffer
                total = torch.as_tensor(sum(s.records["model"][name].double() * s.examples for s in everyone))
                mean = total / weight
                new[name] = (mean if value.is_floating_point() else mean.round()).to(value.dtype)
        self.publish("model", {name: new[name] for name in old})
        for name in self.kept:
            value = getattr(self.inner, name)
            if value is not None:
                self.state[name] = plain(value)

    def reply(self, share: Share) -> Message:
        """A share as the reply that Flower's rule expects; arrays are copies: some rules write into them."""
        arrays = ArrayRecord()
        for name, value in self.ruled(share.records["model"]).items():
            arrays[name] = LiveArray(value.numpy().copy())
        numbers = {name: share.metrics[name] for name in ("num-examples", *self.metrics)}
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord(numbers)})
        return Message(content, reply_to=self.asked[share.client])

    def ruled(self, arrays: Arrays) -> Arrays:
        """Return what the rule is given: floating-point arrays, in the architecture's own order.

        FedAvgM and QFedAvg pair arrays by position, and a checkpoint or a wire may bring them in another order.
        """
        order = self.workspace.initial(self.architecture)
        names = parts.parameters(self.workspace.model(self.architecture)) if self.steps else order
        return {name: arrays[name] for name, v in order.items() if v.is_floating_point() and name in names}

    def revive(self, name: str, kept: Mapping[str, torch.Tensor]) -> Any:
        """An attribute of the rule from what `state` holds."""
        return {key: value.numpy().copy() for key, value in kept.items()}

    def server_models(self) -> dict[str, tuple[str, Arrays]]:
        """The common model."""
        return {"model": (self.architecture, self.model)}


def plain(value: Any) -> Arrays:
    """An attribute of a Flower strategy (a record, arrays by name or a list) as tensors by name."""
    if isinstance(value, ArrayRecord):
        return tensors(value)
    named = value.items() if isinstance(value, Mapping) else ((str(i), v) for i, v in enumerate(value))
    return {name: torch.from_numpy(np.array(array)) for name, array in named}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Flower's progress lines to itself: ours say more."""
    logger = logging.getLogger("flwr")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
