"""No silence: a strategy that says what nobody hears, or a figure that is no number, is named."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from fedfuse.core.shares import declared
from fedfuse.errors import UserError, nearest
from fedfuse.wire.knowledge import Topic

if TYPE_CHECKING:
    from fedfuse.config.registry import Entry
    from fedfuse.core.strategy import FusionStrategy

TRANSFER = ("none", "server", "clients", "both")
UNDEFINED = "undefined"  # a metric: of a client's training loss, or the share of a test set
CONSTANT = "constant"  # a metric: all examples of a test set get one answer
KEPT = "kept"  # a metric: how many with examples this round needed and did not get, so that all stayed as it was


def check_declared(kind: type[Any], known: Iterable[str]) -> None:
    """Check what a server half declares, when its class is made.

    Parameters
    ----------
    kind : type
        A subclass of `FusionStrategy`.
    known : iterable of str
        The class attributes that the platform reads.

    Raises
    ------
    UserError
        Naming the class, the attribute, its value and what is allowed.
    """
    import difflib

    own, known = vars(kind), sorted(known)
    for name, value in own.items():
        if name.startswith("_") or name in known or callable(value) or isinstance(value, property | classmethod):
            continue
        if close := difflib.get_close_matches(name, known, n=1, cutoff=0.85):
            raise UserError(f"{kind.__name__}.{name}: nothing reads it; did you mean {close[0]!r}?")
    if (said := own.get("transfer", "none")) not in TRANSFER and isinstance(said, str):
        raise UserError(f"{kind.__name__}.transfer={said!r}: {nearest(said, TRANSFER)}")
    topics = own.get("topics", {})
    for name, topic in topics.items() if isinstance(topics, Mapping) else ():
        if not isinstance(topic, Topic):
            raise UserError(f"{kind.__name__}.topics[{name!r}] is {type(topic).__name__}; a fedfuse.Topic is needed")
    ranges = own.get("metrics", {})
    for name, span in ranges.items() if isinstance(ranges, Mapping) else ():
        if not isinstance(span, tuple) or len(span) != 2:
            raise UserError(f"{kind.__name__}.metrics[{name!r}] is {span!r}; its least and greatest value are needed")
    setup = own.get("setup", ())
    for phase in setup if isinstance(setup, tuple) else ():  # a property is checked with the run
        if not hasattr(kind, f"fuse_{phase}"):
            raise UserError(f"{kind.__name__}.setup names {phase!r}, and there is no method fuse_{phase}")


def check_halves(entry: Entry, strategy: FusionStrategy) -> None:
    """Check that every phase has a method in both halves, and that what is summed is shared.

    Raises
    ------
    UserError
        Naming the phase and what is missing, or the record.
    """
    phases = *strategy.setup, *strategy.phases(1)
    shared = {name for phase in {"train", *phases} for name in declared(entry.server, phase)}
    if unknown := sorted(set(strategy.sums) - shared):
        raise UserError(f"strategy={entry.name}: sums names {unknown[0]!r}, no record; {nearest(unknown[0], shared)}")
    for phase in phases:
        server, client = ("fuse", "share") if phase == "train" else (f"fuse_{phase}", phase)
        if not hasattr(entry.server, server) or not hasattr(entry.client, client):
            missing = server if not hasattr(entry.server, server) else f"{entry.client.__name__}.{client}"
            raise UserError(f"strategy={entry.name} has a phase {phase!r}, and there is no method {missing}")


def awaits(strategy: FusionStrategy) -> bool:
    """Whether a later round has a phase that none had yet, as a vote after all training."""
    done, last = strategy.round, min(strategy.scenario.config.rounds, strategy.round + 1000)
    had = {phase for round in range(max(1, done - 1000), done + 1) for phase in strategy.phases(round)}
    return any(set(strategy.phases(round)) - had for round in range(done + 1, last + 1))


def unheard(strategy: FusionStrategy) -> list[str]:
    """Say what a strategy declares and did not do in the rounds so far; empty if all is well."""
    if not strategy.round or not strategy.topics or awaits(strategy):
        return []
    items = strategy.board.items
    if all(item.version < 1 for item in items.values()):
        return [f"{strategy.name}: fuse published nothing, so that no client learned from another"]
    there = {topic for topic, _ in items}
    scope = strategy.workspace.scope(0, strategy.hyper)
    return [
        f"{strategy.name}: declares the topic {name!r}, and nobody ever got any of it"
        for name, topic in strategy.topics.items()
        if name not in there
        and not topic.sometimes
        and (topic.arrays is None or topic.arrays(scope))  # a head that the model has not is nothing to say
    ]


def beside_state(strategy: FusionStrategy) -> list[str]:
    """Say what the halves wrote to their classes and modules, and what the server's keeps as attributes."""
    shared = [
        f"{name} was written to: all clients and runs of a process share it, so that bits may depend on the "
        f"runtime; what is to last belongs into self.state"
        for name in sorted(strategy.inbox.wrote)
    ]
    unkept = [
        f"{name} was set after the server's __init__, and a resumed run starts without it: what is to last belongs "
        f"into self.state"
        for name in sorted(strategy.inbox.unkept)
    ]
    return shared + unkept


