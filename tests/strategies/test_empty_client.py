"""A client without a single training example takes part, changes no average, and makes nothing non-finite."""

import pytest
import torch

from fedfuse.core.client import FusionClient
from fedfuse.core.scenario import Scenario
from tests.federations import play
from tests.strategies.test_bad_input import DISTIL


@pytest.mark.parametrize("name", DISTIL)
def test_a_client_without_examples(name, monkeypatch):
    whole = FusionClient.examples

    def examples(self, split):
        found = whole(self, split)
        return (found[0][:0], found[1][:0]) if split == "train" and self.client == 1 else found

    count = Scenario.examples
    monkeypatch.setattr(FusionClient, "examples", examples)
    monkeypatch.setattr(Scenario, "examples", lambda self, client: 0 if client == 1 else count(self, client))
    played = play(name)
    assert played.strategy.inbox.failures == {"replies": 0, "rejected": 0, "retried": 0}, played.strategy.inbox.left_out
    assert played.digest
    for item in played.strategy.board.items.values():
        assert all(bool(torch.isfinite(v).all()) for v in item.arrays.values() if v.is_floating_point())
