"""Local training: rows by index, determinism, batches, optimisers, prediction, scores."""

import copy
import math
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fedfuse import models
from fedfuse.config.schema import ModelConfig, TrainConfig
from fedfuse.errors import UserError
from fedfuse.seeding import generator
from fedfuse.train import scores as scored_by
from fedfuse.train.scores import scores
from fedfuse.train.training import batches, optimizer, predict, train

N = 37
X = torch.randn(N, 6, generator=torch.Generator().manual_seed(0))
Y = X[:, :3].argmax(1)
CONFIG = TrainConfig(epochs=2, batch_size=8, lr=0.1)


def cross_entropy(logits, y, rows):
    return F.cross_entropy(logits, y)


def make(name="mlp_small", shape=(6,), classes=3):
    return models.build(name, shape=shape, classes=classes, config=ModelConfig(), seed=0)


def fit(model=None, **options):
    model = make() if model is None else model
    options = {"loss": cross_entropy, "config": CONFIG, "seed_parts": (0, "fit", 3), **options}
    return model, train(model, X, Y, options.pop("loss"), options.pop("config"), options.pop("seed_parts"), **options)


def same(a, b):
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


@pytest.mark.parametrize(("n", "size"), [(37, 8), (33, 8), (7, 8), (8, 8), (1, 8), (9, 1), (2, 1), (3, 2)])
def test_batches_hold_every_row_once_per_epoch(n, size):
    per_epoch = list(batches(n, size, 1, "a"))
    assert torch.equal(torch.cat(per_epoch), torch.randperm(n, generator=generator("a", 0)))
    sizes = [len(rows) for rows in per_epoch]
    if n > 1 and size > 1:
        assert min(sizes) > 1
    assert max(sizes) <= size + 1
    both = list(batches(n, size, 2, "a"))
    assert len(both) == 2 * len(per_epoch)
    assert all(torch.equal(a, b) for a, b in zip(both, per_epoch, strict=False))
    if n > 5:
        assert not torch.equal(torch.cat(both[len(per_epoch) :]), torch.cat(per_epoch))


def test_short_last_batches():
    assert [len(b) for b in batches(18, 8, 1, 0)] == [8, 8, 2]
    assert [len(b) for b in batches(18, 8, 1, 0, least=3)] == [8, 10]
    assert list(batches(0, 8, 3, 0)) == []
    assert list(batches(8, 8, 0, 0)) == []
    for bad in ((8, 0, 1), (8, 8, -1)):
        with pytest.raises(UserError, match="train"):
            list(batches(*bad, 0))