def undefined(rows: Iterable[tuple[int, str, int, str, str, float]], clients: int) -> list[str]:
    """Say which figures were no numbers.

    Parameters
    ----------
    rows : iterable
        As `metrics.parquet` has them, of one round or of all.
    clients : int
        How many there are.
    """
    found: dict[str, tuple[set[int], int]] = {}
    for round, scope, client, split, metric, value, *_ in rows:  # a clock adds a column
        if not metric.endswith(UNDEFINED) or not value:
            continue
        where = f"the server's model on the {split} test" if scope == "server" else (
            "training loss" if split == "train" else f"predictions on the {split} test"
        )  # fmt: skip
        who, first = found.get(where, (set(), round))
        found[where] = (who | {client}, min(first, round))
    out = []
    for where, (who, first) in found.items():
        of = "" if who == {-1} else f" of {len(who)} of {clients} clients"
        out.append(f"not a number: {where}{of}, first in round {first} (is train.lr too large?)")
    return out


def constant(
    rows: Iterable[tuple[int, str, int, str, str, float]],
    clients: int,
    last: int,
    distils: bool = False,
    alone: Collection[int] = (),
) -> list[str]:
    """Say whose answer to the whole global test is one class after the last round: dead units, or a collapse.

    Parameters
    ----------
    rows : iterable
        As `metrics.parquet` has them.
    clients : int
        How many score the global test.
    last : int
        The last round.
    distils : bool
        Whether there is a distillation, which `distil.*` sets.
    alone : collection of int
        Clients whose training examples are of one class: what they train on themselves gives one answer.
    """
    # few steps leave one answer as much as too large ones do; what distils has an optimiser of its own: Adam, often
    smaller = "more training (train.epochs, rounds), or a smaller train.lr"
    lesson = " or distil.lr, distil.optimizer=adam where that is sgd, or clients with more classes to teach each other"
    advice = smaller + (lesson if distils else "")
    found = [
        (scope, client, metric.rpartition("/")[0])
        for round, scope, client, split, metric, value, *_ in rows  # a clock adds a column
        if (round, split) == (last, "global") and metric.endswith(CONSTANT) and value
    ]
    who = [f"the server's {name}" for scope, _, name in found if scope == "server"]
    if their := [client for scope, client, _ in found if scope == "client"]:
        narrow = len(set(their).intersection(alone))
        of_one = f" ({narrow} of them with training examples of one class alone)" if narrow else ""
        who.append(f"{len(their)} of {clients} clients' models{of_one}")
    return [
        f"one answer for all of the global test: {one}, no better there than guessing: {advice}, may help"
        for one in who
    ]


def kept(rows: Iterable[tuple[int, str, int, str, str, float]], done: int) -> list[str]:
    """Say in which rounds there was nothing to fuse.

    Parameters
    ----------
    rows : iterable
        As `metrics.parquet` has them.
    done : int
        Rounds so far.
    """
    found = {round: int(value) for round, scope, _, _, metric, value, *_ in rows if (scope, metric) == ("server", KEPT)}
    if not found:
        return []
    return [
        f"nothing to fuse in {len(found)} of {done} rounds, first in round {min(found)}: "
        f"{too_few(max(found.values()))} there, and what was published stays (participation)"
    ]


def too_few(needed: int) -> str:
    """Why a phase makes nothing of its shares: how many with examples it needs."""
    if needed == 1:
        return "no client that answered has a training example"
    return f"fewer than the {needed} clients that the rule needs answered with training examples"


def is_undefined(metrics: Mapping[str, Any], examples: float) -> bool:
    """Whether a client trained and its loss is no number; without examples or steps there is none."""
    loss = metrics.get("loss")
    return bool(
        isinstance(loss, int | float) and not math.isfinite(loss) and examples > 0 and metrics.get("steps", 1) != 0
    )
