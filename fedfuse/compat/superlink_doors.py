"""Flower's SuperLink behind doors of our own, and its command line as an operator with a certificate.

Internal names of Flower 1.41: `flower_superlink.uvicorn`, whose `run` is handed the SuperLink's application
(`open_doors`), and `ProtobufClient.__init__` of `flwr.supercore.protobuf.client`, whose `verify` becomes a context
with a certificate (`run_as`). Of uvicorn 0.49: `H11Protocol`, which is subclassed to tell the application who its
peer is and to close what nothing comes from, and its `app_state`, `cycle`, `loop` and `transport`; a started `Server`'s
`config`, `server_state` and `lifespan.state`, of which it makes a connection's protocol (`protocol_of`), and that it
listens nowhere where it is given no sockets. They buy ports apart for sites and operators, that strangers reach
neither, and that they hold no connection. Without them the server does not start, and the operator's commands fail,
both by name. Guards: `tests/deploy/test_doors.py`, `tests/deploy/test_callers.py`.
"""

from __future__ import annotations

import importlib
import ssl
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from fedfuse.errors import WorldError

HEAD = 30.0  # seconds between requests of a connection, and for the head of one
LINK, CLIENT = "flwr.superlink.cli.flower_superlink", "flwr.supercore.protobuf.client"


def open_doors(serve: Callable[[Any, dict[str, Any]], None]) -> None:
    """Let `serve(application, settings)` take the place of the one listener that the SuperLink would open."""
    module = importlib.import_module(LINK)
    if not hasattr(module, "uvicorn"):
        raise WorldError(f"this Flower has no {LINK}.uvicorn: its one port would be open to everyone; flwr 1.41 has it")
    module.uvicorn = SimpleNamespace(run=lambda app, **settings: serve(app, settings))  # type: ignore[attr-defined]


def patient(seconds: float = HEAD) -> Any:
    """A protocol for uvicorn that puts the peer's certificate into `scope["state"]["peer"]`; its patience ends.

    The one that uvicorn prefers reads a head without an end into memory, whoever sends it; neither ends its waiting.
    """
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Patient(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.app_state = {**self.app_state, "peer": transport.get_extra_info("peercert") or {}}
            self._look(self)

        def _look(self, before: Any) -> None:
            if self.transport.is_closing():
                return
            if self.cycle is before and (self.cycle is None or self.cycle.response_complete):
                self.transport.close()  # no request since, and none under way
            else:
                self.loop.call_later(seconds, self._look, self.cycle)

    return Patient


def protocol_of(server: Any) -> Callable[[], Any]:
    """What makes the protocol of one connection to a server of uvicorn's that was started."""
    config, state = server.config, server.server_state
    return lambda: config.http_protocol_class(config=config, server_state=state, app_state=server.lifespan.state)


def run_as(context: ssl.SSLContext, words: list[str]) -> None:
    """Be Flower's command line in this process, with a certificate of the operator's own."""
    module = importlib.import_module(CLIENT)
    usual = module.ProtobufClient.__init__

    def certified(self: Any, base_url: str, **more: Any) -> None:
        usual(self, base_url, **{**more, "verify": context})

    module.ProtobufClient.__init__ = certified  # type: ignore[attr-defined, method-assign]
    from flwr.cli.app import app

    sys.argv = ["flwr", *words]
    app()