def test_equals_a_bare_torch_loop():
    model, report = fit()
    bare = make()
    step = torch.optim.SGD(bare.parameters(), lr=0.1, momentum=0.9)
    values = []
    for epoch in range(2):
        for rows in torch.randperm(N, generator=generator(0, "fit", 3, epoch)).split(8):
            step.zero_grad()
            value = F.cross_entropy(bare(X[rows]), Y[rows])
            value.backward()
            step.step()
            values.append(value.item())
    assert report["steps"] == len(values) == 10
    assert report["loss"] == pytest.approx(np.mean(values), rel=1e-6)
    for key, value in bare.state_dict().items():
        assert torch.allclose(model.state_dict()[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_optimisers_are_torchs_own(name):
    """The same bits and the same state as torch's class, also when one goes on from the other's state."""
    config = TrainConfig(optimizer=name, lr=0.05, momentum=0.9, weight_decay=0.01)
    theirs_of = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    own = {"momentum": 0.9} if name == "sgd" else {}
    models_ = make(), make()
    pair = (
        optimizer(models_[0].parameters(), config),
        theirs_of(models_[1].parameters(), lr=0.05, weight_decay=0.01, fused=True, **own),
    )
    for step in range(4):
        for model, one in zip(models_, pair, strict=True):
            one.zero_grad()
            F.cross_entropy(model(X), Y).backward()
            one.step()
        if step == 1:
            kept = [one.state_dict() for one in pair]
            assert str(kept[0]) == str(kept[1])
            for one, other in zip(pair, reversed(kept), strict=True):
                one.load_state_dict(copy.deepcopy(other))
    assert same(*models_)


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad_is_torchs_own(to_none):
    model = make()
    one = optimizer(model.parameters(), TrainConfig())
    F.cross_entropy(model(X), Y).backward()
    one.zero_grad(to_none)
    assert all(p.grad is None if to_none else not p.grad.any() for p in model.parameters())


def test_step_hooks_run():
    model, seen = make(), []
    one = optimizer(model.parameters(), TrainConfig())
    one.register_step_pre_hook(lambda *_: seen.append("before"))
    handle = register_optimizer_step_post_hook(lambda *_: seen.append("after"))
    one.step()
    handle.remove()
    assert seen == ["before", "after"]


def test_training_does_not_import_torchs_compiler():
    """torch._dynamo takes 2 s to import, in every process that trains."""
    code = (
        "import sys, torch; from fedfuse.config.schema import TrainConfig; from fedfuse.train.training import train; "
        "train(torch.nn.Linear(2, 2), torch.ones(4, 2), None, lambda out, y, rows: out.sum(), TrainConfig(), (0,)); "
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_rows_name_examples_by_index():
    seen = []

    def by_row(logits, y, rows):
        assert torch.equal(y, Y[rows])
        assert torch.equal(logits, X[rows] @ model.weight.T + model.bias)
        seen.append(rows)
        return F.cross_entropy(logits, y)

    model = nn.Linear(6, 3)
    fit(model, loss=by_row, epochs=1)
    assert sorted(torch.cat(seen).tolist()) == list(range(N))


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_training_depends_on_its_arguments_alone(kind):
    config = TrainConfig(epochs=2, batch_size=8, lr=0.01, optimizer=kind)
    dropout = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.Linear(16, 3))
    ends = []
    for i in range(2):
        torch.manual_seed(i)
        state = torch.get_rng_state()
        ends.append(fit(copy.deepcopy(dropout), config=config)[0])
        assert torch.equal(torch.get_rng_state(), state)
    assert same(*ends)
    assert not same(ends[0], fit(copy.deepcopy(dropout), config=config, seed_parts=(1,))[0])
    assert all(p.grad is None for p in ends[0].parameters())


def test_it_learns():
    model, report = fit(epochs=30)
    assert report["loss"] < 0.5
    assert scores(predict(model, X), Y, 3)["accuracy"] > 0.95


def test_batchnorm_survives_a_tail_of_one_row():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    report = train(model, X[:33], Y[:33], cross_entropy, CONFIG, ("tail",), epochs=1)
    assert report["steps"] == 4
    assert model[1].num_batches_tracked.item() == 4


def test_nothing_to_train_on():
    model = make()
    before = copy.deepcopy(model)
    report = train(model, X[:0], Y[:0], cross_entropy, CONFIG, ())
    assert report["steps"] == 0
    assert math.isnan(report["loss"])
    assert math.isnan(fit(model, epochs=0)[1]["loss"])
    assert same(model, before)


def test_only_the_chosen_parameters_move():
    model, start = make(), make()
    fit(model, params=model.head.parameters())
    assert not torch.equal(model.head.weight, start.head.weight)
    assert torch.equal(model.body[1].weight, start.body[1].weight)
    assert all(p.requires_grad for p in model.parameters())
    model.body.requires_grad_(False)
    fit(model)
    assert torch.equal(model.body[1].weight, start.body[1].weight)
    assert not model.body[1].weight.requires_grad


def test_an_optimiser_can_be_kept():
    model = make()
    kept = optimizer(model.parameters(), CONFIG)
    fit(model, optimizer=kept, epochs=1)
    momentum = kept.state[model.head.weight]["momentum_buffer"].clone()
    fit(model, optimizer=kept, epochs=1, lr=0.02)
    assert kept.param_groups[0]["lr"] == 0.02
    assert not torch.equal(kept.state[model.head.weight]["momentum_buffer"], momentum)


def test_gradients_can_be_corrected_and_the_forward_replaced():
    model, start = make(), make()

    def stop(net):
        for p in net.parameters():
            p.grad.zero_()

    calls = []

    def forward(x):
        calls.append(len(x))
        return model.features(x), model(x)

    def on_pair(pair, y, rows):
        assert pair[0].shape == (len(rows), model.feature_dim)
        return F.cross_entropy(pair[1], y)

    fit(model, after_backward=stop, forward=forward, loss=on_pair)
    assert same(model, start)
    assert sum(calls) == 2 * N


def test_without_labels():
    model = make()
    report = train(model, X, None, lambda z, y, rows: z.square().mean() if y is None else 1 / 0, CONFIG, ())
    assert report["steps"] == 10
    assert model.training


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"optimizer": "sdg"}, "did you mean 'sgd'"),
        ({"lr": -0.1}, "train.lr"),
        ({"lr": float("nan")}, "train.lr"),
        ({"momentum": -1.0}, "train.momentum"),
        ({"weight_decay": -1.0}, "train.weight_decay"),
    ],
)
def test_optimiser_options(options, line):
    with pytest.raises(UserError, match=line):
        optimizer(make().parameters(), TrainConfig(**options))


def test_nothing_trainable_is_refused():
    with pytest.raises(UserError, match="no parameter"):
        fit(make().requires_grad_(False))


@pytest.mark.parametrize("micro_batch", [None, 3])
@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda logits, y, rows: None, "is None; a scalar tensor with gradients is needed"),
        (lambda logits, y, rows: 1.5, "is "),  # a part of a batch weighs its share of it
        (lambda logits, y, rows: (logits.sum(),), "is "),
        (lambda logits, y, rows: logits, r"a tensor of shape \(., 3\)"),
        (lambda logits, y, rows: logits.detach().sum(), "depends on nothing that is trained"),
    ],
)
def test_a_loss_that_has_no_gradients_is_named(loss, said, micro_batch):
    with pytest.raises(UserError, match=f"the loss of a batch .*{said}"):
        train(make(), X, Y, loss, CONFIG, (1,), micro_batch=micro_batch)


