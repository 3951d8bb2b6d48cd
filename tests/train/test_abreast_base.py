"""Clients over one frozen base as one batch: to the last bit what each of them computes alone, or one by one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedfuse.config.schema import ModelConfig, TrainConfig
from fedfuse.models.language import build
from fedfuse.models.replicas import Replicas
from fedfuse.train.abreast import Training
from fedfuse.train.abreast_base import common_base
from fedfuse.train.abreast_batches import Feed, Member
from fedfuse.train.abreast_steps import together
from fedfuse.train.adapters import LoRA, LoRASB, inject
from fedfuse.train.task import IGNORED, task_step, trimmed
from fedfuse.train.training import train

torch.set_num_threads(1)


class Net(nn.Module):
    """Hidden layers of odd sizes and a head; `between` stands between them."""

    def __init__(self, between: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(13, 11), nn.Linear(11, 9, bias=False)
        self.norm, self.between, self.head = nn.LayerNorm(9), between or nn.Tanh(), nn.Linear(9, 4)

    def forward(self, x):
        return self.head(self.norm(self.second(self.between(self.first(x)))))


def adapted(model=None, kind=LoRA, **options):
    torch.manual_seed(1)
    model = Net() if model is None else model
    return inject(model, kind, **{"rank": 3, "scale": 0.5, "delta": True, **options})


def language() -> nn.Module:
    torch.manual_seed(2)
    return build("causal_lm", (10,), 40, ModelConfig())


def features(rows, seed):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 13, generator=draw), torch.randint(0, 4, (rows,), generator=draw)


def texts(rows, seed):
    """Texts whose ends are not to be predicted, some of them not at all."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 40, (rows, 10), generator=draw)
    lengths = torch.randint(0, 9 - 3 * (seed % 2), (rows, 1), generator=draw)
    return x, torch.where(torch.arange(10) < lengths, x, IGNORED)


def both(model, data, forward=None, loss=task_step, **options):
    """Whether trainings together end as alone, and the forward pass that was used."""
    forward = common_base(model) if forward is None else forward
    assert forward is not None
    replicas = Replicas(model, len(data))
    draw = torch.Generator().manual_seed(3)
    for name, stack in replicas.stacks.items():
        if stack.is_floating_point() and "inv_freq" not in name:  # clients differ in all that is theirs
            stack += 0.1 * torch.randn(stack.shape, generator=draw)
    config = options.pop("config", TrainConfig(lr=0.05, batch_size=7, optimizer="adamw"))
    told = {"epochs": 2, "batch_size": 7, "least": 2, "after_backward": None, "after_step": None, **options}
    asked, alone = [], []
    for k, (x, y) in enumerate(data):
        single = Replicas(replicas.modules[k], 1).modules[0]
        asked.append((k, Training(replicas.modules[k], x, y, loss, config, ("client", k), **told)))
        alone.append((single, train(single, x, y, loss, config, ("client", k), **told)))
    made = together(asked, replicas, forward)
    same = all(
        one["steps"] == other["steps"]
        and one["loss"] == other["loss"]
        and all(torch.equal(a, b) for a, b in zip(own.parameters(), single.parameters(), strict=True))
        for one, own, (single, other) in zip(made, replicas.modules, alone, strict=True)
    )
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), alone[0][0].parameters(), strict=True)]
    assert any(moved)
    return same, forward


@pytest.mark.parametrize("kind", [LoRA, LoRASB])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_adapters_over_one_base_have_the_bits_that_they_have_alone(kind, optimizer):
    config = TrainConfig(optimizer=optimizer, lr=0.03, momentum=0.9, weight_decay=0.01)
    for rows in ((21, 21, 21), (20, 9, 33, 1, 2)):
        same, _ = both(adapted(kind=kind), [features(n, k) for k, n in enumerate(rows)], config=config)
        assert same, rows


def test_scale_of_one_and_no_fold():
    assert both(adapted(scale=1.0, delta=False), [features(14, k) for k in range(3)])[0]


