"""A client's place: takes one message, wakes the client from committed state, and answers.

The same code serves every runtime; what differs is where the cache of knowledge comes from.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from fedfuse.compat.flower_replies import reply_to
from fedfuse.compat.torch_writes import writes
from fedfuse.compat.turns import modes, set_modes
from fedfuse.config.files import is_full
from fedfuse.config.idle import digests
from fedfuse.config.registry import Entry
from fedfuse.core import attacks, moments
from fedfuse.core.abreast import Abreast
from fedfuse.core.asked import TAG, Asked, Phase, Phases, parcels
from fedfuse.core.class_attributes import ClassAttributes
from fedfuse.core.client import FusionClient
from fedfuse.core.client_level import clipped
from fedfuse.core.labels import LEFT
from fedfuse.core.scenario import Scenario
from fedfuse.core.settings import Settings
from fedfuse.core.shares import FAILED, FULL, INVALID, REFUSED, SPOILT, STALE, Records
from fedfuse.core.threads import single_thread
from fedfuse.core.workspace import Workspace
from fedfuse.errors import TRACEBACK, Refused, UserError, in_words
from fedfuse.models.as_built import built_of
from fedfuse.models.shared_memory import give_back
from fedfuse.train.ledger import Ledger
from fedfuse.train.work import Tally, counting, warm_up
from fedfuse.wire.client_store import INITIAL, ClientStore
from fedfuse.wire.fixed_point import beyond
from fedfuse.wire.knowledge import Cache, Item, Stale, reaches
from fedfuse.wire.records import (
    Arrays,
    InvalidArrays,
    config_in,
    flatten,
    measured,
    plain_record,
    resting,
    sha,
    tensors,
    trusted,
    validate,
)

# After so many answers, freed memory is given back to the system: examples that are kept lie between what is freed,
# and the allocator gives nothing back by itself.
TRIMMED = 512


class Spoilt(Exception):
    """A client wrote to arrays that others are handed too."""


class Answered(NamedTuple):
    """What a client answers, before it is put into Flower's records.

    Arrays in it are copies, but for those of a client that lends: these are the resident model's own memory.
    """

    message: Message
    who: int
    phase: Phase
    records: Records
    metrics: MetricRecord
    config: dict[str, Any]


class Awake(NamedTuple):
    """A client that has received what is new to it, and the versions of lessons it has then seen.

    `trained` is its model before that, to be scored; None where what it receives leaves the model alone.
    """

    client: FusionClient
    seen: dict[str, int]
    trained: Arrays | None = None

    def private(self) -> dict[str, Any]:
        """The client's private state as it stands.

        Raises
        ------
        UserError
            If it has a name that the platform keeps beside it.
        """
        kept = dict(self.client.state)
        if taken := [name for name in ("seen", "spent") if name in kept]:
            raise UserError(f"{type(self.client).__name__}.state[{taken[0]!r}]: the platform keeps something under "
                            f"this name (allowed are all but seen and spent)")  # fmt: skip
        if self.client.personal:
            kept["model"] = self.client.weights()
        return kept


class Node:
    """Runs clients of one strategy, one after another, in this process.

    Parameters
    ----------
    entry : Entry
        The strategy it runs; a message that names another is refused.
    scenario : Scenario
    store : ClientStore
        Where committed client state lies.
    device : torch.device or str
    retries : int
        How often a client that fails is tried again from committed state.
    ledger : Ledger or None
        See `Workspace`.
    """

    def __init__(
        self,
        entry: Entry,
        scenario: Scenario,
        store: ClientStore,
        device: torch.device | str = "cpu",
        retries: int = 0,
        ledger: Ledger | None = None,
    ) -> None:
        single_thread()  # once more: a strategy's file may have said otherwise as it was imported
        self.entry, self.store, self.retries = entry, store, retries
        self._transfer = entry.server.transfer in ("clients", "both")
        self.digests = digests(entry)  # whether evaluations let clients learn before they are scored
        self.phases = Phases(entry)
        self._answered = 0
        # the cache that parcels were last put into, and the list of their versions, by which the same ones are known
        self._taken: tuple[Any, Any] = None, None
        self._liars = scenario.liars
        self._classwide = ClassAttributes(entry.client, FusionClient)
        runtime = scenario.config.runtime
        self.vectorized = runtime.vectorize == "auto" and runtime.client_timeout is None and ledger is None
        self.desk = Abreast()
        self.workspace = Workspace(scenario, self._equip, device, ledger, self._transfer)
        self._equipped = self.phases.hyper
        self._settings = Settings(scenario.config, self.phases.hyper)
        if scenario.config.clock.on:
            warm_up()

    def _equip(self, model: Any, build: Any) -> Any:
        return self.entry.client.equip(model, self.phases.hyper, build)

    def hyper_of(self, run: Mapping[str, Any]) -> Any:
        """The hyper-parameters that a message asks for.

        Where they differ from those before, the workspace is made anew: `equip` may build other models by them.
        """
        hyper = self.phases.hyper_of(run)
        self._equip_anew()
        return hyper

    def _equip_anew(self) -> None:
        if self.phases.hyper is not self._equipped:
            old, self._equipped = self.workspace, self.phases.hyper
            self._settings = Settings(old.scenario.config, self.phases.hyper)
            self.workspace = Workspace(old.scenario, self._equip, old.device, old.ledger, self._transfer)

    # -- messages in, messages out -------------------------------------------------------------------------

    def handle(self, message: Message, cache: Cache) -> Message:
        """Answer one message; every failure becomes an error reply that names the client and the cause."""
        return self.reply(self.answer(message, cache))

    def answer(self, message: Message, cache: Cache, lends: bool = False) -> Answered | Message:
        """Answer one message; every failure becomes an error reply that names the client and the cause.

        Parameters
        ----------
        message : Message
        cache : Cache
            The knowledge that is held here; it is brought up to date with the message.
        lends : bool
            Whether arrays of the answer may be the model's own memory and not copies of it. The caller then has to be
            done with them before the next message.

        Returns
        -------
        Answered or Message
            What `reply` puts into a reply; or the error reply.
        """
        who = self.client_of(message)
        self._answered += 1
        if not self._answered % TRIMMED:
            give_back()
        for attempt in range(self.retries + 1):
            try:
                answered = self._answer(message, cache, who, lends)
                if attempt:
                    answered.config["retried"] = attempt
                return answered
            except Stale as error:
                return self.error(STALE, str(error), message)
            except Refused as error:
                return self.error(REFUSED, str(error), message)
            except Spoilt as error:
                return self.error(SPOILT, str(error), message)
            except InvalidArrays as error:
                return self.error(INVALID, f"received {error}", message)
            except (Exception, SystemExit) as error:  # a client's `exit` ends no run
                if is_full(error):
                    return self.error(FULL, f"its state cannot be kept: {in_words(error)}", message)
                if os.environ.get(TRACEBACK) and self.workspace.ledger is None:  # a site's screen is its operator's
                    print(f"client {who}:", file=sys.stderr)
                    traceback.print_exc()
                if attempt == self.retries:
                    return self.error(FAILED, in_words(error), message)
        raise AssertionError("unreachable")

    def client_of(self, message: Message) -> int:
        """The client that a message is for."""
        config: Any = config_in(message.content) if message.has_content() else None
        if config is not None and "client" in config:
            return int(config["client"])
        return message.metadata.dst_node_id - 1

    def error(self, code: int, reason: str, message: Message) -> Message:
        """A reply that says what went wrong."""
        return Message(Error(code=code, reason=reason), reply_to=message)

    # -- one message, in four steps --------------------------------------------------------------------------

    def _answer(self, message: Message, cache: Cache, who: int, lends: bool = False) -> Answered:
        started = time.perf_counter() - self.desk.away()
        asked = self._admit(message, cache, who)
        config, phase = self.workspace.scenario.config, asked.phase
        handed: dict[str, tuple[Arrays, int]] = {}
        found = modes()
        with counting(config.clock.on) as tally:
            try:
                awake = self._wake(asked, cache, lends, tally, handed)
                records, metrics, answer = self._play(asked, awake)
            finally:
                set_modes(found)
                self._look_after(who, handed, cache)
        if phase.kind == "evaluate" and (name := self._classwide.written()):  # every run ends with an evaluation
            answer["wrote"] = name
        if why := self.desk.apart():
            answer["apart"] = why
        if tally.examples:
            answer["trained"] = tally.examples
        if tally.flops:
            answer["flops"], answer["unit"] = tally.flops, tally.unit
        if phase.kind == "train":
            if config.privacy.by_client:
                records, metrics = self._clip(asked, cache, records, metrics)
            if who in self._liars and not config.attack.colludes:
                records = self._lie(asked, cache, records)
        metrics.setdefault("num-examples", self.workspace.scenario.examples(who))
        if phase.kind == "train" and phase.points:
            metrics["clipped"] = beyond(records, phase.points)
        client = awake.client
        for name, arrays in records.items():
            if not (client.lends and name == "model" and all(isinstance(v, torch.Tensor) for v in arrays.values())):
                records[name] = _detached(arrays, client.model)
        metrics["seconds"] = time.perf_counter() - self.desk.away() - started
        verb = phase.kind if phase.kind == "evaluate" else "fit" if phase.name == "train" else phase.name
        whose = f"{verb}() of {type(client).__name__}"
        return Answered(message, who, phase, records, measured(metrics, whose), answer)

    def _admit(self, message: Message, cache: Cache, who: int) -> Asked:
        """Refuse what this node does not do, and bring its knowledge up to date with the message.

        Raises
        ------
        Refused, Stale, InvalidArrays
            Saying what is wrong with the message.
        """
        content = message.content
        config = config_in(content) or {}
        if not 0 <= who < self.workspace.scenario.clients:
            raise Refused(f"client {who} does not live here")
        for named in (config.get("tag", INITIAL), config.get("new-tag", "")):
            if not TAG.fullmatch(str(named)):
                raise Refused(f"tag {str(named)[:80]!r} is not the name of a state")
        phase = self.phases.of(message.metadata.message_type, config_in(content, "run"), config)
        self._equip_anew()
        if phase.ours:
            self._take(content, config, cache, who, phase.hyper)
        elif isinstance(arrays := content.get("arrays"), ArrayRecord):
            cache["model", ""] = Item(tensors(arrays), phase.round)
        return Asked(message, who, config, phase)

    def _look_after(self, who: int, handed: Mapping[str, tuple[Arrays, int]], cache: Cache) -> None:
        """Make sure that nobody wrote to what a client was handed; knowledge that is spoilt is no longer held here.

        Raises
        ------
        Spoilt
            Naming the topic, the examples or the setting.
        """
        changed = self._settings.changed()
        spoilt = [topic for topic, (arrays, before) in handed.items() if writes(arrays.values()) != before]
        model = self.workspace.model(self.workspace.scenario.architectures[who])
        if moved := {parameter.untyped_storage().data_ptr() for parameter in built_of(model).moved()}:
            # `parameter.data = array`: training then writes to the array, and torch does not count it
            spoilt += [
                topic for topic, (arrays, _) in handed.items()
                if any(value.untyped_storage().data_ptr() in moved for value in arrays.values())
            ]  # fmt: skip
        if written := self.workspace.written(who):
            raise Spoilt(
                f"{self.entry.client.__name__} wrote to {written} in place (or asked for their gradients), and they "
                f"are kept for other rounds: clone them first"
            )
        if spoilt:
            for address in [address for address in cache if address[0] in spoilt]:
                del cache[address]
            raise Spoilt(
                f"{self.entry.client.__name__} wrote to knowledge[{spoilt[0]!r}] in place, and other clients are "
                f"handed the same arrays: clone them first"
            )
        if changed:
            raise Spoilt(
                f"{self.entry.client.__name__} set {changed}, and all clients are handed the same settings: say what "
                f"is this one's own in the call (self.train(lr=…))"
            )

    def _wake(
        self, asked: Asked, cache: Cache, lends: bool, tally: Tally, handed: dict[str, tuple[Arrays, int]]
    ) -> Awake:
        """Load the client's committed state, and let it receive what is new to it.

        Parameters
        ----------
        asked : Asked
        cache : Cache
        lends : bool
            See `answer`.
        tally : Tally
            Counts the work of `receive`, also where that was done before by an evaluation.
        handed : dict
            Is filled with the arrays of each topic that the client is handed, and how often they had been written to.
        """
        who, topics, phase = asked.who, self.entry.server.topics, asked.phase
        architecture = self.workspace.scenario.architectures[who]
        knowledge = cache.for_client(who, architecture, topics)
        state = self.workspace.woken(self.store.load(who, asked.tag))
        seen = state.pop("seen", {})
        new = {
            topic: item.version
            for topic, item in knowledge.items()
            if topics[topic].kind == "lesson" and item.version > int(seen.get(topic, -1))
        }
        news = [t for t in knowledge if topics[t].kind != "lesson" or t in new]
        knowledge = {topic: self.workspace.here(knowledge[topic]) for topic in news}
        handed.update({topic: (item.arrays, writes(item.arrays.values())) for topic, item in knowledge.items()})
        trained = None
        if phase.kind == "evaluate" and self.digests:
            trained = (self.entry.client.personal and state.get("model")) or self.workspace.initial(architecture)
        # An evaluation may have taken in these very lessons from this very state, and staged what came of it. That is
        # used here: the bits are the same, and the client does not distil a second time.
        staging = self.entry.client.personal and bool(new) and len(new) == len(knowledge)
        key = json.dumps([str(phase.run.get("run", "")), asked.tag, sorted(new.items())]) if staging else ""
        staged = self.store.staged(who, key) if staging else None
        if staged is not None:
            state, knowledge = self.workspace.woken(staged), {}
            state.pop("seen", None)
            # what it cost then is counted as if it were done now
            tally.flops, tally.unit, learned, tally.examples = (*state.pop("spent", ()), 0, 0, 0, 0)[:4]
            tally.trained = bool(learned)

        whole = self._replaces_all(knowledge, architecture)
        client = self.entry.client(
            hyper=phase.hyper,
            model=self.workspace.unset(architecture) if whole else self.workspace.fresh(architecture),
            workspace=self.workspace,
            client=who,
            state=state,
            round=phase.round,
            phase=phase.name,
            splits=self.workspace.scenario.scored_by(who, phase.splits),
            pooled=phase.pooled,
        )
        client.config, client.lends = dict(phase.said), lends and phase.kind == "train"
        if client.personal and "model" in state:
            client.load(state["model"])
        client.version = max(new.values(), default=-1)
        if whole and self.desk.filled(architecture, knowledge["model"].arrays):
            knowledge = {}  # the model holds it already, and `receive` would do no more than load it
        if knowledge:
            if not whole:  # copying weights draws nothing
                client.begin("receive")
                # dicts of its own: a name that it sets or deletes in them must not change what other clients are given
                knowledge = {topic: replace(item, arrays=dict(item.arrays)) for topic, item in knowledge.items()}
            client.receive(knowledge)
        awake = Awake(client, {**seen, **new}, trained)
        if staging and staged is None and phase.kind == "evaluate" and client.keeps_all:
            spent = [tally.flops, tally.unit, int(tally.trained), tally.examples]
            self.store.stage(who, key, {**awake.private(), "seen": awake.seen, "spent": spent})
        return awake

    def _replaces_all(self, knowledge: Mapping[str, Item], architecture: str) -> bool:
        """Whether the knowledge overwrites the whole model, so that it need not be reset to initial weights before."""
        kind = self.entry.client
        if kind.receive is not FusionClient.receive or kind.personal or "model" not in knowledge:
            return False
        return knowledge["model"].arrays.keys() == self.workspace.initial(architecture).keys()

    def _play(self, asked: Asked, awake: Awake) -> tuple[Records, dict[str, Any], dict[str, Any]]:
        """Let the client do what is asked, and commit its state if that is training.

        Returns
        -------
        records, metrics, answer
            What the client shared and measured, and what the platform says of it in the reply's config.

        Raises
        ------
        UserError
            If one of the client's methods returns something else than a dict, or its state has a reserved name.
        """
        client, who, phase = awake.client, asked.who, asked.phase
        client.begin(phase.kind if phase.kind == "evaluate" else phase.name)
        answer: dict[str, Any] = {"client": who, "phase": phase.name}
        if phase.kind == "evaluate":
            before = awake.private()
            records, metrics = moments.evaluate(client, awake.trained)
            answer["sha"] = state_sha(before)
            if phase.said.get("final") and before:  # the model this client ends with, for `final/` and export
                self.store.stage(who, "final", {"model": client.weights()})
            return records, metrics, answer
        if phase.name == "train":
            metrics = client.fit()
            records = client.share()
            _dict_of(client, "fit", metrics)
            _dict_of(client, "share", records)
            if client.partly_labelled:
                metrics |= {"labelled": len(client.pools.labelled), LEFT: len(client.pools.unlabelled)}
        else:
            records = _dict_of(client, phase.name, getattr(client, phase.name)())
            counted = client.pooled or client.partly_labelled
            metrics = {"num-examples": len(client.x) if counted else self.workspace.scenario.examples(who)}
        kept = {**awake.private(), **({"seen": awake.seen} if awake.seen else {})}
        answer["tag"] = (str(asked.config.get("new-tag", "")) or f"{phase.round}.1") if kept else INITIAL
        if kept:
            self.store.save(who, answer["tag"], kept, asked.tag)
        return records, metrics, answer

    def _known(self, asked: Asked, cache: Cache) -> dict[str, Item]:
        """What the client was sent, newest of each topic, on this process's device."""
        architecture = self.workspace.scenario.architectures[asked.who]
        found = cache.for_client(asked.who, architecture, self.entry.server.topics)
        return {topic: self.workspace.here(item) for topic, item in found.items()}

    def _clip(
        self, asked: Asked, cache: Cache, records: Records, metrics: dict[str, Any]
    ) -> tuple[Records, dict[str, Any]]:
        """Shorten the client's update to the largest norm that the noise on the sum is made for."""
        anchors, out = self._known(asked, cache), {}
        for name, arrays in records.items():
            out[name], norm = clipped(arrays, anchors[name].arrays, self.workspace.scenario.config.privacy.clip)
            metrics[f"update_norm/{name}"] = norm
        return out, metrics

    def _lie(self, asked: Asked, cache: Cache, records: Records) -> Records:
        """What a client that lies shares instead."""
        scenario, known = self.workspace.scenario, self._known(asked, cache)
        moment = (scenario.seed, "lie", asked.who, asked.phase.round, asked.phase.name)
        liar = attacks.Liar(
            scenario.config.attack, moment, self.workspace.layout(scenario.architectures[asked.who]), scenario.classes
        )
        return {n: liar.altered(n, arrays, known[n].arrays if n in known else {}) for n, arrays in records.items()}

    def reply(self, answered: Answered | Message) -> Message:
        """What the client shared, in Flower's records."""
        if isinstance(answered, Message):
            return answered
        out: dict[str, Any] = {}
        for name, arrays in answered.records.items():
            out["arrays" if name == "model" else name] = resting(arrays)
        out["metrics"] = answered.metrics
        if answered.phase.ours:
            out["config"] = trusted(ConfigRecord, answered.config)
        return reply_to(answered.message, trusted(RecordDict, out))

    def _take(self, content: RecordDict, config: Mapping[str, Any], cache: Cache, who: int, hyper: Any) -> None:
        """Bring the cache up to date with the message, and make sure that it holds what the server believes."""
        versions = config.get("parcel.version")
        if versions is not None and not (self._taken[0] is cache and self._taken[1] is versions):
            self._take_parcels(content, config, cache, who, hyper)
            self._taken = cache, versions  # messages with the same parcels share this very list
        for topic, to, version in zip(
            config.get("needs.topic", []),
            config.get("needs.to", []),
            config.get("needs.version", []),
            strict=True,
        ):
            item = cache.get((topic, to))
            if item is None or item.version != version:
                have = "nothing" if item is None else f"version {item.version}"
                # a server that went back to an earlier round asks for less than is held, and will send the whole
                if item is not None and item.version > version:
                    del cache[topic, to]
                raise Stale(f"{topic}: holds {have}, the server counts on version {version}")

    def _take_parcels(self, content: RecordDict, config: Mapping[str, Any], cache: Cache, who: int, hyper: Any) -> None:
        topics = self.entry.server.topics
        if unknown := [t for t in config.get("parcel.topic", []) if t not in topics]:
            raise Refused(f"topic {unknown[0]!r} is not one of {self.entry.name}'s")
        for parcel in parcels(content, config, cache):
            if not reaches(parcel.to, who, self.workspace.scenario.architectures[who]):
                raise Refused(f"topic {parcel.topic!r} for {parcel.to[:80]!r} is not for client {who}")
            scope = self.workspace.scope(who, hyper)
            spec = topics[parcel.topic].arrays if parcel.since < 0 else topics[parcel.topic].increment
            validate(parcel.topic, parcel.arrays, spec(scope) if spec is not None else None)
            cache.take(parcel, topics)


