"""The round loop where the world is not kind: lost replies, absent clients, lost directories, failing halves."""

from __future__ import annotations

import io
import random
import shutil
import time
from dataclasses import FrozenInstanceError
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from rich.console import Console

from fedfuse.config.registry import NoHyper
from fedfuse.core import loop
from fedfuse.core.client import FusionClient
from fedfuse.core.loop import Callback
from fedfuse.core.shares import FAILED, FULL, INVALID, REFUSED, STALE, Share
from fedfuse.core.strategy import FusionStrategy
from fedfuse.errors import UserError, WorldError
from fedfuse.runs.progress import Progress
from fedfuse.seeding import seed_everything
from fedfuse.wire.client_store import ClientStore
from fedfuse.wire.records import record, tensors
from tests.federations import answer, federation, intercept, play
from tests.halves import server
from tests.ledger import Ledger, LedgerClient, LedgerHyper, enter, losing
from tests.serial_grid import SerialGrid


@pytest.fixture
def ledger(monkeypatch) -> str:
    """The name of the registered ledger."""
    return enter(monkeypatch)


def test_the_seconds_of_all_phases_fit_into_the_time_that_a_run_took(tmp_path: Path) -> None:
    began = time.perf_counter()
    with federation("fedavg", "evaluate.every=1") as (built, _):
        kept = list[Any]()

        class Keeps(Callback):
            def round(self, federation: Any) -> None:
                kept.extend(federation.timing)

        built.callbacks.insert(0, Keeps())
        built.run()
    phases = [seconds for _, scope, what, seconds in kept if scope == "server"]
    assert phases
    assert 0 < sum(phases) < time.perf_counter() - began


def check_books(built, sites: Path) -> None:
    """What each client believes it gave, in the state the server believes in, is what the server took."""
    strategy = built.strategy
    for client in range(strategy.scenario.clients):
        state = ClientStore(sites / str(client)).load(client, strategy.outbox.tags.get(client, "0"))
        taken = strategy.state["books"].get(str(client), torch.zeros(1, dtype=torch.float64))
        assert torch.equal(state.get("total", torch.zeros(1, dtype=torch.float64)), taken), f"client {client}"


# --- what the sketch saw fail -----------------------------------------------------------------------------


def test_a_lost_reply_rolls_back_to_accepted_state(ledger: str, tmp_path: Path) -> None:
    lost = losing((1, 0), (2, 1), (3, 1), (3, 2), (5, 0))
    with federation(ledger, "rounds=6", "evaluate.every=2", grid="serial", path=tmp_path / "run", drop=lost) as (
        built,
        _,
    ):
        built.run()
        check_books(built, tmp_path / "run" / "sites")
        assert built.strategy.inbox.failures["replies"] == 5
        assert built.strategy.inbox.ever_left_out
        for client in range(3):  # each lesson once: those of the rounds in which the reply arrived, but for the last
            state = ClientStore(tmp_path / "run" / "sites" / str(client)).load(
                client, built.strategy.outbox.tags[client]
            )
            versions = state["advice"]["versions"]
            assert versions == sorted(set(versions))


def test_lost_replies_give_equal_digests_again(ledger: str) -> None:
    def once() -> str:
        return play(ledger, "rounds=4", grid="serial", drop=losing((2, 1), (3, 0))).digest

    assert once() == once()


def test_commit_always_would_not_pass(ledger: str, tmp_path: Path, monkeypatch) -> None:
    """The check checks: a store that ignores the tag lets the books drift."""
    newest = ClientStore.load

    def naive(self, client, tag):
        found = sorted(self._folder(client).glob("*.state"))
        return newest(self, client, found[-1].stem if found else tag)

    with monkeypatch.context() as patch:
        patch.setattr(ClientStore, "load", naive)
        with federation(ledger, grid="serial", path=tmp_path / "run", drop=losing((1, 0))) as (built, _):
            built.run()
    with pytest.raises(AssertionError, match="client 0"):
        check_books(built, tmp_path / "run" / "sites")


@pytest.mark.parametrize("every", [1, 2, 5])
def test_a_skipped_fold_version_is_followed(ledger: str, every: int) -> None:
    words = ("rounds=7", "participation=0.34", "evaluate.every=3", f"strategy.every={every}")
    there = play(ledger, *words)
    assert play(ledger, *words, grid="serial").digest == there.digest


