"""Small federations for tests: any strategy, any grid, in a fraction of a second."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from flwr.app import Message, RecordDict
from omegaconf import OmegaConf

from fedfuse import models
from fedfuse.compat.flower_identity import claim_identity
from fedfuse.config import registry
from fedfuse.config.compose import OPEN
from fedfuse.config.hydra_words import by_parts
from fedfuse.config.rules import check
from fedfuse.config.schema import Config
from fedfuse.core.build import build_strategy
from fedfuse.core.callbacks import Evaluation
from fedfuse.core.loop import Callback, Federation
from fedfuse.core.node import place
from fedfuse.core.scenario import Scenario
from fedfuse.core.strategy import FusionStrategy
from fedfuse.core.threads import single_thread
from fedfuse.core.timed import build_clock
from fedfuse.data import FederatedData, prepare
from fedfuse.engines.grid import LocalGrid
from fedfuse.engines.inline import InlineGrid
from fedfuse.runs.directory import RunDirectory
from fedfuse.wire.client_store import ClientStore
from fedfuse.wire.records import Arrays, nbytes, tensors
from tests.differences import Step, Witness
from tests.serial_grid import SerialGrid

single_thread()
claim_identity()

TINY = (
    "data=digits", "data.limit=240", "data.test_limit=60", "partition=iid", "clients=3", "rounds=2",
    "model=mlp_small", "transfer.size=24", "train.epochs=1", "train.batch_size=16", "runtime=inline",
)  # fmt: skip

# generators train for minutes as they come: what a run does is the same in a few steps of small batches
_SHORT = ("strategy.epochs=2", "strategy.generator_steps=2", "strategy.batch=16", "strategy.noise_dim=8")
QUICK: dict[str, tuple[str, ...]] = {
    "dense": _SHORT, "coboosting": _SHORT, "fedftg": ("strategy.iterations=2", "strategy.batch=16"),
    "fedov": ("strategy.distill_epochs=3",),
    "fedmkt": ("transfer.labelled=true",),
}  # fmt: skip


@dataclass
class Played:
    """A run that is over."""

    federation: Federation
    strategy: FusionStrategy
    directory: RunDirectory
    steps: dict[Step, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        assert self.federation.digest is not None, self.strategy.inbox.left_out
        return self.federation.digest

    @property
    def totals(self) -> dict[str, int]:
        return self.strategy.outbox.traffic.summary()


@cache
def _dealt(key: str) -> FederatedData:
    data, partition, transfer, clients, seed = _asked[key]
    return prepare(data, partition, transfer, clients, seed)


_asked: dict[str, Any] = {}


@cache
def scenario_of(overrides: tuple[str, ...]) -> tuple[Config, Scenario]:
    """The words as `compose` takes them, where what a run would refuse as idle is nothing to refuse."""
    name = next(w.split("=", 1)[1] for w in reversed(overrides) if w.startswith("strategy="))
    plain = [w for w in overrides if not w.startswith("strategy=")]
    words = [f"++{w.lstrip('+')}" if w.lstrip("+").startswith(OPEN) else w for w in (*QUICK.get(name, ()), *plain)]
    found = by_parts([f"strategy={name}", *words], name)  # what is asked for comes after what is quick, and holds
    assert found is not None, overrides
    config: Config = OmegaConf.to_object(found)  # type: ignore[assignment]
    config.strategy = registry.typed(config.strategy)
    check(config)
    wanted = (config.data, config.partition, config.transfer, config.clients, config.seed)
    _asked[repr(wanted)] = wanted
    data = _dealt(repr(wanted))
    names = models.architectures(
        config.model, data.dataset.kind_said, data.dataset.shape, data.clients, data.dataset.next_token
    )
    return config, Scenario(config, data, tuple(names))


@contextlib.contextmanager
def federation(
    name: str,
    *overrides: str,
    grid: str = "inline",
    path: Path | None = None,
    reverse: bool = False,
    drop: Callable[[Any, Any], bool] | None = None,
    callbacks: tuple[Callback, ...] = (),
    base: tuple[str, ...] = TINY,
    workers: int = 2,
    device: str = "cpu",
) -> Iterator[tuple[Federation, RunDirectory]]:
    """A federation ready to run, in a run directory of its own (resumed if `path` holds one)."""
    config, scenario = scenario_of((*base, f"strategy={name}", *overrides))
    entry = registry.entry(name)
    strategy = build_strategy(entry, scenario)
    with tempfile.TemporaryDirectory() as folder:
        where = path or Path(folder) / "run"
        directory = RunDirectory(where, config, 0.0)
        resumed = (where / "checkpoint").exists()
        if resumed:
            directory.reopen()
        else:
            directory.create(False)
        if grid == "serial":
            transport: LocalGrid = SerialGrid(
                lambda site: place(entry, scenario, ClientStore(site)),
                where / "sites",
                scenario.clients,
                drop,
            )
        elif grid == "ray":
            from fedfuse.engines.ray import RayGrid

            transport = RayGrid(entry, scenario, directory.clients.directory, workers, device)
        else:
            transport = InlineGrid(place(entry, scenario, directory.clients, device=device), reverse)
        uncollected = mock.patch("gc.collect")  # Flower's, after each aggregation, takes longer than the whole run
        uncollected.start()
        try:
            whole = [Evaluation(config.evaluate.every, config.evaluate.seconds), directory, *callbacks]
            built = Federation(strategy, transport, config.rounds, whole, build_clock(strategy))
            if resumed:
                directory.restore(built)
                transport.cache.update(strategy.board.items)
            yield built, directory
        finally:
            uncollected.stop()
            transport.close()
            directory.close()


def play(
    name: str, *overrides: str, beforehand: Callable[[Federation], None] = lambda built: None, **options: Any
) -> Played:
    """Run a small federation to its end; `beforehand` gets it before it begins."""
    witness = Witness()
    options["callbacks"] = (*options.get("callbacks", ()), witness)
    with federation(name, *overrides, **options) as (built, directory):
        witness.watch(built)
        beforehand(built)
        built.run()
        notes = json.loads((directory.path / "summary.json").read_text())["notes"]
        return Played(built, built.strategy, directory, witness.steps, tuple(notes))


Look = Callable[[Message], Message | list[Message] | None]


def intercept(
    built: Federation,
    replied: Look | None = None,
    *,
    sent: Look | None = None,
    order: Callable[[list[Message]], list[Message]] | None = None,
    kind: str = "",
    round: int | None = None,
    client: int | None = None,
) -> None:
    """Stand between a federation and its grid: see, change, swallow, add or reorder what passes.

    Parameters
    ----------
    built : Federation
    replied, sent : callable, optional
        Is given each reply, or each message, and returns what goes on in its place: one, or a list of any length;
        None leaves it as it is.
    order : callable, optional
        Is given all replies at once and returns them in another order, as a list; else they stream.
    kind, round, client
        Give `replied` and `sent` only what has a message type that begins so, in this round, from or to this client.
    """
    if isinstance(built.grid, InlineGrid):
        built.grid.whole = True  # every reply has its client's arrays
    carry = built.grid.send_and_receive

    def passed(messages: Iterable[Message], look: Look | None, node: str) -> Iterator[Message]:
        for message in messages:
            about, out = message.metadata, None
            concerned = client in (None, getattr(about, node) - 1) and round in (None, built.strategy.round)
            if look is not None and concerned and about.message_type.startswith(kind):
                out = look(message)
            yield from out if isinstance(out, list) else [message if out is None else out]

    def intercepted(messages: Iterable[Message], **options: Any) -> Iterable[Message]:
        replies = passed(carry(passed(messages, sent, "dst_node_id"), **options), replied, "src_node_id")
        return replies if order is None else order(list(replies))

    built.grid.send_and_receive = intercepted  # type: ignore[method-assign]


def asked(reply: Message) -> Message:
    """A message that a reply with this sender would answer."""
    return Message(RecordDict(), dst_node_id=reply.metadata.src_node_id, message_type=reply.metadata.message_type)


def answer(reply: Message, **changes: Any) -> Message:
    """The reply with records exchanged."""
    return Message(RecordDict({**dict(reply.content.items()), **changes}), reply_to=asked(reply))


def uploads(built: Federation, name: str) -> list[Arrays]:
    """What clients will have sent as the record of this name, in the order of arrival."""
    found: list[Arrays] = []

    def look(reply: Message) -> None:
        if name in reply.content:
            found.append({key: value.clone() for key, value in tensors(reply.content[name]).items()})

    intercept(built, look)
    return found


class Undisturbed:
    """Each strategy's plain inline run, made once a process, and the bytes of arrays that its messages carried."""

    def __init__(self) -> None:
        self.made: dict[str, Played] = {}
        self.carried: dict[str, int] = {}

    def __call__(self, name: str) -> Played:
        if name not in self.made:
            self.carried[name] = 0

            def counted(message: Message) -> None:
                if message.has_content():
                    self.carried[name] += sum(nbytes(r) for r in message.content.array_records.values())

            self.made[name] = play(name, beforehand=lambda built: intercept(built, counted, sent=counted))
        return self.made[name]


UNDISTURBED = Undisturbed()
