"""A line: short calls to a worker on this machine, by a Unix socket.

Ray places workers, starts them, says that they died, and carries whatever is large or goes to another machine. For a
round of a few milliseconds its calls are dear: four threads and two servers see each of them, 2 to 3 ms where a socket
takes 0.5, and they take the cores from who computes. Both ends are processes of one run, in a folder that only its user
may enter, and they trust each other as Ray's do; deployed sites have nothing of it.
"""

from __future__ import annotations

import pickle
from multiprocessing.connection import Connection
from typing import Any


def send(line: Connection, value: Any) -> None:
    """Send a value; the memory of its arrays is not copied before."""
    buffers: list[memoryview] = []
    head = pickle.dumps(value, protocol=5, buffer_callback=lambda buffer: buffers.append(buffer.raw()))
    line.send_bytes(len(buffers).to_bytes(4, "big") + head)
    for buffer in buffers:
        line.send_bytes(buffer)


def receive(line: Connection) -> Any:
    """Wait for a value; arrays are read-only, as those that come from Ray.

    Raises
    ------
    EOFError, OSError
        If the other end is gone.
    """
    first = memoryview(line.recv_bytes())
    buffers = [line.recv_bytes() for _ in range(int.from_bytes(first[:4], "big"))]
    return pickle.loads(first[4:], buffers=buffers)
