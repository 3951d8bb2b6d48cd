"""Steps, learning rate over the run, clipping, moments and parts of batches: by closed forms, and in whole runs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fedfuse.config.compose import compose
from fedfuse.config.schema import TrainConfig
from fedfuse.errors import UserError
from fedfuse.train import schedule
from fedfuse.train.task import IGNORED, task_loss
from fedfuse.train.training import optimizer, train
from tests.federations import federation, play
from tests.halves import client

BASE = (
    "data=digits", "data.limit=90", "data.test_limit=10", "partition=iid", "clients=2", "rounds=2", "model=mlp_small",
    "transfer.size=0", "train.epochs=1", "train.batch_size=16", "evaluate.every=2", "runtime.name=inline",
)  # fmt: skip


class Words(nn.Module):
    """A causal model of one place: enough to tell weighing by rows from weighing by tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(7, 7)

    def forward(self, x):
        return self.table(x)


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(0, 7, (6, 9), generator=draw)
    y = x.clone()
    for row, length in enumerate((2, 9, 4, 3, 7, 2)):
        y[row, length:] = IGNORED
    return x, y


def losses(out, y, rows):
    return task_loss(out, y)


@pytest.mark.parametrize("micro", [2, 3, 4, 5])
def test_parts_of_a_batch_make_the_batchs_gradient_also_where_texts_differ_in_length(micro: int) -> None:
    x, y = texts()
    found = []
    for size, trim in ((None, False), (micro, False), (micro, True)):
        model = Words().double()
        result = train(
            model, x, y, losses, TrainConfig(batch_size=6, lr=1.0, momentum=0), (0,), micro_batch=size, trim=trim
        )
        found.append((model.table.weight.detach(), result["loss"]))
    for weight, loss in found[1:]:
        assert (weight - found[0][0]).abs().max() < 1e-12
        assert abs(loss - found[0][1]) < 1e-12


def test_a_part_in_which_nothing_counts_adds_nothing() -> None:
    x, y = texts()
    y[:] = IGNORED
    y[0, :2] = x[0, :2]
    model = Words().double()
    result = train(model, x, y, losses, TrainConfig(batch_size=6, lr=1.0), (0,), micro_batch=2)
    assert math.isfinite(result["loss"])
    assert bool(model.table.weight.isfinite().all())


def test_the_step_is_as_long_as_the_clipped_gradient() -> None:
    x, y = texts()
    for clip in (1e-3, 1e9):
        model = Words().double()
        before = model.table.weight.detach().clone()
        whole = torch.autograd.grad(task_loss(model(x), y), model.table.weight)[0]
        train(model, x, y, losses, TrainConfig(epochs=1, batch_size=6, lr=0.5, momentum=0), (0,), clip=clip)
        step = (before - model.table.weight.detach()).norm() / 0.5
        assert torch.allclose(step, whole.norm().clamp(max=clip), rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 3, 4, 7])
def test_so_many_steps_over_as_many_passes_as_they_take(steps: int) -> None:
    x, y = texts()
    seen: list[int] = []
    result = train(
        Words(), x, y, lambda out, y, rows: seen.extend(rows.tolist()) or task_loss(out, y), TrainConfig(batch_size=2),
        (0,), max_steps=steps,
    )  # fmt: skip
    assert result["steps"] == steps
    assert len(seen) == 2 * steps
    assert sorted(seen[:6]) == (list(range(6)) if steps >= 3 else sorted(seen))  # a pass is whole before the next


def test_a_bound_on_steps_is_on_private_examples_however_they_are_named() -> None:
    half = client("fedavg", "train.max_steps=5", "train.epochs=9", "train.batch_size=1000")
    half.begin("train")
    assert half.train()["steps"] == half.train(x=half.x, y=half.y)["steps"] == 5
    assert half.train(x=half.x.clone(), y=half.y)["steps"] == 9  # what else it learns from, such as a transfer set


def test_the_rate_over_a_run() -> None:
    linear = TrainConfig(schedule="linear", warmup=0.2, lr_floor=0.1)
    assert schedule.factor(linear, 0.0, 0.05) == pytest.approx(0.25)
    assert schedule.factor(linear, 0.2, 0.3) == 1
    assert schedule.factor(linear, 0.6, 0.7) == pytest.approx(0.1 + 0.9 * 0.5)
    assert schedule.factor(linear, 1.0, 1.0) == pytest.approx(0.1)
    cosine = TrainConfig(schedule="cosine")
    assert [schedule.factor(cosine, t, t) for t in (0.0, 0.5, 1.0)] == pytest.approx([1, 0.5, 0])
    assert schedule.factor(cosine, 0.25, 0.3) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert schedule.over(TrainConfig(), (0, 1)) is None
    warm = schedule.over(TrainConfig(warmup=0.5), (0.0, 0.25))
    assert warm is not None
    assert [warm(k, 2) for k in range(2)] == pytest.approx([0.25, 0.5])
    late = schedule.over(TrainConfig(warmup=0.5), (0.5, 1.0))
    assert late is not None
    assert late(0, 3) == 1