@pytest.mark.parametrize("name", ["ledger", "fedavg", "knfu", "fedmd"])
def test_clients_absent_for_many_rounds(name: str, ledger: str) -> None:
    words = ("rounds=10", "clients=5", "participation=0.2", "evaluate.every=10")
    inline = play(name, *words)
    assert play(name, *words, grid="serial").digest == inline.digest
    cohorts = [inline.strategy.plan(round) for round in range(1, 11)]
    assert all(len(c) == 1 for c in cohorts)
    assert max(_gap(cohorts, i) for i in range(5)) >= 5


def _gap(cohorts: list[list[int]], client: int) -> int:
    rounds = [0, *(i + 1 for i, c in enumerate(cohorts) if client in c), len(cohorts)]
    return max(b - a for a, b in pairwise(rounds))


class Forget(Callback):
    """Deletes part of a site between two rounds."""

    def __init__(self, after: int, where: Path) -> None:
        self.after, self.where = after, where

    def round(self, federation) -> None:
        if federation.done == self.after:
            shutil.rmtree(self.where) if self.where.is_dir() else self.where.unlink()


def test_a_node_that_lost_its_cache_gets_whole_values_again(ledger: str, tmp_path: Path) -> None:
    words = ("rounds=5", "evaluate.every=5")
    cache = tmp_path / "run" / "sites" / "1" / "cache"
    lost = play(ledger, *words, grid="serial", path=tmp_path / "run", callbacks=(Forget(3, cache),))
    there = play(ledger, *words, grid="serial")
    assert lost.digest == there.digest
    assert lost.strategy.inbox.failures == {"replies": 0, "rejected": 0, "retried": 0}
    assert there.totals["resent_bytes"] == 0
    assert lost.totals["resent_bytes"] > 0
    for key in ("up_bytes", "down_bytes"):
        assert lost.totals[key] == there.totals[key]


def test_a_node_that_lost_its_state_is_refused_by_name(ledger: str, tmp_path: Path) -> None:
    site = tmp_path / "run" / "sites" / "1"
    words = ("rounds=4", "evaluate.every=4")
    with federation(ledger, *words, grid="serial", path=tmp_path / "run", callbacks=(Forget(2, site),)) as (
        built,
        directory,
    ):
        built.run()
        assert any(why == "client 1: state 2.1 is not here" for why in built.strategy.inbox.left_out)
        assert built.strategy.inbox.failures["replies"] == 3  # rounds 3 and 4, and the evaluation
        assert (built.digest, built.digest_missing) == (None, [1])
        assert directory.summary(built)["cohort_complete"] is False
        assert directory.summary(built)["digest_missing"] == [1]


class Stutter(SerialGrid):
    """Delivers every message twice."""

    repeated = 0

    def exchange(self, groups):
        for group in groups:
            for message in group:
                (first,) = super().exchange([[message]])
                (second,) = super().exchange([[message]])
                if message.metadata.message_type.startswith("train"):
                    assert as_bytes(first) == as_bytes(second)
                    self.repeated += 1
                yield second


def as_bytes(reply: Message) -> dict:
    """Everything a reply says, seconds included, so that a second computation would show."""
    out: dict = {}
    for name, value in reply.content.items():
        if isinstance(value, ArrayRecord):
            out[name] = {k: (a.dtype, tuple(a.shape), a.data) for k, a in value.items()}
        else:
            out[name] = dict(value)
    return out


@pytest.mark.parametrize("name", ["ledger", "fedavg", "fedmd"])
def test_a_repeated_message_gets_the_same_bytes(name: str, ledger: str, monkeypatch) -> None:
    monkeypatch.setattr("tests.federations.SerialGrid", Stutter)
    with federation(name, grid="serial") as (built, _):
        built.run()
        assert built.grid.repeated == 6
    monkeypatch.undo()
    enter(monkeypatch)
    assert built.digest == play(name).digest


# --- phases -----------------------------------------------------------------------------------------------


class TwoPhaseClient(LedgerClient):
    def ask(self):
        self.state["asked"] = self.state.get("asked", 0) + 1
        self.state["total"] = self.state.get("total", torch.zeros(1, dtype=torch.float64)) + self.round
        return {"question": {"q": torch.tensor([float(self.state["asked"])])}}


