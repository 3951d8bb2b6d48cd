"""What runs inside an actor: a node with resident models, handed bare messages, answering with bare records."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import time
from collections.abc import Iterable
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from fedfuse.compat.flower_identity import claim_identity
from fedfuse.compat.flower_records import entries, trusted
from fedfuse.config.registry import Entry
from fedfuse.core.groups import Groups
from fedfuse.core.node import Answered, Node
from fedfuse.core.scenario import Scenario
from fedfuse.core.threads import single_thread
from fedfuse.engines.line import receive, send
from fedfuse.models.shared_memory import give_back
from fedfuse.wire.client_store import INITIAL, ClientStore
from fedfuse.wire.knowledge import Address, Cache, Item, Stale
from fedfuse.wire.records import NUMBERS, leaves, unflatten

Bare = tuple[int, str, dict[str, Any]]  # a message without its arrays: node, type, config
Tree = dict[str, Any]  # a client's state: paths to arrays and plain values, in their order
# a call: what all messages say, groups, knowledge (version, arrays or where they lie), states of clients, and whether
# members are answered one by one, nothing summed (after a worker died on the group)
Task = tuple[
    dict[str, Any] | None,
    list[list[Bare]],
    dict[Address, tuple[int, Any]],
    dict[tuple[int, str], Tree | None],
    bool,
]
Answer = tuple[Any, ...]  # (records, metrics, config), or (error code, reason)


class CarriedStore(ClientStore):
    """Client state that travels with the messages, where driver and actor share no directory."""

    def __init__(self) -> None:
        self.given: dict[tuple[int, str], Tree | None] = {}
        self.kept: list[tuple[str, int, str, Tree, str]] = []  # verb, client, tag or key, state, previous

    def load(self, client: int, tag: str) -> dict[str, Any]:
        """Return the state that came with the message."""
        if tag == INITIAL:
            return {}
        tree = self.given.get((client, tag))
        if tree is None:
            raise Stale(f"state {tag} is not here")
        return unpacked(tree)

    def save(self, client: int, tag: str, state: dict[str, Any], previous: str) -> None:
        """Send the state back with the replies."""
        self.kept.append(("save", client, tag, packed(state), previous))

    def stage(self, client: int, key: str, state: dict[str, Any]) -> None:
        """Send the memo back with the replies."""
        self.kept.append(("stage", client, key, packed(state), ""))

    def staged(self, client: int, key: str) -> dict[str, Any] | None:
        """No memo travels: what it saves is computed anew, to the same bits."""
        return None


def packed(state: dict[str, Any]) -> Tree:
    """A client's state as arrays and plain values."""
    return {k: _array(v) if isinstance(v, torch.Tensor) else v for k, v in leaves(state).items()}


def _array(value: torch.Tensor) -> Any:
    value = value.detach().cpu().contiguous()
    return value.numpy().copy() if value.dtype in NUMBERS else value.clone()  # NumPy has no bfloat16


def unpacked(tree: Tree) -> dict[str, Any]:
    """Undo `packed`; the tensors may be written to."""
    return unflatten({k: torch.from_numpy(v.copy()) if isinstance(v, np.ndarray) else v for k, v in tree.items()})


class TimedNode(Node):
    """A node whose process ends if a client takes too long; whoever waits for it sees it die and tries again."""

    limit: float | None = None

    def _answer(self, message: Message, *args: Any) -> Answered:
        if self.limit is None:
            return super()._answer(message, *args)
        # a C thread: it needs no interpreter lock, so a client that hangs in foreign code is ended too
        faulthandler.dump_traceback_later(self.limit, exit=True)
        try:
            return super()._answer(message, *args)
        finally:
            faulthandler.cancel_dump_traceback_later()


