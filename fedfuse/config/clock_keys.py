"""The keys of the virtual clock: devices, their absence, the schedule that the server keeps, and when a run is over."""

from __future__ import annotations

from dataclasses import dataclass

from fedfuse.config.keys import key

ON = "clock=devices|trace"
DRAWN = f"clock.devices=null with clock.speeds=lognormal with {ON}"
STALE = "schedule=semiasync|fedbuff|fedasync"


@dataclass
class ClockConfig:
    """A virtual clock (`clock=off|devices|trace`): what devices, links and absence do to time. Off costs nothing."""

    name: str = key("off", "off; devices: drawn or from a table; trace: devices and intervals from files of the user's")
    devices: str | None = key(
        None,
        "file: devices.csv (client, gflops or s_per_example, down_kbps, up_kbps, latency_ms), or FedScale's capacities",
        only="clock=trace",
    )
    intervals: str | None = key(
        None,
        "file: availability.csv (client, on_s, off_s), or FedScale's behaviour",
        only="clock=trace",
    )
    speeds: str = key(
        "lognormal",
        "how devices are drawn where no file gives them: lognormal | tiers",
        only=f"clock.devices=null with {ON}",
    )
    gflops: float = key(10.0, "median speed of a device, 10⁹ floating-point operations a second", only=DRAWN)
    spread: float = key(
        1.0, "σ of the logarithm of speeds; 1 spans two orders of magnitude over 100 clients, 1.5 three", only=DRAWN
    )
    down_kbps: float = key(20000.0, "median bandwidth to a device, 1,000 bits a second", only=DRAWN)
    up_kbps: float = key(5000.0, "median bandwidth from a device, 1,000 bits a second", only=DRAWN)
    link_spread: float = key(0.5, "σ of the logarithm of bandwidths, both ways alike on one device", only=DRAWN)
    latency_ms: float = key(50.0, "time until the first byte, each way", only=f"{DRAWN} or clock=trace")
    tiers: list[str] = key(
        ["laptop", "phone", "board"],
        "`tiers`: kinds of device, dealt round-robin: workstation | laptop | phone | board",
        only="clock.speeds=tiers",
    )
    jitter: float = key(0.0, "σ of the logarithm of a factor on each training's time", only=ON)
    availability: str = key(
        "always",
        "when devices are on where no file says it: always | markov | diurnal",
        only=f"clock.intervals=null with {ON}",
    )
    on_s: float = key(3600.0, "`markov`: mean length of an on interval, seconds", only="clock.availability=markov")
    off_s: float = key(3600.0, "`markov`: mean length of an off interval, seconds", only="clock.availability=markov")
    on_share: float = key(0.5, "`diurnal`: share of the period that a device is on", only="clock.availability=diurnal")
    period_s: float = key(86400.0, "availability repeats after so many seconds; a file's: null takes its end", only=ON)
    policy: str = key("whole", "whole: a device must be on from start to finish; end: when its reply arrives", only=ON)
    dropout: float = key(0.0, "probability that a device is lost after its download, for each dispatch", only=ON)
    watts: float | None = key(None, "power of a computing device; null: no energy is counted", only=ON)
    joules_per_mb: float = key(5.0, "energy of 10⁶ bytes, either way", only="clock.watts")

    @property
    def on(self) -> bool:
        """Whether virtual time is kept."""
        return self.name != "off"


@dataclass
class ScheduleConfig:
    """When the server fuses (`schedule=sync|deadline|overcommit|semiasync|fedbuff|fedasync`)."""

    name: str = key(
        "sync",
        "sync: all of the cohort; deadline: all before T; overcommit: the first n of more; semiasync: every W seconds; "
        "fedbuff: every K arrivals; fedasync: every arrival",
    )
    seconds: float = key(60.0, "T or W, virtual seconds", only="schedule=deadline|semiasync")
    factor: float = key(1.3, "`overcommit`: invites ⌈f·n⌉, the first n count", only="schedule=overcommit")
    buffer: int = key(10, "`fedbuff`: K, arrivals that make a version", only="schedule=fedbuff")
    concurrency: int | None = key(
        None,
        "clients at work at once; null: as many as participation draws",
        only=STALE,
    )
    staleness: str = key(
        "polynomial",
        "s(τ) of a share τ versions old: constant: 1 | polynomial: (1+τ)^−a | hinge: 1 if τ ≤ b, else 1/(a·(τ−b)+1)",
        only=STALE,
    )
    a: float = key(0.5, "a of s(τ); a hinge's is usually 10", only=f"{STALE} with schedule.staleness=polynomial|hinge")
    b: int = key(4, "b of the hinge", only=f"{STALE} with schedule.staleness=hinge")
    mixing: float = key(0.6, "`fedasync`: α, what an update without staleness is worth", only="schedule=fedasync")
    server_lr: float = key(1.0, "`fedbuff`: η_g, the server's step along the mean update", only="schedule=fedbuff")


@dataclass
class UntilConfig:
    """Where a run ends beside `rounds`."""

    seconds: float | None = key(
        None, "virtual seconds: no version made later counts; alone, rounds is no limit", only=ON
    )


MANY = 1_000_000  # rounds, where virtual time alone is the limit
