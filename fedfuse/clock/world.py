"""What becomes of a client that is given work: when it has the message, when it has trained, when its reply is there.

A flight is computed whole from the moment it starts; nothing in it depends on any other flight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fedfuse.clock.availability import Intervals, availability
from fedfuse.clock.devices import Device, devices
from fedfuse.clock.draws import SECOND, lognormal, uniform
from fedfuse.config.clock_keys import ClockConfig

DAY = 86_400 * SECOND
ARRIVED, LATE, LOST, DROPPED, FAILED = "arrived", "late", "lost", "dropped", "failed"


class Work(NamedTuple):
    """What a training came to, as counted: FLOPs, FLOPs of one example forward and backward, bytes of the reply.

    Negative FLOPs: the client failed, and the server hears of it once the message is there.
    """

    flops: int
    unit: int
    up: int


class Flight(NamedTuple):
    """A client between its invitation and its reply; moments in nanoseconds.

    Parameters
    ----------
    client, attempt : int
        Who, and how often it was invited before.
    round : int
        The round whose message it carries.
    start, received, computed, end : int
        Invited, has the message, has trained, is there or is lost. `end` is -1 while its work is not known.
    outcome : str
        arrived | late | lost | dropped | failed; empty while its work is not known.
    down, up, flops : int
        Bytes both ways and work, as counted.
    """

    client: int
    attempt: int
    round: int
    start: int
    received: int
    computed: int
    end: int
    outcome: str
    down: int
    up: int = 0
    flops: int = 0

    @property
    def known(self) -> bool:
        """Whether its end is known."""
        return self.end >= 0


@dataclass(frozen=True)
class World:
    """Devices, their intervals and what is drawn for each dispatch.

    Parameters
    ----------
    devices, intervals : sequence
        One a client.
    whole : bool
        Whether a device must be on from start to finish; else when its reply arrives.
    dropout : float
        Probability that a device is lost after its download.
    jitter : float
        σ of the logarithm of a factor on computing time.
    seed : int
    watts, joules_per_mb : float
        For `joules`; no watts, no energy.
    """

    devices: Sequence[Device]
    intervals: Sequence[Intervals]
    whole: bool = True
    dropout: float = 0.0
    jitter: float = 0.0
    seed: int = 0
    watts: float | None = None
    joules_per_mb: float = 0.0

    @property
    def clients(self) -> int:
        """How many there are."""
        return len(self.devices)

    @property
    def certain(self) -> bool:
        """Whether nobody can be lost."""
        return not self.dropout and all(one.always for one in self.intervals)

    @property
    def patience(self) -> int:
        """Nanoseconds after which nobody will come who has not: the longest period of availability, or a day."""
        return max((one.period for one in self.intervals if not one.always), default=DAY)

    def on(self, client: int, at: int) -> bool:
        """Whether a client's device is on."""
        return self.intervals[client].on(at)

    def flight(self, client: int, attempt: int, round: int, start: int, down: int, work: Work | None) -> Flight:
        """A client's way through one piece of work; its end is not known without `work`, unless it is lost before."""
        device, intervals = self.devices[client], self.intervals[client]
        received = start + device.latency + device.downloading(down)
        off = intervals.off_after(start) if self.whole else None
        if off is not None and off < received:
            return Flight(client, attempt, round, start, off, off, off, LOST, down)
        if self.dropout and uniform(self.seed, "dropout", client, attempt) < self.dropout:
            return Flight(client, attempt, round, start, received, received, received, DROPPED, down)
        if work is None:
            return Flight(client, attempt, round, start, received, -1, -1, "", down)
        if work.flops < 0:
            return Flight(client, attempt, round, start, received, received, received, FAILED, down)
        factor = lognormal(1.0, self.jitter, self.seed, "jitter", client, attempt)
        computed = received + device.computing(work.flops, work.unit, factor)
        end = computed + device.latency + device.uploading(work.up)
        if off is not None and off < end:
            sent = work.up if off > computed else 0
            return Flight(
                client, attempt, round, start, received, min(computed, off), off, LOST, down, sent, work.flops
            )
        there = self.whole or intervals.on(end)
        return Flight(
            client,
            attempt,
            round,
            start,
            received,
            computed,
            end,
            ARRIVED if there else LOST,
            down,
            work.up,
            work.flops,
        )

    def joules(self, flight: Flight) -> float | None:
        """Energy of a flight: the device's power while it computes, and its bytes."""
        if self.watts is None:
            return None
        computing = max(0, flight.computed - flight.received) / SECOND
        return self.watts * computing + self.joules_per_mb * (flight.down + flight.up) / 1e6


def world(config: ClockConfig, clients: int, seed: int) -> World:
    """The world that a configuration describes.

    Raises
    ------
    UserError
        If a table cannot be read, or describes what cannot be.
    """
    return World(
        devices(config, clients, seed),
        availability(config, clients, seed),
        config.policy == "whole",
        config.dropout,
        config.jitter,
        seed,
        config.watts,
        config.joules_per_mb,
    )
