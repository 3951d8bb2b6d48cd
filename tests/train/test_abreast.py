"""Several clients' trainings as one computation: to the last bit what each of them computes alone."""

from __future__ import annotations

import random
from itertools import pairwise, product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedfuse import models
from fedfuse.config.schema import TrainConfig
from fedfuse.models.feedforward import Classifier
from fedfuse.models.replicas import Replicas, nbytes
from fedfuse.seeding import generator
from fedfuse.train import abreast_batches, abreast_steps, row_targets
from fedfuse.train.abreast import Training
from fedfuse.train.abreast_images import windows_products
from fedfuse.train.abreast_layers import stacked
from fedfuse.train.abreast_steps import together
from fedfuse.train.divergences import KL
from fedfuse.train.losses import loss
from fedfuse.train.mean_loss import added_in_order
from fedfuse.train.task import task_step
from fedfuse.train.training import proximal, train

torch.set_num_threads(1)


def net(*sizes: int, activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    """A network with odd sizes, whose weights have odd numbers of bytes left over."""
    torch.manual_seed(1)
    layers: list[nn.Module] = [nn.Flatten()]
    for i, (a, b) in enumerate(pairwise(sizes[:-1])):
        layers += [nn.Linear(a, b, bias=i != 1), activation()]
    return Classifier(nn.Sequential(*layers), sizes[-2], sizes[-1])


def examples(rows: int, inputs: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = generator("examples", seed)
    return torch.randn(rows, inputs, generator=draw), torch.randint(0, classes, (rows,), generator=draw)


def abreast(model, data, slots=None, room=None, **options):
    """Weights and metrics of trainings made together, and of the same made alone."""
    slots = list(range(len(data))) if slots is None else slots
    replicas = Replicas(model, max(slots) + 1)
    config = options.pop("config", TrainConfig(lr=0.05, batch_size=7))
    own, after = options.pop("own", lambda k: task_step), options.pop("after", lambda k: None)
    asked, alone = [], []
    for k, (x, y) in enumerate(data):
        with torch.no_grad():  # clients that differ before, too
            for stack in replicas.stacks.values():
                stack[slots[k]] += 0.01 * k
        single = Replicas(replicas.modules[slots[k]], 1).modules[0]
        told = {"epochs": 2, "batch_size": config.batch_size, "least": 2, "after_step": None, **options}
        told["after_backward"] = after(k)
        asked.append((slots[k], Training(replicas.modules[slots[k]], x, y, own(k), config, ("client", k), **told)))
        alone.append((single, train(single, x, y, own(k), config, ("client", k), **told)))
    made = together(asked, replicas, stacked(model))
    return [(replicas.modules[s].state_dict(), m) for s, m in zip(slots, made, strict=True)], [
        (m.state_dict(), told) for m, told in alone
    ]


def same(made, alone) -> bool:
    return all(
        a[1]["steps"] == b[1]["steps"]
        and (a[1]["loss"] == b[1]["loss"] or a[1]["steps"] == 0)
        and all(torch.equal(a[0][name], b[0][name]) for name in a[0])
        for a, b in zip(made, alone, strict=True)
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("sizes", [(64, 32, 10), (13, 11, 7, 5), (30, 3), (3, 2, 2)])
def test_together_is_alone(optimizer, sizes):
    config = TrainConfig(optimizer=optimizer, lr=0.03, momentum=0.9, weight_decay=0.01, batch_size=7)
    for rows in ((20, 20, 20), (20, 9, 33, 1, 2), (5,)):
        data = [examples(n, sizes[0], sizes[-1], k) for k, n in enumerate(rows)]
        made, alone = abreast(net(*sizes), data, config=config)
        assert same(made, alone), rows


@pytest.mark.parametrize("rows", [(20, 20, 20), (20, 9, 33, 1, 2)])
def test_examples_laid_behind_each_other_as_on_a_gpu_change_nothing(rows, monkeypatch):
    monkeypatch.setattr(abreast_batches, "_gathers", lambda device: True)
    data = [examples(n, 13, 3, k) for k, n in enumerate(rows)]
    assert same(*abreast(net(13, 11, 3), data))
    assert same(*abreast(net(13, 11, 3), data, own=lambda k: lambda z, y, rows: F.cross_entropy(z, y) * (rows[0] + k)))
    assert same(
        *abreast(net(13, 11, 3), [(x, None) for x, _ in data], own=lambda k: lambda z, y, rows: z.square().mean())
    )


@pytest.mark.parametrize("activation", [nn.Tanh, nn.Sigmoid, nn.GELU])
def test_functions_that_round_the_last_numbers_otherwise(activation):
    data = [examples(20, 13, 3, k) for k in range(5)]
    assert same(*abreast(net(13, 11, 7, 3, activation=activation), data))


def test_any_number_beside_one_changes_nothing():
    data = [examples(20 + k % 3, 64, 10, k) for k in range(12)]
    whole, alone = abreast(net(64, 33, 10), data)
    assert same(whole, alone)
    for first, last in ((0, 1), (0, 5), (3, 12)):
        some = [together_one(data[first:last], first)]
        assert all(same([a], [b]) for a, b in zip(some[0], whole[first:last], strict=True))


def together_one(data, first):
    model = net(64, 33, 10)
    replicas = Replicas(model, len(data))
    config = TrainConfig(lr=0.05, batch_size=7)
    asked = []
    for k, (x, y) in enumerate(data):
        with torch.no_grad():
            for stack in replicas.stacks.values():
                stack[k] += 0.01 * (first + k)
        training = Training(replicas.modules[k], x, y, task_step, config, ("client", first + k), 2, 7, 2, None, None)
        asked.append((k, training))
    made = together(asked, replicas, stacked(model))
    return [(replicas.modules[k].state_dict(), m) for k, m in enumerate(made)]


def test_slots_with_gaps_and_out_of_order():
    data = [examples(n, 13, 3, k) for k, n in enumerate((20, 31, 12))]
    assert same(*abreast(net(13, 11, 3), data, slots=[4, 0, 2]))


def test_a_loss_of_ones_own_with_random_numbers_and_a_look_at_the_model():
    teachers = [torch.randn(40, 3, generator=generator("teacher", k)) for k in range(3)]

    def own(k):
        def loss(logits, y, rows):
            noise = torch.randn(())  # torch's numbers are the client's own
            return F.mse_loss(logits, teachers[k][rows]) * (1 + 0.1 * noise) + 0.01 * k * F.cross_entropy(logits, y)

        return loss

    data = [examples(n, 13, 3, k) for k, n in enumerate((20, 31, 12))]
    assert same(*abreast(net(13, 11, 3), data, own=own))


def test_gradients_are_changed_client_by_client():
    model = net(13, 11, 3)
    anchors = [{name: p.detach() + k for name, p in model.named_parameters()} for k in range(3)]
    data = [examples(n, 13, 3, k) for k, n in enumerate((20, 31, 12))]
    made, alone = abreast(model, data, after=lambda k: proximal(anchors[k], 0.1))
    assert same(made, alone)
    without, _ = abreast(model, data)
    assert not same(made, without)

    def exchanged(k):  # a hook that puts another tensor in a gradient's place
        def hook(model):
            for p in model.parameters():
                p.grad = (k + 1) * p.grad

        return hook

    assert same(*abreast(model, data, after=exchanged))


def test_steps_that_end_a_training_end_it_for_all_or_fail():
    data = [examples(20, 13, 3, k) for k in range(3)]
    made, alone = abreast(net(13, 11, 3), data, after_step=lambda done, planned: done >= 4)
    assert same(made, alone)
    assert made[0][1]["steps"] == 4
    ends = iter([False, False, True] * 9)
    with pytest.raises(RuntimeError, match="before others"):
        abreast_only(data, after_step=lambda done, planned: next(ends))


def abreast_only(data, loss=task_step, after_step=None):
    model = net(13, 11, 3)
    replicas = Replicas(model, len(data))
    config = TrainConfig(lr=0.05, batch_size=7)
    asked = [
        (k, Training(replicas.modules[k], x, y, loss, config, (k,), 1, 7, 2, None, after_step))
        for k, (x, y) in enumerate(data)
    ]
    return together(asked, replicas, stacked(model))


def test_pythons_random_numbers_are_not_shared_in_silence():
    data = [examples(20, 13, 3, k) for k in range(2)]
    with pytest.raises(RuntimeError, match="random numbers"):
        abreast_only(data, loss=lambda z, y, rows: F.cross_entropy(z, y) * random.random())


def test_rows_counted_are_those_that_passed():
    data = [examples(20, 13, 3, 0), examples(9, 13, 3, 1)]
    assert [m["rows"] for m in abreast_only(data)] == [20, 9]
    assert [m["rows"] for m in abreast_only(data[:1], after_step=lambda done, planned: done >= 2)] == [14]


@pytest.mark.parametrize("batch", [1, 2, 15, 16, 17, 64, 257])
def test_a_mean_is_added_in_torchs_order(batch):
    z, y = torch.randn(9, batch, 10) * 3, torch.randint(0, 10, (9, batch))
    rows = F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none").view(9, batch)
    assert torch.equal(added_in_order(rows), torch.stack([F.cross_entropy(a, b) for a, b in zip(z, y, strict=True)]))


def test_what_has_a_hook_or_no_stacked_form_does_not_fit():
    assert stacked(net(13, 11, 3)) is not None
    hooked = net(13, 11, 3)
    hooked.body[1].register_forward_hook(lambda *_: None)
    assert stacked(hooked) is None
    assert stacked(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))) is None
    assert stacked(nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True))) is None
    patched = nn.Linear(3, 3)
    patched.forward = lambda x: x
    assert stacked(patched) is None


