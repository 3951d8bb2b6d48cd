"""The sites' door with a quota: what one node has lying at the server, at any time, is limited.

A reply is announced as a tree of hashes and then pushed object by object. The server keeps them until the run has
read them, or is over; so whoever announces a million and pushes them all, or never what was announced, fills it.
What a node pushed is counted until the server has it no more. A server that was started again begins to count anew.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedfuse.compat.superlink_objects import MESSAGES, OBJECT, holds, proved, push_of
from fedfuse.deploy.doors import LARGEST, Door, Receive, Scope, Send, TooLarge, answered, whole
from fedfuse.errors import UserError, one_line
from fedfuse.network.audit import Audit
from fedfuse.network.roster import Roster, fingerprint

ROW = 4096  # bytes that an object takes beside its content
TREE = 2_000  # objects of a message: of an array, each 20 MB are one
MANY = 20_000  # objects of a node
LITTLE = 64 * 1024  # bytes of a request that anyone may send: to join, to ask for work
BRIEF = 60.0  # seconds that such a request may take to come
AT_ONCE = 8  # larger requests of a node that are read at once: what is not read whole yet is in no quota
Who = Callable[..., bytes | None]
PAUSE = 30.0  # seconds between looks for what is gone, which asks for every object
REST = 3.0  # times what an announcement took, before the node's next: the store takes them in for one node at a time


class OverQuota(Exception):
    """A node has too much lying here."""


class Quota:
    """How much of each node lies at the server.

    Parameters
    ----------
    most : int
        Bytes of a node's.
    holds : callable
        Whether the server still has an object.
    """

    def __init__(self, most: int, holds: Callable[[str], bool]) -> None:
        self.most, self.holds = most, holds
        self._held: dict[bytes, dict[str, int]] = {}
        self._bytes: dict[bytes, int] = {}
        self._looked: dict[bytes, float] = {}

    def take(self, node: bytes, objects: Mapping[str, int]) -> None:
        """Count what a node wants to leave here.

        Raises
        ------
        OverQuota
            If that is too much; nothing is counted then.
        """
        if not self._fits(node, objects):
            self._look(node)
            if not self._fits(node, objects):
                raise OverQuota(f"this node has {len(self._held.get(node, {}))} objects here, too many to take more")
        for key, size in objects.items():
            self._count(node, key, size)

    def held(self, node: bytes) -> int:
        """Bytes of a node's."""
        return self._bytes.get(node, 0)

    def _fits(self, node: bytes, objects: Mapping[str, int]) -> bool:
        known = self._held.get(node, {})
        new = [max(0, size - known[key]) if key in known else size + ROW for key, size in objects.items()]
        count = len(known) + sum(key not in known for key in objects)
        return self.held(node) + sum(new) <= self.most and count <= MANY

    def _count(self, node: bytes, key: str, size: int) -> None:
        known = self._held.setdefault(node, {})
        before = known[key] + ROW if key in known else 0
        known[key] = max(size, known.get(key, 0))
        self._bytes[node] = self.held(node) + known[key] + ROW - before

    def _look(self, node: bytes) -> None:
        now = time.monotonic()
        if now - self._looked.get(node, -PAUSE) >= PAUSE:
            kept = {key: size for key, size in self._held.get(node, {}).items() if self.holds(key)}
            self._held[node], self._bytes[node] = kept, sum(kept.values()) + ROW * len(kept)
            self._looked[node] = time.monotonic()


class Sites(Door):
    """The sites' door.

    Parameters
    ----------
    app : callable
        The SuperLink's.
    quota : Quota
    note : callable
        Is told, once a node, who had too much here: the key that it proved.
    who : callable
        The key that whoever asks has proved, with or without what is pushed; None for a stranger.
    """

    def __init__(self, app: Any, quota: Quota, note: Callable[[bytes, str], None], who: Who = proved) -> None:
        super().__init__(app, ("/v1/fleet/", "/health"))
        self.quota, self.note, self.who = quota, note, who
        self._noted: set[bytes] = set()
        self._turns: dict[bytes, threading.Lock] = {}
        self._read: dict[bytes, asyncio.Semaphore] = {}
        self._announcing: dict[bytes, asyncio.Lock] = {}

    async def passed(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request on, if what it leaves here is not too much; of strangers nothing large is read."""
        if little(scope):
            await self._passed(scope, in_time(receive), send)
        elif (node := await asyncio.to_thread(self.who, self.app, scope)) is None:
            await answered(send, 401, f"more than {LITTLE} bytes are taken from registered nodes alone")
        else:
            async with self._read.setdefault(node, asyncio.Semaphore(AT_ONCE)):
                await self._passed(scope, receive, send)

    async def _passed(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] not in (MESSAGES, OBJECT):
            await super().passed(scope, receive, send)
            return
        try:
            body = await whole(receive)
            node = await asyncio.to_thread(self._take, scope, body)
        except TooLarge:
            await answered(send, 413, f"a request is at most {LARGEST} bytes")
        except UserError as error:
            await answered(send, 400, str(error))
        except OverQuota as error:
            await answered(send, 507, str(error))
        else:
            if node is None or scope["path"] != MESSAGES:
                await self.app(scope, again(body, receive), send)
                return
            async with self._announcing.setdefault(node, asyncio.Lock()):
                began = time.monotonic()
                await self.app(scope, again(body, receive), send)
                await asyncio.sleep(REST * (time.monotonic() - began))

    def _take(self, scope: Scope, body: bytes) -> bytes | None:
        """Count what is pushed; whose it is, None for a stranger's."""
        push = push_of(scope["path"], body, TREE)
        if (node := self.who(self.app, scope, push)) is None:
            return None
        try:
            with self._turns.setdefault(node, threading.Lock()):
                self.quota.take(node, push.objects)
        except OverQuota as error:
            if node not in self._noted:
                self._noted.add(node)
                self.note(node, str(error))
            raise
        return node


def little(scope: Scope) -> bool:
    """Whether a request says that it is small, which the listener then holds it to."""
    headers = dict(scope["headers"])
    return b"transfer-encoding" not in headers and int(headers.get(b"content-length", b"0")) <= LITTLE


def in_time(receive: Receive, seconds: float = BRIEF) -> Receive:
    """A small request, of which nothing more is waited for after a time: it may be a stranger's, who sends no end."""
    until, over = time.monotonic() + seconds, False

    async def receiving() -> Any:
        nonlocal over
        if over:
            return await receive()  # an application waits for its peer to leave
        try:
            message = await asyncio.wait_for(receive(), max(0.0, until - time.monotonic()))
        except TimeoutError:
            return {"type": "http.disconnect"}
        over = not message.get("more_body")
        return message

    return receiving


def again(body: bytes, receive: Receive) -> Receive:
    """A request whose body was read, to be read once more."""
    waiting = [body]

    async def receiving() -> Any:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return receiving


def sites_door(app: Any, post: Path, audit: Audit, quota: int) -> Sites:
    """The door of a server whose roster and audit log are known.

    Parameters
    ----------
    app : callable
        The SuperLink's.
    post : Path
    audit : Audit
    quota : int
        MB of a node's.
    """

    def note(key: bytes, words: str) -> None:
        place = Roster(post / "roster.json").place(key)
        name = place.name if place is not None else fingerprint(key)[:16]
        print(f"fedfuse: {one_line(name, 60)}: {words}", flush=True)
        audit.add("quota", who=one_line(name, 60), reason=words)

    return Sites(app, Quota(quota * 2**20, holds(app)), note)
