"""`fedfuse watch`: the report page served while runs go on. It only reads; loopback unless told otherwise.

At any other address whoever asks needs the token that is printed at the start, once: a cookie follows it.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedfuse.errors import UserError, printable
from fedfuse.results.page import build, run_names
from fedfuse.results.report import document, fragment, render
from fedfuse.results.run_data import RunRecord, find
from fedfuse.results.status import line

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

LOOPBACK = "127.0.0.1"
PORT = 8642
COOKIE = "fedfuse-watch"
MOST_FINISHED = 10  # shown in the strip; all are in the table below it


def command(words: Sequence[str]) -> int:
    """Serve until interrupted: `fedfuse watch DIR… [--host ADDRESS] [--port PORT]`; port 0 takes a free one.

    Raises
    ------
    UserError
        A directory is missing, a flag is unknown, or the address cannot be bound.
    """
    directories, host, port = arguments(words)
    import uvicorn

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise UserError(f"--host {host} --port {port}: cannot be used ({error.strerror or error})") from error
    bound = listening.getsockname()[1]
    shown = f"[{host}]" if ":" in host else host
    token = "" if is_loopback(host) else secrets.token_urlsafe(32)
    query = f"?token={token}" if token else ""
    print(f"watching {', '.join(map(str, directories))} at http://{shown}:{bound}/{query} (Ctrl-C ends)", flush=True)
    if token:
        print("whoever has this address with its token can read these runs; it travels without TLS", flush=True)
    app = application(directories, host, token)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off"))
    try:
        server.run(sockets=[listening])
    except KeyboardInterrupt:
        pass
    finally:
        listening.close()
    return 0


def arguments(words: Sequence[str]) -> tuple[list[Path], str, int]:
    """The directories, the host and the port that the words name; for errors see `command`."""
    directories: list[Path] = []
    flags = {"--host": LOOPBACK, "--port": str(PORT)}
    rest = list(words)
    while rest:
        name, _, value = rest.pop(0).partition("=")
        if name in flags:
            if not value and not rest:
                raise UserError(f"fedfuse watch {name}: needs a value")
            flags[name] = value or rest.pop(0)
        elif name.startswith("-"):
            raise UserError(f"fedfuse watch {name}: unknown; allowed: --host, --port")
        else:
            directories.append(Path(name if not value else f"{name}={value}"))
    if not directories:
        raise UserError("fedfuse watch: needs at least one run or sweep directory")
    for path in directories:
        if not path.is_dir():
            raise UserError(f"{path}: no such directory")
    if not flags["--port"].isdecimal() or int(flags["--port"]) > 65535:
        raise UserError(f"fedfuse watch --port {flags['--port']}: allowed are 0 to 65535")
    return directories, flags["--host"], int(flags["--port"])


@dataclass
class Watch:
    """What is served: the directories, and what was last read from them.

    Parameters
    ----------
    directories
        Run or sweep directories.
    """

    directories: Sequence[Path]
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _runs: list[RunRecord] = field(default_factory=list)
    _skipped: list[str] = field(default_factory=list)
    _read_until: float = 0.0
    _body: tuple[str, str] = ("", "")
    _body_until: float = 0.0

    def look(self) -> tuple[list[RunRecord], list[str], str]:
        """Return runs, skipped directories and a version that changes when any run has moved on."""
        with self._lock:
            now = time.monotonic()
            if now >= self._read_until:
                self._runs, self._skipped = find(self.directories)
                took = time.monotonic() - now
                self._read_until = time.monotonic() + max(0.5, 4 * took)  # never busy with looking alone
            state = repr([(str(run.dir), run.status, run.rounds_done) for run in self._runs] + self._skipped)
            return self._runs, self._skipped, hashlib.sha256(state.encode()).hexdigest()[:16]

    def strip(self) -> tuple[str, str]:
        """Return the progress of runs as markup, and its version."""
        runs, _, version = self.look()
        names = run_names(runs)
        moving = [run for run in runs if run.status != "finished"]
        finished = [run for run in runs if run.status == "finished"]
        shown = moving + finished[:MOST_FINISHED]
        lines = []
        for run in shown:
            try:
                lines.append(line(run, names[run.dir]))
            except Exception:  # files change while they are read; the next look has them whole
                continue
        timed = any(one["virtual"] for one in lines)
        return fragment("live.html", runs=lines, hidden=max(0, len(finished) - MOST_FINISHED), timed=timed), version

    def body(self) -> tuple[str, str]:
        """Return the page's body and the version it was made from; an older one while it is too soon."""
        runs, skipped, version = self.look()
        with self._lock:
            if version != self._body[1] and time.monotonic() >= self._body_until:
                began = time.monotonic()
                try:
                    text = render(build(runs, skipped)[0])
                except UserError as error:
                    text = fragment("empty.html", message=str(error)) if runs or skipped else ""
                except Exception:  # files were merged or removed under our hands: keep the last page, look again
                    return self._body
                self._body = (text, version)
                self._body_until = time.monotonic() + max(2.0, 3 * (time.monotonic() - began))
            return self._body