def test_replicas_share_what_is_frozen_and_nothing_else():
    model = net(13, 11, 3)
    model.frozen = frozenset({"body.1.weight"})
    replicas = Replicas(model, 2)
    first = replicas.modules[0]
    assert first.body[1].weight is model.body[1].weight
    assert nbytes(model) == 4 * (11 + 33 + 3)
    first.head.weight.data.fill_(1.0)
    assert replicas.stacks["head.weight"][0].eq(1).all()
    assert not replicas.stacks["head.weight"][1].eq(1).any()
    assert not model.head.weight.eq(1).any()
    norm = Replicas(nn.BatchNorm1d(3), 2)
    norm.modules[0].running_mean += 5
    assert norm.stacks["running_mean"].tolist() == [[5, 5, 5], [0, 0, 0]]
    assert [module.twin for module in replicas.modules] == [model, model]


def test_products_of_all_sizes():
    for rows, inputs, outputs in product((1, 2, 3, 16), (1, 5, 40), (1, 7, 32)):
        layer = nn.Linear(inputs, outputs)
        replicas = Replicas(layer, 3)
        for k, stack in product(range(3), replicas.stacks.values()):
            stack[k] *= k + 1
        x = torch.randn(3, rows, inputs)
        out = stacked(layer)(replicas.stacks, x)
        assert all(torch.equal(out[k], replicas.modules[k](x[k])) for k in range(3)), (rows, inputs, outputs)


