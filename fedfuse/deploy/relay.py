"""A TCP relay that counts: what really passes between nodes and their server, TLS and all."""

from __future__ import annotations

import contextlib
import socket
import threading


class Relay:
    """Passes connections on to a port of this machine.

    Parameters
    ----------
    port : int
        Where connections go.

    Attributes
    ----------
    address : str
        host:port to connect to instead.
    up, down : int
        Payload bytes of TCP that went to the port, and that came from it.
    """

    def __init__(self, port: int) -> None:
        self.port, self.up, self.down = port, 0, 0
        self._door = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._door.getsockname()[1]}"
        self._counting = threading.Lock()
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._door.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near, _ = self._door.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self.port), 10)
                except OSError:
                    near.close()
                    continue
                far.settimeout(None)
                for source, sink, upwards in ((near, far, True), (far, near, False)):
                    threading.Thread(target=self._pump, args=(source, sink, upwards), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, upwards: bool) -> None:
        with contextlib.suppress(OSError):
            while content := source.recv(65536):
                with self._counting:
                    if upwards:
                        self.up += len(content)
                    else:
                        self.down += len(content)
                sink.sendall(content)
        for end in (source, sink):  # one side is gone: so is the other
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
