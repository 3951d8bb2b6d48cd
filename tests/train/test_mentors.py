"""Mentors in float64, against NumPy: who ranks where, who teaches whom and how hard, and the loss of a student."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedfuse.train import mentors
from fedfuse.train.losses import loss
from fedfuse.wire.records import InvalidArrays, Scope, validate
from tests.halves import random_labels

Y = torch.tensor([2, 0, 1, 1, 2])


def outputs() -> torch.Tensor:
    """Four models' probabilities of three classes on five rows, unequally good: none, some, most, hardly any of it."""
    p = torch.stack([random_labels(5, 3, seed=i) for i in range(4)])
    right = torch.nn.functional.one_hot(Y, 3).double()
    share = torch.tensor([0.0, 0.3, 0.8, 0.05], dtype=torch.float64)[:, None, None]
    return share * right + (1 - share) * p


def by_hand(p: np.ndarray, worth: np.ndarray) -> np.ndarray:
    ce = np.array([np.mean([-np.log(q[i, c]) for i, c in enumerate(Y)]) for q in p])
    r = worth * np.exp(-ce)
    return r / r.sum() * (len(p) - 1)


@pytest.mark.parametrize("worth", [None, [1.0, 0.5, 0.25, 1.0]])
def test_standing_against_numpy(worth: list[float] | None) -> None:
    p = outputs()
    w = mentors.standing(p.log(), Y, None if worth is None else torch.tensor(worth, dtype=torch.float64))
    np.testing.assert_allclose(w.numpy(), by_hand(p.numpy(), np.array(worth or np.ones(4))), rtol=1e-12)
    assert w.sum().item() == pytest.approx(3, abs=1e-12)
    shifted = mentors.standing(p.log() + 7, Y)  # logits are probabilities up to a shift
    torch.testing.assert_close(shifted, mentors.standing(p.log(), Y), rtol=1e-12, atol=0)


def test_a_probability_of_zero_ranks_last_and_breaks_nothing() -> None:
    p = outputs()
    p[1] = torch.tensor([1.0, 0.0, 0.0])
    w = mentors.standing(p.log(), Y)
    assert w[1] == 0
    assert w.sum().item() == pytest.approx(3)
    assert bool(torch.isfinite(mentors.standing(p[1:2].expand(3, -1, -1).log(), Y)).all())


def test_only_those_no_worse_teach() -> None:
    w = torch.tensor([0.6, 1.2, 0.6, 0.6], dtype=torch.float64)
    want = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 1], [1, 1, 1, 0]], dtype=torch.bool)
    assert torch.equal(mentors.mentors(w), want)
    able = torch.tensor([True, False, True, True])
    assert torch.equal(mentors.mentors(w, able), want & able)


def test_the_wider_the_gap_the_warmer() -> None:
    tau = mentors.temperatures(torch.tensor([0.5, 2.0, 0.5], dtype=torch.float64))
    torch.testing.assert_close(tau, torch.tensor([[1.0, 10.0, 1.0], [10.0, 1.0, 10.0], [1.0, 10.0, 1.0]]).double())


def test_a_students_loss_against_numpy() -> None:
    """The second best of four: one mentor, its own CE by its own standing; rows in another order than taught."""
    p, w = outputs(), mentors.standing(outputs().log(), Y)
    n = int(w.argsort()[-2])
    taught = {k: v.double() for k, v in mentors.lesson(n, p, w).items()}
    assert len(taught["p"]) == 1
    z, rows = random_labels(3, 3, seed=9).log() * 2, torch.tensor([4, 0, 3])
    found = mentors.objective(taught, lambda name, **o: loss(name, **o))(z, Y[rows], rows)
    s, best = z.numpy(), int(w.argmax())
    tau = 1 + 12 * (w[best] - w[n]).item() / w[best].item()
    log_q = lambda a: a - np.log(np.exp(a).sum(1, keepdims=True))  # noqa: E731
    t, q = np.log(p[best].numpy()[rows]) / tau, log_q(s / tau)
    t = log_q(t)
    kl = tau**2 * (np.exp(t) * (t - q)).sum(1).mean()
    ce = -log_q(s)[np.arange(3), Y[rows].numpy()].mean()
    assert found.item() == pytest.approx(w[n].item() * ce + w[best].item() * kl, rel=1e-6)  # w travels as float32


def test_equally_good_models_teach_each_other_alike_and_the_best_only_hears_the_labels() -> None:
    p = outputs()
    w = torch.full((4,), 0.75, dtype=torch.float64)
    taught = {k: v.double() for k, v in mentors.lesson(1, p, w).items()}
    assert taught["temperature"].tolist() == [1, 1, 1]
    z, rows = random_labels(5, 3, seed=5).log(), torch.arange(5)
    ce = torch.nn.functional.cross_entropy(z, Y)
    kl = loss("kl")
    want = 0.75 * (ce + sum(kl.from_probabilities(z, p[m].float().double()) for m in (0, 2, 3)))
    torch.testing.assert_close(mentors.objective(taught, lambda name, **o: loss(name, **o))(z, Y, rows), want)
    alone = mentors.lesson(2, p, mentors.standing(p.log(), Y))
    assert alone["p"].shape == (0, 5, 3)
    own = mentors.objective(alone, loss)(z, Y, rows)
    torch.testing.assert_close(own, alone["own"].double()[0] * ce)


def test_softened_labels_are_hardened_again() -> None:
    """Shared at T = 10, taught at τ: the mentor at τ, not at 10·τ."""
    p, w = outputs(), mentors.standing(outputs().log(), Y)
    worst = int(w.argmin())
    plain = {k: v.double() for k, v in mentors.lesson(worst, p, w).items()}
    soft = plain | {"p": (plain["p"].log() / 10).softmax(-1)}
    z, rows = random_labels(5, 3, seed=3).log(), torch.arange(5)
    make = lambda name, **o: loss(name, **o)  # noqa: E731
    torch.testing.assert_close(
        mentors.objective(soft, make, softened=10.0)(z, Y, rows), mentors.objective(plain, make)(z, Y, rows)
    )


def test_a_lesson_that_does_not_fit_is_refused() -> None:
    p, w = outputs(), mentors.standing(outputs().log(), Y)
    taught, scope = mentors.lesson(0, p, w), Scope({"clients": 4, "subset": 5, "classes": 3}, {})
    validate("lesson", taught, mentors.lessons(scope))
    with pytest.raises(InvalidArrays, match="expected"):
        validate("lesson", taught, mentors.lessons(Scope({"clients": 2, "subset": 5, "classes": 3}, {})))
    with pytest.raises(InvalidArrays, match="has 0 weights"):
        mentors.objective(taught | {"weight": taught["weight"][:0]}, loss)
    with pytest.raises(InvalidArrays, match="below 1"):
        mentors.objective(taught | {"temperature": taught["temperature"] * 0}, loss)
