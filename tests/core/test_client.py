"""A client half alone: which of its trainings the user's `train.*` are about, and what its draws depend on."""

from __future__ import annotations

import pytest
import torch

from fedfuse.errors import UserError
from tests.halves import client


def test_training_settings_are_about_private_examples_however_they_are_named() -> None:
    half = client("fedmd", "train.max_steps=1")
    half.begin("train")
    labels = torch.zeros(len(half.transfer), dtype=torch.int64)
    assert [half.train()["steps"], half.train(x=half.x, y=half.y)["steps"]] == [1, 1]
    assert half.train(x=half.transfer, y=labels, epochs=1)["steps"] > 1  # the public rows have an effort of their own
    assert half.train(x=half.x, y=half.y, epochs=1)["steps"] > 1  # a strategy's own goes before the user's


def test_draws_depend_on_the_lesson_while_it_is_taken_in_and_on_the_round_else() -> None:
    def drawn(purpose: str, round: int, version: int) -> list[float]:
        half = client("fedmd", round=round)
        half.version = version
        half.begin(purpose)
        return [*torch.rand(2, generator=half.generator("mine")).tolist(), *torch.rand(2).tolist()]

    assert drawn("receive", 3, 2) == drawn("receive", 5, 2)
    assert not set(drawn("receive", 3, 2)) & set(drawn("receive", 3, 1))
    assert drawn("train", 3, 2) == drawn("train", 3, 1)
    assert not set(drawn("train", 3, 2)) & set(drawn("train", 5, 2))


def test_private_examples_are_out_of_sight_again_once_the_budget_has_been_spent() -> None:
    half = client("fedavg", "privacy.noise=1", "train.epochs=1")
    half.begin("train")
    for _ in range(2):
        with pytest.raises(UserError, match="outside of training"):
            half.examples("train")
        half.train()


def test_a_pooled_client_trains_on_everybodys_examples_and_is_scored_on_its_own() -> None:
    half = client("centralized")
    half.pooled = True
    every = [half.workspace.tensors(who, "train") for who in range(half.scenario.clients)]
    assert torch.equal(half.x, torch.cat([x for x, _ in every]))
    assert torch.equal(half.y, torch.cat([y for _, y in every]))
    half.begin("evaluate")
    assert torch.equal(half.examples("personal")[0], half.workspace.tensors(0, "personal")[0])