class TwoPhase(Ledger):
    """A round of two phases, and a set-up."""

    setup = ("ask",)
    records_ask = {"question": None}

    def phases(self, round):
        return ("ask", "train")

    def fuse_ask(self, shares) -> None:
        for share in shares:
            key = f"asked {share.client}"
            self.state[key] = self.state.get(key, 0) + 1


class CrashIn(Callback):
    """Lets a round's first phases pass, then ends the process' work."""

    def __init__(self, after: int, phases: int) -> None:
        self.after, self.phases = after, phases

    def round(self, federation) -> None:
        if federation.done == self.after:
            for phase in federation.strategy.phases(self.after + 1)[: self.phases]:
                federation.play(self.after + 1, phase)
            raise KeyboardInterrupt


@pytest.mark.parametrize("grid", ["inline", "serial"])
@pytest.mark.parametrize("phases", [1, 2])
def test_a_crash_between_two_phases_is_undone(monkeypatch, tmp_path: Path, phases: int, grid: str) -> None:
    name = enter(monkeypatch, TwoPhase, TwoPhaseClient)
    whole = play(name, "rounds=3")
    where = tmp_path / "run"
    crash = (CrashIn(1, phases),)
    with (
        federation(name, "rounds=3", path=where, grid=grid, callbacks=crash) as (built, _),
        pytest.raises(KeyboardInterrupt),
    ):
        built.run()
    resumed = play(name, "rounds=3", path=where, grid=grid)
    assert resumed.digest == whole.digest
    assert resumed.totals == whole.totals
    assert resumed.strategy.state["asked 0"] == 4  # the set-up's and three rounds'


# --- halves that fail -------------------------------------------------------------------------------------


class Moody(LedgerClient):
    """Fails as the test says: {(round, client): exception}; once each, or always."""

    moods: dict = {}
    once = False

    def fit(self):
        error = self.moods.get((self.round, self.client))
        if error is not None:
            self.state["total"] = torch.full((1,), 1e9, dtype=torch.float64)  # must not survive
            if self.once:
                del self.moods[self.round, self.client]
            raise error
        return super().fit()


def test_a_client_that_raises_is_left_out_and_named(monkeypatch, tmp_path: Path) -> None:
    name = enter(monkeypatch, Ledger, Moody)
    monkeypatch.setattr(Moody, "moods", {(2, 1): ValueError("boom\nbang")})
    said: list[list[str]] = []

    class Listen(Callback):
        def round(self, federation) -> None:
            said.append(list(federation.strategy.inbox.left_out))

    with federation(name, "rounds=3", "evaluate.every=3", callbacks=(Listen(),)) as (built, directory):
        built.run()
        assert said[1] == [
            why for why in said[1] if why.startswith("client 1: ValueError: boom bang (fit, test_loop.py:")
        ]
        assert said[0] == []
        summary = directory.summary(built)
        assert summary["failures"] == {"replies": 1, "rejected": 0, "retried": 0}
        assert summary["cohort_complete"] is False
        assert sorted(built.strategy.state["books"]) == ["0", "1", "2"]
        assert built.strategy.outbox.tags == {0: "3.1", 1: "3.1", 2: "3.1"}
        for client in range(3):
            total = directory.clients.load(client, "3.1")["total"]
            assert torch.equal(total, built.strategy.state["books"][str(client)])


def test_a_retry_that_succeeds_changes_nothing(monkeypatch) -> None:
    name = enter(monkeypatch, Ledger, Moody)
    there = play(name)
    monkeypatch.setattr(Moody, "moods", {(1, 0): OSError("net"), (2, 2): RuntimeError("gpu")})
    monkeypatch.setattr(Moody, "once", True)
    with federation(name) as (built, _):
        built.grid.node.retries = 2
        built.run()
        assert built.digest == there.digest
        assert built.strategy.inbox.failures == {"replies": 0, "rejected": 0, "retried": 2}
        assert not built.strategy.inbox.ever_left_out


def test_if_every_client_fails_the_run_stops(monkeypatch, tmp_path: Path) -> None:
    name = enter(monkeypatch, Ledger, Moody)
    whole = play(name, "rounds=3")
    monkeypatch.setattr(Moody, "moods", {(2, c): ValueError("boom") for c in range(3)})
    where = tmp_path / "run"
    with federation(name, "rounds=3", path=where) as (built, _), pytest.raises(WorldError) as caught:
        built.run()
    assert str(caught.value).startswith("round 2, train: no client succeeded: client 0: ValueError: boom (fit, ")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(Moody, "moods", {})
    assert play(name, "rounds=3", path=where).digest == whole.digest