def test_other_errors_on_the_way_back_stay_what_they_are():
    def loss(logits, y, rows):
        logits.register_hook(lambda gradient: 1 / 0)
        return logits.sum()

    with pytest.raises(ZeroDivisionError):
        train(make(), X, Y, loss, CONFIG, (1,))
    weight = torch.ones(3, requires_grad=True)
    once = weight.sum() ** 2
    once.backward()
    with pytest.raises(RuntimeError, match="second time"):
        train(make(), X, Y, lambda logits, y, rows: once, CONFIG, (1,))


def test_labels_are_as_many_as_examples():
    for labels in (Y[:-1], torch.cat([Y, Y])):
        with pytest.raises(UserError, match=f"{len(X)} examples and {len(labels)} labels"):
            train(make(), X, labels, cross_entropy, CONFIG, (1,))


def test_predict_changes_nothing():
    model = make("resnet8_bn", (1, 8, 8)).train()
    model.layer1.eval()  # a part frozen on purpose
    x = torch.randn(9, 1, 8, 8)
    modes = [m.training for m in model.modules()]
    before = copy.deepcopy(model.state_dict())
    logits, z = predict(model, x, 4), predict(model, x, 4, features=True)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not logits.requires_grad
    assert z.shape == (9, model.feature_dim)
    model.eval()
    assert torch.allclose(logits, model(x), atol=1e-6)
    assert predict(model, x[:0]).shape == (0, 3)
    with pytest.raises(UserError, match="features"):
        predict(nn.Linear(1, 1), x, features=True)
    with pytest.raises(UserError, match="batch_size"):
        predict(model, x, 0)


def test_predict_restores_modes_after_an_error():
    model = make()
    with pytest.raises(RuntimeError):
        predict(model, torch.zeros(2, 5))
    assert all(m.training for m in model.modules())


def test_scores_by_hand():
    logits = torch.tensor([[2.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [2.0, 0.0, 0.0]])
    y = torch.tensor([0, 0, 0, 1])
    got = scores(logits, y, 3)
    assert got["accuracy"] == 0.5
    assert got["accuracy_macro"] == pytest.approx((2 / 3 + 0) / 2)  # class 2 is absent
    norm = math.log(math.exp(2) + 2)
    assert got["loss"] == pytest.approx((2 * (norm - 2) + 2 * norm) / 4, rel=1e-9)
    for few in (0, 1):
        assert all(math.isnan(value) for value in scores(logits[:few], y[:few], 3).values())


def test_overhead_over_a_bare_loop_is_small():
    """Not a benchmark: catches a loop that turned several times slower."""
    torch.set_num_threads(1)
    model = make()
    bare = make()
    x, y = X.repeat(30, 1), Y.repeat(30)
    step = torch.optim.SGD(bare.parameters(), lr=0.1, momentum=0.9)

    def loop():
        for rows in torch.randperm(len(x)).split(8):
            step.zero_grad()
            F.cross_entropy(bare(x[rows]), y[rows]).backward()
            step.step()

    def best(run):
        times = []
        for _ in range(5):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return min(times)

    ours = best(lambda: train(model, x, y, cross_entropy, CONFIG, ("speed",), epochs=1))
    assert ours < 3 * best(loop)


def test_bf16_trains_float32_weights_to_nearly_the_same():
    full, _ = fit()
    config = TrainConfig(epochs=2, batch_size=8, lr=0.1, precision="bf16")
    seen = []

    def loss(logits, y, rows):
        seen.append(logits.dtype)
        return F.cross_entropy(logits, y)

    mixed, told = fit(config=config, loss=loss)
    again, _ = fit(config=config)
    assert set(seen) == {torch.float32}
    assert all(p.dtype == torch.float32 for p in mixed.parameters())
    assert same(mixed, again)
    assert not same(mixed, full)
    for a, b in zip(mixed.parameters(), full.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=0.03, rtol=0.1)
    assert math.isfinite(told["loss"])


def test_many_predictions_are_scored_piece_by_piece(monkeypatch):
    """Of 200,000 examples of a thousand classes the float64 copies took 3 GB beside the predictions' 0.8."""
    generator = torch.Generator().manual_seed(0)
    logits, y = torch.randn(300, 7, generator=generator), torch.randint(0, 7, (300,), generator=generator)
    logits[5, 2] = float("inf")
    undefined = scores(logits, y, 7)
    whole = scores(logits[6:], y[6:], 7)
    largest = []

    def entropy(part, *more, **named):
        largest.append(part.numel())
        return F.cross_entropy(part, *more, **named)

    monkeypatch.setattr(scored_by, "NUMBERS", 100)
    monkeypatch.setattr(scored_by, "F", SimpleNamespace(cross_entropy=entropy))
    pieces = scores(logits[6:], y[6:], 7)
    assert pieces == pytest.approx(whole, rel=1e-12)
    assert pieces["accuracy"] == whole["accuracy"]
    assert max(largest) <= 100
    assert scores(logits, y, 7)["undefined"] == undefined["undefined"] == pytest.approx(1 / 300)
