"""`fedfuse flower`: any unmodified Flower app on our actors, without a SuperLink.

Why it is fast where Flower's simulator is not: content goes into the object store once a round, not once a client;
each actor gets its whole list of messages at once and loads the app once; nothing is polled.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ray
from flwr.app import ArrayRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from ray.exceptions import RayError

from fedfuse.compat.flower_apps import APP_RAISED, as_received, load_app, name_message
from fedfuse.compat.flower_identity import claim_identity
from fedfuse.compat.flower_records import trusted
from fedfuse.core.threads import single_thread
from fedfuse.engines.grid import FusionGrid
from fedfuse.errors import UserError, WorldError

LIST = 64  # messages in one call at most, so that replies flow while others work
LARGE = 32 * 1024  # bytes of arrays from which on a record is put into the object store once, not into each message

log = logging.getLogger("fedfuse")


def load(reference: str, directory: str, kind: type) -> Any:
    """Import a Flower app's component.

    Raises
    ------
    UserError
        If there is none, or it is something else.
    """
    try:
        found = load_app(reference, ImportError, directory)
    except ImportError as error:
        raise UserError(f"{reference}: cannot be loaded ({error})") from error
    if not isinstance(found, kind):
        raise UserError(f"{reference}: is a {type(found).__name__}; a {kind.__name__} is needed")
    return found


class GuestWorker:
    """An actor that has loaded a ClientApp once and answers lists of messages with it."""

    def __init__(self, reference: str, directory: str, run_config: dict[str, Any], nodes: int) -> None:
        single_thread()
        claim_identity()
        self.app: ClientApp = load(reference, directory, ClientApp)
        self.run_config, self.nodes = run_config, nodes
        self.held: dict[Any, Any] = {}

    def work(self, jobs: list[tuple[Any, dict[str, Any], RecordDict | None]], shared: dict[int, Any]) -> list[Any]:
        """Answer messages in the order given: (reply or cause of failure, the node's state) each."""
        self.held = {key: self.held.get(key) for key in shared}
        missing = [key for key in shared if self.held[key] is None]
        self.held.update(zip(missing, ray.get([shared[key] for key in missing]), strict=True))
        return [self._answer(*job) for job in jobs]

    def _answer(self, metadata: Any, content: dict[str, Any], state: RecordDict | None) -> tuple[Any, Any]:
        records = {name: own(self.held[v] if isinstance(v, int) else v) for name, v in content.items()}
        message = as_received(metadata, trusted(RecordDict, records))
        node = metadata.dst_node_id
        context = Context(
            run_id=metadata.run_id,
            node_id=node,
            node_config={"partition-id": node - 1, "num-partitions": self.nodes},
            state=state if state is not None else RecordDict(),
            run_config=dict(self.run_config),
        )
        try:
            reply = self.app(message, context)
            if not isinstance(reply, Message):
                raise TypeError(f"the ClientApp returned a {type(reply).__name__}, not a Message")
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            return f"{text} ({where.filename.rsplit('/', 1)[-1]}:{where.lineno})", None
        return reply, context.state if len(context.state) else None


def own(record: Any) -> Any:
    """A record that the app may change without changing what other clients see."""
    values = {k: v if isinstance(v, int | float | str | bytes) else copy.copy(v) for k, v in record.items()}
    return trusted(type(record), values)


class GuestGrid(FusionGrid):
    """A Flower grid for apps that know nothing of FedFuse: node i + 1 has `partition-id` i.

    Replies come back in the order of the messages. A node's `Context.state` is kept here, by the driver: it is
    replaced only when the reply is in, so a node that failed or whose actor died starts from what it had before.

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
        self.nodes, self.retries = nodes, retries
        self.actors = [self._start() for _ in range(workers)]
        self.states: dict[int, RecordDict] = {}
        self.failed = self.succeeded = 0  # messages
        self._ids = itertools.count(1)
        self._pending: dict[str, _Sent] = {}
        self._ready: dict[str, Message] = {}
        self._puts: dict[int, tuple[Any, Any]] = {}

    def _start(self) -> Any:
        return ray.remote(GuestWorker).options(num_cpus=1).remote(*self._args)

    def get_node_ids(self) -> Iterable[int]:
        """All nodes."""
        return range(1, self.nodes + 1)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand messages out at once: each actor gets its share as one list."""
        sent = []
        for message in messages:
            node = message.metadata.dst_node_id
            if not 1 <= node <= self.nodes:
                raise ValueError(f"there is no node {node}")
            key = f"m{next(self._ids)}"
            name_message(message, key)
            sent.append(_Sent(key, message))
        self._puts = {k: v for k, v in self._puts.items() if any(v[0] is s.message for s in self._pending.values())}
        self._hand_out(sent, min(LIST, -(-len(sent) // len(self.actors)) or 1))
        return [item.key for item in sent]

    def _hand_out(self, sent: list[_Sent], size: int) -> None:
        for k, start in enumerate(range(0, len(sent), size)):
            chosen, jobs = sent[start : start + size], []
            shared: dict[int, Any] = {}
            for item in chosen:
                content = {name: self._shared(value, shared) for name, value in item.message.content.items()}
                jobs.append((item.message.metadata, content, self.states.get(item.message.metadata.dst_node_id)))
            worker = k % len(self.actors)
            reference = self.actors[worker].work.remote(jobs, shared)
            call = _Call(worker, self.actors[worker], reference, chosen)
            for item in chosen:
                item.call = call
                self._pending[item.key] = item

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
        keys = list(message_ids)
        return self._pull(keys, 0.5)

    def _pull(self, keys: list[str], patience: float | None) -> list[Message]:
        calls = {id(c): c for k in keys if k in self._pending and (c := self._pending[k].call) is not None}
        if calls and not any(key in self._ready for key in keys):
            by_reference = {call.reference: call for call in calls.values()}
            done, _ = ray.wait(list(by_reference), num_returns=1, timeout=patience)
            for reference in done:
                self._take(by_reference[reference])
        return [self._ready.pop(key) for key in keys if key in self._ready]

    def _take(self, call: _Call) -> None:
        """Take one call's answers in; what failed is handed out again, one message a call."""
        try:
            answers = ray.get(call.reference)
        except RayError as error:
            if self.actors[call.worker] is call.actor:
                with contextlib.suppress(Exception):
                    ray.kill(call.actor)
                self.actors[call.worker] = self._start()
            cause = str(error).strip().splitlines()
            answers = [(f"its worker failed: {cause[-1] if cause else type(error).__name__}", None)] * len(call.sent)
        again = []
        for item, (reply, state) in zip(call.sent, answers, strict=True):
            node = item.message.metadata.dst_node_id
            if isinstance(reply, str):
                item.tries += 1
                if item.tries <= self.retries:
                    again.append(item)
                    continue
                log.warning("node %d (partition %d) failed: %s", node, node - 1, reply)
                self.failed += 1
                reply = Message(Error(APP_RAISED, reply), reply_to=item.message)
            else:
                self.succeeded += not reply.has_error()
                self.states.pop(node, None)
                if state is not None:
                    self.states[node] = state
            name_message(reply, f"r{item.key}")
            del self._pending[item.key]
            self._ready[item.key] = reply
        if again:
            self._hand_out(again, 1)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Run messages and return the replies in their order.

        Raises
        ------
        WorldError
            If no node ever succeeded: Flower would go on and end untrained.
        """
        keys = list(self.push_messages(messages))
        end = None if timeout is None else time.monotonic() + timeout
        found: dict[str, Message] = {}
        while len(found) < len(keys) and (end is None or time.monotonic() < end):
            left = [key for key in keys if key not in found]
            rest = None if end is None else max(0.0, end - time.monotonic())
            for reply in self._pull(left, rest):
                found[reply.metadata.reply_to_message_id] = reply
        replies = [found[key] for key in keys if key in found]
        if replies and not self.succeeded:
            raise WorldError(f"no node succeeded: {replies[0].error.reason}")
        return replies

    def close(self) -> None:
        """End the actors."""
        for actor in self.actors:
            with contextlib.suppress(Exception):
                ray.kill(actor)
        self.actors = []


class _Call:
    def __init__(self, worker: int, actor: Any, reference: Any, sent: list[_Sent]) -> None:
        self.worker, self.actor, self.reference, self.sent = worker, actor, reference, sent


class _Sent:
    def __init__(self, key: str, message: Message) -> None:
        self.key, self.message = key, message
        self.call: _Call | None = None
        self.tries = 0


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
