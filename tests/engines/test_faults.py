"""Workers that die, clients that fail or hang: retried from committed state, to the same bits, or left out by name."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from flwr.app import Message, RecordDict
from ray.exceptions import RayError

from fedfuse.config import registry
from fedfuse.core.client import FusionClient
from fedfuse.engines.ray import WINDOW, Exchange, Member
from fedfuse.errors import WorldError
from tests.engines.processes import workers
from tests.federations import federation, play

WIDE = ("clients=10", "data.limit=480", "rounds=3")


def faulty(base: type[FusionClient], fault: str, folder: Path, who: int = 1) -> type[FusionClient]:
    """A client that has a fault in round 2: `raise`, `exit`, `die` or `hang`; once, or (with `!`) every time."""
    always, kind, marks = fault.endswith("!"), fault.rstrip("!"), str(folder)

    class Faulty(base):  # type: ignore[misc, valid-type]
        def fit(self):
            mark = Path(marks) / f"{self.client}"
            if self.round == 2 and who in (self.client, -1) and (always or not mark.exists()):
                mark.touch()
                if kind == "raise":
                    raise RuntimeError("a nasty\nfault")
                if kind == "exit":
                    sys.exit("a nasty fault")
                if kind == "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                if kind == "hang":
                    time.sleep(600)
            return super().fit()

    return Faulty


@pytest.fixture
def with_fault(monkeypatch, tmp_path):
    def arrange(name: str, fault: str, who: int = 1) -> None:
        entry = registry.entry(name)
        made = faulty(entry.client, fault, tmp_path, who)
        monkeypatch.setitem(registry.registered, name, entry._replace(client=made))

    return arrange


@pytest.fixture(scope="module")
def undisturbed():
    made: dict[str, str] = {}

    def digest(name: str) -> str:
        if name not in made:
            made[name] = play(name, *WIDE).digest
        return made[name]

    return digest


@pytest.mark.parametrize("name", ["fedavg", "knfu"])
@pytest.mark.parametrize("fault", ["raise", "die"])
def test_passing_fault_changes_nothing(name, fault, undisturbed, with_fault, ray_session) -> None:
    expected = undisturbed(name)
    with_fault(name, fault)
    run = play(name, *WIDE, grid="ray")
    assert run.digest == expected
    assert run.strategy.inbox.failures["retried"] >= 1
    assert not run.strategy.inbox.ever_left_out


@pytest.mark.parametrize("fault", ["raise!", "die!"])
def test_lasting_fault_is_left_out_and_named(fault, with_fault, ray_session) -> None:
    with_fault("fedavg", fault)
    with federation("fedavg", *WIDE, grid="ray") as (built, directory):
        left_out: list[str] = []
        accept = built.strategy.inbox.leave_out

        def note(client, reason, code):
            left_out.append(f"{client}: {reason}")
            accept(client, reason, code)

        built.strategy.inbox.leave_out = note
        built.run()
        assert built.done == 3
        assert [line[:3] for line in left_out] == ["1: "], left_out
        assert ("a nasty fault" if fault == "raise!" else "died") in left_out[0]
        summary = directory.summary(built)
        assert summary["cohort_complete"] is False
        assert summary["failures"]["replies"] == 1


@pytest.mark.parametrize("more", [(), ("runtime.vectorize=auto",)])
def test_a_client_that_exits_is_left_out_by_name(more, with_fault) -> None:
    with_fault("fedavg", "exit!")
    with federation("fedavg", "clients=10", "data.limit=480", "rounds=2", *more) as (built, _):
        built.run()
        assert built.strategy.inbox.failures["replies"] == 1
        assert "SystemExit: a nasty fault" in built.strategy.inbox.left_out[0]


def test_a_death_is_not_blamed_on_who_was_done_before(monkeypatch) -> None:
    """A reply may be lost with the worker that dies over the next call, every time: only who kills it is left out."""

    class Actor:
        """A worker that loses all replies that were not fetched yet when it comes to client 1."""

        def __init__(self) -> None:
            self.pending: list[list[int]] = []
            self.work = SimpleNamespace(remote=self.push)

        def push(self, args):
            self.pending.append([node - 1 for group in args[1] for node, _, _ in group])
            return self, len(self.pending) - 1

    def get(reference):
        actor, k = reference
        if any(1 in clients for clients in actor.pending):
            raise RayError("died")
        return [[({}, [])] for _ in actor.pending[k]], [], 1.0

    def replace(member) -> None:
        member.actor = Actor()

    monkeypatch.setattr("fedfuse.engines.ray.ray.get", get)
    monkeypatch.setattr("fedfuse.engines.ray.GROUP", 1)  # clients of a call
    grid = SimpleNamespace(
        crew=[Member(Actor())], _scenario=SimpleNamespace(examples=lambda client: 1), retries=2, limit=None,
        window=WINDOW, seen={}, prepare=lambda member: None, needs=lambda message: {},
        states=lambda member, bare: {}, replace=replace,
    )  # fmt: skip
    groups = [[Message(RecordDict(), dst_node_id=client + 1, message_type="train")] for client in range(4)]
    exchange = Exchange(grid, groups)
    replies = [reply for i in range(4) for reply in exchange.replies(i)]
    assert [reply.has_error() for reply in replies] == [False, True, False, False]
    assert "died 3 times" in replies[1].error.reason
    assert exchange.attempts == {(0, 0): 1, (1, 0): 3}


def test_nobody_succeeds(with_fault, ray_session) -> None:
    with_fault("fedavg", "raise!", who=-1)
    with pytest.raises(WorldError, match="a nasty fault"):
        play("fedavg", *WIDE, grid="ray")


def test_hanging_client(undisturbed, with_fault, ray_session) -> None:
    expected = undisturbed("knfu")
    with_fault("knfu", "hang")
    run = play("knfu", *WIDE, "runtime.client_timeout=6", grid="ray")
    assert run.digest == expected
    assert run.strategy.inbox.failures["retried"] >= 1


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.deploy)])
def test_killed_at_random_moments(seed, ray_session) -> None:
    """Several `kill -9` in one run, whatever the workers are doing."""
    long = (*WIDE, "rounds=12")  # else it may be over before the first kill
    expected, draw, over = play("knfu", *long).digest, random.Random(seed), threading.Event()
    killed = []

    def killer() -> None:
        for _ in range(3):
            if over.wait(draw.uniform(0.0, 0.3)):
                return
            while not (found := workers()):  # they may still be starting
                if over.wait(0.02):
                    return
            killed.append(draw.choice(found))
            os.kill(killed[-1], signal.SIGKILL)

    with federation("knfu", *long, grid="ray") as (built, _):
        thread = threading.Thread(target=killer)
        thread.start()
        try:
            built.run()
        finally:
            over.set()
            thread.join()
        assert killed
        assert not built.strategy.inbox.ever_left_out, built.strategy.inbox.left_out
        assert built.digest == expected


def test_broken_off_run_leaves_no_work_behind(with_fault, ray_session) -> None:
    """After Ctrl-C in mid-phase the next run of this process gets workers that are free."""
    with federation("fedavg", *WIDE, grid="ray") as (built, _):
        carry = built.grid.exchange

        def broken(groups):
            for i, reply in enumerate(carry(groups)):
                if i == 3:
                    raise KeyboardInterrupt
                yield reply

        built.grid.exchange = broken
        with pytest.raises(KeyboardInterrupt):
            built.run()
    started = time.monotonic()
    play("fedavg", *WIDE, grid="ray")
    assert time.monotonic() - started < 120