def test_a_fuse_that_raises_stops_the_run_in_words(monkeypatch, tmp_path: Path) -> None:
    class Broken(Ledger):
        healed = False

        def fuse(self, shares) -> None:
            if self.round == 2 and not self.healed:
                raise ZeroDivisionError("no\nshares")
            super().fuse(shares)

    name = enter(monkeypatch, Broken)
    where = tmp_path / "run"
    with federation(name, path=where) as (built, _), pytest.raises(WorldError) as caught:
        built.run()
    assert str(caught.value).startswith(
        "round 2, fuse of ledger failed: ZeroDivisionError: no shares (fuse, test_loop.py:"
    )
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    monkeypatch.setattr(Broken, "healed", True)
    assert play(name, path=where).digest == play(enter(monkeypatch)).digest


def test_an_evaluation_that_fails_leaves_the_digest_open(monkeypatch) -> None:
    class Blind(LedgerClient):
        def evaluate(self):
            if self.client == 1:
                raise ValueError("no eyes")
            return super().evaluate()

    name = enter(monkeypatch, Ledger, Blind)
    with federation(name) as (built, directory):
        built.run()
        assert (built.digest, built.digest_missing) == (None, [1])
        assert directory.summary(built)["digest"] is None
        assert directory.summary(built)["failures"]["replies"] == 2


# --- replies that lie -------------------------------------------------------------------------------------


def config(reply: Message, **entries) -> dict:
    return {"config": ConfigRecord({**dict(reply.content["config"]), **entries})}


def metrics(reply: Message, **entries) -> dict:
    return {"metrics": MetricRecord({**dict(reply.content["metrics"]), **entries})}


