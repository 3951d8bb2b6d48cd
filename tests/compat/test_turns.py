"""Clients that take turns find every global generator as they left it, whether or not they drew from it."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from fedfuse.compat import turns
from fedfuse.compat.turns import Turns
from fedfuse.seeding import seed_everything


def drawn() -> tuple:
    return (
        torch.rand(1).item(),
        random.random(),
        random.gauss(0, 1),
        np.random.rand(),
        np.random.randn(),
        np.random.randint(9),
    )


@pytest.mark.parametrize("looked", [True, False])
@pytest.mark.parametrize("before", [0, 1, 3])
def test_what_comes_after_is_as_if_nobody_had_been_there(before, looked, monkeypatch):
    def play(seed, other):
        seed_everything(seed)
        first = [drawn() for _ in range(before)]
        other()
        return [*first, drawn()]

    alone = play(5, lambda: None)
    if not looked:
        monkeypatch.setattr(turns, "_look", lambda: None)
        monkeypatch.setattr(turns, "_lying", lambda: None)
    mine = Turns()

    def other():
        mine.leave()
        theirs = Turns()
        theirs.take()  # a first turn: nothing to go on with
        seed_everything(6)
        drawn()
        theirs.leave()
        mine.take()

    assert play(5, other) == alone


def test_pythons_generator_lies_where_we_copy_it_from():
    assert turns._lying() is not None
    random.seed(77)
    random.gauss(0, 1)
    kept, state = turns._python(), random.getstate()
    random.seed(78)
    turns._go_on(kept)
    assert random.getstate() == state


def test_numpys_generator_is_where_we_look():
    np.random.seed(1234)
    assert turns.fresh(1234)
    assert not turns.fresh(1235)
    np.random.rand()
    assert not turns.fresh(1234)


@pytest.mark.parametrize("looked", [True, False])
def test_a_default_device_is_set_back(looked, monkeypatch):
    if not looked:
        monkeypatch.setattr(turns, "_any_mode", lambda: 1)
    found = turns.modes()
    try:
        torch.set_default_device("meta")
        assert turns.modes() != found
        turns.set_modes(found)
        assert torch.zeros(1).device.type == "cpu"
        assert turns.modes() == found
        torch.set_default_device("meta")  # as a user may, before a run
        mine = turns.modes()
        torch.set_default_device("cpu")
        turns.set_modes(mine)
        assert torch.zeros(1).device.type == "meta"
    finally:
        torch.set_default_device(None)
