"""What the keys of the virtual clock may be, and which of them go together."""

from __future__ import annotations

import math
from typing import Any

from fedfuse.config.schema import Config
from fedfuse.errors import UserError

Rule = tuple[str, Any, bool, str]  # key, value, whether it is good, what is allowed

SECONDS = ("_s", ".seconds")
TIERS = ("workstation", "laptop", "phone", "board")


def timed(config: Config) -> list[Rule]:
    """Rules of the clock, the schedule and their limits."""
    clock, schedule = config.clock, config.schedule
    positive = {
        "clock.gflops": clock.gflops,
        "clock.down_kbps": clock.down_kbps,
        "clock.up_kbps": clock.up_kbps,
        "clock.on_s": clock.on_s,
        "clock.off_s": clock.off_s,
        "clock.period_s": clock.period_s,
        "schedule.seconds": schedule.seconds,
        "schedule.server_lr": schedule.server_lr,
        "until.seconds": config.until.seconds,
        "evaluate.seconds": config.evaluate.seconds,
        "stop.seconds": config.stop.seconds,
    }
    not_negative = {
        "clock.latency_ms": clock.latency_ms,
        "clock.watts": clock.watts,
        "clock.joules_per_mb": clock.joules_per_mb,
        "schedule.a": schedule.a,
        "schedule.b": schedule.b,
    }
    sigmas = {"clock.spread": clock.spread, "clock.link_spread": clock.link_spread, "clock.jitter": clock.jitter}
    at_least_one = {"schedule.buffer": schedule.buffer, "schedule.concurrency": schedule.concurrency}
    rules: list[Rule] = [(k, v, v is None or 0 < v < math.inf, "more than 0") for k, v in positive.items()]
    # nanoseconds are counted in 64 bits
    most = [(k, v, v is None or v <= 9e9, "at most 9,000,000,000") for k, v in positive.items() if k.endswith(SECONDS)]
    rules += most
    rules += [(k, v, v is None or 0 <= v < math.inf, "at least 0") for k, v in not_negative.items()]
    rules += [(k, v, 0 <= v <= 5, "at least 0 and at most 5") for k, v in sigmas.items()]  # of 10, e⁴⁰: no time at all
    rules += [(k, v, v is None or v >= 1, "at least 1") for k, v in at_least_one.items()]
    rules += [
        ("clock.dropout", clock.dropout, 0 <= clock.dropout < 1, "at least 0 and below 1"),
        ("clock.on_share", clock.on_share, 0 < clock.on_share <= 1, "more than 0 and at most 1"),
        ("schedule.factor", schedule.factor, 1 < schedule.factor < math.inf, "more than 1"),
        ("schedule.mixing", schedule.mixing, 0 < schedule.mixing <= 1, "more than 0 and at most 1"),
        (
            "clock.tiers",
            clock.tiers,
            bool(clock.tiers) and set(clock.tiers) <= set(TIERS),
            "a list of " + ", ".join(TIERS),
        ),
    ]
    return rules


def refuse_apart(config: Config) -> None:
    """Refuse words that are good alone and say nothing together.

    Raises
    ------
    UserError
        Naming the key, the value and what is allowed.
    """
    clock, schedule, part = config.clock, config.schedule, config.participation
    told = [
        (
            clock.name == "trace" and not (clock.devices or clock.intervals),
            "clock=trace: needs clock.devices=<file>, clock.intervals=<file> or both",
        ),
        (
            not clock.on and schedule.name != "sync",
            f"schedule={schedule.name}: needs a clock; allowed with clock=off is sync",
        ),
        (
            schedule.name == "overcommit" and part == 1,
            "schedule=overcommit: participation=1.0 leaves nobody to invite more; allowed is below 1",
        ),
        (
            clock.on and config.runtime.name == "flower",
            f"clock={clock.name}: runtime=flower keeps its own time; allowed are inline and ray",
        ),
    ]
    for key, on in (("secure=on", config.secure.name == "on"), ("privacy.level=client", config.privacy.by_client)):
        wrong = clock.on and on
        told.append((wrong, f"clock={clock.name}: {key} needs everybody's reply at once; allowed is clock=off"))
    for wrong, line in told:
        if wrong:
            raise UserError(line)
