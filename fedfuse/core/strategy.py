"""The server half every algorithm extends: Flower's `Strategy`, with knowledge instead of one model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from fedfuse.core.exchange import Exchange
from fedfuse.core.scenario import variable
from fedfuse.core.shares import INVALID, Metrics, Records, Share, Shares
from fedfuse.seeding import generator
from fedfuse.train import training
from fedfuse.train.losses import Loss, chosen
from fedfuse.train.objective import followed
from fedfuse.wire.knowledge import Topic, address_of, model_topic
from fedfuse.wire.records import Arrays, Scope, Spec, model_arrays


class FusionStrategy(Exchange):
    """One federated knowledge-fusion algorithm, server half.

    A subclass declares what travels and overrides `fuse`; often nothing else. It runs on any Flower `Grid`.

    Class attributes
    ----------------
    topics : dict of str to Topic
        Knowledge the server publishes.
    records : dict of str to Spec
        Layout of what clients share; a reply of another layout is rejected. None checks finiteness only.
    sums : dict of str to (str or None)
        Records of which `fuse` needs only the weighted sum, and the metric that weighs them (None: 1).
    setup : tuple of str
        Phases before round 1; phase p pairs the client's method p with `fuse_p`.
    transfer : {"none", "server", "clients", "both"}
        Who needs the transfer set.
    heterogeneous : bool
        Whether clients may have different architectures.
    pooled : bool
        The clients' training data is joined at client 0: an upper bound, not a federation.
    needs_features : bool
        Whether models must have `features(x)`, `head(z)` and `feature_dim`.
    same_features : bool
        Whether `feature_dim` must be the same in all architectures.
    discloses : tuple of str
        What of the private examples themselves leaves a client ("labels", "features"); said in the run's notes.

    Attributes
    ----------
    hyper
        Hyper-parameters (an instance of the registered dataclass).
    state : dict
        Server-side tensors and plain values; with the board, all that is checkpointed.
    round : int
        Current round, 0 before the first.
    """

    topics: ClassVar[dict[str, Topic]] = {"model": model_topic()}
    records: ClassVar[dict[str, Spec | None]] = {"model": model_arrays}
    setup: ClassVar[tuple[str, ...]] = ()
    transfer: ClassVar[Literal["none", "server", "clients", "both"]] = "none"
    heterogeneous: ClassVar[bool] = True
    pooled: ClassVar[bool] = False
    needs_features: ClassVar[bool] = False
    same_features: ClassVar[bool] = False
    discloses: ClassVar[tuple[str, ...]] = ()

    # -- what an algorithm writes --------------------------------------------------------------------------

    @property
    def sums(self) -> Mapping[str, str | None]:
        """Records of which `fuse` needs only the weighted sum; a class attribute where nothing depends on hyper."""
        return {}

    def begin(self) -> None:
        """Publish version 0: by default each architecture's initial model, if there is a topic `model`."""
        if "model" in self.topics:
            names = sorted(set(self.scenario.architectures))
            if len(names) == 1:
                self.publish("model", self.residents.initial(names[0]))
            else:
                for name in names:
                    self.publish("model", self.residents.initial(name), to=name)

    def phases(self, round: int) -> tuple[str, ...]:
        """Phases of a round."""
        return ("train",)

    def cohort(self, round: int, sampled: list[int]) -> list[int]:
        """Clients of this round; may only add to the platform's sample."""
        return sampled

    def fuse(self, shares: Shares) -> None:
        """Turn what all shared into what each gets: publish it."""
        raise NotImplementedError

    def server_models(self) -> dict[str, tuple[str, Arrays]]:
        """Models the server can score on the global test set: name to (architecture, arrays)."""
        return {}

    def server_halves(self) -> dict[str, tuple[str, Arrays, tuple[int, ...]]]:
        """Networks of the server that predict only behind a client's: name to (architecture, arrays, input shape)."""
        return {}

    def predict(self, model: nn.Module, x: torch.Tensor, batch_size: int) -> torch.Tensor:
        """Logits of a server model."""
        return training.predict(model, x, batch_size)

    def judge(self, shares: Iterable[Share]) -> list[tuple[int, Metrics]]:
        """Metrics per client, where predicting needs both halves (split learning)."""
        return []

    @classmethod
    def examine(cls, scope: Scope, records: Records) -> None:
        """Refuse a share whose layout is right and whose values make no sense: raise `InvalidArrays`.

        Runs beside the client or at the server, on what is there of a share's records, before `fuse` or any sum.
        """

    @property
    def made_from(self) -> str:
        """What version 0 was made from; said of private runs."""
        return "initial weights, which no private example has touched"

    # -- what it uses --------------------------------------------------------------------------------------

    @property
    def classes(self) -> int:
        """Number of classes C."""
        return self.scenario.classes

    @property
    def architecture(self) -> str:
        """The architecture, where there is only one."""
        return self.scenario.architectures[0]

    @property
    def model(self) -> Arrays:
        """The published model common to all."""
        return self.board.items["model", ""].arrays

    def publish(self, topic: str, arrays: Arrays, to: int | str | None = None) -> None:
        """Put knowledge on the board for everyone, one client (int) or one architecture (str)."""
        self.board.publish(topic, arrays, to, self.round)

    def published(self, topic: str, to: int | str | None = None) -> Arrays:
        """The newest value of a topic."""
        return self.board.items[topic, address_of(to)].arrays

    def generator(self, *purpose: object) -> torch.Generator:
        """A generator seeded by (run seed, purpose, round)."""
        return generator(self.scenario.seed, "server", *purpose, self.round)

    def loss(self, default: str = "kl", **options: Any) -> Loss:
        """The next training's distillation objective: `loss=<name>` if the user chose one, else the paper's own.

        What a stateful one learns (TAID's τ) is kept in `state["losses"]`.
        """
        self._losses.append(chosen(self.scenario.config.loss, default, **options))
        return self._losses[-1]

    def train(
        self,
        model: nn.Module,
        x: torch.Tensor,
        y: torch.Tensor | None,
        loss: Callable[[Any, Any, torch.Tensor], torch.Tensor],
        *,
        purpose: str,
        **options: Any,
    ) -> Arrays:
        """Train a network of the server's in place and return a copy of its weights, for `state` or `publish`.

        Parameters
        ----------
        model : nn.Module
            For example `self.residents.loaded(architecture, arrays)`.
        x, y : Tensor
            Examples, and labels or None.
        loss : callable
            `loss(logits, labels, rows) -> scalar`; rows are indices into `x`.
        purpose : str
            Names the random stream that orders the batches, and the logged `loss/<purpose>`.
        **options
            Passed to `fedfuse.train.training.train`.
        """
        moment = (self.scenario.seed, "server", purpose, self.round)
        losses, self._losses = self._losses, []
        span = self.scenario.span(self.round)
        with followed(losses, self.state, purpose, span, options.pop("after_step", None)) as more:
            result = training.train(model, x, y, loss, self.scenario.config.train, moment, **{**more, **options})
        self.log(f"loss/{purpose}", result["loss"])
        return {name: value.detach().clone() for name, value in variable(model).items()}

    def exclude(self, share: Share, reason: str) -> None:
        """Count a share as rejected that only `fuse` or `judge` can tell is wrong, and that it does not use.

        The client goes on from the state before it: what both ends keep of earlier rounds still agrees.
        """
        if share.client in self._earlier:
            self.tags[share.client] = self._earlier[share.client]
        self._leave_out(share.client, reason, INVALID)

    def log(self, metric: str, value: float, client: int = -1, scope: str = "server", split: str = "train") -> None:
        """Keep a figure of this round in `metrics.parquet`."""
        self.logged.append((scope, client, split, metric, float(value)))

    def log_matrix(self, name: str, clients: list[int], matrix: torch.Tensor) -> None:
        """Keep a client-by-client matrix of this round (similarities, fusion weights)."""
        for i, row in zip(clients, matrix.tolist(), strict=True):
            for j, value in zip(clients, row, strict=True):
                self.log(f"{name}/{i}/{j}", value, scope="matrix")