@pytest.mark.parametrize("kind", [LoRA, LoRASB])
def test_texts_of_their_own_lengths(kind):
    model = adapted(language(), kind, delta=kind is LoRASB)
    for trim in (True, False):
        same, forward = both(model, [texts(n, k) for k, n in enumerate((21, 21, 18, 21, 5))], trim=trim)
        assert same
        lengths = {length for (_, _, length), _ in forward.alike}
        assert len(lengths) > 1 if trim else lengths == {10}
        assert any(forward.alike.values()), "not all of them one by one"


def test_texts_are_cut_as_alone():
    data = [texts(9, k) for k in range(4)] + [(torch.ones(9, 10).long(), torch.full((9, 10), IGNORED))]
    asked = [
        Training(nn.Identity(), x, y, task_step, TrainConfig(), ("cut", k), 1, 9, 2, None, None, trim=True)
        for k, (x, y) in enumerate(data)
    ]
    feed = Feed([Member(one, k) for k, one in enumerate(asked)])
    (group,) = feed.groups(0, 5)
    seen = []
    for places, x, y in feed.batches(*group):
        for i, k in enumerate(places):
            rows = feed.named(k, 9)
            want_y, want_x = trimmed(data[k][1][rows], data[k][0][rows])
            assert torch.equal(x[i], want_x)
            assert torch.equal(y[i], want_y)
            seen.append(k)
    assert sorted(seen) == [0, 1, 2, 3, 4]
    assert x.shape[2] > 2 == min(x.shape[2] for _, x, _ in feed.batches(*group))


class Mixed(nn.Module):
    """Rows that look at each other."""

    def forward(self, x):
        return x - x.mean(0)


class Drawn(nn.Module):
    """Noise."""

    def forward(self, x):
        return x + torch.randn_like(x)


def test_a_base_whose_rows_look_at_each_other_is_passed_one_by_one():
    same, forward = both(adapted(Net(Mixed())), [features(14, k) for k in range(3)])
    assert same
    assert list(forward.alike.values()) == [False]


def test_a_base_of_right_outputs_and_mixed_gradients_is_found_out():

    class Backwards(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, slope):
            return slope - slope.mean(0)

    class Odd(nn.Module):
        def forward(self, x):
            return Backwards.apply(x)

    same, forward = both(adapted(Net(Odd())), [features(14, k) for k in range(3)])
    assert same
    assert list(forward.alike.values()) == [False]


def test_what_draws_at_random_has_no_such_pass():
    assert common_base(adapted(dropout=0.1)) is None
    assert common_base(adapted(Net(nn.Dropout(0.1)))) is None
    assert common_base(adapted(Net(nn.Dropout(0.0)))) is not None
    quiet, loud = nn.Tanh(), nn.Tanh()
    quiet.attention_dropout, loud.attention_dropout = 0.0, 0.1
    assert common_base(adapted(Net(quiet))) is not None
    assert common_base(adapted(Net(loud))) is None
    with pytest.raises(RuntimeError, match="draws random numbers"):
        both(adapted(Net(Drawn())), [features(14, k) for k in range(3)])


def test_what_is_a_clients_own_beside_linear_layers_has_no_such_pass():
    assert common_base(Net()) is None
    model = adapted()
    model.norm.weight.requires_grad_(True)
    model.frozen -= {"norm.weight"}
    assert common_base(model) is None
    assert common_base(adapted(Net(nn.BatchNorm1d(11)))) is None, "statistics are a client's own"
    packed = adapted()
    packed.second.quantized = True
    assert common_base(packed) is None


def test_a_look_is_taken_once_for_each_shape(monkeypatch):
    forward = common_base(adapted())
    looked = []
    real = forward._same
    monkeypatch.setattr(forward, "_same", lambda weights, x: looked.append(tuple(x.shape)) or real(weights, x))
    data = [features(20, k) for k in range(3)]
    both(adapted(), data, forward)
    both(adapted(), data, forward)
    assert looked == [(3, 7, 13), (3, 6, 13)]