def test_the_rate_is_put_back_and_never_kept() -> None:
    x, y = texts()
    model = Words()
    made = optimizer(model.parameters(), TrainConfig(lr=0.5))
    rates: list[float] = []
    config = TrainConfig(epochs=1, lr=0.5, batch_size=2)
    train(model, x, y, losses, config, (0,), optimizer=made, rate=lambda k, steps: (k + 1) / steps,
          after_step=lambda done, planned: rates.append(made.param_groups[0]["lr"]))  # fmt: skip
    assert rates == pytest.approx([0.5 / 3, 1 / 3, 0.5])
    assert made.param_groups[0]["lr"] == 0.5


def test_moments_of_adam() -> None:
    model = Words()
    assert optimizer(model.parameters(), TrainConfig(optimizer="adamw", betas=[0.5, 0.6])).defaults["betas"] == (
        0.5,
        0.6,
    )
    assert optimizer(model.parameters(), TrainConfig(optimizer="adam")).defaults["betas"] == (0.9, 0.999)


WORDS = [
    ("train.max_steps=1",), ("train.max_steps=5",), ("train.schedule=linear",), ("train.schedule=cosine",),
    ("train.warmup=0.5",), ("train.schedule=linear", "train.lr_floor=0.5"), ("train.clip=0.01",),
]  # fmt: skip


def test_every_key_is_heard_and_none_depends_on_where_a_run_stopped(tmp_path) -> None:
    from tests.contract.test_matrix import Crash

    digests = [play("fedavg", *words, base=BASE).digest for words in ((), *WORDS)]
    assert len(set(digests)) == len(digests)
    assert play("fedavg", "train.max_steps=2", base=BASE).digest == digests[0]  # two batches are a pass
    assert play("fedavg", "train.clip=1e9", base=BASE).digest == digests[0]
    schedule_of = ("train.schedule=linear", "train.warmup=0.2")
    crashed = federation("fedavg", *schedule_of, base=BASE, path=tmp_path / "run", callbacks=(Crash(1),))
    with crashed as (again, _), pytest.raises(KeyboardInterrupt):
        again.run()
    resumed = play("fedavg", *schedule_of, base=BASE, path=tmp_path / "run").digest
    assert resumed == play("fedavg", *schedule_of, base=BASE).digest
    adam = [
        play("fedavg", "train.optimizer=adam", *words, base=BASE).digest for words in ((), ("train.betas=[0.5,0.6]",))
    ]
    assert adam[0] != adam[1]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("train.max_steps=0", "train.max_steps=0: allowed is at least 1"),
        ("train.micro_batch=0", "train.micro_batch=0: allowed is at least 1"),
        ("train.schedule=step", "train.schedule=step"),
        ("train.warmup=1", "train.warmup=1"),
        ("train.lr_floor=2", "train.lr_floor=2"),
        ("train.clip=0", "train.clip=0"),
        ("train.betas=[0.9]", "train.betas"),
        ("train.betas=[0.5,0.5]", "train.betas=.* does nothing here: it goes with train.optimizer=adam|adamw"),
    ],
)
def test_what_is_not_allowed(word: str, said: str) -> None:
    with pytest.raises(UserError, match=said.replace("|", r"\|")):
        compose((word,))


@pytest.mark.parametrize("word", ["train.clip=1", "train.micro_batch=2"])
def test_privacy_has_its_own_clip_and_parts(word: str) -> None:
    with pytest.raises(UserError, match="no privacy of examples"):
        compose((word, "privacy.epsilon=1"))


def test_scaffolds_printed_variate_asks_for_one_rate() -> None:
    for word in ("train.schedule=linear", "train.clip=1", "train.warmup=0.1"):
        with pytest.raises(UserError, match="η must be one number"):
            play("scaffold", "strategy.variate=difference", word, base=BASE)


def test_steps_and_rate_under_privacy() -> None:
    pytest.importorskip("opacus", reason="the extra `privacy` is not installed")
    base = (*BASE, "privacy.noise=1", "rounds=1")
    some = play("fedavg", "train.max_steps=3", base=base)
    assert some.digest != play("fedavg", "train.max_steps=3", "train.schedule=linear", base=base).digest
    assert some.digest != play("fedavg", base=base).digest