def is_loopback(host: str) -> bool:
    """Whether nobody on another machine can reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name may stand for any address


class Login:
    """Lets nobody pass who has not brought the token once; in its place a browser keeps a cookie.

    Parameters
    ----------
    app : callable
        The ASGI application behind it.
    token : str
    """

    def __init__(self, app: Any, token: str) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        from starlette.requests import Request
        from starlette.responses import PlainTextResponse, RedirectResponse, Response

        if scope["type"] != "http":
            return
        request, answer = Request(scope), Response()
        if self._is_it(request.cookies.get(COOKIE, "")):
            await self.app(scope, receive, send)
            return
        if self._is_it(request.query_params.get("token", "")):
            answer = RedirectResponse("./", status_code=303)  # the token stays in no address bar
            answer.set_cookie(COOKIE, self.token, httponly=True, samesite="strict")
        else:
            answer = PlainTextResponse("the address that fedfuse watch printed, with its token, is needed\n", 401)
        answer.headers.update({"Cache-Control": "no-store", "Referrer-Policy": "no-referrer"})
        await answer(scope, receive, send)

    def _is_it(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "replace"), self.token.encode())


def application(directories: Sequence[Path], host: str = LOOPBACK, token: str = "") -> Starlette:
    """Return the ASGI application: `/`, `/live` and `/body`, GET only, under this host's names only.

    Parameters
    ----------
    directories
        Run or sweep directories.
    host : str
        The address that is served.
    token : str
        What a reader must have brought once; empty: nothing is asked.

    Raises
    ------
    UserError
        Without a token where other machines could read.
    """
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import HTMLResponse
    from starlette.routing import Route

    if not token and not is_loopback(host):
        raise UserError(f"--host {host}: other machines reach it, and nobody is asked for a token")
    watch = Watch(directories)
    title = "FedFuse: " + ", ".join(printable(path.name or str(path)) for path in directories)
    # Another site may point a name of its own at this machine; it shall not read what is served here.
    # Starlette cuts at the first colon, so an address of version 6 is "[" to it; a name is never that.
    names = ["localhost", "127.0.0.1", host, *(["["] if ":" in host else [])]
    trusted = ["*"] if host in ("0.0.0.0", "::") else names

    def answer(text: str, version: str = "") -> Response:
        headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "X-Version": version}
        headers |= {"X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer"}
        return HTMLResponse(text, headers=headers)

    def index(request: Request) -> Response:
        return answer(document(title, "", live="", script="watch.js"))

    def live(request: Request) -> Response:
        return answer(*watch.strip())

    def body(request: Request) -> Response:
        return answer(*watch.body())

    return Starlette(
        routes=[Route("/", index), Route("/live", live), Route("/body", body)],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=trusted, www_redirect=False),
            *([Middleware(Login, token=token)] if token else []),
        ],
    )
