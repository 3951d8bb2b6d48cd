"""Stacks are taken where they were measured to pay, and left where they were not."""

from __future__ import annotations

import pytest
import torch

from fedfuse.config.compose import compose
from fedfuse.core import abreast_trial
from fedfuse.core.abreast_notes import computed, vectorized_notes
from fedfuse.core.abreast_trial import GAIN, SILENT, TRIES, Trials

KIND = ("mlp", 10)


def measured(alone: list[float], stacked: list[float], steps: tuple[int, int] = (1, 1)) -> Trials:
    """Trials that have seen these seconds a step, in trainings of so many steps alone and in stacks."""
    trials = Trials()
    for took in alone:
        trials.measured(KIND, 1, took * steps[0], steps[0])
    for took in stacked:
        trials.measured(KIND, 8, took * steps[1], steps[1])
    return trials


@pytest.mark.parametrize(("ratio", "pays"), [(0.5, True), (GAIN - 0.01, True), (GAIN + 0.01, False), (1.6, False)])
def test_the_faster_way_is_taken(ratio: float, pays: bool) -> None:
    trials = measured([9.0, 2.0, 2.4], [0.01, 2 * ratio, 6.0], (3, 40))  # the first of each builds, and is not counted
    assert trials.pays(KIND) is pays
    assert trials.declined("mlp") is not pays
    assert not trials.declined("cnn")


def test_nothing_is_decided_before_both_ways_were_tried() -> None:
    trials = Trials()
    for _ in range(1 + TRIES):
        assert trials.wants_alone(KIND)
        trials.measured(KIND, 1, 1.0, 1)
    assert not trials.wants_alone(KIND)
    for _ in range(TRIES):
        trials.measured(KIND, 8, 0.1, 1)
    assert trials.pays(KIND) is None
    assert not trials.declined("mlp")
    trials.measured(KIND, 8, 0.0, 0)  # no step, no measure
    assert trials.pays(KIND) is None
    trials.measured(KIND, 8, 0.1, 1)
    assert trials.pays(KIND) is True


def test_the_first_stack_of_a_size_builds_what_later_ones_find() -> None:
    trials = measured([9.0, 1.0, 1.0], [5.0])
    trials.measured(KIND, 7, 5.0, 1)
    trials.measured(KIND, 6, 5.0, 1)
    assert trials.pays(KIND) is None
    trials.measured(KIND, 7, 0.5, 1)
    trials.measured(KIND, 6, 0.6, 1)
    assert trials.pays(KIND) is True


def test_an_architecture_is_declined_only_if_all_kinds_of_it_are() -> None:
    trials = measured([1.0] * 3, [2.0] * 3)
    other = ("mlp", 64)
    assert trials.declined("mlp")
    assert trials.wants_alone(other)
    assert not trials.declined("mlp")
    for _ in range(1 + TRIES):
        trials.measured(other, 1, 1.0, 1)
        trials.measured(other, 8, 0.2, 1)
    assert trials.pays(other) is True
    assert trials.pays(KIND) is False
    assert not trials.declined("mlp")


def test_who_asked_for_nothing_is_not_seated_for_a_while() -> None:
    trials = Trials()
    assert not trials.silent("mlp", "train")
    trials.heard("mlp", "train", False)
    assert not trials.silent("mlp", "train.predict")
    assert not trials.silent("cnn", "train")
    assert [trials.silent("mlp", "train") for _ in range(SILENT + 2)] == [True] * SILENT + [False] * 2
    trials.heard("mlp", "train", False)
    trials.heard("mlp", "train", True)
    assert not trials.silent("mlp", "train")


def test_a_run_says_how_its_clients_were_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = compose(["strategy=fedavg", "runtime.vectorize=auto", "runtime.device=cuda"])
    assert computed(config) == {"clients": {"device": "cuda", "vectorize": "auto"}}
    said = vectorized_notes(config, {"a stack of 9 failed: no room": 9})
    assert said == [
        "vectorize: 9 trainings were begun anew: a stack of 9 failed: no room",
        "vectorize: clients were stacked on CUDA, which rounds otherwise than one by one does",
    ]
    config.runtime.device = "cpu"
    assert vectorized_notes(config, {}) == []


def test_who_keeps_asking_for_nothing_is_seated_ever_more_rarely(monkeypatch) -> None:
    monkeypatch.setattr(abreast_trial, "SILENT", 2)
    monkeypatch.setattr(abreast_trial, "LONGEST", 5)
    trials, waited = Trials(), []
    assert not trials.silent("mlp", "train")
    for _ in range(4):
        trials.heard("mlp", "train", False)
        times = 0
        while trials.silent("mlp", "train"):
            times += 1
        waited.append(times)
    assert waited == [2, 4, 5, 5]
    assert not trials.silent("mlp", "evaluate")
    trials.heard("mlp", "train", True)
    assert not trials.silent("mlp", "train")
    trials.heard("mlp", "train", False)
    assert [trials.silent("mlp", "train") for _ in range(3)] == [True, True, False]
