"""Flower's own runtimes under a fusion strategy: who holds which client, and what of their answers counts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid

from fedfuse.core.shares import FAILED, INVALID, STALE
from fedfuse.engines.fusion_grid import FusionGrid
from fedfuse.errors import WorldError, one_line
from fedfuse.network.exchange import OURS, Exchange, Look, Patience, Sent
from fedfuse.network.replies import fault_of
from fedfuse.network.roster import Roster
from fedfuse.network.secure_sums import SecureSums, TooFew, size_of
from fedfuse.wire.packing import packed, unpacked
from fedfuse.wire.records import InvalidArrays, config_in


class RemoteGrid(FusionGrid):
    """Adapts any grid of Flower's to what a fusion strategy expects: known clients, ordered replies, retries.

    Strategies see client i as node i + 1, as on every grid of ours; which of Flower's nodes acts as which client
    (one node may act as several) is known here alone.

    Parameters
    ----------
    grid : Grid
        Flower's own.
    setting : dict
        Goes with every message: the run's configuration, id and attempt.
    patience : Patience
    say : callable
        Takes one line of log.
    roster : Roster or None
        Which key may be which client; None where nodes prove none.
    over : threading.Event, optional
        Set by whoever sees the grid end.

    Attributes
    ----------
    timed : list
        See `Exchange`.
    extra : list
        Of the messages around a secure sum: client, direction, record, bytes; the loop takes them.
    """

    def __init__(
        self,
        grid: Grid,
        setting: Mapping[str, Any],
        patience: Patience | None = None,
        say: Callable[[str], None] = print,
        over: threading.Event | None = None,
        roster: Roster | None = None,
    ) -> None:
        super().__init__()
        self.grid, self.patience, self._say, self.roster = grid, patience or Patience(), say, roster
        self.setting = ConfigRecord(dict(setting))
        self.nodes: dict[int, int] = {}  # client -> Flower's node
        self.examples: dict[int, int] = {}  # client -> training examples, as its node said before the first round
        self.exchange = Exchange(grid, self.patience, self.say, self._dressed, over)
        self.timed = self.exchange.timed
        self.extra: list[tuple[int, str, str, int]] = []
        self._secure: SecureSums | None = None
        self._dropped: dict[int, str] = {}  # who is not part of a phase's secure sum, and why

    def say(self, line: str) -> None:
        """Log one line, whatever a node's words in it hold."""
        self._say(one_line(line))

    # -- Flower's interface --------------------------------------------------------------------------------

    def set_run(self, run: Any) -> None:
        """Pass on the run."""
        self.grid.set_run(run)

    @property
    def run(self) -> Any:
        """Flower's run."""
        return self.grid.run

    def get_node_ids(self) -> Iterable[int]:
        """Clients as nodes, in client order."""
        return [client + 1 for client in sorted(self.nodes)]

    def reaches(self, client: int) -> bool:
        """Whether a node acts as a client; nothing is sent to one that none acts as."""
        return client in self.nodes

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages without waiting."""
        return self.grid.push_messages([self._dressed(m, self.nodes[m.metadata.dst_node_id - 1]) for m in messages])

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Take replies that are there."""
        return self.grid.pull_messages(message_ids)

    # -- who is there --------------------------------------------------------------------------------------

    def join(self, clients: int, check: Callable[[Mapping[str, Any]], list[str]]) -> dict[int, int]:
        """Learn which node holds which client, and that both sides agree on everything that matters.

        Parameters
        ----------
        clients : int
            How many the run has; all must answer.
        check : callable
            `check(hello) -> differences`, in words.

        Raises
        ------
        WorldError
            If in time not every client is there; it says who refused and why.
        """
        since = time.monotonic()
        until, reasons = since + self.patience.join, dict[int, str]()
        asked, waiting, looks = dict[int, str](), list[Sent](), dict[str, Look]()
        while len(self.nodes) < clients:
            online = self.exchange.online()
            known = {*self.nodes.values(), *(item.node for item in waiting)}
            if new := sorted(n for n, stamp in online.items() if n not in known and asked.get(n) != stamp):
                asked |= {node: online[node] for node in new}
                waiting += [Sent(Message(RecordDict(), node, "query.hello"), -1, node) for node in new]
                since = time.monotonic()
            answered: list[tuple[Sent, Message]] = []
            self.exchange.look(waiting, looks, answered)  # who does not answer keeps out nobody who comes later
            for node, found, reason in self._greeted(answered, clients, check):
                if reason is None:
                    self.nodes |= dict.fromkeys(found, node)
                    self.say(f"fedfuse: node {node} acts as client {', '.join(map(str, found))}")
                else:
                    reasons[node] = one_line(reason)
                    self.say(f"fedfuse: node {node} is not taken: {reason}")
            missing, now = sorted(set(range(clients)) - set(self.nodes)), time.monotonic()
            settled = not waiting and reasons and len(online) >= clients  # whoever is there was turned away
            if missing and (now > until or settled):
                for item in waiting:
                    reasons[item.node] = f"node {item.node} does not answer"
                    self.say(f"fedfuse: {reasons[item.node]}")
                if not self._enough(clients):
                    after = f"after {self.patience.join:g} s " if now > until else ""
                    why = f"; turned away: {'; '.join(reasons.values())}" if reasons else ""
                    raise WorldError(f"{after}no node acts as client {missing}{why}")
                self.say(f"fedfuse: begins without client {missing}: no node acts as it")
                break
            if missing:
                self.exchange.pause(now - since)
        return self.nodes

    def _enough(self, clients: int) -> bool:
        return len(self.nodes) >= (clients if self.patience.clients is None else max(1, self.patience.clients))

    def _greeted(
        self, answered: list[tuple[Sent, Message]], clients: int, check: Callable[[Mapping[str, Any]], list[str]]
    ) -> Iterable[tuple[int, list[int], str | None]]:
        for item, reply in answered:
            if reply.has_error():
                yield item.node, [], reply.error.reason
                continue
            records: list[dict[str, Any]] = [
                dict(value) for name, value in sorted(reply.content.config_records.items()) if name[:5] == "hello"
            ]
            found: list[Any] = [hello.get("client") for hello in records]
            if not found or not all(type(client) is int and 0 <= client < clients for client in found):
                yield item.node, [], f"says it acts as clients {found}; the run has {clients}"
            elif len(set(found)) < len(found):
                yield item.node, [], f"says it acts as clients {found}, one of them twice"
            elif taken := [client for client in found if client in self.nodes]:
                yield item.node, [], f"client {taken[0]} is node {self.nodes[taken[0]]} already"
            elif wrong := [line for hello in records for line in self._checked(check, hello)]:
                yield item.node, [], f"does not agree: {'; '.join(wrong[:4])}"
            elif fault := self._unlisted(item.node, found, [hello["examples"][0] for hello in records]):
                yield item.node, [], fault
            else:
                said: list[Any] = list(records)
                self.examples |= {hello["client"]: hello["examples"][0] for hello in said}
                yield item.node, sorted(found), None

    def _unlisted(self, node: int, clients: list[int], examples: list[int]) -> str | None:
        """What the roster has against a node that has proved its key."""
        if self.roster is None:
            return None
        keys = [about.public_key for about in self.grid.get_nodes() if about.node_id == node]
        place = self.roster.place(keys[0]) if keys else None
        if place is None:
            return "its key is not in the roster (fedfuse deploy register)"
        fault = place.fault_of(clients, examples)
        return f"{place.name} {fault}" if fault else None

    def _checked(self, check: Callable[[Mapping[str, Any]], list[str]], hello: Mapping[str, Any]) -> list[str]:
        """What is wrong with a hello; one that cannot even be looked at is wrong, and nobody else's affair."""
        try:
            counts = hello.get("examples")
            if not isinstance(counts, list) or not counts or type(counts[0]) is not int or counts[0] < 0:
                return [f"examples={counts!r}: counts are needed"]
            return check(hello)
        except Exception as error:
            return [str(error)]

    # -- messages ------------------------------------------------------------------------------------------

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages, wait, and return the replies in client order.

        What the transport loses is sent again; stragglers past the deadline are left out.

        Raises
        ------
        WorldError
            If too few clients succeeded even when asked a second time.
        """
        messages = list(messages)
        limit = timeout if timeout is not None else self.patience.deadline
        try:
            opened = self._secured(messages)
            answered = self._answers(messages, limit, 0 if opened else self.patience.minimum)
            short = self._secure.short(_good(answered)) if opened and self._secure is not None else None
        except TooFew as few:  # nothing was unmasked yet
            short, answered = str(few), []
        if short is not None:
            self.say(f"fedfuse: {short}; keys are exchanged anew and all are asked once more")
            self._secured(messages, anew=True)
            answered = self._answers(messages, limit, self.patience.minimum)
        answered.sort(key=lambda pair: pair[0].client)
        return [self._looked_at(item, reply) for item, reply in answered]

    def _answers(self, messages: list[Message], limit: float | None, least: int) -> list[tuple[Sent, Message]]:
        """Whatever clients answer; those who fail are asked once more where fewer than `least` succeed."""
        sent, answered = list[Sent](), list[tuple[Sent, Message]]()
        for message in messages:
            client = message.metadata.dst_node_id - 1
            if self._secure is not None and client in self.nodes and client not in self._secure.records:
                out = Error(FAILED, f"dropped out before the secure sum: {self._dropped.get(client, 'was not asked')}")
                answered.append((Sent(message, client, -1), Message(out, reply_to=message)))
            elif client in self.nodes:
                sent.append(Sent(message, client, self.nodes[client]))
            else:
                gone = Error(FAILED, "no node acts as it")
                answered.append((Sent(message, client, -1), Message(gone, reply_to=message)))
        self.exchange.send(sent, limit, answered)
        needed = min(least, len(sent))
        if _good(answered) < needed:
            self.say(f"fedfuse: {_good(answered)} of {len(sent)} replied, {needed} are needed; asking again")
            answered = [(item, reply) for item, reply in answered if _counts(reply)]
            kept = {id(item) for item, _ in answered}
            again = [Sent(item.original, item.client, item.node) for item in sent if id(item) not in kept]
            self.exchange.send(again, limit, answered)
            if _good(answered) < needed:
                causes = [f"client {i.client}: {r.error.reason}" for i, r in answered if r.has_error()]
                raise WorldError(
                    f"{_good(answered)} of {len(sent)} clients replied, at least {needed} are needed"
                    + (f" ({'; '.join(causes)})" if causes else "")
                )
        return answered

    def _secured(self, messages: list[Message], anew: bool = False) -> bool:
        """Have keys and shares of a phase's secure sum exchanged, and say whether that was done now.

        A client that is asked once more is in its phase's sum already.
        """
        run: Any = (config_in(messages[0].content, "run") if messages else None) or {}
        if "secure" not in run:
            self._secure = None
            return False
        clients = {message.metadata.dst_node_id - 1 for message in messages} & self.nodes.keys()
        about, open_ = (run["run"], run["round"], run["phase"]), self._secure
        if open_ is not None and open_.about == about and clients <= open_.clients and not anew:
            return False
        self._secure, self._dropped = None, {}
        self._secure = SecureSums(run, clients, lambda step, told: self._ask(step, told, run), self._drop)
        for client, told in self._secure.records.items():
            self.extra.append((client, "down", "secure:train", size_of(told)))
        return True

    def _ask(self, step: str, told: Mapping[int, dict[str, Any]], run: Any) -> dict[int, Mapping[str, Any]]:
        """Send one step of a secure sum; who does not answer with a record is left out of what comes back."""
        sent, answered, found = list[Sent](), list[tuple[Sent, Message]](), dict[int, Mapping[str, Any]]()
        for client, values in told.items():
            content = RecordDict({"config": ConfigRecord({"client": client}), "run": ConfigRecord(dict(run))})
            content["secure"] = ConfigRecord(values)
            node = self.nodes[client]
            sent.append(Sent(Message(content, node, f"query.secure_{step}"), client, node))
            self.extra.append((client, "down", f"secure:{step}", size_of(values)))
        self.exchange.send(sent, self.patience.deadline, answered)
        for item, reply in answered:
            record = reply.content.config_records.get("secure") if reply.has_content() else None
            if record is not None and reply.metadata.src_node_id == item.node:
                found[item.client] = record
                self.extra.append((item.client, "up", f"secure:{step}", size_of(record)))
            else:
                self._drop(item.client, step, str(reply.error.reason) if reply.has_error() else "not an answer")
        return dict(sorted(found.items()))

    def _drop(self, client: int, step: str, why: str) -> None:
        """Name who is left out of a secure sum."""
        self._dropped[client] = f"{step}: {one_line(why)}"
        self.say(f"fedfuse: client {client}: secure sum, {step}: {why}")

    def unmask(self, clients: list[int], total: Any) -> Any:
        """Take the masks off a phase's sum over these clients; see `SecureSums`."""
        assert self._secure is not None
        secure, self._secure = self._secure, None
        return secure.unmask(clients, total)

    def _looked_at(self, item: Sent, reply: Message) -> Message:
        if reply.has_error():
            if reply.error.code in OURS:
                return Message(reply.error, reply_to=item.original)
            return Message(Error(FAILED, reply.error.reason or "the transport failed"), reply_to=item.original)
        fault = fault_of(reply, item.client, self.examples.get(item.client))
        if reply.metadata.src_node_id != item.node:
            fault = f"comes from node {reply.metadata.src_node_id}, node {item.node} was asked"
        if fault is None:
            try:
                return Message(unpacked(reply.content), reply_to=item.original)
            except InvalidArrays as error:
                fault = str(error)
        self.say(f"fedfuse: client {item.client}: reply rejected: {fault}")
        return Message(Error(INVALID, fault), reply_to=item.original)

    def _dressed(self, message: Message, node: int) -> Message:
        content = packed(message.content)
        content["setting"] = self.setting
        metadata = message.metadata
        client = metadata.dst_node_id - 1
        if self._secure is not None and client in self._secure.records and metadata.message_type[:5] == "train":
            content["secure"] = self._secure.records[client]
        return Message(content, node, metadata.message_type, group_id=metadata.group_id)


def _good(answered: list[tuple[Sent, Message]]) -> int:
    return sum(_counts(reply) for _, reply in answered)


def _counts(reply: Message) -> bool:
    """Whether a client has answered; one that lacks what it should hold has, and is sent the whole by the loop."""
    return reply.has_content() or reply.error.code == STALE