POISON = {"w": torch.full((3,), float("nan"))}
LIES = {
    "no config": lambda r: {"config": ArrayRecord()},
    "no metrics": lambda r: {"metrics": ConfigRecord()},
    "negative count": lambda r: metrics(r, **{"num-examples": -5}),
    "too large a count": lambda r: metrics(r, **{"num-examples": 2.0**53}),
    "endless count": lambda r: metrics(r, **{"num-examples": float("inf")}),
    "no count": lambda r: metrics(r, **{"num-examples": float("nan")}),
    "listed count": lambda r: metrics(r, **{"num-examples": [1, 2]}),
    "listed seconds": lambda r: metrics(r, seconds=[1.0]),
    "not a number": lambda r: metrics(r, lie=float("nan")),
    "extra record": lambda r: {"extra": record({"w": torch.zeros(1)})},
    "a group's sum": lambda r: {
        **config(r, **{"summed.record": ["model"], "summed.bytes": [4], "weight:model": 1e9, "dtypes:model": "{}"}),
        "arrays": ConfigRecord(),
        "sum:model": record(POISON),
    },
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_rejected_and_counted(lie: str) -> None:
    """Over a network, client 1 lies in round 2: it is left out, nothing breaks, nothing of it is averaged in."""
    with federation("fedavg", grid="serial") as (built, _):
        intercept(built, lambda reply: answer(reply, **LIES[lie](reply)), kind="train", round=2, client=1)
        built.run()
        assert built.strategy.inbox.failures["rejected"] == 1
        assert built.strategy.outbox.tags[1] == built.strategy.outbox.tags[0] == "0"  # stateless
        left = play("fedavg", grid="serial", drop=losing((2, 1)))
        assert built.strategy.sha() == left.strategy.sha()


@pytest.mark.parametrize(
    "lie",
    [
        lambda r: metrics(r, **{"personal/accuracy": [0.1, 0.2]}),
        lambda r: metrics(r, **{"personal/accuracy": float("nan")}),
        lambda r: config(r, retried=-3),
        lambda r: config(r, retried="many"),
        lambda r: config(r, **{"summed.record": ["model"]}),
    ],
)
def test_strange_evaluations_do_no_harm(lie) -> None:
    with federation("fedavg", grid="serial") as (built, _):
        intercept(built, lambda reply: answer(reply, **lie(reply)), kind="evaluate", client=1)
        built.run()
        assert 0 <= built.headline["accuracy/personal"] <= 1
        assert built.strategy.inbox.failures["retried"] == 0


def test_a_second_reply_and_a_stranger_are_rejected() -> None:
    with federation("fedavg") as (built, _):
        stranger = Message(RecordDict(), dst_node_id=99, message_type="train")
        intercept(built, lambda r: [r, r, Message(r.content, reply_to=stranger)], kind="train", client=1)
        built.run()
        assert built.strategy.inbox.failures == {"replies": 0, "rejected": 4, "retried": 0}
        assert built.digest == play("fedavg").digest


@pytest.mark.parametrize("name", ["fedavg", "knfu"])
def test_replies_in_any_order_give_the_same_bits(name: str) -> None:
    """A grid of Flower's returns a list, first come first served."""
    there = play(name, "clients=10", "participation=0.9")
    with federation(name, "clients=10", "participation=0.9") as (built, _):
        intercept(built, order=lambda replies: replies[1::2] + replies[::2][::-1])
        built.run()
        assert built.digest == there.digest
        assert built.strategy.outbox.traffic.summary() == there.totals


@pytest.mark.parametrize("verb", ["receive", "fit", "evaluate"])
@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ("inline", ("runtime.vectorize='off'",)),
        ("inline", ("runtime.vectorize=auto",)),
        ("inline", ("clock=devices",)),
        ("inline", ("clock=devices", "schedule=fedbuff", "schedule.buffer=3")),
        ("serial", ()),
    ],
)
def test_who_writes_to_what_all_are_handed_is_named_and_does_no_harm(grid, words, verb, monkeypatch) -> None:
    class Writes(FusionClient):
        def receive(self, knowledge):
            arrays = self.arrays = knowledge["model"].arrays
            seen.append((self.client, self.phase, float(sum(value.double().sum() for value in arrays.values()))))
            self.load(arrays)
            self.write("receive")

        def write(self, where):
            if where == verb and self.client == 1:
                for value in self.arrays.values():
                    value.mul_(0.5)
                raise ValueError("and then it fails")

        def fit(self):
            self.write("fit")
            return self.train()

        def evaluate(self):
            self.write("evaluate")
            return super().evaluate()

    class Constant(FusionStrategy):
        staleness = "updates"

        def fuse(self, shares):
            self.publish("model", {name: value.clone() for name, value in self.model.items()})

    seen: list[tuple[int, str, float]] = []
    name, told = enter(monkeypatch, Constant, Writes, NoHyper, "writes"), "Writes wrote to knowledge['model'] in place"
    if grid == "serial":
        played = play(name, grid=grid)
        assert played.strategy.inbox.failures["replies"] > 0
        assert all(line.startswith(f"client 1: {told}") for line in played.strategy.inbox.left_out)
        assert {total for _, _, total in seen} == {seen[0][2]}
        return
    with pytest.raises(
        WorldError, match=r"^round [12], client 1: Writes wrote to knowledge\['model'\] in place, .*first$"
    ):
        play(name, *words, grid=grid)
    assert len([client for client, phase, _ in seen if client == 1]) <= 2  # it is not tried again


@pytest.mark.parametrize(
    ("grid", "words", "summed"),
    [
        ("inline", (), False),
        ("inline", (), True),
        ("inline", ("runtime.vectorize='off'",), False),
        ("serial", (), False),
        ("inline", ("clock=devices",), False),
        ("inline", ("clock=devices", "schedule=fedbuff", "schedule.buffer=10"), False),
    ],
)
def test_a_fuse_that_draws_between_shares_is_not_disturbed_by_clients(grid, words, summed, monkeypatch) -> None:
    """Clients may play in its process, and seed the global generators before each verb; elsewhere they do not."""

    def draw() -> list[float]:
        return [torch.rand(1).item(), random.random(), float(np.random.rand())]

    class Draws(FusionClient):
        def fit(self):
            draw()
            return self.train()

    class Noisy(FusionStrategy):
        staleness = "updates"
        sums = {"model": None} if summed else {}

        def fuse(self, shares):
            drawn[self.round] = [draw() for share in shares]
            self.publish("model", {name: value.clone() for name, value in self.model.items()})

    drawn: dict[int, list[list[float]]] = {}
    name = enter(monkeypatch, Noisy, Draws, NoHyper, "noisy")
    play(name, "clients=10", *words, grid=grid)
    assert sorted(drawn) == [1, 2]
    for round, found in drawn.items():
        seed_everything(0, "fuse", "train", round)
        assert found == [draw() for _ in range(10)]


