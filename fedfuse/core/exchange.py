"""The server's side of the wire: who is asked, what each node is sent, and which answers are taken."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar, NamedTuple

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedfuse.core.scenario import Residents, Scenario
from fedfuse.core.shares import FAILED, FULL, INVALID, Metrics, Records, Share, Shares, check_share
from fedfuse.errors import UserError, WorldError, in_words
from fedfuse.seeding import generator, seed_everything
from fedfuse.train.objective import Loss
from fedfuse.wire.client_store import INITIAL
from fedfuse.wire.knowledge import Address, Board, Parcel, Topic
from fedfuse.wire.records import (
    InvalidArrays,
    Scope,
    Spec,
    arrays_in,
    config_in,
    entries,
    flatten,
    message_to,
    nbytes,
    plain_record,
    record,
    sha,
    tensors,
    trusted,
    validate,
)
from fedfuse.wire.sums import GROUP, Sum
from fedfuse.wire.traffic import Traffic


class Delivery(NamedTuple):
    """The knowledge of a message, alike for all clients who need the same and lack the same of it."""

    parcels: list[Parcel]
    records: dict[str, ArrayRecord]
    columns: dict[str, list[Any]]  # of the message's config
    versions: dict[Address, int]  # what the node holds afterwards


class Exchange(Strategy):
    """Flower's four hooks, once for all algorithms; `FusionStrategy` adds what an algorithm writes and uses.

    Keeps what the server believes of each client: the state it last accepted (`tags`), the versions its node holds
    (`held`), the bytes it was charged (`traffic`), and who failed.
    """

    topics: ClassVar[dict[str, Topic]]
    records: ClassVar[dict[str, Spec | None]]
    setup: ClassVar[tuple[str, ...]]
    pooled: ClassVar[bool]
    name: str = ""

    def __init__(self, hyper: Any, residents: Residents) -> None:
        self.hyper, self.residents = hyper, residents
        self.state: dict[str, Any] = {}
        self.round, self.phase = 0, "train"
        self.board, self.traffic = Board(self.topics), Traffic()
        self.tags: dict[int, str] = {}  # state last accepted from each client
        self.held: dict[int, dict[tuple[str, str], int]] = {}  # versions each node holds
        self.failures = {"replies": 0, "rejected": 0, "retried": 0}
        self.left_out: list[str] = []  # this round's failures, in words
        self._told = -1  # the round they are of
        self._earlier: dict[int, str] = {}  # each client's state before the one accepted in this phase
        self.ever_left_out = False
        self._losses: list[Loss] = []  # made for the next training at the server
        self.logged: list[
            tuple[str, int, str, str, float]
        ] = []  # rows of this round: scope, client, split, metric, value
        self.timed: list[tuple[str, str, float]] = []  # rows of this round: scope, what, seconds
        self.losses: list[tuple[float, float]] = []  # of this round's clients: examples, training loss
        self.run_id = ""
        self.nodes: Mapping[int, int] | None = None  # client -> node id, where the grid's ids are not ours
        self.splits: tuple[str, ...] = ()
        self.begun = False
        self.inside = False  # whether nodes are processes of this run, whose sums of a group are believed

    # -- what the algorithm answers ------------------------------------------------------------------------

    @property
    @abstractmethod
    def sums(self) -> Mapping[str, str | None]:
        """Records of which only the weighted sum is needed."""

    @abstractmethod
    def begin(self) -> None:
        """Publish version 0."""

    @abstractmethod
    def phases(self, round: int) -> tuple[str, ...]:
        """Phases of a round."""

    @abstractmethod
    def cohort(self, round: int, sampled: list[int]) -> list[int]:
        """Clients of a round."""

    @classmethod
    @abstractmethod
    def examine(cls, scope: Scope, records: Records) -> None:
        """Refuse values that make no sense."""

    @abstractmethod
    def judge(self, shares: Iterable[Share]) -> list[tuple[int, Metrics]]:
        """Metrics that need both halves."""

    @abstractmethod
    def log(self, metric: str, value: float, client: int = -1, scope: str = "server", split: str = "train") -> None:
        """Keep a figure of this round."""

    @property
    def scenario(self) -> Scenario:
        """The experiment."""
        return self.residents.scenario

    # -- who takes part ---------------------------------------------------------------

    def plan(self, round: int) -> list[int]:
        """This round's clients: the platform's seeded sample, alike for every strategy, plus what `cohort` adds."""
        if self.pooled:
            return [0]
        n = self.scenario.clients
        size = max(1, round_half_up(n * self.scenario.config.participation))
        draw = generator(self.scenario.seed, "cohort", round)
        sampled = sorted(torch.randperm(n, generator=draw)[:size].tolist()) if size < n else list(range(n))
        chosen = sorted(set(self.cohort(round, sampled)))
        if not set(sampled) <= set(chosen):
            raise ValueError("cohort() may only add clients to the sample")
        return chosen

    # -- Flower's four hooks -------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages of this phase, one a client, each with just the knowledge its node lacks."""
        self.ensure_begun()
        self.round, self.inside = server_round, getattr(grid, "inside", False)
        return self.messages(self.plan(server_round), "train", dict(config))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check every reply, let the algorithm fuse what is valid, and count the rest.

        Raises
        ------
        WorldError
            If no client succeeded, or the algorithm failed.
        """
        sums, known = {name: Sum() for name in self.sums}, len(self.left_out)
        stream = self._accepted(replies, sums)
        first = next(stream, None)
        if first is None:
            cause = f": {self.left_out[known]}" if len(self.left_out) > known else ""
            raise WorldError(f"round {server_round}, {self.phase}: no client succeeded{cause}")
        shares = Shares(_chain(first, stream), sums)
        seed_everything(self.scenario.seed, "fuse", self.phase, server_round)
        verb = "fuse" if self.phase == "train" else f"fuse_{self.phase}"
        try:
            getattr(self, verb)(shares)
        except (UserError, WorldError):
            raise
        except Exception as error:
            raise WorldError(f"round {server_round}, {verb} of {self.name} failed: {in_words(error)}") from error
        for _ in stream:  # what fuse did not look at is still accepted and counted
            pass
        item = self.board.items.get(("model", ""))
        return (record(item.arrays) if item is not None else ArrayRecord()), MetricRecord()

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages to every client; evaluation works on what a client would use and commits nothing."""
        self.round, self.inside = server_round, getattr(grid, "inside", False)
        return self.messages(list(range(self.scenario.clients)), "evaluate", dict(config))

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Collect the clients' scores into `self.scored` (client -> metrics) and `self.client_shas`."""
        self.scored: dict[int, Metrics] = {}
        self.client_shas: dict[int, str] = {}
        for share in (shares := list(self._accepted(replies, {}, evaluate=True))):
            numbers = {k: v for k, v in share.metrics.items() if "/" in k and isinstance(v, int | float)}
            self.scored[share.client] = numbers
        for client, metrics in self.judge(shares):
            self.scored.setdefault(client, {}).update(metrics)
        values = [m["personal/accuracy"] for m in self.scored.values() if "personal/accuracy" in m]
        return MetricRecord({"accuracy": sum(values) / len(values)}) if values else MetricRecord()

    def summary(self) -> None:
        """Flower asks for a log line; the run directory says it all."""

    def start(self, grid: Grid, initial_arrays: ArrayRecord, *args: Any, **kwargs: Any) -> Any:
        """Run under Flower's own loop, if the algorithm has one phase a round and no set-up.

        Raises
        ------
        ValueError
            If it needs several phases: Flower's loop has one.
        """
        if self.setup or self.phases(1) != ("train",):
            raise ValueError(f"{self.name} has phases {self.setup + self.phases(1)}: run it with fedfuse, not start()")
        return super().start(grid, initial_arrays, *args, **kwargs)

    # -- messages ------------------------------------------------------------------------------------------

    def ensure_begun(self) -> None:
        """Publish version 0 once."""
        if not self.begun:
            self.begun = True
            self.begin()

    @property
    def label(self) -> str:
        """How this phase's bytes are counted."""
        return "setup" if self.phase in self.setup else "train"

    def tag(self) -> str:
        """Name of the client state that this phase makes."""
        order = self.setup if self.phase in self.setup else self.phases(self.round)
        return f"{self.round}.{order.index(self.phase) + 1}"

    def common(self, kind: str, extra: Mapping[str, Any]) -> ConfigRecord:
        """What every message of a phase says alike."""
        values: dict[str, Any] = {
            "run": self.run_id,
            "strategy": self.name,
            "round": self.round,
            "phase": self.phase,
            "pooled": self.pooled,
            "splits": list(self.splits) or ["personal"],
            "sums": json.dumps(dict(self.sums)) if kind == "train" else "{}",
        }
        hypers = {k: v for k, v in asdict(self.hyper).items() if k != "name"}
        values |= {f"hyper.{k}": v for k, v in hypers.items() if v is not None}
        values["hyper.unset"] = json.dumps(sorted(k for k, v in hypers.items() if v is None))
        values |= {f"server.{k}": v for k, v in extra.items()}
        return ConfigRecord(values)

    def messages(self, clients: Iterable[int], kind: str, extra: Mapping[str, Any]) -> list[Message]:
        """Build the messages of one phase, in client order."""
        clients = sorted(clients)
        self.groups = {client: i // GROUP for i, client in enumerate(clients)}
        self._common, self._kind = self.common(kind, extra), kind
        self._earlier = {}
        if self._told != self.round:  # an evaluation does not hide who failed in training
            self.left_out, self._told = [], self.round
        self.awaited = set(clients)
        self.sent: dict[int, dict[tuple[str, str], int]] = {}  # versions a node holds once it has answered
        suffix = "" if kind == "evaluate" or self.phase == "train" else f".{self.phase}"
        self._type = kind + suffix
        self._tag = self.tag() if kind == "train" else ""
        self._wire: dict[Any, ArrayRecord] = {}
        self._deliveries: dict[Any, Delivery] = {}
        self._like = Message(RecordDict(), dst_node_id=1, message_type=self._type)
        return [self._message(client) for client in clients]

    def _message(self, client: int, again: bool = False) -> Message:
        held = self.held.get(client, {})
        needed = tuple(self.board.addresses(client, self.scenario.architectures[client]))
        parcels = [p for address in needed for p in self.board.path(address, held.get(address, -1))]
        key = (needed, tuple(map(id, parcels)))  # ids of what the deliveries keep
        delivery = self._deliveries.get(key)
        if delivery is None:
            delivery = self._deliveries[key] = self._deliver(needed, parcels)
        self.sent[client] = delivery.versions
        config: dict[str, Any] = {
            "client": client,
            "group": self.groups[client],
            "tag": self.tags.get(client, INITIAL),
            "new-tag": self._tag,
            **delivery.columns,
        }
        content = {**delivery.records, "config": trusted(ConfigRecord, config), "run": self._common}
        if again:
            self.traffic.resent(self.round, client, delivery.parcels)
        else:
            label = "evaluate" if self._kind == "evaluate" else self.label
            self.traffic.down(label, self.round, client, needed, delivery.parcels, self.board)
        node = client + 1 if self.nodes is None else self.nodes[client]
        return message_to(node, self._type, trusted(RecordDict, content), self._like)

    def _deliver(self, needed: tuple[Address, ...], parcels: list[Parcel]) -> Delivery:
        """What brings a node to the newest version of all that it needs."""
        records: dict[str, ArrayRecord] = {}
        for parcel in parcels:
            name = "arrays" if parcel.topic == "model" else parcel.topic
            if name in records:
                name = f"{name}@{parcel.version}{parcel.to}"
            key = (parcel.address, parcel.version, parcel.since)
            if key not in self._wire:  # one record object per distinct array and phase: grids broadcast it once
                self._wire[key] = record(parcel.arrays)
            records[name] = self._wire[key]
        versions = {address: self.board.items[address].version for address in needed}
        columns: dict[str, list[Any]] = {}
        if parcels:
            columns["parcel.record"] = list(records)
            columns["parcel.topic"] = [p.topic for p in parcels]
            columns["parcel.to"] = [p.to for p in parcels]
            columns["parcel.version"] = [p.version for p in parcels]
            columns["parcel.since"] = [p.since for p in parcels]
            columns["parcel.sha"] = [p.sha for p in parcels]
        if needed:
            columns["needs.topic"] = [topic for topic, _ in needed]
            columns["needs.to"] = [to for _, to in needed]
            columns["needs.version"] = list(versions.values())
        return Delivery(parcels, records, columns, versions)

    def message_again(self, client: int) -> Message:
        """Build a client's message anew, with whole values, after its node said that it could not follow."""
        self.held.pop(client, None)
        return self._message(client, again=True)

    # -- replies -------------------------------------------------------------------------------------------

    def _accepted(self, replies: Iterable[Message], sums: dict[str, Sum], evaluate: bool = False) -> Iterator[Share]:
        expected = set(self.awaited)
        if isinstance(replies, Sequence):  # a grid of Flower's, in no order; ours stream in client order
            replies = sorted(replies, key=self.sender)
        for reply in replies:
            client = self.sender(reply)
            if client not in expected:
                self._reject(f"a reply from {client}, who was not asked or has answered already")
                continue
            expected.discard(client)
            if reply.has_error():
                if reply.error.code == FULL and self.inside:
                    raise WorldError(f"round {self.round}, client {client}: {reply.error.reason}")
                self._leave_out(client, reply.error.reason or "failed", reply.error.code)
                continue
            try:
                share = self._checked(reply, client, evaluate)
                sizes = {name: nbytes(content) for name, content in share.records.items()}
                self._add_up(share, sums)
            except InvalidArrays as error:
                self._leave_out(client, str(error), INVALID)
                continue
            config: Any = config_in(reply.content)
            self.failures["retried"] += _count(config.get("retried"))
            label = "evaluate" if evaluate else self.label
            if self.inside:
                sizes |= zip(config.get("summed.record", []), config.get("summed.bytes", []), strict=True)
            for name, size in sizes.items():
                self.traffic.up(label, self.round, client, name, int(size))
            self.held[client] = self.sent[client]
            if evaluate:
                self.client_shas[client] = str(config.get("sha", ""))
            else:
                self._note(share)
                self._earlier[client] = self.tags.get(client, INITIAL)
                self.tags[client] = self._tag if config.get("tag") == self._tag else INITIAL
                for name, total in sums.items():
                    if self.inside and isinstance(sent := entries(reply.content).get(f"sum:{name}"), ArrayRecord):
                        group = tensors(sent)
                        dtypes = json.loads(str(config[f"dtypes:{name}"]))
                        total.add_group(self.groups[client], group, float(config[f"weight:{name}"]), dtypes)
            yield share
        for client in sorted(expected):
            self._leave_out(client, "did not answer", FAILED)

    def _add_up(self, share: Share, sums: dict[str, Sum]) -> None:
        """Move the records that are only summed from a share into the sums; all of them or none."""
        weights: dict[str, float] = {}
        for name, total in sums.items():
            if name in share.records:
                key = self.sums[name]
                number = share.metrics.get(key) if key else 1.0
                if not isinstance(number, int | float):
                    raise InvalidArrays(f"metric {key} is {number!r}; it weighs {name}")
                weights[name] = float(number)
                total.check(share.records[name], weights[name])
        for name, weight in weights.items():
            sums[name].add(self.groups[share.client], share.records.pop(name), weight)

    def _note(self, share: Share) -> None:
        """Keep a client's own figures; seconds are timing, not a result."""
        for key, value in share.metrics.items():
            if key == "seconds":
                self.timed.append((f"client:{share.client}", self.phase, float(value)))
            elif not isinstance(value, list) and key != "num-examples":
                self.log(key, float(value), client=share.client, scope="client")
        loss = share.metrics.get("loss")
        if isinstance(loss, int | float) and loss == loss:
            self.losses.append((float(share.examples), float(loss)))

    def sender(self, reply: Message) -> int:
        """The client a reply comes from; -1 if it is nobody we know."""
        node = reply.metadata.src_node_id
        if self.nodes is None:
            return node - 1
        return next((client for client, known in self.nodes.items() if known == node), -1)

    def _checked(self, reply: Message, client: int, evaluate: bool) -> Share:
        content = reply.content
        config, measured = config_in(content), entries(content).get("metrics")
        if config is None or not isinstance(measured, MetricRecord):
            raise InvalidArrays("a reply needs a config and a metrics record")
        records: Records = {}
        for name, value in arrays_in(content).items():
            if not name.startswith("sum:"):
                records["model" if name == "arrays" else name] = tensors(value)
        metrics: dict[str, Any] = dict(entries(measured))
        if not evaluate:
            summed = set(map(str, config.get("summed.record", []))) if self.inside else set()
            check_share(type(self), self.hyper, self.residents, client, self.phase, records, metrics, summed)
        else:
            for name, arrays in records.items():
                validate(name, arrays, None)
        return Share(client, records, metrics)

    def _leave_out(self, client: int, reason: str, code: int) -> None:
        self.failures["rejected" if code == INVALID else "replies"] += 1
        self.ever_left_out = True
        self.left_out.append(f"client {client}: {reason}")

    def _reject(self, reason: str) -> None:
        self.failures["rejected"] += 1
        self.left_out.append(reason)

    # -- state ---------------------------------------------------------------------------------------------

    def server_sha(self) -> str:
        """Hash of the board's current values and `state`."""
        flat, rest = flatten(self.state)
        records = {f"{topic}|{to}": item.arrays for (topic, to), item in self.board.items.items()}
        return sha({**records, "state": flat, **plain_record(rest)})


def _count(value: Any) -> int:
    """How often a client says it was tried again, if that makes sense."""
    return value if isinstance(value, int) and 0 < value < 100 else 0


def round_half_up(value: float) -> int:
    """Round to the nearest integer, halves up (so that 0.25 of 10 clients is 3)."""
    return int(value + 0.5)


def _chain(first: Share, rest: Iterator[Share]) -> Iterator[Share]:
    yield first
    yield from rest
