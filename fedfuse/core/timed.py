"""The clock of a run, made and checked before anything begins; and what a round of it will be like."""

from __future__ import annotations

from statistics import median_high

import torch

from fedfuse.clock.draws import SECOND, nanoseconds
from fedfuse.clock.world import Flight, Work, world
from fedfuse.config.clock_rules import refuse_apart
from fedfuse.core.strategy import FusionStrategy
from fedfuse.core.virtual_clock import VirtualClock
from fedfuse.errors import UserError
from fedfuse.train.work import flops
from fedfuse.wire.records import layout_nbytes


def build_clock(strategy: FusionStrategy) -> VirtualClock | None:
    """The virtual clock that a run asks for; None with `clock=off`.

    Raises
    ------
    UserError
        If the words do not go together, a table is wrong, the strategy is wrong under staleness, or nobody can meet
        the deadline.
    """
    scenario = strategy.scenario
    config = scenario.config
    refuse_apart(config)
    if not config.clock.on:
        return None
    _check_stale(strategy)
    clock = VirtualClock(strategy, world(config.clock, scenario.clients, scenario.seed))
    if config.schedule.name == "deadline":
        least = min(nominal(strategy, clock), key=lambda flight: flight.end)
        if least.end > nanoseconds(config.schedule.seconds):
            raise UserError(
                f"schedule.seconds={config.schedule.seconds:g}: nobody can meet this deadline; the fastest, client "
                f"{least.client}, needs {least.end / SECOND:.3g} s"
            )
    return clock


def _check_stale(strategy: FusionStrategy) -> None:
    scenario = strategy.scenario
    schedule, name = scenario.config.schedule, strategy.name
    if schedule.name not in ("fedbuff", "fedasync"):
        return
    if strategy.staleness not in ("updates", "newest"):
        why = (
            "is wrong under staleness" if strategy.staleness == "wrong" else "does not say that stale shares are right"
        )
        raise UserError(
            f"schedule={schedule.name}: strategy={name} {why}; allowed for it are sync, deadline, overcommit, semiasync"
        )
    if strategy.phases(1) != ("train",):
        raise UserError(f"schedule={schedule.name}: strategy={name} has several phases a round; allowed is one")
    transfer = scenario.data.transfer
    redrawn = strategy.transfer != "none" and transfer is not None and scenario.config.transfer.redraw
    if redrawn and strategy.rows_distilled < len(transfer or ()):
        raise UserError(
            f"schedule={schedule.name}: shares of different rounds stand on different rows of the transfer set; "
            f"set transfer.redraw=false, or use all of its rows"
        )
    if schedule.name == "fedbuff" and schedule.buffer > scenario.clients:
        raise UserError(
            f"schedule.buffer={schedule.buffer}: there are {scenario.clients} clients; allowed is at most that"
        )


def nominal(strategy: FusionStrategy, clock: VirtualClock) -> list[Flight]:
    """Every client's flight on a quiet day: `train.epochs` over its examples, the strategy's bytes, always on."""
    from dataclasses import replace

    from fedfuse.clock.availability import ALWAYS

    scenario = strategy.scenario
    quiet = replace(clock.world, intervals=[ALWAYS] * scenario.clients, dropout=0.0, jitter=0.0)
    return [quiet.flight(client, 0, 0, 0, *_nominal(strategy, client)) for client in range(scenario.clients)]


def _nominal(strategy: FusionStrategy, client: int) -> tuple[int, Work]:
    scenario, workspace = strategy.scenario, strategy.workspace
    scope = workspace.scope(client, scenario.config.strategy)
    down = sum(
        layout_nbytes(spec(scope))
        for topic in type(strategy).topics.values()
        if (spec := topic.increment or topic.arrays) is not None and not topic.once
    )
    up = sum(layout_nbytes(spec(scope)) for spec in type(strategy).records.values() if spec is not None)
    examples = scenario.data.tensors(client, "train")
    unit = 0
    if examples is not None and len(examples[0]):
        x: torch.Tensor = examples[0][:1].to(workspace.device)
        unit = flops(workspace.model(scenario.architectures[client]), x, True)
    train = scenario.config.train
    passed = scenario.examples(client) * train.epochs
    if train.max_steps is not None:
        passed = train.max_steps * min(train.batch_size, scenario.examples(client))
    return down, Work(unit * passed, unit, up)


def shape(strategy: FusionStrategy, clock: VirtualClock) -> list[str]:
    """What a schedule will be like, in lines: devices, a round, who is slow, who is away."""
    flights = sorted(nominal(strategy, clock), key=lambda flight: flight.end)
    times = [flight.end / SECOND for flight in flights]
    slow = ", ".join(f"client {flight.client} {flight.end / SECOND:.3g} s" for flight in reversed(flights[-3:]))
    computing = [(f.computed - f.received) / f.end if f.end else 0.0 for f in flights]
    schedule = strategy.scenario.config.schedule
    lines = [
        f"schedule: {schedule.name}{_detail(clock)}",
        f"  a client's round: {times[0]:.3g} s fastest, {median_high(times):.3g} s median, {times[-1]:.3g} s slowest "
        f"(train.epochs={strategy.scenario.config.train.epochs}, nobody away)",
        f"  of which computing: {100 * median_high(computing):.0f} % (median); the rest is the network",
        f"  slowest: {slow}",
    ]
    if schedule.name == "deadline":
        late = sum(time > schedule.seconds for time in times)
        acts = f"stops {late} of {len(times)} clients" if late else "is beyond the slowest client: it stops nobody"
        lines.append(f"  the deadline {acts}")
    spans = [sum(b - a for a, b in one.spans) / one.period for one in clock.world.intervals if not one.always]
    if spans:
        lines.append(
            f"  devices are on {100 * median_high(spans):.0f} % of the time (median), {len(spans)} of them by intervals"
        )
    if clock.world.dropout:
        lines.append(f"  {100 * clock.world.dropout:g} % of dispatches are lost")
    return lines


def _detail(clock: VirtualClock) -> str:
    schedule, sky = clock.schedule, clock.sky
    return {
        "deadline": f", T = {schedule.seconds:g} s",
        "overcommit": f", f = {schedule.factor:g}",
        "semiasync": f", W = {schedule.seconds:g} s, {sky.concurrency} at work",
        "fedbuff": f", K = {schedule.buffer}, {sky.concurrency} at work",
        "fedasync": f", α = {schedule.mixing:g}, {sky.concurrency} at work",
    }.get(schedule.name, "")
