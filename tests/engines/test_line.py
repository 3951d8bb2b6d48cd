"""The line between a driver and a worker on its machine: what travels by it, what does not, and what its end means."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from itertools import pairwise
from multiprocessing import Pipe
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedfuse.engines import ray as engine
from fedfuse.engines import worker as engine_worker
from fedfuse.engines.line import receive, send
from tests.engines.processes import workers
from tests.federations import federation, play

WIDE = ("clients=10", "data.limit=480", "rounds=3")


def carried(value: Any) -> Any:
    """A value sent down one end of a line and taken at the other."""
    here, there = Pipe()
    with here, there:
        sender = threading.Thread(target=send, args=(here, value))
        sender.start()
        found = receive(there)
        sender.join()
        assert not there.poll()  # nothing is left for the next to stumble over
    return found


def test_a_value_arrives_as_it_was() -> None:
    grid = np.arange(12.0).reshape(3, 4)
    arrays = [
        grid, grid.T, np.asfortranarray(grid), grid[:, ::2], grid[::-1], np.zeros((0, 3), np.float32), np.array(7),
        np.arange(300_000, dtype=np.int64), np.array([True, False]), np.float16([1, -0.0, np.nan]),
    ]  # fmt: skip
    value = ({"a": 1, "b": [2.5, "c", None]}, arrays, {("model", ""): (3, {"w": grid})}, [], False)
    found = carried(value)
    assert found[0] == value[0]
    assert found[3:] == ([], False)
    assert np.array_equal(found[2]["model", ""][1]["w"], grid)
    for sent, here in zip(arrays, found[1], strict=True):
        assert (here.dtype, here.shape) == (sent.dtype, sent.shape)
        assert here.tobytes() == sent.tobytes()
    assert carried(None) is None


def test_arrays_cannot_be_written_to_as_with_ray() -> None:
    with pytest.raises(ValueError, match="read-only"):
        carried(np.zeros(3))[0] = 1.0


@pytest.fixture
def ways(monkeypatch) -> list[str]:
    """How each call travelled; one that goes by the line is the only one its worker owes."""
    found: list[str] = []
    ask = engine.Member.ask

    def noted(member: engine.Member, task: Any, brief: bool) -> Any:
        assert not any(call.by_line for call in member.calls)  # who is still writing a reply does not read
        reference = ask(member, task, brief)
        found.append("line" if reference is None else "ray")
        assert reference is not None or len(member.calls) == 1
        return reference

    monkeypatch.setattr(engine.Member, "ask", noted)
    return found


def test_short_calls_go_by_the_line_once_it_is_known_that_they_are(ways, ray_session) -> None:
    alone = play("fedavg", *WIDE).digest
    assert play("fedavg", *WIDE, grid="ray").digest == alone
    assert ways[:2] == ["ray", "ray"]  # of two workers, in round 1
    assert set(ways[4:]) == {"line"}  # an evaluation's first was by Ray as well


@pytest.mark.parametrize("limit", ["BRIEF", "SMALL"])
def test_what_is_large_goes_by_ray(limit, ways, monkeypatch, ray_session) -> None:
    """A reply that may be large, or knowledge that lies in the object store."""
    alone = play("fedavg", *WIDE).digest
    monkeypatch.setattr(engine, limit, 0)
    assert play("fedavg", *WIDE, grid="ray").digest == alone
    assert set(ways) == {"ray"}


def test_who_hung_up_takes_rays_calls_and_is_called_again(ways, monkeypatch, ray_session) -> None:
    alone = play("fedavg", *WIDE, "rounds=6").digest
    with federation("fedavg", *WIDE, "rounds=6", grid="ray") as (built, _):
        carry = built.grid.exchange

        def in_turns(groups):
            monkeypatch.setattr(engine, "BRIEF", 0 if built.done == 3 else 2**21)
            yield from carry(groups)

        built.grid.exchange = in_turns
        built.run()
        assert built.digest == alone
    changes = [b for a, b in pairwise(ways) if a != b]
    assert changes == ["line", "ray", "line"], ways


def test_several_calls_of_one_worker_go_by_ray(ways, monkeypatch, ray_session) -> None:
    alone = play("fedmd", *WIDE).digest
    monkeypatch.setattr(engine, "SHORT", 0.0)
    monkeypatch.setattr(engine, "MOST", 1)
    monkeypatch.setattr(engine, "GROUP", 1)
    monkeypatch.setattr(engine, "LARGE", 2**21)
    assert play("fedmd", *WIDE, grid="ray").digest == alone
    assert ways[:10] == ["ray"] * 10


def test_a_worker_that_dies_between_two_calls_is_replaced(ways, ray_session) -> None:
    alone = play("fedavg", *WIDE, "rounds=5").digest
    with federation("fedavg", *WIDE, "rounds=5", grid="ray") as (built, _):
        carry, killed = built.grid.exchange, []

        def deadly(groups):
            if built.done == 3 and not killed:
                assert ways[-1] == "line"
                killed.append(workers()[0])
                os.kill(killed[0], signal.SIGKILL)
            yield from carry(groups)

        built.grid.exchange = deadly
        built.run()
        assert killed
        assert not built.strategy.inbox.ever_left_out
        assert built.digest == alone


def test_nothing_is_left_of_a_line(ray_session) -> None:
    """Neither an open end nor, once their run is over, a worker that listens to nobody."""
    for _ in range(2):
        with federation("fedavg", *WIDE, grid="ray") as (built, _):
            built.run()
            crew = list(built.grid.crew)
            assert all(member.line is not None for member in crew)
        assert all(member.line is None for member in crew)


def attended(work: Any, hear: bool) -> Any:
    """What comes of a worker that is asked once, by a driver that hears its answer or is gone before."""
    here, there = Pipe()
    attending = SimpleNamespace(listener=SimpleNamespace(accept=lambda: there), work=work)
    with here:
        send(here, "task")
        if hear:
            send(here, None)
        else:
            here.close()
        return engine_worker.Worker.attend(attending), receive(here) if hear else None


def test_what_fails_over_the_work_is_told_and_a_driver_that_is_gone_is_not() -> None:
    assert attended(lambda task: f"{task} done", hear=True) == (None, "task done")
    assert attended(lambda task: np.zeros(10**6), hear=False) == (None, None)

    def refused(task: str) -> None:
        raise ConnectionResetError("the object store is gone")

    with pytest.raises(ConnectionResetError, match="object store"):
        attended(refused, hear=True)


def test_a_worker_that_reads_no_more_holds_nobody_up() -> None:
    """It is stopped, and what was sent fills the line: a goodbye would wait for it."""
    here, there = Pipe()
    os.set_blocking(here.fileno(), False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(here.fileno(), bytes(4096))
    os.set_blocking(here.fileno(), True)
    grid: Any = SimpleNamespace(_start=lambda again: "another")
    member = engine.Member("stopped")
    member.line = here
    engine.RayGrid.replace(grid, member)
    assert (member.actor, member.line, here.closed) == ("another", None, True)
    there.close()