class Worker:
    """One process with one torch thread, kept from run to run; runs groups of clients it is handed."""

    def __init__(self) -> None:
        single_thread()
        claim_identity()
        self.cache = Cache()
        self.listener: Listener | None = None
        gc.collect()
        gc.freeze()  # what was imported is never garbage: looking through it takes 0.1 s

    def prepare(
        self,
        entry: Entry,
        scenario: Scenario,
        state_dir: str,
        token: str,
        device: str,
        retries: int,
        limit: float | None,
        line: str | None,
    ) -> bool:
        """Take on a run: what it builds from here on is resident. Say whether the driver's directory is seen.

        `line` is where `attend` is to listen, if the driver is on this machine.
        """
        if self.listener is not None:
            self.listener.close()
        self.listener = None if line is None else Listener(line, "AF_UNIX")
        self.cache = Cache()
        seen = Path(state_dir, token).exists()
        self.store: ClientStore = ClientStore(Path(state_dir)) if seen else CarriedStore()
        self.node = TimedNode(entry, scenario, self.store, device, retries)
        self.node.limit = limit
        self.groups = Groups(self.node)
        return seen

    def attend(self) -> None:
        """Work on calls that come by the line, until the driver says that Ray's go on or is gone."""
        assert self.listener is not None, "prepared without a line"
        with self.listener.accept() as line:
            while (task := _asked(line)) is not None:
                answer = self.work(task)  # what it raises is the driver's to know
                with contextlib.suppress(ConnectionError):  # gone meanwhile, as the next look will find
                    send(line, answer)

    def work(self, task: Task) -> tuple[list[list[Answer]], list[Any], float]:
        """Run groups in the order given; return each group's answers, states to keep, and the seconds it took."""
        started = time.perf_counter()
        run, groups, needs, states, alone = task
        self._fetch(needs)
        if isinstance(self.store, CarriedStore):
            self.store.given, self.store.kept = states, []
        common = None if run is None else trusted(ConfigRecord, run)
        asked = [[self._message(bare, common) for bare in group] for group in groups]
        one_by_one = (self.groups.each(messages, self.cache) for messages in asked)
        replied: Iterable[Iterable[Message]] = one_by_one if alone else self.groups.all(asked, self.cache)
        out = [[answer_of(reply) for reply in replies] for replies in replied]
        for address in needs:  # what was meant for one client is not kept in every actor
            if address[1].startswith("client:"):
                self.cache.pop(address, None)
        if self.node.workspace.scenario.config.runtime.memory is not None:
            give_back()
        kept = self.store.kept if isinstance(self.store, CarriedStore) else []
        return out, kept, time.perf_counter() - started

    def _message(self, bare: Bare, run: ConfigRecord | None) -> Message:
        node, kind, config = bare
        content = {"config": trusted(ConfigRecord, config)}
        if run is not None:
            content["run"] = run
        return Message(trusted(RecordDict, content), node, kind)

    def _fetch(self, needs: dict[Address, tuple[int, Any]]) -> None:
        missing: dict[Address, Any] = {}
        lying: dict[Address, Any] = {}
        for address, (version, value) in needs.items():
            held = self.cache.get(address)
            if held is None or held.version != version:
                (missing if isinstance(value, tuple) else lying)[address] = value
        if lying:
            missing |= zip(lying, ray.get(list(lying.values())), strict=True)
        for address, (arrays, version) in missing.items():
            self.cache[address] = Item({k: torch.from_numpy(v) for k, v in arrays.items()}, version)


def _asked(line: Connection) -> Task | None:
    """The next call that comes by a line; None where the driver says that Ray's go on, or is gone."""
    try:
        task: Task | None = receive(line)
        return task
    except (EOFError, ConnectionError):
        return None


def answer_of(reply: Message) -> Answer:
    """A reply as plain values; arrays stay arrays."""
    if reply.has_error():
        return reply.error.code, reply.error.reason
    records, plain = {}, []
    for name, value in entries(reply.content).items():
        if isinstance(value, ArrayRecord):
            records[name] = {key: array.numpy() for key, array in entries(value).items()}
        else:
            plain.append((name, isinstance(value, ConfigRecord), dict(entries(value))))
    return records, plain