@pytest.mark.parametrize(("shape", "width"), [((1, 8, 8), 1.0), ((2, 9, 7), 1.0), ((3, 12, 12), 0.4)])
@pytest.mark.parametrize("batch", [1, 7])
def test_convolutions_have_the_bits_of_each_alone(shape, width, batch):
    model = models.build(f"lenet@{width}", shape=shape, classes=3, seed=0)
    draw = generator("images")
    rows = (14, 9, 20) if batch > 1 else (2, 3)
    data = [(torch.randn(n, *shape, generator=draw), torch.randint(0, 3, (n,), generator=draw)) for n in rows]
    assert same(*abreast(model, data, config=TrainConfig(lr=0.05, batch_size=batch)))


@pytest.mark.parametrize("padding", [0, 1, 2])
def test_products_over_windows_are_convolutions(padding):
    x = torch.randn(3, 4, 2, 6, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, 7, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    b = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    out = windows_products(x, w, b, (padding, padding))
    each = torch.stack([F.conv2d(*one, padding=padding) for one in zip(x, w, b, strict=True)])
    torch.testing.assert_close(out, each)
    aim = torch.randn_like(each)
    found, wanted = (torch.autograd.grad((y * aim).sum(), (x, w, b)) for y in (out, each))
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(windows_products(x, w, None, (padding, padding)), each - b[:, None, :, None, None])


def test_convolutions_that_have_no_stacked_form():
    for options in ({"stride": 2}, {"padding": "same"}, {"groups": 2}, {"dilation": 2}, {"padding": 3}):
        assert stacked(nn.Conv2d(2, 2, 3, **options)) is None
    assert stacked(nn.Conv2d(2, 1, 3)) is None
    assert stacked(nn.MaxPool2d(2, return_indices=True)) is None
    assert stacked(nn.Sequential(nn.Conv2d(2, 2, 3), nn.MaxPool2d(2))) is not None


ROW_BY_ROW = [("kl", {"temperature": 3.0, "weight": 0.3}), ("reverse_kl", {}), ("js", {"weight": 2.0}),
              ("soft_ce", {"temperature": 1.5}), ("mae", {}), ("ttm", {})]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), ROW_BY_ROW)
