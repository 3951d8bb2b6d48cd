"""The server half every algorithm extends: Flower's `Strategy`, with knowledge instead of one model."""

from __future__ import annotations

import contextlib
import json
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, ClassVar, Literal, Protocol, SupportsIndex

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import nn

from fedfuse.config import registry
from fedfuse.core.client_level import Noised
from fedfuse.core.collusion import added, agreed
from fedfuse.core.defended import Defended
from fedfuse.core.defended import quorum as defended_quorum
from fedfuse.core.inbox import Inbox
from fedfuse.core.outbox import Outbox, Request
from fedfuse.core.scenario import Scenario
from fedfuse.core.secure import plan_of
from fedfuse.core.settings import Settings
from fedfuse.core.shares import Metrics, Records, Share, Shares, nobody
from fedfuse.core.silence import KEPT, check_declared, too_few
from fedfuse.core.workspace import Workspace
from fedfuse.errors import UserError, WorldError, in_words
from fedfuse.models.in_place import variable
from fedfuse.seeding import generator, seed_everything
from fedfuse.train import training
from fedfuse.train.distil import Effort
from fedfuse.train.distil import plan as as_options
from fedfuse.train.losses import Loss, chosen
from fedfuse.train.objective import followed, least_batch
from fedfuse.train.second_head import attached
from fedfuse.wire.group_sums import asked, empty_totals
from fedfuse.wire.knowledge import Board, Topic, address_of, model_topic
from fedfuse.wire.records import (
    Arrays,
    InvalidArrays,
    Scope,
    Spec,
    flatten,
    leaves,
    model_arrays,
    plain_record,
    record,
    sha,
    validate,
)
from fedfuse.wire.sums import Sum


class Calendar(Protocol):
    """Which clients can be invited to a round, in a run that keeps virtual time."""

    apart: bool  # whether replies come one by one, since some of them may not count

    def sampled(self, round: int) -> list[int]:
        """The clients drawn for a round, among those that are available."""

    def there(self, client: int) -> bool:
        """Whether a client can be invited now."""


