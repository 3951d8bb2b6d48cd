"""`fedfuse flower`: any unmodified Flower app on our actors, without a SuperLink.

Why it is fast where Flower's simulator is not: content goes into the object store once a round, not once a client;
each actor gets its whole list of messages at once and loads the app once; nothing is polled. A node that waits is left
to wait apart, so that it holds back nobody (`guest_worker.py`).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from flwr.app import ArrayRecord, Error, Message, RecordDict
from ray.exceptions import RayError

from fedfuse.compat.flower_apps import APP_RAISED, MESSAGE_GONE, name_message, pushed
from fedfuse.engines.cluster import cause, own_folder
from fedfuse.engines.fusion_grid import FusionGrid
from fedfuse.engines.guest_words import Words
from fedfuse.engines.guest_worker import Answer, GuestWorker
from fedfuse.errors import UserError, WorldError

LIST = 64  # messages in one call at most, so that replies flow while others work
ASIDE = 8  # processes that may stand aside with a node that waits before the next such node is waited for
LOOK = 0.2  # seconds: how often a thread of ours looks for answers and for what clients print
LARGE = 32 * 1024  # bytes of arrays from which on a record is put into the object store once, not into each message

log = logging.getLogger("fedfuse")


class GuestGrid(FusionGrid):
    """A Flower grid for apps that know nothing of FedFuse: node i + 1 has `partition-id` i.

    Replies come back in the order of the messages. A node's `Context.state` is kept here, by the driver: it is
    replaced only when the reply is in, so a node that failed or whose actor died starts from what it had before; and a
    node is handed its next message only then. A thread takes answers in while the app is busy elsewhere.
    Flower's older servers ask for each client in a thread of its own: what is kept here changes under one lock, and
    nobody waits while holding it.

    Parameters
    ----------
    reference : str
        The ClientApp, `module:attribute`.
    directory : str
        The app's directory.
    run_config : dict
    nodes, workers : int
    retries : int
        How often a node that fails is tried again.
    """

    def __init__(
        self, reference: str, directory: str, run_config: dict[str, Any], nodes: int, workers: int, retries: int = 2
    ) -> None:
        super().__init__()
        self._args = (reference, directory, run_config, nodes)
        self.nodes, self.retries, self.workers = nodes, retries, workers
        self.words = Words(own_folder())
        self.actors = [self._start() for _ in range(workers)]
        self.spare: list[_Process] = []  # beyond the workers, free again
        self.states: dict[int, RecordDict] = {}
        self.failed = self.succeeded = 0  # messages
        self.told = ""  # by the last that failed
        self._ids = itertools.count(1)
        self._pending: dict[str, _Sent] = {}
        self._behind: dict[int, list[_Sent]] = {}  # by node that has not answered yet: what it is asked next
        self._until = math.inf  # when the first of them has no time left
        self._ready: dict[str, Message] = {}
        self._calls: dict[Any, _Call] = {}
        self._puts: dict[int, tuple[Any, Any]] = {}
        self._aside = 0  # processes that wait for their node
        self._loads = False  # whether a process has loaded the app
        self._born_dead = 0  # processes that died before they had
        self._trouble: Exception | None = None
        self._lock, self._over = threading.Lock(), threading.Event()
        self._attendant = threading.Thread(target=self._attend, daemon=True)
        self._attendant.start()

    def _start(self, aside: bool = False) -> _Process:
        options: Any = ray.remote(GuestWorker).options(num_cpus=0 if aside else 1)
        actor = options.remote(*self._args, self.words.of_another())
        return _Process(actor, actor.loaded.remote())

    def _able(self) -> list[_Process]:
        """The processes that have loaded the app; all if none has yet."""
        loading = {p.loading: p for p in self.actors if p.loading is not None}
        for reference in ray.wait(list(loading), num_returns=len(loading), timeout=0)[0] if loading else ():
            self._loaded(loading[reference])
        return [p for p in self.actors if p.loading is None] or self.actors

    def _loaded(self, process: _Process) -> None:
        """A process has tried to load the app.

        Raises
        ------
        UserError
            If there is a fault in it.
        """
        reference, process.loading = process.loading, None
        with contextlib.suppress(RayError):  # it died meanwhile, as its next call says
            fault = ray.get(reference)
            if fault:
                raise UserError(fault)
            self._loads = True

    def get_node_ids(self) -> Iterable[int]:
        """All nodes."""
        return range(1, self.nodes + 1)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand messages out at once: each actor gets its share as one list."""
        with self._lock:
            return self._push(messages)

    def _push(self, messages: Iterable[Message]) -> list[str]:
        sent = []
        for message in messages:
            node = message.metadata.dst_node_id
            if not 1 <= node <= self.nodes:
                log.error("there is no node %d: a message to it is left out", node)
                continue
            key = f"m{next(self._ids)}"
            name_message(message, key)
            sent.append(_Sent(key, pushed(message)))
        self._puts = {}
        self._pending.update((item.key, item) for item in sent)
        self._until = min([self._until, *(item.until for item in sent)])
        self._hand_out(self._next(sent), min(LIST, -(-len(sent) // len(self._able())) or 1))
        return [item.key for item in sent]

    def _next(self, sent: list[_Sent]) -> list[_Sent]:
        """Those of some messages whose nodes have answered all before; the others stay behind them."""
        free = []
        for item in sent:
            node = item.message.metadata.dst_node_id
            if node in self._behind:
                self._behind[node].append(item)
            elif not item.expired():
                self._behind[node] = []
                free.append(item)
        return free

    def _hand_out(self, sent: list[_Sent], size: int) -> None:
        able = self._able()
        for k, start in enumerate(range(0, len(sent), size)):
            chosen, jobs = sent[start : start + size], []
            shared: dict[int, Any] = {}
            for item in chosen:
                content = {name: self._shared(value, shared) for name, value in item.message.content.items()}
                jobs.append((item.message.metadata, content, self.states.get(item.message.metadata.dst_node_id)))
            process = able[k % len(able)]
            call = _Call(process, process.actor.work.remote(jobs, shared, self._aside >= ASIDE), chosen)
            self._calls[call.reference] = call

    def _shared(self, record: Any, shared: dict[int, Any]) -> Any:
        if not isinstance(record, ArrayRecord) or sum(len(a.data) for a in record.values()) < LARGE:
            return record
        key = id(record)
        if key not in self._puts:
            self._puts[key] = (record, ray.put(record))  # the record is kept, so that its id stays taken
        shared[key] = self._puts[key][1]
        return key

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are in; wait a moment for the first if none is."""
        return list(self._pull(list(message_ids), 0.5).values())

    def _pull(self, keys: list[str], patience: float | None) -> dict[str, Message]:
        with self._lock:
            ready = any(key in self._ready for key in keys)
            waits = not ready and any(key in self._pending for key in keys)
            left = max(0.0, self._until - time.time())
        self._take_in((left if patience is None else min(left, patience)) if waits else 0)
        if self._trouble is not None:
            raise self._trouble
        with self._lock:
            if self._until <= time.time():
                self._expire()
            return {key: self._ready.pop(key) for key in keys if key in self._ready}

    def _expire(self) -> None:
        """Answer in place of nodes that have not in the time that their message was given."""
        for item in [item for item in self._pending.values() if item.expired()]:
            reason = f"the message was given {item.message.metadata.ttl:g} s, which are over"
            self._ready[item.key] = reply = Message(Error(MESSAGE_GONE, reason), reply_to=item.message)
            name_message(reply, f"r{item.key}")
            del self._pending[item.key]
        self._until = min((item.until for item in self._pending.values()), default=math.inf)

    def _attend(self) -> None:
        """While the app is busy elsewhere, take answers in, so that nodes go on, and say what clients print."""
        while self._trouble is None and not self._over.wait(LOOK):
            try:
                self._take_in(0)
            except Exception as error:
                self._trouble = error

    def _take_in(self, patience: float | None) -> None:
        """Take in what calls have answered; wait for the first if none has."""
        with self._lock:
            calls = list(self._calls)
        done = ray.wait(calls, num_returns=1, timeout=patience)[0] if calls else []
        if done and len(calls) > 1:
            done = ray.wait(calls, num_returns=len(calls), timeout=0)[0]
        self.words.pass_on()  # before the app goes on
        with self._lock:
            for reference in done:
                if (call := self._calls.pop(reference, None)) is not None:  # else another thread has taken it in
                    self._take(call)

    def _take(self, call: _Call) -> None:
        """Take one call's answers in; what failed is handed out again, one message a call, and what was not begun."""
        answers: list[Answer]
        if call.process.loading is not None:
            self._loaded(call.process)
        try:
            answers, waits = ray.get(call.reference)
        except RayError as error:
            self._born_dead += not (self._loads or call.process.dead)
            if self._born_dead > self.retries:
                raise WorldError(f"{self._args[0]}: {self._born_dead} processes died as they loaded it") from error
            self._replace(call.process)
            if len(call.sent) > 1:  # which of them it died of, each will show by itself
                self._hand_out(call.sent, 1)
                return
            answers, waits = [(f"its worker died ({cause(error)})", None)], False
        if call.aside:
            self._aside -= 1
            self._return(call.process)
        rest = call.sent[len(answers) :]
        if waits:
            self._set_aside(call.process, rest.pop(0))
        rest += self._keep(call.sent, answers)
        if rest:
            self._hand_out(rest, max(1, -(-len(rest) // len(self._able()))))

    def _set_aside(self, process: _Process, item: _Sent) -> None:
        """Let a process wait for its node; another takes its place, which computes while the node does not."""
        call = _Call(process, process.actor.finish.remote(), [item], aside=True)
        self._calls[call.reference] = call
        self._aside += 1
        if process in self.actors:  # else it died since, and was replaced
            self.actors.remove(process)
            self.actors.append(self.spare.pop() if self.spare else self._start(aside=True))

    def _return(self, process: _Process) -> None:
        """Take a process back whose node waits no longer."""
        if process.dead:
            return
        loading = next((p for p in self.actors if p.loading is not None), None)
        if loading is not None:  # who has loaded the app goes first
            self.actors.remove(loading)
            self.spare.append(loading)
            self.actors.append(process)
        else:
            self.spare.append(process)

    def _replace(self, process: _Process) -> None:
        """End a process that failed; start another where it had a place."""
        if process.dead:
            return
        process.dead = True
        with contextlib.suppress(Exception):
            ray.kill(process.actor)
        if process in self.actors:
            self.actors[self.actors.index(process)] = self._start()

    def _keep(self, sent: list[_Sent], answers: list[Answer]) -> list[_Sent]:
        """Keep replies and states; hand out again what failed; return what the nodes are asked next."""
        again, behind = [], []
        for item, (reply, state) in zip(sent, answers, strict=False):
            node = item.message.metadata.dst_node_id
            if isinstance(reply, str):
                item.tries += 1
                if item.tries <= self.retries:
                    again.append(item)
                    continue
                log.warning("node %d (partition %d) failed: %s", node, node - 1, reply)
                self.failed, self.told = self.failed + 1, reply
                reply = Message(Error(APP_RAISED, reply), reply_to=item.message)
            else:
                self.succeeded += not reply.has_error()
                self.states.pop(node, None)
                if state is not None:
                    self.states[node] = state
            behind += self._behind.pop(node)
            if self._pending.pop(item.key, None) is not None:  # else its time was over
                name_message(reply, f"r{item.key}")
                self._ready[item.key] = reply
        if again:
            self._hand_out(again, 1)
        return self._next(behind)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Run messages and return the replies in their order.

        Raises
        ------
        WorldError
            If no node ever succeeded: Flower would go on and end untrained.
        """
        keys = left = list(self.push_messages(messages))
        end = None if timeout is None else time.monotonic() + timeout
        found: dict[str, Message] = {}
        while left and (end is None or time.monotonic() < end):
            found |= self._pull(left, None if end is None else max(0.0, end - time.monotonic()))
            left = [key for key in left if key not in found]
        with self._lock:
            for key in left:  # which nobody can ask for: a late reply leaves its node's state, and is dropped
                self._pending.pop(key, None)
                self._ready.pop(key, None)
        replies = [found[key] for key in keys if key in found]
        if replies and not self.succeeded:
            raise WorldError(f"no node succeeded: {replies[0].error.reason}")
        return replies

    def close(self) -> None:
        """End the actors."""
        self._over.set()
        self._attendant.join()
        aside = [call.process for call in self._calls.values()]
        for process in {*self.actors, *self.spare, *aside}:
            with contextlib.suppress(Exception):
                ray.kill(process.actor)
        self.actors, self.spare = [], []
        self.words.close()


@dataclass(eq=False)
class _Process:
    actor: Any
    loading: Any  # the reference that says it has loaded the app; None once it has
    dead: bool = False


@dataclass(eq=False)
class _Call:
    process: _Process
    reference: Any
    sent: list[_Sent]
    aside: bool = False  # one message, of a node that waits


@dataclass(eq=False)
class _Sent:
    key: str
    message: Message
    tries: int = 0

    @property
    def until(self) -> float:
        """When the time that the message was given is over."""
        return self.message.metadata.created_at + self.message.metadata.ttl

    def expired(self) -> bool:
        """Whether it is."""
        return self.until <= time.time()


def read_app(directory: Path, overrides: list[str]) -> tuple[str, str, dict[str, Any], dict[str, Any]]:
    """Read a Flower app: server and client components, the run's configuration, and the whole table.

    Raises
    ------
    UserError
        If it is no Flower app, or an override is wrong.
    """
    from fedfuse.compat.flower_apps import flatten_dict, fuse_dicts, get_project_config, parse_config_args

    try:
        table = get_project_config(directory)
        app = table["tool"]["flwr"]["app"]
        components = app["components"]
        config = flatten_dict(app.get("config", {}))
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise UserError(f"{directory}: is not a Flower app ({' '.join(str(error).split())})") from error
    vain = next((words for words in overrides if words.strip() and "=" not in words and words[-5:] != ".toml"), None)
    if vain is not None:  # Flower takes it for nothing
        raise UserError(f"--run-config {vain}: a key and its value are needed (key=value), or a .toml file")
    try:
        given = parse_config_args(overrides or None)
        config = fuse_dicts(config, given)
    except Exception as error:
        text = " ".join(str(getattr(error, "message", error)).split())
        known = ", ".join(sorted(config)) or "none"
        raise UserError(f"--run-config {' '.join(overrides)}: {text}; keys of this app: {known}") from error
    return components["serverapp"], components["clientapp"], config, table


def nodes_of(table: dict[str, Any]) -> int:
    """The number of nodes an older app's `pyproject.toml` names, else 10."""
    federations = table["tool"]["flwr"].get("federations", {})
    chosen = federations.get(federations.get("default", ""), {})
    return int(chosen.get("options", {}).get("num-supernodes", 10))