def state_sha(private: dict[str, Any]) -> str:
    """Hash a client's private state (sha256, hexadecimal); where it is empty, that is the hash of an empty record."""
    flat, rest = flatten(private)
    return sha({"state": flat, **plain_record({k: v for k, v in rest.items() if v != {}})})


def _dict_of(client: FusionClient, verb: str, value: Any) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{verb}() of {type(client).__name__} returned {value!r:.40}; a dict is needed")
    return value


def _detached(arrays: Mapping[str, torch.Tensor], model: torch.nn.Module) -> Arrays:
    # what shares memory with the resident model is copied: the next client overwrites it in place
    resident = {value.untyped_storage().data_ptr() for value in model.state_dict().values()}
    out: Arrays = {}
    for name, value in arrays.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"array {name!r} is {type(value).__name__}; what is shared is a torch.Tensor")
        value = value.detach()
        if value.untyped_storage().data_ptr() in resident:
            value = value.clone()
        out[name] = value.cpu().contiguous()
    return out


def place(entry: Entry, scenario: Scenario, store: ClientStore, **options: Any) -> Node:
    """Build a node; `options` are its further parameters.

    Raises
    ------
    TypeError
        If the strategy's client half does not extend `FusionClient`.
    """
    if not issubclass(entry.client, FusionClient):
        raise TypeError(f"{entry.name}: the client half does not extend FusionClient")
    return Node(entry, scenario, store, **options)