class FusionStrategy(Strategy):
    """One federated knowledge-fusion algorithm, server half.

    A subclass declares what travels and overrides `fuse`; often nothing else. It runs on any Flower `Grid`.

    Class attributes
    ----------------
    topics : dict of str to Topic
        Knowledge the server publishes.
    records : dict of str to (Spec or None)
        Layout of what clients share; a reply of another layout is rejected. Where it is None, numbers must be finite
        and nothing else is checked.
    metrics : dict of str to (float, float)
        Metrics that `fuse` reads beside `num-examples`, with their least and greatest values; a reply without one, or
        with another value, is rejected.
    sums : dict of str to (str or None)
        Records of which `fuse` needs only the weighted sum, and the metric that weighs them (None: 1).
    setup : tuple of str
        Phases before round 1. In phase p the client's method p is called in place of `fit` and `share`, and the
        server's `fuse_p` in place of `fuse`.
    transfer : {"none", "server", "clients", "both"}
        Who needs the transfer set.
    heterogeneous : bool
        Whether clients may have different architectures.
    pooled : bool
        The clients' training data is joined at client 0: an upper bound, not a federation.
    needs_features : bool
        Whether models must have `features(x)`, `head(z)` and `feature_dim`.
    of_classes : bool
        Whether it needs one class for each example: data whose labels are the next tokens are refused.
    same_features : bool
        Whether `feature_dim` must be the same in all architectures.
    aligns : bool
        Whether architectures may read the transfer set by tokenizers of their own, as `workspace.texts` has them.
    across : bool
        Whether an objective compares tokens of two vocabularies and is told both; a property where hyper-parameters or
        tokenizers decide. Where it is False, options of `loss=xtoken` are refused.
    discloses : tuple of str
        What of the private examples themselves leaves a client ("labels", "class counts"); said in the run's notes,
        and refused with privacy.
    uncovered : str
        What clients do with private examples that DP-SGD does not cover ("looks at private examples outside of
        training"): refused with privacy before the run; a property where hyper-parameters decide.
    bare : bool
        Whether the server's models are networks as they are built, without what the client's `equip` adds.
    distils : bool
        Whether soft labels are trained on by `distil`, so that the user's `distil.*` has something to say; a property
        where hyper-parameters decide.
    of_logits : bool
        Whether soft labels are compared as logits: a temperature of an objective that softens probabilities alone
        (`mse`, `mae`, `rkd`, `nd`) is refused then; a property where hyper-parameters decide.
    whole : bool
        Whether `distil` trains whole networks, never parts of one, whatever the objective: an objective that adds a
        second head to the network needs that.
    staleness : {"", "updates", "newest", "wrong"}
        What `fuse` does with a share that was made from an older version (`schedule=fedbuff|fedasync`). *updates*: it
        counts how far the client moved since that version; a record named like a topic is that topic's value after it.
        *newest*: the share stands until its client sends another, and `Share.weight` says how much it counts.
        *wrong*: it cannot be used, and such a schedule is refused; so it is where nothing is said.

    Attributes
    ----------
    hyper
        Hyper-parameters (an instance of the registered dataclass).
    state : dict
        Server-side nested dicts of tensors and plain values; with the board, all that is checkpointed.
    round : int
        Current round, 0 before the first.
    """

    topics: ClassVar[dict[str, Topic]] = {"model": model_topic()}
    records: ClassVar[dict[str, Spec | None]] = {"model": model_arrays}
    metrics: ClassVar[dict[str, tuple[float, float]]] = {}
    setup: ClassVar[tuple[str, ...]] = ()
    transfer: ClassVar[Literal["none", "server", "clients", "both"]] = "none"
    heterogeneous: ClassVar[bool] = True
    pooled: ClassVar[bool] = False
    needs_features: ClassVar[bool] = False
    of_classes: ClassVar[bool] = False
    same_features: ClassVar[bool] = False
    aligns: ClassVar[bool] = False
    across: ClassVar[bool] = False
    discloses: ClassVar[tuple[str, ...]] = ()
    uncovered: ClassVar[str] = ""
    distils: ClassVar[bool] = False
    of_logits: ClassVar[bool] = False
    whole: ClassVar[bool] = False
    staleness: ClassVar[Literal["", "updates", "newest", "wrong"]] = ""
    bare: ClassVar[bool] = False
    name: str = ""
    deployed: bool = False  # whether clients are real sites; then nobody may know what noise is drawn from

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        check_declared(cls, vars(FusionStrategy))

    def __init__(self, hyper: Any, workspace: Workspace) -> None:
        self.hyper, self.workspace = hyper, workspace
        self.state: dict[str, Any] = {}
        self.round, self.phase, self.begun, self.run_id = 0, "train", False, ""
        self.place = 0  # which of its round's phases this is, from 0
        self._kept = -1  # the last round in which too few had examples
        self._settings = Settings(workspace.scenario.config, hyper)
        self.board = Board(self.topics)
        self.outbox = Outbox(workspace.scenario, self.board)
        self.inbox = Inbox(self, self.outbox)
        self.calendar: Calendar | None = None  # who is there, where virtual time is kept
        self.splits: tuple[str, ...] = ("personal",)  # what an evaluation scores
        self.logged: list[tuple[str, int, str, str, float]] = []  # rows: scope, client, split, metric, value
        self._losses: list[Loss] = []  # made for the next training at the server
        self.platforms = {*vars(FusionStrategy), *vars(self), "platforms"}  # attributes that are not the algorithm's

    # -- what an algorithm writes --------------------------------------------------------------------------

    @property
    def sums(self) -> Mapping[str, str | None]:
        """Records of which `fuse` needs only the weighted sum; a class attribute where nothing depends on hyper."""
        return {}

    @property
    def means(self) -> Collection[str]:
        """Records of which `fuse` wants the mean and nothing else: a `defence` may stand in its place."""
        return self.sums.keys()

    @property
    def quorum(self) -> int:
        """Clients with examples that a phase must hear, or all stays as it is: as many as a `defence` needs, or one."""
        return defended_quorum(self) if self.scenario.config.defence.on else 1

    def begin(self) -> None:
        """Publish version 0: by default each architecture's initial model, if there is a topic `model`."""
        if "model" in self.topics:
            names = sorted(set(self.scenario.architectures))
            if len(names) == 1:
                self.publish("model", self.workspace.initial(names[0]))
            else:
                for name in names:
                    self.publish("model", self.workspace.initial(name), to=name)

    def phases(self, round: int) -> tuple[str, ...]:
        """Phases of a round; one may come several times (the steps of a split network), `place` counts them."""
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

    @property
    def headline(self) -> str | None:
        """Name of the server model whose score is the run's.

        None takes the mean of all of them, each weighted by the number of clients with its architecture.
        """
        return None

    def server_halves(self) -> dict[str, tuple[str, Arrays, tuple[int, ...]]]:
        """Networks of the server that predict only behind a client's: name to (architecture, arrays, input shape)."""
        return {}

    def predict(self, model: nn.Module, x: torch.Tensor, batch_size: int) -> torch.Tensor:
        """Logits of a server model."""
        return training.predict(model, x, batch_size)

    def judge(self, shares: Iterable[Share]) -> list[tuple[int, Metrics]]:
        """Metrics per client, where predicting needs both halves (split learning): else evaluations send no records."""
        return []

    @property
    def judges(self) -> bool:
        """Whether evaluations send records: nothing but `judge` looks at them."""
        return type(self).judge is not FusionStrategy.judge

    @classmethod
    def examine(cls, scope: Scope, records: Records) -> None:
        """Refuse a share whose layout is right and whose values make no sense: raise `InvalidArrays`.

        Runs beside the client or at the server, on what is there of a share's records, before `fuse` or any sum.
        """

    def notes(self) -> list[str]:
        """What whoever reads the result has to know of this run, from `state`, so that a resumed one says the same."""
        return []

    def planned(self) -> str:
        """What of this strategy depends on how many rounds there shall be, in words; empty if nothing does."""
        return ""

    @property
    def made_from(self) -> str:
        """What version 0 was made from; said of private runs."""
        return "initial weights, which no private example has touched"

    # -- what it uses --------------------------------------------------------------------------------------

    @property
    def scenario(self) -> Scenario:
        """The experiment."""
        return self.workspace.scenario

    @property
    def rows_distilled(self) -> int:
        """Rows of the transfer set that a round's lesson stands on."""
        return self.scenario.rows_of(getattr(self.hyper, "subset", None))

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

    def publish(
        self, topic: str, arrays: Arrays, to: SupportsIndex | str | None = None, *, version: int | None = None
    ) -> None:
        """Put knowledge on the board.

        Parameters
        ----------
        topic : str
            One of `topics`.
        arrays : dict of str to Tensor
        to : int or str, optional
            The client or the architecture that it is for; default everybody.
        version : int, optional
            Default the round. What is published several times in a round needs versions of its own, which must grow.

        Raises
        ------
        UserError
            If there is no such client or architecture, so that nobody would ever get it, or if one of the arrays is
            no tensor.
        WorldError
            If a number in it is not finite: no client could take it. The run can be resumed from the round before.
        """
        to = self._receiver(topic, to)
        for name, value in arrays.items():
            if not isinstance(value, torch.Tensor):
                raise UserError(
                    f"{self.name} publishes {topic!r} with {name!r}, which is {type(value).__name__}; "
                    "what is published are torch.Tensors"
                )
        try:
            validate(topic, arrays, None)
        except InvalidArrays as error:
            raise WorldError(
                f"round {self.round}: what was fused of the clients' shares is unusable: {error}"
            ) from error
        self.board.publish(topic, arrays, to, self.round if version is None else version)

    def published(self, topic: str, to: SupportsIndex | str | None = None) -> Arrays:
        """The newest value of a topic, as it was published to everybody, one client (int) or one architecture (str).

        Raises
        ------
        KeyError
            If nothing was published there yet.
        UserError
            If there is no such client or architecture.
        """
        item = self.board.items.get((topic, address_of(self._receiver(topic, to))))
        if item is None:
            there = ", ".join(sorted({known for known, _ in self.board.items})) or "none yet"
            raise KeyError(f"{self.name}: nothing of topic {topic!r} was published to={to!r:.40}; published: {there}")
        return item.arrays

    def _receiver(self, topic: str, to: SupportsIndex | str | None) -> int | str | None:
        """Whom something is for: a client of any integer type as a plain number, which its address is made of."""
        if to is None or (isinstance(to, str) and to in self.scenario.architectures):
            return to
        if (client := self._client(to)) is not None:
            return client
        names = ", ".join(sorted(set(self.scenario.architectures)))
        raise UserError(
            f"{self.name} publishes {topic!r} to={to!r:.40}: nobody gets that; allowed are clients 0 to "
            f"{self.scenario.clients - 1}, architectures ({names}) and None, everybody"
        )

    @property
    def summed(self) -> Mapping[str, str | None]:
        """The records that are summed beside the clients in this run, and the metric that weighs each.

        These are `sums`, with two exceptions. Where privacy hides whole clients, all weigh alike. Where a defence or
        liars look at each client's share, nothing is summed before.
        """
        if self.scenario.config.defence.on or self.scenario.config.attack.colludes:
            return {}
        return dict.fromkeys(self.sums) if self.scenario.config.privacy.by_client else self.sums

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
            For example `self.workspace.loaded(architecture, arrays)`.
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
        config = options.pop("config", self.scenario.config.train)
        with followed(losses, self.state, purpose, span, options.pop("after_step", None)) as more:
            result = training.train(model, x, y, loss, config, moment, **{**more, **options})
        self.log(f"loss/{purpose}", result["loss"])
        return {name: value.detach().clone() for name, value in variable(model).items()}

    def distil(
        self,
        model: nn.Module,
        x: torch.Tensor,
        y: torch.Tensor | None,
        loss: Callable[[Any, Any, torch.Tensor], torch.Tensor],
        *,
        purpose: str,
        epochs: int | None,
        batch_size: int,
        lr: float | None = None,
        optimizer: str | None = None,
        steps: int = 0,
    ) -> Arrays:
        """Train a network of the server's on soft labels: `train`, the user's `distil.*` before what is said.

        Parameters
        ----------
        model, x, y, loss, purpose
            As of `train`.
        epochs, batch_size, lr, optimizer, steps
            The strategy's own effort (`fedfuse.train.distil.Effort`).
        """
        own, config = Effort(epochs, batch_size, lr, optimizer, steps), self.scenario.config
        options = as_options(config.distil, own, config.train, len(x), least_batch(self._losses))
        with attached(self._losses, model, self.classes, config.seed, purpose) as more:
            return self.train(model, x, y, loss, purpose=purpose, **options, **more)

    def exclude(self, share: Share, reason: str) -> None:
        """Count a share as rejected that only `fuse` or `judge` can tell is wrong, and that it does not use.

        The client goes on from the state before it: what both ends keep of earlier rounds still agrees.
        """
        self.inbox.exclude(share.client, reason)

    def log(self, metric: str, value: float, client: int = -1, scope: str = "server", split: str = "train") -> None:
        """Keep a figure of this round in `metrics.parquet`, by default one of the server's (client -1)."""
        self.logged.append((scope, client, split, metric, float(value)))

    def log_matrix(self, name: str, clients: list[int], matrix: torch.Tensor) -> None:
        """Keep a matrix of this round (similarities, fusion weights) in `metrics.parquet`.

        Parameters
        ----------
        name : str
        clients : list of int
            Whom rows and columns stand for.
        matrix : Tensor
            n × n, of the n clients.
        """
        for i, row in zip(clients, matrix.tolist(), strict=True):
            for j, value in zip(clients, row, strict=True):
                self.log(f"{name}/{i}/{j}", value, scope="matrix")

    # -- Flower's four hooks -------------------------------------------------------------------------------

    def plan(self, round: int) -> list[int]:
        """This round's clients: the platform's seeded sample, alike for every strategy, plus what `cohort` adds."""
        if self.pooled:
            return [0]
        calendar = self.calendar
        sampled = self.scenario.sampled(round) if calendar is None else calendar.sampled(round)
        chosen = sampled if type(self).cohort is FusionStrategy.cohort else self._grown(round, sampled)
        return chosen if calendar is None else [client for client in chosen if calendar.there(client)]

    def _grown(self, round: int, sampled: list[int]) -> list[int]:
        """What `cohort` makes of the sample, in order.

        Raises
        ------
        UserError
            If it names a client that there is not, or leaves one of the sample out.
        """
        chosen = set[int]()
        for named in self.cohort(round, list(sampled)):
            if (client := self._client(named)) is None:
                raise UserError(
                    f"strategy={self.name}: cohort() of round {round} names {named!r:.40}; allowed are clients 0 to "
                    f"{self.scenario.clients - 1}"
                )
            chosen.add(client)
        if dropped := set(sampled) - chosen:
            raise UserError(
                f"strategy={self.name}: cohort() of round {round} leaves client {min(dropped)} out, which was sampled; "
                f"it may only add clients"
            )
        return sorted(chosen)

    def _client(self, named: SupportsIndex | str | None) -> int | None:
        """A client of any integer type as a plain number; None where there is no such client."""
        with contextlib.suppress(TypeError):  # text, or no whole number
            if 0 <= (client := operator.index(named)) < self.scenario.clients:  # type: ignore[arg-type]
                return client
        return None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages of this phase, one a client, each with just the knowledge its node lacks."""
        self.ensure_begun()
        self.round = server_round
        return self.messages(self.plan(server_round), "train", config)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check every reply, let the algorithm fuse what is valid, and count the rest.

        Where fewer than `quorum` of those who answered have training examples, there is nothing to fuse: what is
        published stays, and the round is noted. The noise of clients' privacy is drawn all the same: it hides who took
        part.

        Raises
        ------
        WorldError
            If no client succeeded, the algorithm failed, or too few have examples in a phase that others stand on.
        UserError
            If its `state` holds what no checkpoint can keep.
        """
        sums = dict(self.summed)
        totals, known = empty_totals(sums, self.outbox.request.said), len(self.inbox.left_out)
        stream, held = self.inbox.shares(replies, sums, totals), list[Share]()
        heard = 0
        for share in stream:
            held.append(share)
            heard += share.metrics["num-examples"] > 0 or self.scenario.config.privacy.by_client
            if heard >= self.quorum:
                break
        if not held:
            raise nobody(server_round, self.phase, self.inbox.left_out[known:])
        # asked again: by now an overcommitted cohort awaits fewer clients, of whom a defence reckons with fewer liars
        if heard < (needed := self.quorum):
            self.keep_published(server_round, needed)
            return self._model_record(), MetricRecord()
        seed_everything(self.scenario.seed, "fuse", self.phase, server_round)
        verb = "fuse" if self.phase == "train" else f"fuse_{self.phase}"
        with self._named(verb):
            getattr(self, verb)(self._handed(chain(held, stream), totals))
        self._refuse_writes(verb)
        self._check_state()
        for _ in stream:  # what fuse did not look at is still accepted and counted
            pass
        return self._model_record(), MetricRecord()

    @contextlib.contextmanager
    def _named(self, verb: str) -> Iterator[None]:
        """Name the method that fails; one that calls `exit` would else end the command as if all were done."""
        try:
            yield
        except (UserError, WorldError):
            raise
        except (Exception, SystemExit) as error:
            raise WorldError(f"round {self.round}, {verb} of {self.name} failed: {in_words(error)}") from error

    def _refuse_writes(self, verb: str) -> None:
        """Refuse a fuse that wrote to what it shares with clients: examples, published knowledge, settings.

        Raises
        ------
        UserError
            Naming the method and what it wrote to.
        """
        if written := self.workspace.written():
            raise UserError(
                f"strategy={self.name}: {verb} wrote to {written} in place (or asked for their gradients), and they "
                f"are kept for other rounds: clone them first"
            )
        if topic := self.board.written():
            raise UserError(
                f"strategy={self.name}: {verb} wrote to the published {topic!r} in place, and clients hold it as it "
                f"was: clone it first, and publish what it becomes"
            )
        if changed := self._settings.changed():
            raise UserError(
                f"strategy={self.name}: {verb} set {changed}, and clients in its process are handed the same settings: "
                f"what is to last belongs into self.state"
            )

    def _model_record(self) -> ArrayRecord:
        """What Flower's loop is told: the model common to all, where there is one."""
        item = self.board.items.get(("model", ""))
        return record(item.arrays) if item is not None else ArrayRecord()

    def keep_published(self, round: int, needed: int) -> None:
        """Leave what is published as it is, and note it: too few of those who answered have training examples.

        Raises
        ------
        WorldError
            In a phase that makes what a later one needs.
        """
        if self.phase in self.setup or (self.place and self._kept != round):
            raise WorldError(f"round {round}, {self.phase}: {too_few(needed)} (clients, participation)")
        if self._kept != round:
            self.log(KEPT, needed)
        self._kept = round

    def _handed(self, stream: Iterator[Share], totals: dict[str, Sum]) -> Shares:
        """A phase's shares as `fuse` sees them."""
        if self.scenario.config.attack.colludes:
            stream = agreed(stream, self)
            if not self.scenario.config.defence.on:
                totals = empty_totals(self.sums, {})
                stream = added(stream, self, totals)
        if self.scenario.config.defence.on:
            return Defended(stream, self)
        return Noised(stream, totals, self) if self.scenario.config.privacy.by_client else Shares(stream, totals)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages to every client; evaluation works on what a client would use and commits nothing."""
        self.round = server_round
        return self.messages(range(self.scenario.clients), "evaluate", config)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Collect the clients' scores into `inbox.scored` and the hashes of their states into `inbox.shas`."""
        inbox = self.inbox
        inbox.scored, inbox.shas = {}, {}
        for share in (shares := list(inbox.shares(replies, {}, {}))):
            numbers = {k: v for k, v in share.metrics.items() if "/" in k and isinstance(v, int | float)}
            inbox.scored[share.client] = numbers
        with self._named("judge"):
            judged = self.judge(shares)
        for client, metrics in judged:
            inbox.scored.setdefault(client, {}).update(metrics)
        values = [m["personal/accuracy"] for m in inbox.scored.values() if "personal/accuracy" in m]
        return MetricRecord({"accuracy": sum(values) / len(values)}) if values else MetricRecord()

    def summary(self) -> None:
        """Flower asks for a log line; the run directory says it all."""

    def start(self, grid: Grid, initial_arrays: ArrayRecord, *args: Any, **kwargs: Any) -> Any:
        """Run in Flower's own loop, if the algorithm has one phase a round and no set-up.

        Raises
        ------
        ValueError
            If it needs several phases: Flower's loop has one.
        """
        if self.setup or self.phases(1) != ("train",):
            raise ValueError(f"{self.name} has phases {self.setup + self.phases(1)}: run it with fedfuse, not start()")
        return super().start(grid, initial_arrays, *args, **kwargs)

    # -- what the platform asks of it ----------------------------------------------------------------------

    def ensure_begun(self) -> None:
        """Publish version 0 once."""
        if not self.begun:
            self.begun = True
            with self._named("begin"):
                self.begin()
            self._check_state()

    def _check_state(self) -> None:
        """Refuse a state that no checkpoint can keep, before anything is made of it."""
        try:
            leaves(self.state)
        except TypeError as error:
            raise UserError(f"strategy={self.name}, at the server: {error}") from error

    def messages(self, clients: Iterable[int], kind: str, extra: Mapping[str, Any]) -> list[Message]:
        """Build the messages of this phase, in client order.

        Parameters
        ----------
        clients : iterable of int
        kind : {"train", "evaluate"}
        extra : mapping
            What else clients find in their `config`.
        """
        in_setup, clients = self.phase in self.setup, list(clients)
        train = kind == "train"
        apart = self.calendar is not None and self.calendar.apart
        request = Request(
            kind,
            self.round,
            self.phase,
            label=("setup" if in_setup else "train") if train else "evaluate",
            tag=f"{self.round}.{self.place + 1}" if train else "",
            said=self._said(
                asked(self.summed if train and not apart else {}), plan_of(self, clients) if train else {}, extra
            ),
        )
        self.inbox.expect(request)
        return self.outbox.messages(request, clients, charge=not train or self.calendar is None)

    def _said(self, sums: str, secure: Mapping[str, Any], extra: Mapping[str, Any]) -> ConfigRecord:
        """What every message of a phase says alike."""
        values: dict[str, Any] = {
            "run": self.run_id,
            "strategy": self.name,
            "round": self.round,
            "phase": self.phase,
            "pooled": self.pooled,
            "splits": list(self.splits),
            "sums": sums,
            **({"secure": json.dumps(secure)} if secure else {}),
        }
        hypers = registry.told(self.hyper)
        values |= {f"hyper.{k}": v for k, v in hypers.items() if v is not None}
        values["hyper.unset"] = json.dumps(sorted(k for k, v in hypers.items() if v is None))
        return ConfigRecord({**values, **{f"server.{k}": v for k, v in extra.items()}})

    def sha(self) -> str:
        """Hash of the board's current values and `state`: the server's part of a digest."""
        flat, rest = flatten(self.state)
        records = {f"{topic}|{to}": item.arrays for (topic, to), item in self.board.items.items()}
        return sha({**records, "state": flat, **plain_record(rest)})
