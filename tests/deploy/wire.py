"""IP packets between this machine and a network namespace, delayed and lost: netem for kernels without it."""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import threading
import time

TUNSETIFF, TUN, NO_HEADER = 0x400454CA, 0x0001, 0x1000


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Wire:
    """A pair of TUN devices, one in the namespace; this process carries every packet.

    `delay` ± `jitter` seconds each way (uniform, order kept), and `loss` of all packets never arrive.
    """

    def __init__(self, namespace: str, here: str, there: str, delay: float, jitter: float, loss: float) -> None:
        self.delay, self.jitter, self.loss = delay, jitter, loss
        self.carried = self.lost = 0
        self._draw = random.Random(0)
        near, far = f"ffn{os.getpid() % 10**8}", f"fff{os.getpid() % 10**8}"
        index = here.split(".")[2]
        self._near, self._far = self._open(near + index), self._open(far + index)
        ip("link", "set", far + index, "netns", namespace)
        ip("addr", "add", here, "peer", there, "dev", near + index)
        ip("link", "set", near + index, "up")
        ip("-n", namespace, "addr", "add", there, "peer", here, "dev", far + index)
        ip("-n", namespace, "link", "set", far + index, "up")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    @staticmethod
    def _open(name: str) -> int:
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH", name.encode(), TUN | NO_HEADER))
        return device

    def close(self) -> None:
        self._over.set()
        self._thread.join(5)
        os.close(self._near)
        os.close(self._far)

    def _carry(self) -> None:
        waiting: list[tuple[float, int, int, bytes]] = []
        latest = {self._near: 0.0, self._far: 0.0}
        other = {self._near: self._far, self._far: self._near}
        while not self._over.is_set():
            now = time.monotonic()
            while waiting and waiting[0][0] <= now:
                _, _, sink, packet = heapq.heappop(waiting)
                try:
                    os.write(sink, packet)
                except OSError:
                    continue  # its device is down: the packet is lost
            pause = min(0.2, waiting[0][0] - now) if waiting else 0.2
            for source in select.select([self._near, self._far], [], [], pause)[0]:
                packet = os.read(source, 65536)
                self.carried += 1
                if self._draw.random() < self.loss:
                    self.lost += 1
                    continue
                sink = other[source]
                due = time.monotonic() + self.delay + self._draw.uniform(-self.jitter, self.jitter)
                latest[sink] = max(latest[sink], due)
                heapq.heappush(waiting, (latest[sink], self.carried, sink, packet))