@pytest.mark.parametrize("kind", [int, np.int64, torch.tensor, lambda client: np.array(client, dtype=np.int32)])
def test_a_client_is_published_for_by_any_whole_number(kind, monkeypatch) -> None:
    class Advises(Ledger):
        def fuse(self, shares):
            for share in shares:
                self.publish("advice", {"v": torch.full((1,), float(share.client))}, to=kind(share.client))
                assert self.published("advice", kind(share.client)) is self.published("advice", share.client)

    played = play(enter(monkeypatch, Advises), "evaluate.every=9")
    assert [played.strategy.published("advice", client)["v"].item() for client in range(3)] == [0, 1, 2]
    assert {address[1] for address in played.strategy.board.items} == {"", "client:0", "client:1", "client:2"}


@pytest.mark.parametrize("to", [3, -1, np.int64(3), 0.0, torch.tensor([0, 1]), "client:0", "nosuch", "", [0]])
def test_who_publishes_for_nobody_is_told_whom_there_is(to, monkeypatch) -> None:
    class Astray(Ledger):
        def fuse(self, shares):
            self.publish("advice", {"v": torch.ones(1)}, to=to)

    with pytest.raises(UserError) as told:
        play(enter(monkeypatch, Astray))
    assert str(told.value).startswith("ledger publishes 'advice' to=")
    assert str(told.value).endswith(
        "nobody gets that; allowed are clients 0 to 2, architectures (mlp_small) and None, everybody"
    )
    assert "\n" not in str(told.value)


def test_knowledge_published_while_replies_stream_is_not_taken_for_sent(monkeypatch, tmp_path: Path) -> None:
    """What `fuse` publishes after the first share is not what the second client was sent."""

    class Eager(Ledger):
        def fuse(self, shares) -> None:
            for i, share in enumerate(shares):
                if i == 0:
                    self.publish("base", {"a": torch.ones(6)})
                self.publish("advice", {"v": share.records["entry"]["amount"].float()}, to=share.client)

    name = enter(monkeypatch, Eager)
    there = play(name, "rounds=3")
    serial = play(name, "rounds=3", grid="serial")
    assert serial.digest == there.digest
    assert serial.totals["resent_bytes"] == 0
    assert serial.totals == there.totals


# --- what is declared -------------------------------------------------------------------------------------


def test_a_cohort_may_only_grow(monkeypatch) -> None:
    class Grows(Ledger):
        def cohort(self, round, sampled):
            return [*sampled, 0]

    class Shrinks(Ledger):
        def cohort(self, round, sampled):
            return sampled[1:]

    with federation(enter(monkeypatch, Grows), "participation=0.34") as (built, _):
        assert all(0 in built.strategy.plan(r) for r in range(1, 9))
    with (
        federation(enter(monkeypatch, Shrinks)) as (built, _),
        pytest.raises(UserError, match=r"client 0 out.*only add"),
    ):
        built.run()


@pytest.mark.parametrize("named", [3, -1, "a", 0.5, [0], np.int64(2)], ids=repr)
def test_a_cohort_names_clients_that_there_are(named, monkeypatch) -> None:
    class Strays(Ledger):
        def cohort(self, round, sampled):
            return [*sampled, named]

    with federation(enter(monkeypatch, Strays), "participation=0.34") as (built, _):
        if named == 2:
            assert all(built.strategy.plan(r)[-1] == 2 for r in range(1, 9))
            return
        with pytest.raises(UserError) as told:
            built.run()
    assert str(told.value).endswith(f"cohort() of round 1 names {named!r}; allowed are clients 0 to 2")


def test_what_was_never_published_is_named(monkeypatch) -> None:
    with federation(enter(monkeypatch, Ledger)) as (built, _):
        built.strategy.ensure_begun()
        with pytest.raises(KeyError, match="ledger: nothing of topic 'bsae' was published to=None; published: base"):
            built.strategy.published("bsae")


def test_cohorts_do_not_depend_on_the_strategy() -> None:
    plans = []
    for name in ("fedavg", "knfu", "local"):
        with federation(name, "clients=10", "participation=0.25") as (built, _):
            plans.append([built.strategy.plan(r) for r in range(1, 20)])
    assert plans[0] == plans[1] == plans[2]
    assert {len(p) for p in plans[0]} == {3}  # 2.5, halves up
    assert len({tuple(p) for p in plans[0]}) > 10


