"""Work is counted by what a network does, and counting leaves no trace."""

from __future__ import annotations

import torch
from torch import nn

from fedfuse.train import work


def test_flops_of_linear_layers_by_hand() -> None:
    model, x = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3)), torch.zeros(1, 8)
    assert work.flops(model, x, False) == 2 * (8 * 4 + 4 * 3)
    assert work.flops(model, x, True) == 2 * (8 * 4 + 4 * 3) * 2 + 2 * 4 * 3  # both weights, and the hidden layer
    model[0].weight.requires_grad_(False)
    assert work.flops(model, x, True) < 2 * (8 * 4 + 4 * 3) * 2 + 2 * 4 * 3


def test_counting_adds_up_and_only_where_it_is_asked_for() -> None:
    model, x = nn.Linear(8, 4), torch.zeros(5, 8)
    work.note(model, x, 5, True)
    with work.counting() as tally:
        work.note(model, x, 10, False)
        work.note(model, x, 3, True)
        work.note(model, x, 0, True)
    with work.counting(False) as nothing:
        work.note(model, x, 10, False)
        work.note(model, x, 4, True)
        work.note(model, x, 4, True, examples=6)
    assert (tally.flops, tally.unit) == (10 * 64 + 3 * 128, 128)
    assert (tally.examples, nothing.examples, nothing.flops) == (3, 4 + 6, 0)


class Branches(nn.Module):
    """A small branch that is called, and a large one beside it; of a third nothing comes."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large, self.idle = nn.Linear(8, 2), nn.Linear(8, 32), nn.Linear(8, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.small(x)

    def both(self, x: torch.Tensor) -> tuple:
        return self.small(x), None, self.large(x)


def test_a_method_of_the_network_is_counted_in_its_place_and_nothing_else_is() -> None:
    model, x = Branches(), torch.zeros(5, 8)
    assert work.flops(model, x[:1], True) == 2 * 2 * 8 * 2  # forward, and the gradient of what the output needs
    for forward, one in ((None, 2), (model.both, 2 + 32), (lambda x: model.large(x), 2)):
        with work.counting() as tally:
            work.note(model, x, 5, True, forward)
        assert tally.flops == 5 * 2 * 2 * 8 * one
    with work.counting() as predicted:
        work.note(model, x, 5, False)
    assert predicted.unit == 2 * 8 * 2


def test_counting_leaves_buffers_gradients_random_numbers_and_hooks_alone() -> None:
    model, woken = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout()), []
    model[0].register_forward_hook(lambda *_: woken.append(1))
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    work.flops(model, torch.ones(1, 8), True)
    assert woken == []
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    model(torch.ones(2, 8))
    assert woken == [1]
