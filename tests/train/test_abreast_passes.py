"""Passes through linear layers and ReLUs, written out, against autograd's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedfuse import models
from fedfuse.models.replicas import Replicas
from fedfuse.train.abreast_layers import stacked
from fedfuse.train.abreast_passes import written_out
from tests.train.test_abreast import net

torch.set_num_threads(1)


def leaves_of(model):
    stacks = Replicas(model, 3).stacks
    for k, stack in enumerate(stacks.values()):
        stack += 0.1 * torch.randn(stack.shape, generator=torch.Generator().manual_seed(k))
    return {name: stack.requires_grad_() for name, stack in stacks.items()}


@pytest.mark.parametrize(
    "model", [net(30, 20, 24, 10), nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 20, bias=False))]
)
def test_outputs_and_gradients_are_autograds(model):
    leaves, forward = leaves_of(model), stacked(model)
    x, aim = torch.randn(3, 9, 30), torch.randn(3, 9, 20 if isinstance(model, nn.Sequential) else 10)
    wanted = forward(leaves, x)
    wanted.backward(aim)
    passes, plain = written_out(forward, leaves), {name: leaf.detach() for name, leaf in leaves.items()}
    into = {name: torch.full_like(leaf, torch.nan) for name, leaf in plain.items()}
    for _ in range(2):  # what was there before does not matter
        assert torch.equal(passes.forward(plain, x), wanted)
        passes.backward(plain, aim, into)
        assert all(torch.equal(into[name], leaf.grad) for name, leaf in leaves.items())
    assert passes.seen == []


def test_products_that_are_too_small_do_not_suit():
    model = net(30, 20, 10)
    leaves = leaves_of(model)
    passes = written_out(stacked(model), leaves)
    assert [passes.suits(rows, leaves) for rows in (1, 2, 9)] == [False, True, True]  # 2 · 20 · 10 is just enough


def test_only_linear_layers_with_relus_all_of_them_trained_are_written_out():
    model = net(30, 20, 10)
    leaves = leaves_of(model)
    assert written_out(stacked(model), {n: leaf for n, leaf in leaves.items() if n != "head.bias"}) is None
    assert written_out(stacked(model), {**leaves, "another": leaves["head.bias"]}) is None
    for other in (
        net(30, 20, 10, activation=nn.Tanh),
        nn.Sequential(nn.ReLU(), nn.Linear(30, 20)),
        nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.ReLU()),
        nn.Sequential(nn.Linear(30, 20), nn.Flatten()),
        nn.Flatten(),
        models.build("lenet", shape=(1, 12, 12), classes=3, seed=0),
    ):
        assert written_out(stacked(other), leaves_of(other)) is None
    assert written_out(stacked(nn.Linear(30, 20)), leaves_of(nn.Linear(30, 20))) is not None