def test_several_phases_are_refused_under_flowers_own_loop(monkeypatch) -> None:
    with (
        federation(enter(monkeypatch, TwoPhase, TwoPhaseClient)) as (built, _),
        pytest.raises(ValueError, match="has phases"),
    ):
        built.strategy.start(built.grid, ArrayRecord())


def test_early_stop_looks_at_validation_only() -> None:
    from fedfuse.core.callbacks import EarlyStop

    with federation("local", "rounds=6", "stop.patience=1", "train.lr=1e-9") as (built, directory):
        built.callbacks.insert(1, EarlyStop(1))
        built.run()
        assert built.done < 6
        assert "validation" in built.stop
        assert built.digest is not None
        assert directory.summary(built)["rounds_done"] == built.done


class Silent(FusionStrategy):
    topics = {}
    records = {}

    def fuse(self, shares) -> None:
        pass


def test_shares_nobody_looked_at_are_accepted(monkeypatch) -> None:
    class Quiet(FusionClient):
        def share(self):
            return {}

    played = play(enter(monkeypatch, Silent, Quiet, NoHyper, "silent"))
    assert played.strategy.inbox.failures["replies"] == 0
    assert played.totals["up_bytes"] == 0


def test_hyperparameters_reach_the_other_half(monkeypatch) -> None:
    seen = set()

    class Looks(LedgerClient):
        def fit(self):
            seen.add(self.hyper.every)
            return super().fit()

    play(enter(monkeypatch, Ledger, Looks, LedgerHyper), "strategy.every=7", grid="serial")
    assert seen == {7}


# --- what a phase says, and what it says back ---------------------------------------------------------------


def test_a_phase_asks_in_its_own_words() -> None:
    built = server("fedavg", "clients=10")
    built.round, built.place = 5, 2
    messages = built.messages([9, *range(9)], "train", {})
    asked = built.outbox.request
    assert (asked.kind, asked.round, asked.phase, asked.label, asked.tag) == ("train", 5, "train", "train", "5.3")
    assert [built.outbox.groups[client] for client in range(10)] == [0] * 8 + [1] * 2
    assert [message.content["config"]["client"] for message in messages] == list(range(10))
    assert {message.metadata.message_type for message in messages} == {"train"}
    built.setup, built.phase = ("prepare",), "prepare"
    (message,) = built.messages([3], "train", {})
    assert (built.outbox.request.label, message.metadata.message_type) == ("setup", "train.prepare")
    assert message.metadata.dst_node_id == 4
    (message,) = built.messages([3], "evaluate", {})
    asked = built.outbox.request
    assert (asked.label, asked.tag, message.metadata.message_type) == ("evaluate", "", "evaluate")
    assert built.outbox.awaited == {3}


