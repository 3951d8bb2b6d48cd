"""Who may reach what of a server: sites one port, operators another with certificates and roles, our executor a third.

Flower's SuperLink has one application behind one port without accounts. Here it stays one application, and each port
lets through its own part of it. Beside it, orders and results travel by the operators' port alone: the run
configuration that Flower shows to every node holds a name and a hash.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from fedfuse.compat.superlink_doors import patient, protocol_of
from fedfuse.compat.superlink_objects import nodes
from fedfuse.config.files import replaced
from fedfuse.deploy.callers import MOST, Callers, descriptors, listeners
from fedfuse.deploy.processes import RUNS
from fedfuse.errors import UserError, one_line
from fedfuse.network.audit import Audit
from fedfuse.network.roster import Roster, place_from

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
READY = "fedfuse: the server is ready"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
LARGEST = 64 * 2**20  # bytes of a request: objects travel in pieces of 20 MB at most
PATH = 200  # characters of a path, or of what is asked of it: a line of the log has them
LEAVE = 5  # seconds that a server which ends waits for what it is asked; a log is streamed without end
ORDER = 2**18  # bytes of a request of our own: an order, or the places of a few keys
WAITING = 100  # orders of one operator that lie here and were not carried out yet
ROLES = ("read", "submit", "register")
READ = frozenset({"list-runs", "list-nodes", "stream-logs", "list-federations", "show-federation", "get-login-details"})
MAY = {
    **dict.fromkeys(READ, ROLES),
    **dict.fromkeys(("start-run", "stop-run"), ("submit",)),
    **dict.fromkeys(("register-node", "unregister-node"), ("register",)),
}
OURS = {
    ("POST", "orders"): ("submit",),
    ("GET", "results"): ("submit", "read"),
    ("POST", "roster"): ("register",),
    ("GET", "sites"): ROLES,
}


class Door:
    """An application that passes on requests below one prefix, none larger than `LARGEST`.

    Parameters
    ----------
    app : callable
        The SuperLink's.
    prefix : tuple of str
        Of the paths that are let through.
    """

    def __init__(self, app: Any, prefix: tuple[str, ...]) -> None:
        self.app, self.prefix = app, prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            return
        elif refusal := self.refusal(scope):
            scope["path"], scope["query_string"] = scope["path"][:PATH], b""  # what the log has of it
            await answered(send, *refusal)
        else:
            await self.passed(scope, _capped(receive, _most(scope)), send)

    def refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Why a request is not let through: a status and words; None if it is."""
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > _most(scope):
            return 413, f"a request is at most {_most(scope)} bytes"
        path = scope["path"]
        if (
            not path.startswith(self.prefix)
            or ".." in path
            or max(len(path), len(scope.get("query_string", b""))) > PATH
        ):
            return 404, "not here"
        return None

    async def passed(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request on."""
        try:
            await self.app(scope, receive, send)
        except TooLarge as error:
            await answered(send, 413, str(error))


class Operators(Door):
    """The operators' door: Flower's control interface and our own, for those whose certificate has the role.

    Parameters
    ----------
    app : callable
    post : Path
        Where orders and results lie.
    audit : Audit
    open_to_all : bool
        Without TLS there is nobody to tell apart: only for trying out.
    """

    def __init__(self, app: Any, post: Path, audit: Audit, open_to_all: bool = False) -> None:
        super().__init__(app, ("/v1/control/", "/fedfuse/"))
        self.post, self.audit, self.open_to_all = post, audit, open_to_all

    def refusal(self, scope: Scope) -> tuple[int, str] | None:
        """See `Door.refusal`; and a role is needed."""
        if found := super().refusal(scope):
            return found
        what = scope["path"].removeprefix("/fedfuse/").partition("/")[0]
        if scope["path"].startswith("/v1/"):
            needed = MAY.get(scope["path"].removeprefix("/v1/control/"), ())
        else:
            needed = OURS.get((scope["method"], what), ())
        who, roles = self.operator(scope)
        if who in self._revoked():
            return 403, f"the certificate of {one_line(who, 60)} was revoked"
        if not set(needed) & set(roles):
            return (
                403,
                f"{one_line(who, 60)} may {', '.join(roles) or 'nothing'}; this needs {' or '.join(needed) or 'more'}",
            )
        return None

    def operator(self, scope: Scope) -> tuple[str, tuple[str, ...]]:
        """Name and roles of whoever is at the door, as the CA has signed them."""
        if self.open_to_all:
            return "anyone", ROLES
        peer: Any = scope.get("state", {}).get("peer", {})
        subject = [pair for part in peer.get("subject", ()) for pair in part]
        names = [value for key, value in subject if key == "commonName"]
        return (names or ["nobody"])[0], tuple(v for k, v in subject if k == "organizationalUnitName" and v in ROLES)

    def _revoked(self) -> set[str]:
        path = self.post / "revoked"
        return set(path.read_text(encoding="utf-8").split()) if path.exists() else set()

    async def passed(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Note who did what, and do it."""
        path = scope["path"]
        try:
            if path.removeprefix("/v1/control/") not in READ and scope["method"] != "GET":
                await asyncio.to_thread(self.audit.add, "operator", who=self.operator(scope)[0], asked=path[:200])
        except OSError as error:  # what cannot be noted is not done
            await answered(send, 507, f"its disk: {one_line(error.strerror or error)}")
            return
        if path.startswith("/v1/control/"):
            await super().passed(scope, receive, send)
            return
        try:
            await self._own(path.removeprefix("/fedfuse/"), self.operator(scope)[0], receive, send)
        except TooLarge as error:
            await answered(send, 413, str(error))
        except (UserError, ValueError) as error:
            await answered(send, 400, one_line(error))
        except OSError as error:
            await answered(send, 507, f"its disk: {one_line(error.strerror or error)}")

    async def _own(self, path: str, who: str, receive: Receive, send: Send) -> None:
        what, _, name = path.partition("/")
        if what == "roster":
            others: list[str] = []
            for key, values in json.loads(await whole(receive)).items():
                if not re.fullmatch(r"[0-9a-f]{64}", key):
                    raise UserError("roster: the fingerprint of a key is needed")
                others += Roster(self.post / "roster.json").add(key, place_from(values))
            also = f"; also the place of {', '.join(one_line(name, 60) for name in others)}, with another key"
            await answered(send, 200, f"entered{also if others else ''}")
            return
        if what == "sites":
            await answered(send, 200, json.dumps(await asyncio.to_thread(self.sites)))
            return
        if not NAME.fullmatch(name):
            raise UserError(f"name={name[:100]!r}: letters, digits, '.', '_' and '-' are allowed")
        file = self.post / what / name
        if what == "orders":
            self._take(name, who, await whole(receive))
            await answered(send, 200, "taken")
        elif file.is_file():
            await sent(send, file)
        else:
            await answered(send, 404, "not here")

    def sites(self) -> list[dict[str, Any]]:
        """Who was let in and not revoked: name and clients by the roster (empty for a key it does not know), node."""
        found, roster = [], Roster(self.post / "roster.json")
        for key, node, status, since in nodes(self.app):
            place = roster.place(key)
            name, clients = ("", "") if place is None else (place.name, place.said)
            found.append({"site": name, "clients": clients, "node": str(node), "status": status, "since": since[:19]})
        return sorted(found, key=lambda one: (one["site"], one["since"], one["node"]))

    def _take(self, name: str, who: str, content: bytes) -> None:
        """Keep an order and whose it is; run directory and results of a name are those of who used it first."""
        holder = self._holder(name)
        if holder not in (None, who):
            raise UserError(f"name={name}: is a run of {one_line(holder, 60)}'s; choose another")
        for folder, text in (("owners", who.encode()), ("orders", content)):
            (self.post / folder).mkdir(parents=True, exist_ok=True)
            with replaced(self.post / folder / name, durable=True) as partial:
                partial.touch(0o600)
                partial.write_bytes(text)
        lying = [path for path in (self.post / "orders").iterdir() if self._holder(path.name) == who]
        for old in sorted(lying, key=lambda path: path.stat().st_mtime_ns)[:-WAITING]:
            old.unlink()
            if not (Path(os.environ.get(RUNS, "runs")) / old.name).exists() and not self._ended(old.name):
                (self.post / "owners" / old.name).unlink()

    def _holder(self, name: str) -> str | None:
        """Who used a name first; None if nobody did."""
        path = self.post / "owners" / name
        if path.is_file():
            return path.read_text(encoding="utf-8")
        there = self._ended(name) or (Path(os.environ.get(RUNS, "runs")) / name).exists()
        return "somebody else" if there else None  # before owners were kept, or the server's own user's

    def _ended(self, name: str) -> bool:
        return (self.post / "results" / f"{name}.json").exists()


class TooLarge(Exception):
    """A request is larger than it may be."""


def _most(scope: Scope) -> int:
    """Bytes of a request."""
    return ORDER if scope["path"].startswith("/fedfuse/") else LARGEST


def _capped(receive: Receive, most: int) -> Receive:
    taken = 0

    async def capped() -> Any:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > most:
            raise TooLarge(f"a request is at most {most} bytes")
        return message

    return capped


async def whole(receive: Receive) -> bytes:
    """The body of a request."""
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


async def answered(send: Send, status: int, words: str) -> None:
    """Answer with a status and words, in the form that Flower's own errors have."""
    body = json.dumps({"detail": words}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def sent(send: Send, file: Path) -> None:
    """Answer with a file."""
    headers = [(b"content-type", b"application/octet-stream"), (b"content-length", str(file.stat().st_size).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    with open(file, "rb") as content:
        while part := await asyncio.to_thread(content.read, 2**20):
            await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def serve(
    app: Any,
    settings: dict[str, Any],
    *,
    control: tuple[str, int],
    near: int,
    ca: Path | None,
    post: Path,
    sites: Callable[[Any, Path, Audit], Door],
) -> None:
    """Open all doors of a server until it is ended.

    Parameters
    ----------
    app, settings
        What Flower would have run: its application, and uvicorn's settings of the sites' port.
    control : (str, int)
        Host and port for operators; without TLS everything is at the sites' port.
    near : int
        Port for our executor, on this machine alone.
    ca : Path or None
        Vouches for operators; None without TLS.
    post : Path
        Where orders, results and the roster lie.
    sites : callable
        Makes the sites' door of the application, `post` and the audit log.
    """
    import uvicorn

    audit = Audit(post / "audit.jsonl")
    operators = Operators(app, post, audit, open_to_all=ca is None)

    async def both(scope: Any, receive: Receive, send: Send) -> None:
        ours = scope["type"] == "http" and scope["path"].startswith(operators.prefix)
        await (operators if ours else app)(scope, receive, send)

    class Beside(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield  # the first of them listens for signals

    settings = {key: value for key, value in settings.items() if key not in ("reload", "workers")}
    settings["timeout_graceful_shutdown"] = LEAVE
    first: Any = both if ca is None else sites(app, post, audit)
    servers = [uvicorn.Server(uvicorn.Config(first, **settings, http=patient()))]
    inner = {**settings, "host": "127.0.0.1", "port": near, "lifespan": "off", "access_log": False}
    beside = Beside(uvicorn.Config(Door(app, ("/v1/runtime/",)), **inner))
    servers.append(beside)
    if ca is not None:
        outer = {**settings, "host": control[0], "port": control[1], "lifespan": "off", "http": patient()}
        outer |= {"ssl_ca_certs": str(ca), "ssl_cert_reqs": 2}  # ssl.CERT_REQUIRED: nobody without a certificate
        servers.append(Beside(uvicorn.Config(operators, **outer)))

    callers = Callers(min(MOST, descriptors() // 2))
    outside = {server: listeners(server.config.host, server.config.port) for server in servers if server is not beside}

    async def all_of_them() -> None:
        tasks = [asyncio.create_task(server.serve([] if server in outside else None)) for server in servers]
        while not all(server.started for server in servers) and not any(task.done() for task in tasks):
            await asyncio.sleep(0.05)
        taking = [
            asyncio.create_task(callers.take(listener, protocol_of(server), server.config.ssl))
            for server, places in outside.items()
            for listener in places
            if server.started
        ]
        print(READY, flush=True)
        while not any(server.should_exit for server in servers) and not any(task.done() for task in tasks):
            await asyncio.sleep(0.1)
        for server in servers:
            server.should_exit = True
        for task in taking:  # at once: a server that ends waits until nobody is connected
            task.cancel()
        for listener in (listener for places in outside.values() for listener in places):
            listener.close()
        await asyncio.gather(*tasks, *taking, return_exceptions=True)

    with asyncio.Runner(loop_factory=servers[0].config.get_loop_factory()) as runner:  # the loop that Flower would take
        runner.run(all_of_them())
