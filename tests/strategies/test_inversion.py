"""DENSE and Co-Boosting: their losses, weights and perturbations in closed form; the pool; what was chosen on test."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fedfuse.families import inversion, synthesis
from fedfuse.families.one_shot import Ensemble
from fedfuse.strategies import coboosting
from tests.federations import play
from tests.halves import server, shares, wake

BOTH = ("dense", "coboosting")


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kl(d: torch.Tensor, s: torch.Tensor) -> float:
    return float((d.softmax(0) * (d.log_softmax(0) - s.log_softmax(0))).sum())


def asked(name: str, *words: str):
    """A server half, and the ensemble of three random models of unequal scale."""
    strategy = server(name, *words)
    draw, ensemble = torch.Generator().manual_seed(3), Ensemble(strategy.workspace)
    for k in range(3):
        noise = {n: (k + 1) * 0.2 * torch.randn(v.shape, generator=draw) for n, v in strategy.model.items()}
        ensemble.add("mlp_small", {n: v + noise[n] for n, v in strategy.model.items()})
    return strategy, ensemble


# --- what both are made of ----------------------------------------------------------------------------------


def test_an_ensemble_says_what_its_models_say_and_leads_gradients_to_inputs_alone() -> None:
    strategy, ensemble = asked("dense")
    x = strategy.workspace.tensors("test")[0][:5].clone().requires_grad_()
    found = ensemble.logits(x)
    for k, (name, arrays) in enumerate(ensemble.members):
        own = strategy.workspace.loaded(name, arrays).eval()
        torch.testing.assert_close(found[k], own(x), rtol=1e-6, atol=1e-6)
    found.sum().backward()
    assert bool(x.grad.any())
    assert all(p.grad is None for net in ensemble.networks.values() for p in net.parameters())
    mixed = inversion.mixture(found, torch.tensor([0.5, 0.0, 2.0]))
    torch.testing.assert_close(mixed, 0.5 * found[0] + 2 * found[2])


def test_disagreement_counts_rows_where_the_answers_differ() -> None:
    d = torch.tensor([[3.0, 0, 1], [0, 2, 1], [1, 0, 5]], dtype=torch.float64)
    s = torch.tensor([[2.0, 0, 0], [1, 0, 0], [4, 1, 0]], dtype=torch.float64)
    want = (kl(d[1], s[1]) + kl(d[2], s[2])) / 3
    assert float(inversion.disagreement(d, s)) == pytest.approx(want, rel=1e-12)


def test_the_students_loss_is_t_squared_times_kl() -> None:
    s, d = logits(4, 3), logits(4, 3, seed=1)
    want = 49 * sum(kl(d[b] / 7, s[b] / 7) for b in range(4)) / 4
    assert float(inversion.softened(s, d, 7.0)) == pytest.approx(want, rel=1e-12)


def test_a_students_step_is_sgd_on_it() -> None:
    strategy, ensemble = asked("dense", "strategy.distill_lr=0.1")
    student = inversion.Student(strategy.workspace, "mlp_small", strategy.model, strategy.hyper)
    x = strategy.workspace.tensors("test")[0][:20]
    d = inversion.mixture(ensemble.logits(x), torch.full((3,), 1 / 3))
    inversion.softened(student.model(x), d, 20.0).backward()
    want = {n: p.detach() - 0.1 * p.grad for n, p in student.model.named_parameters()}
    student.learn(x, d)
    for name, value in student.arrays.items():
        torch.testing.assert_close(value, want[name])


def test_the_generator_lowers_its_loss_and_the_best_batch_is_kept() -> None:
    strategy, ensemble = asked("dense", "strategy.generator_steps=40", "strategy.batch=64", "strategy.adversarial=0")
    student = inversion.Student(strategy.workspace, "mlp_small", strategy.model, strategy.hyper)
    w, draw = torch.full((3,), 1 / 3), strategy.generator("test")
    x, y = strategy.synthesised(ensemble, student.model, w, draw, 0)
    low, high = synthesis.bounds(strategy.scenario.data.dataset)
    assert float(low.min()) <= float(x.min()) <= float(x.max()) <= float(high.max())
    reached = float(F.cross_entropy(inversion.mixture(ensemble.logits(x), w), y))
    ((*_, metric, least),) = strategy.logged
    assert metric == "loss/synthesis/0"
    assert reached == pytest.approx(least, rel=1e-5)
    assert reached < 0.5 * float(F.cross_entropy(inversion.mixture(ensemble.logits(torch.rand_like(x)), w), y))
    assert all(p.grad is None for net in ensemble.networks.values() for p in net.parameters())


def test_the_pool_remembers_what_was_said_of_each_row() -> None:
    strategy, ensemble = asked("dense")
    x, pool = strategy.workspace.tensors("test")[0], inversion.Pool()
    pool.add(x[:3], torch.tensor([1, 2, 3]), ensemble)
    pool.add(x[3:8], torch.tensor([0, 0, 0, 1, 1]), ensemble)
    assert len(pool) == 8
    assert pool.y.tolist() == [1, 2, 3, 0, 0, 0, 1, 1]
    said = torch.cat([ensemble.logits(x[:3]), ensemble.logits(x[3:8])], 1).detach()  # a kernel's bits are of its batch
    assert torch.equal(pool.logits, said)


@pytest.mark.parametrize("name", BOTH)
def test_batch_norm_pulls_where_there_is_some(name: str) -> None:
    words = ("rounds=1", "model=resnet8_bn", "data.limit=60", "strategy.epochs=1")
    without = play(name, *words, "strategy.statistics=0")
    assert play(name, *words).digest != without.digest
    assert play(name, "rounds=1", "strategy.statistics=0").digest == play(name, "rounds=1").digest  # an mlp has none


@pytest.mark.parametrize("name", BOTH)
def test_where_no_batch_norm_is_a_note_says_that_its_weight_does_nothing(name: str) -> None:
    (said,) = server(name, "rounds=1", "strategy.statistics=3").notes()
    assert "no model has a BatchNorm" in said
    assert "strategy.statistics does nothing" in said


@pytest.mark.parametrize("name", BOTH)
def test_the_last_student_is_the_result_and_the_test_set_is_not_read(name: str) -> None:
    """The released code keeps the epoch that is best on the test set."""
    assert play(name, "rounds=1").digest == play(name, "rounds=1", "data.test_limit=30").digest


@pytest.mark.parametrize("name", BOTH)
def test_every_architecture_gets_a_student_that_has_learnt(name: str) -> None:
    played = play(name, "rounds=1", "model.pool=[mlp_small,mlp]").strategy
    for which in ("mlp", "mlp_small"):
        initial = played.workspace.initial(which)
        assert any(not torch.equal(v, initial[k]) for k, v in played.server_models()[which][1].items())


@pytest.mark.parametrize("name", BOTH)
def test_further_rounds_start_from_the_student_and_say_so(name: str) -> None:
    normed = ("model=resnet8_bn", "data.limit=60")
    assert server(name, "rounds=1", *normed).notes() == []
    (said,) = server(name, *normed).notes()
    assert "rounds=2 is no one shot" in said


# --- Co-Boosting --------------------------------------------------------------------------------------------


def test_hard_rows_weigh_more() -> None:
    d, y = logits(4, 3), torch.tensor([0, 2, 1, 1])
    p = d.softmax(1)[range(4), y]
    for h in (0.0, 0.5, 2.0):
        want = float(((1 - p) ** h * -p.log()).mean())
        assert float(coboosting.hard_loss(d, y, h)) == pytest.approx(want, rel=1e-10)
    sure = torch.tensor([[800.0, 0.0]], requires_grad=True)
    coboosting.hard_loss(sure, torch.tensor([0]), 0.5).backward()
    assert bool(torch.isfinite(sure.grad).all())


def test_weights_step_against_the_sign_of_the_gradient_and_stay_in_the_unit_interval() -> None:
    z, y = logits(3, 6, 4), torch.tensor([0, 1, 2, 3, 1, 0])
    v = torch.tensor([0.005, 0.4, 0.995], dtype=torch.float64)
    eps, want = 1e-6, []
    for k in range(3):
        ends = []
        for sign in (1, -1):
            w = v.clone()
            w[k] += sign * eps
            ends.append(float(F.cross_entropy((w[:, None, None] * z).sum(0), y)))
        want.append(min(1.0, max(0.0, float(v[k]) - 0.01 * math.copysign(1, ends[0] - ends[1]))))
    torch.testing.assert_close(coboosting.stepped(v, z, y, 0.01), torch.tensor(want, dtype=torch.float64))


def test_a_model_that_is_always_wrong_loses_its_weight_and_somebody_keeps_one() -> None:
    y = torch.tensor([0, 1, 2])
    right = 3 * F.one_hot(y, 3).double()
    v = torch.full((2,), 0.5, dtype=torch.float64)
    for _ in range(100):
        v = coboosting.stepped(v, torch.stack([right, -right]), y, 0.01)
    assert v.tolist() == pytest.approx([1.0, 0.0], abs=1e-9)
    alone = torch.tensor([0.005], dtype=torch.float64)
    assert torch.equal(coboosting.stepped(alone, -right[None], y, 0.01), alone)


def test_a_model_that_makes_no_difference_keeps_its_weight() -> None:
    """Where the slope is 0, so is its sign: no step, whichever way the others go."""
    right = 3 * F.one_hot(torch.tensor([0, 1, 2]), 3).double()
    v = torch.tensor([0.3, 0.6, 0.2], dtype=torch.float64)
    new = coboosting.stepped(v, torch.stack([0 * right, right, -right]), torch.tensor([0, 1, 2]), 0.125)
    torch.testing.assert_close(new, torch.tensor([0.3, 0.725, 0.075], dtype=torch.float64))


def test_the_perturbation_is_the_sign_of_the_gradient_by_differences() -> None:
    strategy, ensemble = asked("coboosting")
    w = torch.tensor([0.2, 0.5, 0.3])
    x = 0.25 + 0.5 * strategy.workspace.tensors("test")[0][:4]
    got = strategy.hardened(x, w, ensemble, torch.Generator().manual_seed(1))
    u = 2 * torch.rand(4, 10, generator=torch.Generator().manual_seed(1)) - 1
    low, high = (float(limit.flatten()[0]) for limit in synthesis.bounds(strategy.scenario.data.dataset))
    moved = (got - x) / (high - low)
    assert float(moved.abs().max()) == pytest.approx(8 / 255, rel=1e-4)

    def value(rows: torch.Tensor) -> torch.Tensor:
        return (u * (inversion.mixture(ensemble.logits(rows), w) / 4).softmax(1)).sum(1)

    for i, j in ((2, 3), (4, 4), (6, 2)):
        up, down = x.clone(), x.clone()
        up[:, 0, i, j] += 1e-2
        down[:, 0, i, j] -= 1e-2
        slope = value(up) - value(down)
        clear = slope.abs() > 1e-5
        assert torch.equal(moved[:, 0, i, j].sign()[clear], slope.sign()[clear])
        assert bool(clear.any())
    assert float(strategy.hardened(torch.full_like(x, high), w, ensemble, torch.Generator()).max()) <= high


def test_where_pixels_have_no_range_the_perturbation_is_delta_itself(monkeypatch) -> None:
    strategy, ensemble = asked("coboosting", "strategy.perturbation=0.25")
    x, w = 0.25 + 0.5 * strategy.workspace.tensors("test")[0][:4], torch.tensor([0.2, 0.5, 0.3])
    monkeypatch.setattr(synthesis, "bounds", lambda dataset: (torch.tensor(-9.0), torch.tensor(9.0)))  # none in reach
    inside = strategy.hardened(x, w, ensemble, torch.Generator().manual_seed(1)) - x
    monkeypatch.setattr(synthesis, "bounds", lambda dataset: None)
    free = strategy.hardened(x, w, ensemble, torch.Generator().manual_seed(1)) - x
    torch.testing.assert_close(free, inside / 18, rtol=1e-4, atol=1e-6)
    assert float(free.abs().max()) == pytest.approx(0.25, rel=1e-5)


def test_without_its_own_terms_it_is_dense() -> None:
    words = ("rounds=1", "strategy.temperature=4")
    own = ("strategy.hardness=0", "strategy.weight_step=0", "strategy.perturbation=0")
    assert play("coboosting", *words, *own).digest == play("dense", *words).digest


def test_the_weights_are_told() -> None:
    strategy = server("coboosting", "strategy.weight_step=0.1")
    strategy.fuse(shares(strategy, *(wake(strategy, who).share() for who in range(3))))
    told = [value for *_, metric, value in strategy.logged if metric.startswith("ensemble/")]
    steps = {round(1 / 3 + a * 0.1 + b * 0.099, 4) for a in (-1, 0, 1) for b in (-1, 0, 1)}  # two epochs
    assert len(told) == 3
    assert {round(value, 4) for value in told} <= steps