def test_a_matrix_is_logged_row_by_row() -> None:
    built = server("knfu")
    built.logged = []
    built.log_matrix("w", [4, 7], torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert built.logged == [
        ("matrix", -1, "train", f"w/{i}/{j}", value)
        for (i, j), value in zip(((4, 4), (4, 7), (7, 4), (7, 7)), (1.0, 2.0, 3.0, 4.0), strict=True)
    ]


def test_flowers_hooks_return_the_model_and_the_mean_accuracy() -> None:
    with federation("fedavg", "rounds=1", "partition=dirichlet", "data.personal_test=0.4") as (built, _):
        strategy, found = built.strategy, []
        train, evaluate = strategy.aggregate_train, strategy.aggregate_evaluate
        strategy.aggregate_train = lambda *args: found.append(train(*args))
        strategy.aggregate_evaluate = lambda *args: found.append(evaluate(*args))
        built.run()
    (model, empty), evaluated = found
    assert {key: value.tolist() for key, value in tensors(model).items()} == {
        key: value.tolist() for key, value in strategy.model.items()
    }
    assert len(empty) == 0
    scores = [scored["personal/accuracy"] for scored in strategy.inbox.scored.values()]
    assert len(set(scores)) > 1
    assert evaluated["accuracy"] == sum(scores) / 3


def test_what_clients_say_of_themselves_is_kept_and_counted() -> None:
    """Seconds are timing, the count is a weight, lists are nobody's figure; a second try is counted if it can be."""

    def told(reply: Message) -> Message:
        said = {"extra": 2.5, "list": [1.0, 2.0], "seconds": 9.0}
        return answer(reply, **metrics(reply, **said), **config(reply, retried=3))

    with federation("fedavg", "rounds=2", grid="serial") as (built, _):
        strategy, logged = built.strategy, []
        log = strategy.log
        strategy.log = lambda *args, **words: (logged.append((args, words)), log(*args, **words))[1]
        intercept(built, told, kind="train", client=1)
        intercept(built, lambda r: answer(r, **metrics(r, loss=float("nan"))), kind="train", client=2, round=1)
        intercept(built, lambda r: answer(r, **config(r, retried=100)), kind="train", client=0)
        built.run()
        assert strategy.inbox.failures == {"replies": 0, "rejected": 0, "retried": 6}
    of_one = {args[0]: args[1] for args, words in logged if words.get("client") == 1}
    assert of_one["extra"] == 2.5
    assert not {"list", "seconds", "num-examples"} & of_one.keys()
    lost = [(args, words["client"]) for args, words in logged if args[0] == "loss/undefined"]
    assert lost == [(("loss/undefined", 1.0), 2)]


def test_a_share_counts_for_one_unless_it_says_otherwise() -> None:
    share = Share(3, {}, {"num-examples": 7.0})
    assert (share.examples, share.group, share.weight) == (7, 0, 1.0)
    with pytest.raises(FrozenInstanceError):
        share.weight = 2.0


def test_what_went_wrong_is_told_apart_and_from_what_flower_says() -> None:
    """The numbers are no contract: sites and server are of one version (docs/deployment.md). They are ours alone."""
    ours = {STALE, REFUSED, FAILED, INVALID, FULL}
    flowers = {code for name, code in vars(ErrorCode).items() if not name.startswith("_")}
    assert len(ours) == 5
    assert not ours & flowers
    assert flowers


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ((1, 2), "state 'n' is a tuple"),
        ({1, 2}, "state 'n' is a set"),
        ({1: torch.ones(1)}, "key 1 below 'n/' is a int; keys are text"),
        (np.int64(3), "state 'n' is a int64"),
        (np.ones(3), "state 'n' is a ndarray"),
        ([torch.ones(1)], "state 'n' is a list holding a Tensor"),
        (torch.optim.SGD([torch.nn.Parameter(torch.ones(2))]).state_dict(), "list holding a dict"),
    ],
    ids=["tuple", "set", "key", "number", "array", "list", "optimizer"],
)
@pytest.mark.parametrize("verb", ["begin", "fuse"])
def test_server_state_that_cannot_be_kept_is_told(
    verb: str, value: Any, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Keeping(Ledger):
        """Keeps what no checkpoint can."""

    def keep(self: Ledger, *given: Any) -> None:
        getattr(Ledger, verb)(self, *given)
        self.state["n"] = value

    monkeypatch.setattr(Keeping, verb, keep)
    enter(monkeypatch, Keeping)
    with pytest.raises(UserError, match=f"strategy=ledger, at the server: .*{words}"):
        play("ledger", path=tmp_path / "run")


def test_a_phase_that_takes_long_says_how_far_it_is(monkeypatch) -> None:
    """Without a pace callbacks hear of each answer, in the phase that it belongs to; by default, of none here."""

    class Listens(Callback):
        def __init__(self):
            self.told = []

        def heard(self, federation, answers, asked):
            self.told.append((federation.strategy.outbox.request.label, answers, asked))

    quiet, often, console = Listens(), Listens(), Console(file=io.StringIO(), width=200)
    play("fedavg", "rounds=1", callbacks=(quiet,))
    monkeypatch.setattr(loop, "PACE", -1.0)
    progress = Progress()
    progress.console = console
    played = play("fedavg", "rounds=1", callbacks=(often, progress))
    assert quiet.told == []
    assert often.told == [(phase, k, 3) for phase in ("train", "evaluate") for k in (1, 2, 3)]
    lines = [line.split(" after ")[0] for line in console.file.getvalue().splitlines() if " after " in line]
    assert lines == [f"  {phase}: {k} of 3 clients" for phase in ("train", "evaluate") for k in (1, 2, 3)]
    assert played.digest == play("fedavg", "rounds=1").digest
