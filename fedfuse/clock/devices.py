"""What each client computes with: drawn, dealt by tier, or read from `devices.csv`; fixed for the whole run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedfuse.clock import fedscale
from fedfuse.clock.draws import lognormal
from fedfuse.clock.tables import numbers
from fedfuse.config.clock_keys import ClockConfig
from fedfuse.errors import UserError

# what a kind of device amounts to: GFLOP/s, kbit/s down and up, ms; rough magnitudes, for who has no table
TIERS: dict[str, tuple[float, float, float, float]] = {
    "workstation": (1000.0, 500_000.0, 200_000.0, 10.0),
    "laptop": (100.0, 100_000.0, 30_000.0, 20.0),
    "phone": (20.0, 20_000.0, 5_000.0, 50.0),
    "board": (2.0, 5_000.0, 1_000.0, 80.0),
}


@dataclass(frozen=True)
class Device:
    """One client's device; of its two measures of speed, one is set.

    Parameters
    ----------
    gflops : float or None
        10⁹ floating-point operations a second.
    s_per_example : float or None
        Seconds for one example forward and backward through the client's own network.
    down_kbps, up_kbps : float
        Bandwidth, 1,000 bits a second.
    latency_ms : float
        Until the first byte, each way.
    """

    gflops: float | None
    s_per_example: float | None
    down_kbps: float
    up_kbps: float
    latency_ms: float

    def computing(self, flops: int, unit: int, factor: float = 1.0) -> int:
        """Nanoseconds of work: FLOPs at this speed, or as many examples as they amount to (`unit` FLOPs each)."""
        if self.gflops is not None:
            return math.ceil(flops / self.gflops * factor)
        return math.ceil(flops / max(unit, 1) * (self.s_per_example or 0.0) * factor * 1e9)

    @property
    def latency(self) -> int:
        """Nanoseconds until the first byte."""
        return round(self.latency_ms * 1e6)

    def downloading(self, size: int) -> int:
        """Nanoseconds to get so many bytes, without latency."""
        return _carried(size, self.down_kbps)

    def uploading(self, size: int) -> int:
        """Nanoseconds to send so many bytes, without latency."""
        return _carried(size, self.up_kbps)


def _carried(size: int, kbps: float) -> int:
    return math.ceil(8 * size * 10**6 / kbps)


def devices(config: ClockConfig, clients: int, seed: int) -> list[Device]:
    """Every client's device.

    Raises
    ------
    UserError
        If a table cannot be read, misses a client or holds what no device can be.
    """
    if config.devices is not None:
        path = Path(config.devices)
        if path.suffix == ".csv":
            return _table(path, clients)
        return [Device(None, s, kbps, kbps, config.latency_ms) for s, kbps in fedscale.capacities(path, clients, seed)]
    if config.speeds == "tiers":
        kinds = [TIERS[config.tiers[client % len(config.tiers)]] for client in range(clients)]
        return [Device(gflops, None, down, up, latency) for gflops, down, up, latency in kinds]
    return [_drawn(config, client, seed) for client in range(clients)]


def _drawn(config: ClockConfig, client: int, seed: int) -> Device:
    link = lognormal(1.0, config.link_spread, seed, "link", client)  # a good line is good both ways
    return Device(
        lognormal(config.gflops, config.spread, seed, "speed", client),
        None,
        config.down_kbps * link,
        config.up_kbps * link,
        config.latency_ms,
    )


def _table(path: Path, clients: int) -> list[Device]:
    rows: dict[int, Device] = {}
    for line, row in numbers(path, ("client", "down_kbps", "up_kbps", "latency_ms"), ("gflops", "s_per_example")):
        client = int(row["client"])
        if client in rows:
            raise UserError(f"{path}, line {line}: client {client} has a row already; allowed is one a client")
        rows[client] = _checked(path, line, row)
    if missing := [client for client in range(clients) if client not in rows]:
        raise UserError(f"{path}: client {missing[0]} has no row; needed is one for each of {clients} clients")
    return [rows[client] for client in range(clients)]


def _checked(path: Path, line: int, row: Mapping[str, float]) -> Device:
    speeds = [name for name in ("gflops", "s_per_example") if name in row]
    if len(speeds) != 1:
        raise UserError(
            f"{path}, line {line}: has {' and '.join(speeds) or 'no speed'}; needed is gflops or s_per_example"
        )
    for name in (*speeds, "down_kbps", "up_kbps"):
        if not 0 < row[name] < math.inf:
            raise UserError(f"{path}, line {line}: {name}={row[name]:g}; allowed is more than 0")
    if not 0 <= row["latency_ms"] < math.inf:
        raise UserError(f"{path}, line {line}: latency_ms={row['latency_ms']:g}; allowed is at least 0")
    return Device(row.get("gflops"), row.get("s_per_example"), row["down_kbps"], row["up_kbps"], row["latency_ms"])