@pytest.mark.parametrize("given", ["logits", "probabilities", "softened"])
def test_teachers_by_row_are_compared_with_at_once(name, options, given, monkeypatch):
    at_once = []
    real = row_targets.losses_of

    def watched(losses, out, rows):
        found = real(losses, out, rows)
        at_once.append(found is not None)
        return found

    monkeypatch.setattr(abreast_steps, "losses_of", watched)
    teachers = [4 * torch.randn(40, 8, generator=generator("teacher", k)) for k in range(3)]
    teachers[1][3, 2] = -torch.inf

    def own(k):
        made = loss(name, **options)
        if given == "logits":
            return made.towards_logits(teachers[k])
        return made.towards(teachers[k].softmax(1), softened=2.0 if given == "softened" else 1.0)

    config = TrainConfig(lr=0.5, batch_size=10, momentum=0.9)
    data = [(examples(n, 64, 8, k)[0], None) for k, n in enumerate((20, 32, 17))]
    assert same(*abreast(net(64, 33, 8), data, own=own, config=config))
    if name == "mae" and given != "logits":
        assert not at_once  # probabilities are compared
    else:
        assert set(at_once) == {True, False}  # 17 leaves 7 · 8 numbers, the last of which torch may round otherwise


def test_an_objective_with_a_way_of_its_own_is_asked_client_by_client():
    class Doubled(KL):
        def value(self, student, teacher, labels):
            return 2 * super().value(student, teacher, labels)

    teacher = torch.randn(40, 8)
    assert row_targets.kind_of(KL().towards(teacher)) is not None
    for own in (Doubled(), loss("wttm"), loss("mse"), loss("taid")):
        assert row_targets.kind_of(own.towards(teacher)) is row_targets.kind_of(own.towards_logits(teacher)) is None
    assert row_targets.kind_of(KL().towards(teacher)) != row_targets.kind_of(KL(2.0).towards(teacher))
    assert row_targets.kind_of(KL()) is None
    looks = KL()
    looks.prior = torch.ones(8)  # which may be another client's
    assert row_targets.kind_of(looks.towards(teacher)) is None
