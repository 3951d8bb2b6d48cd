"""Whom a Ray grid hands what: groups that are summed stay whole, all else is dealt client by client."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedfuse.compat.flower_identity import claim_identity
from fedfuse.engines.grid import grouped
from fedfuse.engines.ray import LARGE, LEVEL, WINDOW, Member, RayGrid
from fedfuse.wire.sums import GROUP
from tests import federations


class Actor:
    """A worker that notes the clients of each call and answers at once; each takes `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.calls: list[list[list[int]]] = []
        self.seconds, self.work = seconds, SimpleNamespace(remote=self.push)

    def push(self, task: Any) -> Any:
        self.calls.append([[node - 1 for node, _, _ in group] for group in task[1]])
        took = self.seconds * sum(map(len, self.calls[-1]))
        return [[({}, []) for _ in group] for group in self.calls[-1]], [], took


def grid_of(monkeypatch: pytest.MonkeyPatch, workers: int, seconds: float = 0.0, sizes: Any = None) -> RayGrid:
    monkeypatch.setattr("fedfuse.engines.ray.ray.get", lambda answers: answers)
    claim_identity()
    grid: Any = RayGrid.__new__(RayGrid)
    grid.crew = [Member(Actor(seconds)) for _ in range(workers)]
    config = SimpleNamespace(runtime=SimpleNamespace(memory=None))
    grid._scenario = SimpleNamespace(config=config, examples=lambda client: sizes[client] if sizes else 1)
    grid.seen, grid.window, grid.retries, grid.limit = {}, WINDOW, 2, None
    grid.prepare, grid.states, grid.needs = lambda member: None, lambda member, bare: {}, lambda message: {}
    return grid


def play(grid: RayGrid, clients: int, sums: dict[str, str]) -> list[list[list[list[int]]]]:
    """One phase; each worker's calls."""
    messages = []
    for client in range(clients):
        config = ConfigRecord({"client": client, "group": client // GROUP})
        content = RecordDict({"config": config, "run": ConfigRecord({"sums": json.dumps(sums)})})
        messages.append(Message(content, dst_node_id=client + 1, message_type="train"))
    for member in grid.crew:
        member.actor.calls.clear()
    replies = list(grid.exchange(grouped(messages)))
    assert [reply.metadata.src_node_id - 1 for reply in replies] == list(range(clients))
    return [member.actor.calls for member in grid.crew]


def test_what_is_summed_is_dealt_group_by_group(monkeypatch) -> None:
    calls = play(grid_of(monkeypatch, 2), 10, {"model": "num-examples"})
    assert calls == [[[list(range(8))]], [[[8, 9]]]]
    grid = grid_of(monkeypatch, 2)
    for known, together in ((None, [1, 1]), ((0.0, 1), [2]), ((0.0, LARGE), [1, 1]), ((0.0, LARGE - 1), [2])):
        grid.seen = {} if known is None else {"train": known}
        assert [list(map(len, calls)) for calls in play(grid, 32, {"model": "num-examples"})] == [together] * 2


def test_what_is_not_summed_is_dealt_client_by_client(monkeypatch) -> None:
    calls = play(grid_of(monkeypatch, 2), 10, {})
    assert calls == [[[[0], [2], [4], [6], [8]]], [[[1], [3], [5], [7], [9]]]]
    sizes = [60, 1, 1, 1, 10, 10, 10, 9]
    one, other = play(grid_of(monkeypatch, 2, sizes=sizes), 8, {})
    assert one == [[[0]]]
    assert sorted(client for call in other for (client,) in call) == [1, 2, 3, 4, 5, 6, 7]


def test_of_many_clients_groups_are_dealt_whole(monkeypatch) -> None:
    many = play(grid_of(monkeypatch, 2), GROUP * LEVEL * 2, {})
    assert {len(group) for calls in many for call in calls for group in call} == {GROUP}
    fewer = play(grid_of(monkeypatch, 2), GROUP * LEVEL * 2 - GROUP, {})
    assert {len(group) for calls in fewer for call in calls for group in call} == {1}


def test_calls_are_of_like_size_and_last_a_while(monkeypatch) -> None:
    grid = grid_of(monkeypatch, 2, seconds=0.01)
    assert [list(map(len, calls)) for calls in play(grid, 40, {})] == [[6, 7, 7], [6, 7, 7]]  # until more is known
    assert [list(map(len, calls)) for calls in play(grid, 44, {})] == [[11, 11], [11, 11]]  # of at most 0.2 s
    grid.seen["train"] = 1.0, 1
    assert [list(map(len, calls)) for calls in play(grid, 32, {})] == [[8, 8], [8, 8]]  # so that some may sit abreast


def test_each_record_of_flowers_is_a_version_of_its_own(monkeypatch) -> None:
    """They were told apart by `id`, which Python gives again: who slept a round kept the arrays of the one before."""
    grid = grid_of(monkeypatch, 1)
    grid._foreign = None
    asked = (
        {"arrays": ArrayRecord({"w": Array(np.full(3, i, np.float32))}), "config": ConfigRecord()} for i in range(9)
    )
    needs = [RayGrid.needs(grid, Message(RecordDict(content), 1, "train"))["model", ""] for content in asked]
    assert len({version for version, _ in needs}) == 9
    assert [(arrays["w"][0], inner == version) for version, (arrays, inner) in needs] == [(i, True) for i in range(9)]
    same = ArrayRecord({"w": Array(np.zeros(3))})
    assert grid._broadcast(same) is grid._broadcast(same)  # one copy, whoever asks


def test_nothing_is_pushed_behind_a_call_on_the_line(monkeypatch) -> None:
    """Where a window lets a phase in bit by bit, what follows waits until the line's reply is here."""
    ways: list[bool] = []

    class Lined(Member):
        out: Any = None

        def ask(self, task: Any, brief: bool) -> Any:
            assert self.out is None
            ways.append(brief)
            found = self.actor.push(task)
            if brief:
                self.out = found
            return None if brief else found

        def answer(self, call: Any) -> Any:
            found, self.out = self.out if call.by_line else call.reference, None
            return found

    grid = grid_of(monkeypatch, 2, sizes=[1, 1, 1, 5, 1, 1])
    grid.crew = [Lined(member.actor) for member in grid.crew]
    grid.window, grid.seen = 1, {"train": (0.0, 1)}  # four clients at a time
    assert play(grid, 6, {}) == [[[[3]], [[4]]], [[[0], [1], [2]], [[5]]]]
    assert ways == [True] * 4


def test_workers_do_not_wait_for_the_cores_of_a_run_before(ray_session) -> None:
    """Ray was started for two: a third waited for ever."""
    alone = federations.play("fedavg")
    assert federations.play("fedavg", grid="ray", workers=3).digest == alone.digest
