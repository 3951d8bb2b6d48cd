"""Connections of whoever reaches a server's ports: so many at once, whoever they are and whatever they prove.

A stranger needs a thousand connections, which say nothing, to take every descriptor that a process usually has: then
nobody is let in, our executor neither, and the run is over. So the server takes in itself who calls. Where all places
are taken, the address that has most loses its oldest connections: a stranger his own.
"""

from __future__ import annotations

import asyncio
import ipaddress
import resource
import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from fedfuse.errors import UserError

MOST = 2048  # connections of sites and operators at once
HANDSHAKE = 15.0  # seconds for that of TLS
DESCRIPTORS = 2**16  # of a server's process, where its surroundings let it have as many


def descriptors() -> int:
    """Let this process have as many descriptors as it may, and say how many those are: usually 1024 to begin with."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(soft, DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS))
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def listeners(host: str, port: int) -> list[socket.socket]:
    """Listen at a port, of every family that the host has.

    Raises
    ------
    UserError
        If that is not possible.
    """
    found = []
    try:
        places = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, place in dict.fromkeys(places):
            found.append(listener := socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind(place)
            listener.listen(2048)
            listener.setblocking(False)
    except OSError as error:
        raise UserError(f"port {port} cannot be listened at on {host} ({error.strerror or error})") from error
    return found


class Callers:
    """Who is connected.

    Parameters
    ----------
    most : int
        Connections at once.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._open: dict[str, deque[socket.socket]] = {}
        self._count = 0
        self._joining: set[asyncio.Task[None]] = set()

    async def take(self, listener: socket.socket, protocol: Callable[[], Any], tls: Any) -> None:
        """Take in whoever calls, without end."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                caller, place = await loop.sock_accept(listener)
            except OSError:  # a caller who has left, or no descriptor left
                await asyncio.sleep(0.05)
                continue
            caller.setblocking(False)
            self._note(caller, place[0])
            task = loop.create_task(self._join(caller, protocol, tls))
            self._joining.add(task)
            task.add_done_callback(self._joining.discard)

    async def _join(self, caller: socket.socket, protocol: Callable[[], Any], tls: Any) -> None:
        patience = {"ssl": tls, "ssl_handshake_timeout": HANDSHAKE} if tls is not None else {}
        try:
            await asyncio.get_running_loop().connect_accepted_socket(protocol, caller, **patience)
        except Exception:  # no TLS, not in time, or he has left: nobody whom a line of the log is for
            caller.close()

    def _note(self, caller: socket.socket, address: str) -> None:
        who = address
        with suppress(ValueError):  # of IPv6, a household has 2⁶⁴ addresses
            if (found := ipaddress.ip_address(address)).version == 6:
                who = str(ipaddress.ip_network((found, 64), strict=False))
        self._open.setdefault(who, deque()).append(caller)
        self._count += 1
        if self._count > self.most:
            self._make_room()

    def _make_room(self) -> None:
        """Forget who has left; if there are still too many, an eighth more go than would have to."""
        alive = {who: deque(one for one in callers if one.fileno() >= 0) for who, callers in self._open.items()}
        self._open = {who: callers for who, callers in alive.items() if callers}
        self._count = sum(map(len, self._open.values()))
        while self._count > self.most - self.most // 8:
            with suppress(OSError):
                max(self._open.values(), key=len).popleft().shutdown(socket.SHUT_RDWR)
            self._count -= 1
