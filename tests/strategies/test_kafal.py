"""KAFAL: its score, its losses and its loop in closed form, and the defects of the released code."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedfuse.errors import UserError
from fedfuse.strategies import kafal
from tests.contract.test_matrix import Crash
from tests.differences import assert_same
from tests.federations import federation, play
from tests.halves import client, random_labels, server, shares, take

COUNTS = torch.tensor([7, 0, 2, 1])  # class 1 has no label
CYCLE = ("labels.rounds=1", "labels.budget=0.1")


def logits(n: int, seed: int, classes: int = 4) -> torch.Tensor:
    return 3 * torch.randn(n, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def skewed(z: torch.Tensor) -> list[float]:
    """softmax(z + log c) of one row, class by class."""
    weight = [int(c) * math.exp(float(v)) for c, v in zip(COUNTS, z, strict=True)]
    return [w / sum(weight) for w in weight]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def test_the_score_is_the_mean_of_both_divergences_under_the_clients_prior() -> None:
    local, common = logits(6, 1), logits(6, 2)
    wanted = []
    for a, b in zip(local, common, strict=True):
        p, q = skewed(a), skewed(b)
        wanted.append((kl(p, q) + kl(q, p)) / 2)
    found = kafal.ksas(local, common, COUNTS)
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found, kafal.ksas(common, local, COUNTS), rtol=1e-12, atol=1e-13)
    plain = kafal.ksas(local, common, torch.ones(4, dtype=torch.int64))
    assert not torch.equal(found.argsort(), plain.argsort())  # the prior decides who is asked about


def test_a_class_without_labels_neither_counts_nor_breaks_the_score() -> None:
    """Defect (iii): the logarithm of 0."""
    local, common = logits(5, 3), logits(5, 4)
    found = kafal.ksas(local, common, COUNTS)
    assert bool(torch.isfinite(found).all())
    local[:, 1], common[:, 1] = 50.0, -50.0
    torch.testing.assert_close(kafal.ksas(local, common, COUNTS), found, rtol=0, atol=0)
    assert torch.equal(
        kafal.ksas(local, common, torch.zeros(4, dtype=torch.int64)), torch.zeros(5, dtype=torch.float64)
    )


def test_the_balanced_loss_and_its_gradient() -> None:
    z, y = logits(5, 5).requires_grad_(), torch.tensor([0, 2, 3, 0, 2])
    value = kafal.balanced(z, y, COUNTS)
    p = torch.tensor([skewed(row) for row in z.detach()], dtype=torch.float64)
    torch.testing.assert_close(value, -p[range(5), y].log().mean(), rtol=1e-12, atol=1e-13)
    (gradient,) = torch.autograd.grad(value, z)
    torch.testing.assert_close(gradient, (p - F.one_hot(y, 4)) / 5, rtol=1e-12, atol=1e-13)
    assert torch.equal(gradient[:, 1], torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(kafal.balanced(z, y, 3 * torch.ones(4)), F.cross_entropy(z, y), rtol=1e-12, atol=1e-13)


def test_rare_classes_weigh_more_and_absent_ones_nothing() -> None:
    torch.testing.assert_close(kafal.rarity(COUNTS), torch.tensor([2 / 23, 0, 7 / 23, 14 / 23]), rtol=1e-6, atol=0)
    assert torch.equal(kafal.rarity(torch.zeros(3, dtype=torch.int64)), torch.zeros(3))


def test_the_compensatory_loss_weighs_each_mixture_by_its_own_partner() -> None:
    """Defect (i): the released code mixes the whole batch with one and the same example."""
    student, teacher = logits(5, 6), logits(5, 7)
    beta = torch.tensor([0.1, 0.9, 0.4, 0.6, 0.3], dtype=torch.float64)
    partner, gamma = torch.tensor([3, 0, 4, 2, 1]), torch.tensor([0.1, 0.0, 0.3, 0.6], dtype=torch.float64)
    said, total = teacher.argmax(1), 0.0
    assert len(said.unique()) > 2
    for i in range(5):
        weight = beta[i] * gamma[said[i]] + (1 - beta[i]) * gamma[said[partner[i]]]
        p, q = teacher[i].softmax(0), student[i].softmax(0)
        total += float(weight * (p * (p / q).log()).sum() / 4) / 5
    found = kafal.compensatory(student, teacher, beta, partner, gamma)
    assert float(found) == pytest.approx(total, rel=1e-12)
    assert float(kafal.compensatory(student, teacher, beta, torch.full((5,), 2), gamma)) != pytest.approx(total)
    assert float(kafal.compensatory(student, student, beta, partner, gamma)) == pytest.approx(0, abs=1e-15)


def test_two_steps_on_both_losses() -> None:
    """Plain SGD by hand: w ← w − η·∇(L_bal + λ·L_comp); in the first step z^k = z^s and L_comp has no gradient."""
    plain = ("train.momentum=0", "train.batch_size=1000", "train.lr=0.1", "train.epochs=2", "strategy.compensation=50")
    half = client("kafal", *plain, round=2)
    initial = half.workspace.initial(half.architecture)
    start = {name: v + 0.1 * torch.sin(torch.arange(v.numel()).reshape(v.shape)) for name, v in initial.items()}
    take(half, "model", **start)
    counts, pool, draw = half.counts, half.unlabelled, half.generator("mixtures")
    own, losses = dict(start), []
    for _ in range(2):
        x = pool[torch.randperm(len(pool), generator=draw)]
        partner = torch.randperm(len(pool), generator=draw)
        beta = torch.rand(len(pool), 3, generator=draw).median(1).values
        mixed = torch.stack([b * x[i] + (1 - b) * x[j] for i, (b, j) in enumerate(zip(beta, partner, strict=True))])
        half.load(start)
        teacher = half.model(mixed).detach()
        half.load(own)
        value = kafal.balanced(half.model(half.x), half.y, counts)
        value = value + 50 * kafal.compensatory(half.model(mixed), teacher, beta, partner, kafal.rarity(counts))
        half.model.zero_grad()
        value.backward()
        own = {name: (p - 0.1 * p.grad).detach().clone() for name, p in half.model.named_parameters()}
        losses.append(float(value.detach()))
    half.load(start)
    metrics = half.fit()
    assert metrics["num-examples"] == len(half.y) == math.ceil(half.scenario.examples(0) / 10)
    assert metrics["loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    for name, p in half.model.named_parameters():
        torch.testing.assert_close(p.detach(), own[name], rtol=1e-5, atol=1e-6)


# The rules of KAFAL in NumPy and float64, written from its formulae alone; c (C,), logits (B × C).


def np_softmax(z: np.ndarray, c: np.ndarray | float = 1.0) -> np.ndarray:
    e = c * np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def np_kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / np.where(p > 0, q, 1)), 0).sum(1)


def np_gamma(c: np.ndarray) -> np.ndarray:
    inverse = np.array([c.sum() / k if k else 0 for k in c])
    return inverse / inverse.sum()


def np_weights(teacher: np.ndarray, beta: np.ndarray, partner: np.ndarray, c: np.ndarray) -> np.ndarray:
    seen = np_gamma(c)[teacher.argmax(1)]
    return np.array([b * seen[i] + (1 - b) * seen[j] for i, (b, j) in enumerate(zip(beta, partner, strict=True))])


def np_losses(z: np.ndarray, y: np.ndarray, c: np.ndarray, mixed: tuple[np.ndarray, ...]) -> tuple[float, float]:
    """L_bal and L_comp."""
    student, teacher, beta, partner = mixed
    weight = np_weights(teacher, beta, partner, c)
    compensatory = (weight * np_kl(np_softmax(teacher), np_softmax(student)) / len(c)).mean()
    return -np.log(np_softmax(z, c)[np.arange(len(y)), y]).mean(), compensatory


@pytest.mark.parametrize("counts", [[7, 0, 2, 1], [0, 0, 3, 0], [5, 5, 5, 5], [4000, 1, 0, 12]])
def test_score_and_losses_against_numpy_in_float64(counts: list[int]) -> None:
    c, seen = np.array(counts), torch.tensor(counts)
    z, student, teacher, common = (logits(9, seed) for seed in (11, 12, 13, 14))
    y = torch.tensor([k for k in range(4) if counts[k]] * 9)[:9]
    beta = torch.rand(9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    partner = torch.tensor([4, 0, 1, 8, 6, 2, 3, 5, 7])
    mixed = (student.numpy(), teacher.numpy(), beta.numpy(), partner.numpy())
    balanced, compensatory = np_losses(z.numpy(), y.numpy(), c, mixed)
    gamma = torch.from_numpy(np_gamma(c))
    assert float(kafal.balanced(z, y, seen)) == pytest.approx(balanced, rel=1e-12, abs=1e-15)
    assert float(kafal.compensatory(student, teacher, beta, partner, gamma)) == pytest.approx(compensatory, rel=1e-12)
    torch.testing.assert_close(kafal.rarity(seen).double(), gamma, rtol=1e-6, atol=0)
    p, q = np_softmax(z.numpy(), c), np_softmax(common.numpy(), c)
    wanted = torch.from_numpy((np_kl(p, q) + np_kl(q, p)) / 2)
    torch.testing.assert_close(kafal.ksas(z, common, seen), wanted, rtol=1e-11, atol=1e-14)


def test_three_steps_of_a_linear_model_against_numpy() -> None:
    """A client's whole update, its gradients worked out by hand: none of the module's rules is used here."""
    words = ("train.momentum=0", "train.batch_size=1000", "train.lr=0.5", "train.epochs=3", "strategy.compensation=30")
    half = client("kafal", *words, "model=custom", "model.build=tests.halves:featureless", round=2)
    draw = torch.Generator().manual_seed(5)
    start = {name: torch.randn(v.shape, generator=draw) / 4 for name, v in half.weights().items()}
    take(half, "model", **start)
    flat = lambda x: x.flatten(1).double().numpy()  # noqa: E731
    x, y, pool, draw = flat(half.x), half.y.numpy(), flat(half.unlabelled), half.generator("mixtures")
    (w, b), c = (v.double().numpy() for v in start.values()), np.bincount(half.y.numpy(), minlength=half.classes)
    assert 0 in c
    w0, b0, n, told = w, b, len(pool), []
    for _ in range(3):
        rows, partner = (torch.randperm(n, generator=draw).numpy() for _ in range(2))
        beta = np.median(torch.rand(n, 3, generator=draw).numpy(), 1).astype(float)
        mixed = beta[:, None] * pool[rows] + (1 - beta[:, None]) * pool[rows][partner]
        z, student, teacher = x @ w.T + b, mixed @ w.T + b, mixed @ w0.T + b0
        both = np_losses(z, y, c, (student, teacher, beta, partner))
        told.append(both[0] + 30 * both[1])
        first = (np_softmax(z, c) - np.eye(len(c))[y]) / len(y)
        second = np_weights(teacher, beta, partner, c)[:, None] * (np_softmax(student) - np_softmax(teacher))
        second *= 30 / (len(c) * n)
        w, b = w - 0.5 * (first.T @ x + second.T @ mixed), b - 0.5 * (first.sum(0) + second.sum(0))
    assert half.fit()["loss"] == pytest.approx(np.mean(told), rel=1e-5)
    for found, wanted in zip(half.weights().values(), (w, b), strict=True):
        torch.testing.assert_close(found.double(), torch.from_numpy(wanted), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("round", "restart", "taught"), [(1, True, False), (2, True, True), (3, True, False), (3, False, True)]
)
def test_no_teacher_where_a_cycle_begins_anew(round: int, restart: bool, taught: bool) -> None:
    trained = []
    for weight in (0, 50):
        words = (f"strategy.compensation={weight}", f"strategy.restart={restart}", "labels.rounds=2", "train.epochs=3")
        half = client("kafal", *words, round=round)
        take(half, "model", **half.workspace.initial(half.architecture))
        half.fit()
        trained.append(half.weights())
    assert all(torch.equal(v, trained[1][name]) for name, v in trained[0].items()) != taught


def test_three_uniform_numbers_have_the_median_that_is_wanted() -> None:
    draws = torch.rand(200_000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).median(1).values
    for power, moment in ((1, 1 / 2), (2, 3 / 10), (3, 1 / 5)):  # of Beta(2, 2)
        assert float((draws**power).mean()) == pytest.approx(moment, abs=0.003)


def test_entropy_and_core_set() -> None:
    p = random_labels(4, 5)
    torch.testing.assert_close(kafal.entropy(p.log()), -(p * p.log()).sum(1), rtol=1e-12, atol=1e-13)
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [9.0, 0.0], [8.5, 0.0], [0.0, 4.0]], dtype=torch.float64)
    centres = torch.tensor([[0.0, 0.1]], dtype=torch.float64)
    assert kafal.farthest(points, centres, 4).tolist() == [2, 4, 1, 3]  # 8.5 is near 9, which is taken
    assert kafal.farthest(points, centres[:0], 2).tolist() == [0, 2]


def answers(half: kafal.KAFALClient):
    """A client at the end of its first cycle: models ω_k and Ω, and their logits on the unlabelled pool."""
    initial = half.workspace.initial(half.architecture)
    take(half, "model", **{name: value * 1.5 for name, value in initial.items()})
    common = half.predict(half.unlabelled)
    half.state["local"] = {name: value.flip(0) * 2 for name, value in initial.items()}
    half.state["trained"] = 1
    half.load(half.state["local"])
    local, features, centres = half.predict(half.unlabelled), half.embed(half.unlabelled), half.embed(half.x)
    half.load(half.start)
    return local.double(), common.double(), features, centres


@pytest.mark.parametrize("rule", ["ksas", "entropy", "coreset", "random"])
def test_the_labels_asked_for_are_the_rules_own(rule: str) -> None:
    half = client("kafal", *CYCLE, f"strategy.acquisition={rule}", round=1)
    local, common, features, centres = answers(half)
    size, before = half.allowance, half.pools.unlabelled
    assert size == math.ceil(half.scenario.examples(0) / 10)
    wanted = {
        "ksas": kafal.ksas(local, common, half.counts).topk(size).indices,
        "entropy": (-(local.softmax(1) * local.log_softmax(1)).sum(1)).topk(size).indices,
        "coreset": kafal.farthest(features, centres, size),
        "random": torch.randperm(len(local), generator=half.generator("acquisition"))[:size],
    }[rule]
    assert half.annotate() == {}
    assert set(half.state["annotated"].tolist()) == set(before[wanted].tolist())
    assert set(half.state) == {"annotated"}  # the local model is of no more use
    assert not set(half.pools.unlabelled.tolist()) & set(half.state["annotated"].tolist())  # defect (ii)


def test_a_client_that_did_not_train_at_the_cycles_end_waits() -> None:
    half = client("kafal", *CYCLE, round=2)
    answers(half)  # its model is of round 1
    assert half.annotate() == {}
    assert "annotated" not in half.state


def test_a_cycle_begins_from_the_initial_weights_or_goes_on() -> None:
    begins = (
        ("true", 2, 1, True),
        ("false", 2, 1, False),
        ("true", 2, 5, False),
        ("true", 4, 5, False),
        ("true", 6, 5, True),
    )
    for restart, round, rounds, fresh in begins:
        half = client("kafal", f"labels.rounds={rounds}", f"strategy.restart={restart}", "train.epochs=0", round=round)
        initial = half.workspace.initial(half.architecture)
        take(half, "model", **{name: value + 1 for name, value in initial.items()})
        half.fit()
        for name, value in half.weights().items():
            assert torch.equal(value, initial[name] + (0 if fresh else 1))
        assert ("local" in half.state) == (rounds == 1)


def test_clients_weigh_by_their_labels() -> None:
    built = server("kafal")
    model = built.workspace.initial(built.architecture)
    sent = [{"model": {name: torch.full_like(v, float(i)) for name, v in model.items()}} for i in range(3)]
    built.fuse(shares(built, *sent, examples=[1, 2, 7]))
    assert all(torch.allclose(v, torch.full_like(v, 1.6)) for v in built.model.values())


def test_with_all_labels_and_plain_cross_entropy_it_is_fedavg() -> None:
    words = ("rounds=3", "participation=0.7")
    same = play("kafal", "labels.initial=1", "strategy.update=fedavg", *words)
    other = play("fedavg", *words)
    assert same.digest == other.digest
    assert same.totals == other.totals


def test_all_clients_take_part_where_a_cycle_ends() -> None:
    built = server("kafal", "participation=0.4", "labels.rounds=2")
    assert [len(built.plan(r)) for r in (1, 2, 3, 4)] == [1, 3, 1, 3]
    assert [built.phases(r) for r in (1, 2)] == [("train",), ("train", "annotate")]


@pytest.mark.parametrize("rule", ["ksas", "coreset"])
def test_cycles_resume_travel_and_turn_round(rule: str, tmp_path: Path) -> None:
    words = (*CYCLE, f"strategy.acquisition={rule}", "rounds=3")
    plain = play("kafal", *words)
    assert_same(plain, play("kafal", *words, reverse=True))
    assert_same(plain, play("kafal", *words, grid="serial"))
    where = tmp_path / "run"
    with federation("kafal", *words, path=where, callbacks=(Crash(1),)) as (built, _), pytest.raises(KeyboardInterrupt):
        built.run()
    assert_same(plain, play("kafal", *words, path=where))


def test_the_annotation_costs_no_bytes_but_the_last_ones_model() -> None:
    """The new global model comes before the question, and not again for the next round."""
    often, never = play("kafal", *CYCLE, "rounds=3"), play("kafal", "labels.rounds=9", "rounds=3")
    model = never.totals["up_bytes"] // 3
    assert often.totals["up_bytes"] == never.totals["up_bytes"]
    assert often.totals["down_bytes"] == never.totals["down_bytes"] + model


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(UserError, match="needs models with features"):
        play("kafal", "strategy.acquisition=coreset", "model=custom", "model.build=tests.halves:featureless")
    assert play("kafal", *CYCLE, "model=custom", "model.build=tests.halves:featureless").digest
