"""`runtime.vectorize=auto`: the same digests and rows as clients in turns, on every grid and through every fault."""

from __future__ import annotations

import random
import sys
import time

import numpy as np
import pytest
import torch

from fedfuse.core import abreast, abreast_room, abreast_trial
from fedfuse.core.client import FusionClient
from tests.contract.test_matrix import Crash
from tests.federations import federation, intercept, play

AUTO = "runtime.vectorize=auto"
UNEQUAL = ("partition=dirichlet", "clients=9", "train.batch_size=7", "rounds=2")


@pytest.fixture(autouse=True)
def untried(monkeypatch):
    """Stacks are made at once, whether they pay or not."""
    monkeypatch.setattr(abreast_trial, "TRIES", 0)


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "scaffold", "knfu", "ditto", "fed_sb", "fedex_lora"])
def test_digests_are_those_of_clients_in_turns(name, made):
    alone, together = play(name, *UNEQUAL), play(name, *UNEQUAL, AUTO)
    assert alone.digest == together.digest
    assert alone.steps == together.steps
    assert sum(made) >= 2 * 8
    assert max(made) > 2
    assert play(name, *UNEQUAL, AUTO, reverse=True).digest == alone.digest


@pytest.mark.parametrize(
    ("word", "stacks"),
    [
        ("train.max_steps=3", True),
        ("train.clip=0.1", False),
        ("train.micro_batch=2", False),
        ("train.schedule=cosine", False),
    ],
)
def test_settings_of_training_are_heard_or_their_clients_train_alone(word, stacks, made):
    assert play("fedavg", *UNEQUAL, word, AUTO).digest == play("fedavg", *UNEQUAL, word).digest
    assert bool(made) == stacks


def test_architectures_that_fit_and_one_that_does_not(made):
    words = ("clients=6", "model.pool=[mlp_small,mlp,cnn]", "rounds=1")
    assert play("fedmd", *words, AUTO).digest == play("fedmd", *words).digest
    assert sorted(set(made)) == [2]
    assert len(made) == 6


def test_who_has_nobody_beside_him_trains_as_he_would_alone(made):
    words = ("clients=4", "model.pool=[mlp_small,mlp,cnn]", "rounds=1")  # two of the first, one of the second
    assert play("fedmd", *words, AUTO).digest == play("fedmd", *words).digest
    assert set(made) == {2}


def test_nobody_waits_for_sympy(monkeypatch, made):
    """Torch imports it to compare shapes, 0.3 s, where a gradient is given for each of several numbers."""
    monkeypatch.setitem(sys.modules, "torch.fx.experimental.symbolic_shapes", None)  # to import it is an error
    for name in ("fedmd", "fedex_lora"):
        made.clear()
        run = play(name, *UNEQUAL, AUTO)
        assert max(made) > 2
        assert not run.strategy.inbox.apart


def test_stacks_of_any_size(monkeypatch, made):
    whole = play("fedavg", *UNEQUAL, AUTO)
    for stack, awake in ((50_000, 64), (2**30, 64), (2**30, 3)):
        monkeypatch.setattr(abreast_room, "STACK", stack)
        monkeypatch.setattr(abreast_room, "AWAKE", awake)
        made.clear()
        assert play("fedavg", *UNEQUAL, AUTO).digest == whole.digest
        assert max(made) == (5 if stack == 50_000 else min(awake, 9))


def test_ray_has_the_same_bits():
    alone = play("fedavg", *UNEQUAL).digest
    for workers in (2, 1):  # one more than Ray was started with would wait for ever
        assert play("fedavg", *UNEQUAL, AUTO, grid="ray", workers=workers).digest == alone


def test_a_run_that_goes_on_has_the_same_bits(tmp_path):
    words = (*UNEQUAL, AUTO)
    with (
        federation("ditto", *words, path=tmp_path, callbacks=(Crash(1),)) as (built, _),
        pytest.raises(KeyboardInterrupt),
    ):
        built.run()
    assert play("ditto", *words, path=tmp_path).digest == play("ditto", *UNEQUAL).digest


def test_seconds_are_ones_own_and_a_share_of_the_stack(monkeypatch):
    real, took = abreast.together, []

    def slow(asked, replicas, forward):
        started = time.perf_counter()
        time.sleep(0.2)
        made = real(asked, replicas, forward)
        took.append(time.perf_counter() - started)
        return made

    monkeypatch.setattr(abreast, "together", slow)
    with federation("fedavg", *UNEQUAL, "rounds=1", AUTO) as (built, _):
        found = []
        intercept(built, lambda reply: found.append(reply.content["metrics"]["seconds"]), kind="train")
        built.run()
    assert len(found) == 9
    assert len(took) == 1
    assert all(took[0] / 9 <= seconds < took[0] for seconds in found)


@pytest.mark.parametrize(("idle", "seated"), [(False, [9, 9]), (True, [9])])
def test_clients_that_train_nothing_are_seated_once(idle, seated, monkeypatch, made):
    run, seats = abreast.Abreast.run, []

    def counted(desk, workspace, jobs):
        seats.append(len(jobs))
        return run(desk, workspace, jobs)

    monkeypatch.setattr(abreast.Abreast, "run", counted)
    if idle:
        monkeypatch.setattr(FusionClient, "fit", lambda client: {"num-examples": 1})
    play("fedavg", *UNEQUAL, AUTO)
    assert seats == seated
    assert bool(made) is not idle


