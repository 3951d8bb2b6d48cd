"""Messages over a real network: sent, waited for, and sent again where the transport lost them."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import httpx
from flwr.app import Error, Message
from flwr.serverapp import Grid

from fedfuse.core.shares import FAILED, INVALID, REFUSED, STALE
from fedfuse.errors import WorldError, in_words, one_line
from fedfuse.network.replies import LONGEST

OURS = {STALE, REFUSED, FAILED, INVALID}  # a node has spoken; anything else is the transport's failure
POLL = 0.3  # most seconds between looks for replies (Flower's own: 3)
FIRST, SHARE = 0.05, 0.05  # least seconds between looks, and what part they are of the time waited so far
SOON = 1.0  # seconds for which the look for one reply holds up the others


@dataclass(frozen=True)
class Patience:
    """How long a server waits, and for how many.

    Attributes
    ----------
    join, deadline, absence : float or None
        Seconds until all clients must have said hello; until a phase's replies must be there (None: as long as
        their nodes are online); until a node that went away must be back.
    minimum : int
        Least number of good replies in a phase; below it, those who failed are asked once more, then the run stops.
    clients : int or None
        Least number of clients to begin with, once `join` is over or all nodes that are there were turned away; whoever
        is missing is left out and counted. None: all.
    retries : int
        How often a message is sent again that the transport lost, or whose node was started again.
    """

    join: float = 300.0
    deadline: float | None = None
    absence: float = 180.0
    minimum: int = 1
    retries: int = 2
    clients: int | None = None


@dataclass
class Sent:
    """One message under way, and everything it was sent as."""

    original: Message
    client: int
    node: int
    ids: set[str] = field(default_factory=set)
    tries: int = 0
    due: bool = True  # to be sent (again) as soon as its node is there
    at: float = 0.0  # when it was last sent, by this machine's clock
    stamp: str = ""  # when its node was last activated, as of sending
    away_since: float | None = None

    @property
    def who(self) -> str:
        """Whom it is for, in words; a node that was not greeted yet is no client."""
        return f"client {self.client}" if self.client >= 0 else f"node {self.node}"


class Look:
    """A look for the reply to one message, beside others: Flower's waits for all parts that were announced.

    Whoever announces a reply and sends its parts slowly, or never, would else keep the others' from being read, for
    hours and past any deadline.
    """

    def __init__(self, grid: Grid, key: str) -> None:
        self._found: list[Message] = []
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._look, args=(grid, key), daemon=True)
        self._thread.start()

    def _look(self, grid: Grid, key: str) -> None:
        try:
            self._found = list(grid.pull_messages([key]))
        except Exception as error:
            self._error = error

    def ended(self, within: float) -> bool:
        """Whether it has come to its end, waited for as long."""
        self._thread.join(within)
        return not self._thread.is_alive()

    def replies(self) -> list[Message]:
        """What it found; raises what Flower did."""
        if self._error is not None:
            raise self._error
        return self._found


class Exchange:
    """Sends messages over a grid of Flower's, and waits for the answers.

    Parameters
    ----------
    grid : Grid
    patience : Patience
    say : callable
        Takes one line of log.
    dressed : callable
        `dressed(message, node)`: the message as it travels.
    over : threading.Event or None
        Set by whoever sees the grid end.

    Attributes
    ----------
    timed : list
        Of each answer the seconds out (sent, until the client began), at work, and back (answered, until it was here).
        Out and back compare two machines' clocks; their sum needs the server's alone.
    """

    def __init__(
        self,
        grid: Grid,
        patience: Patience,
        say: Callable[[str], None],
        dressed: Callable[[Message, int], Message],
        over: threading.Event | None,
    ) -> None:
        self.grid, self.patience, self.say, self.dressed, self.over = grid, patience, say, dressed, over
        self.timed: list[tuple[str, str, float]] = []
        self._online: dict[int, str] | None = None
        self._looked = 0.0

    def online(self) -> dict[int, str]:
        """Nodes that are online, and when each was last activated; asked at most once a second.

        Raises
        ------
        WorldError
            If the grid has ended.
        """
        if self.over is not None and self.over.is_set():
            raise WorldError("Flower's simulator ended before the run did")
        if self._online is None or time.monotonic() - self._looked > 1.0:
            self._online = {node.node_id: node.last_activated_at for node in self.grid.get_nodes()}
            self._looked = time.monotonic()
        return self._online

    def pause(self, waited: float = math.inf) -> None:
        """Wait a moment before looking again: the shorter, the less was waited so far."""
        time.sleep(min(POLL, max(FIRST, SHARE * waited)))

    def send(self, sent: list[Sent], limit: float | None, answered: list[tuple[Sent, Message]]) -> None:
        """Send until everything is answered, given up, or the limit is reached; repeats are harmless at a site."""
        started = time.monotonic()
        waiting, looks = list(sent), dict[str, Look]()
        while waiting:
            self.look(waiting, looks, answered)
            now = time.monotonic()
            if limit is not None and now - started > limit:
                for item in waiting:
                    self.say(f"fedfuse: {item.who}: no reply within {limit:g} s; left out")
                return
            if waiting:
                self.pause(now - started)

    def look(self, waiting: list[Sent], looks: dict[str, Look], answered: list[tuple[Sent, Message]]) -> None:
        """Send what is due, and move what is answered or given up from `waiting` to `answered`."""
        online = self.online()
        for item in waiting:
            self._watch(item, online)
        if due := [item for item in waiting if item.due and item.node in online]:
            self._push(due, online)
        owner = {key: item for item in waiting for key in item.ids}
        for key, reply in self._pulled(owner, looks):
            found = owner[key]
            if found not in waiting:
                continue
            if reply.has_error() and reply.error.code not in OURS:
                found.ids.discard(key)
                if found.ids or found.due:
                    continue  # an older copy was lost; a newer one is under way
                if found.tries <= self.patience.retries:
                    self.say(f"fedfuse: {found.who}: {reply.error.reason}; sending again")
                    found.due, self._online = True, None  # whoever is away is waited for: tries are few
                    continue
            waiting.remove(found)
            if reply.has_error():  # a node's words are printed and kept: one line, nothing that steers a terminal
                reply = Message(Error(reply.error.code, one_line(reply.error.reason)), reply_to=found.original)
            answered.append((found, reply))
            self._time(found, reply)
        now = time.monotonic()
        for item in list(waiting):
            if why := self._given_up(item, online, now):
                waiting.remove(item)
                answered.append((item, Message(Error(FAILED, why), reply_to=item.original)))

    def _pulled(self, owner: Mapping[str, Sent], looks: dict[str, Look]) -> Iterable[tuple[str, Message]]:
        """Take replies that are there, by the message they answer; one that cannot be read is its sender's failure.

        They are read one by one: Flower raises for all of a list if one of them is malformed, when it has signed
        for some of the others.
        """
        announced = self._announced([key for key in owner if key not in looks])
        for key, item in owner.items():
            if key in announced:
                look, within = Look(announced[key], key), SOON
                looks[key] = look
            elif key in looks:
                look, within = looks[key], 0.0
            else:
                continue
            if not look.ended(within):
                continue
            del looks[key]
            try:
                for reply in look.replies():
                    if reply.metadata.reply_to_message_id == key:
                        yield key, reply
            except Exception as error:
                broken = isinstance(error, httpx.HTTPStatusError) and error.response.is_server_error  # by this reply
                if isinstance(error, httpx.HTTPError) and not broken:
                    raise
                reason = f"its reply cannot be read: {in_words(error)}"
                yield key, Message(Error(INVALID, one_line(reason)), reply_to=item.original)

    def _announced(self, keys: list[str]) -> dict[str, Grid]:
        """Which messages may have been answered, and the grid that reads the answer."""
        ask = getattr(self.grid, "announced", None)
        found: dict[str, Grid] | None = ask(keys) if ask is not None and keys else None
        return dict.fromkeys(keys, self.grid) if found is None else found

    def _time(self, item: Sent, reply: Message) -> None:
        """Note where an answer's time went, if the client says how long it worked."""
        measured = reply.content.metric_records.get("metrics") if reply.has_content() else None
        if measured is not None and isinstance(seconds := measured.get("seconds"), int | float):
            who, (verb, _, phase) = f"wire:{item.client}", item.original.metadata.message_type.partition(".")
            parts = {"out": reply.metadata.created_at - seconds - item.at, "work": seconds}
            parts["back"] = time.time() - reply.metadata.created_at
            if all(abs(value) < LONGEST for value in parts.values()):  # a node says when it answered
                self.timed += [(who, f"{phase or verb}/{part}", float(value)) for part, value in parts.items()]

    def _watch(self, item: Sent, online: Mapping[int, str]) -> None:
        """A node that was started again has lost what it was working on: it is asked again."""
        if item.node not in online:
            item.away_since = item.away_since or time.monotonic()
        else:
            item.away_since = None
            if self._restarted(item, online) and item.tries <= self.patience.retries:
                self.say(f"fedfuse: {item.who}: its node was started again; sending again")
                item.due = True

    def _restarted(self, item: Sent, online: Mapping[int, str]) -> bool:
        return bool(item.ids) and not item.due and online.get(item.node, item.stamp) != item.stamp

    def _given_up(self, item: Sent, online: Mapping[int, str], now: float) -> str | None:
        """Why nothing more is expected of a node, if so; asked once its replies were looked for."""
        if item.away_since is not None and now - item.away_since > self.patience.absence:
            return f"its node was away for more than {self.patience.absence:g} s"
        if self._restarted(item, online):
            return f"its node was started again, after the message was sent {item.tries} times"
        if not item.ids and not item.due:  # nothing is under way that could be answered
            return f"Flower took no message for its node, {item.tries} times"
        return None

    def _push(self, due: list[Sent], online: Mapping[int, str]) -> None:
        now = time.time()
        for item, key in zip(
            due, self.grid.push_messages([self.dressed(i.original, i.node) for i in due]), strict=True
        ):
            item.due, item.at = False, now
            item.tries += 1
            item.stamp = online[item.node]
            if key:
                item.ids.add(key)
            else:
                item.due = item.tries <= self.patience.retries