def test_clients_awake_at_once_all_have_seats_where_their_models_are_lent(monkeypatch):
    monkeypatch.setattr(abreast_room.Room, "seats", lambda room, workspace, architecture: 9)
    with federation("fedavg", "clients=30", AUTO) as (built, _):
        groups, sent = built.grid.groups, []
        answered = groups.all
        monkeypatch.setattr(groups, "all", lambda asked, cache: sent.append(asked) or answered(asked, cache))
        built.grid.whole = False
        built.play(1, "train")
        assert [len(group) for group in sent[0]] == [8, 8, 8, 6]
        assert [sum(map(len, some)) for some in groups.portions(sent[0])] == [8, 8, 8, 6]
        monkeypatch.setattr(abreast_room.Room, "seats", lambda room, workspace, architecture: 16)
        assert [sum(map(len, some)) for some in groups.portions(sent[0])] == [16, 14]
        monkeypatch.setattr(abreast_room.Room, "seats", lambda room, workspace, architecture: 0)
        assert [sum(map(len, some)) for some in groups.portions(sent[0])] == [30]


def test_stacks_without_memory_are_halved_until_they_fit(monkeypatch):
    alone, real, sizes, holds = play("fedavg", *UNEQUAL), abreast.together, [], 3

    def together(asked, replicas, forward):
        sizes.append(len(asked))
        if len(asked) > holds:
            for stack in replicas.stacks.values():
                for slot, _ in asked:
                    stack[slot].fill_(float("nan"))  # what fails half-way leaves rubbish behind
            raise torch.cuda.OutOfMemoryError("no room")
        return real(asked, replicas, forward)

    monkeypatch.setattr(abreast, "together", together)
    crowded = play("fedavg", *UNEQUAL, AUTO)
    assert crowded.digest == alone.digest
    assert crowded.strategy.inbox.left_out == []
    assert sizes == [9, 3, 3, 3, 3, 3, 3]  # what did not fit once is not tried again
    (note,) = [note for note in crowded.notes if note.startswith("vectorize")]
    assert note.startswith("vectorize: 9 trainings were begun anew: a stack of 9 failed: OutOfMemoryError: no room")
    holds = 1
    sizes.clear()
    assert play("fedavg", *UNEQUAL, AUTO).digest == alone.digest
    assert sizes == [9, 3] + [1] * 18, "the other six of the first nine are asked for anew, alone"
    monkeypatch.setattr(abreast, "together", lambda *_: 1 / 0)  # nor does a stack of one work
    broken = play("fedavg", *UNEQUAL, AUTO)
    assert broken.digest == alone.digest
    assert {note.split(":")[1] for note in broken.notes if note.startswith("vectorize")} == {
        " 18 trainings were begun anew"
    }


def test_random_numbers_are_each_clients_own(monkeypatch, made):
    seen: dict[str, list] = {}

    def fit(self):
        first = torch.rand(1).item(), random.random(), np.random.rand(), np.random.randn()
        metrics = self.train()
        second = torch.rand(1).item(), random.random(), np.random.rand(), np.random.randn()
        seen.setdefault(mode, []).append((self.client, self.round, first, second))
        return metrics

    monkeypatch.setattr(FusionClient, "fit", fit)
    for mode in ("off", "auto"):
        play("fedavg", *UNEQUAL, *(AUTO,) * (mode == "auto"))
    assert max(made) > 2
    assert sorted(seen["off"]) == sorted(seen["auto"])


def test_a_client_that_fails_takes_nobody_with_it(monkeypatch):
    def fit(self):
        metrics = self.train()
        if self.client == 3:
            raise ValueError("broken")
        return metrics

    monkeypatch.setattr(FusionClient, "fit", fit)
    broken = [play("fedavg", *UNEQUAL, *mode) for mode in ((), (AUTO,))]
    assert broken[0].federation.digest == broken[1].federation.digest
    assert broken[0].strategy.inbox.left_out == broken[1].strategy.inbox.left_out != []


def test_texts_over_one_base(tmp_path, made, monkeypatch):
    from tests.models.test_language import lm

    words = ("strategy.rank=3", "rounds=1")
    alone = play("fed_sb", *words, base=lm(tmp_path))
    monkeypatch.setattr(abreast_room, "PLACES", 8 * 8 * 2)
    assert play("fed_sb", *words, AUTO, base=lm(tmp_path)).digest == alone.digest
    assert made == [2, 1]
    made.clear()
    packed = play("fed_sb", *words, "data.packing=true", base=lm(tmp_path)).digest
    assert play("fed_sb", *words, "data.packing=true", AUTO, base=lm(tmp_path)).digest == packed
    assert not made


def test_one_base_in_any_stack_and_order_after_a_crash_and_on_ray(tmp_path, made, monkeypatch):
    alone, words = play("fed_sb", *UNEQUAL).digest, (*UNEQUAL, AUTO)
    for most, reverse, sizes in ((9, False, [9, 9]), (9, True, [9, 9]), (4, False, [3] * 6), (1, False, [1] * 18)):
        monkeypatch.setattr(abreast_room, "PLACES", most)  # of which a client whose examples are no texts takes one
        made.clear()
        assert play("fed_sb", *words, reverse=reverse).digest == alone
        assert made == sizes
    monkeypatch.setattr(abreast_room, "PLACES", 2)
    with (
        federation("fed_sb", *words, path=tmp_path, callbacks=(Crash(1),)) as (built, _),
        pytest.raises(KeyboardInterrupt),
    ):
        built.run()
    made.clear()
    assert play("fed_sb", *words, path=tmp_path).digest == alone
    assert sorted(made) == [1, 2, 2, 2, 2], "the second round alone"
    assert play("fed_sb", *words, grid="ray", workers=2).digest == alone
