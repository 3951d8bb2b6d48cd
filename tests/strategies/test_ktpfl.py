"""KT-pFL in closed form: the coefficients' gradient, the projection, the frozen uniform matrix."""

import numpy as np
import pytest
import torch

from fedfuse.config import registry
from fedfuse.core.client import transfer_rows
from fedfuse.errors import UserError
from fedfuse.strategies.ktpfl import KTpFLHyper, gradient, learn, project, rates
from fedfuse.wire.records import InvalidArrays
from tests.federations import federation, play, uploads
from tests.halves import server, shares


def soft(n=4, rows=6, classes=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(n, rows, classes, generator=draw, dtype=torch.float64)).softmax(-1)


@pytest.mark.parametrize("distance", ["kl", "mse"])
def test_the_gradient_is_that_of_the_stated_objective(distance):
    s, rho = soft(), 0.7
    c = torch.rand(4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    value = torch.zeros((), dtype=torch.float64)
    for n in range(4):
        mixture = sum(c[n, m] * s[m] for m in range(4))
        if distance == "kl":
            value = value + (mixture * (mixture / s[n]).log()).sum(-1).mean()
        else:
            value = value + ((mixture - s[n]) ** 2).mean()
        value = value + rho * ((c[n] - 0.25) ** 2).mean()
    (expected,) = torch.autograd.grad(value, c)
    torch.testing.assert_close(gradient(c.detach(), s, rho, distance), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("both", [False, True])
def test_what_nobody_thinks_possible_counts_as_1e_minus_12(both):
    """Client 0 listens to client 1 only, which is sure of class 0; its own slope goes by log 10⁻¹² of class 1."""
    s = torch.tensor([[[0.25, 0.75]], [[1.0, 0.0]]], dtype=torch.float64)
    if both:  # and where it is client 0 that is sure of class 0, what it listens to is weighed against that
        s = s.flip(0)
    c = torch.tensor([[0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    own, other = s[0, 0].clamp_min(1e-12), s[1, 0].clamp_min(1e-12)
    slope = (other / own).log() + 1
    want = torch.stack([(slope * s[0, 0]).sum(), (slope * s[1, 0]).sum()])
    torch.testing.assert_close(gradient(c, s, 0.0, "kl")[0], want, rtol=1e-12, atol=0)


def test_the_projection_is_the_nearest_distribution():
    rows = np.random.default_rng(2).normal(size=(5, 4))
    got = project(torch.tensor(rows)).numpy()
    np.testing.assert_allclose(got.sum(1), 1, rtol=1e-14)
    assert (got == 0).any()
    for row, mine in zip(rows, got, strict=True):  # optimal: one shift on the support, and no gain in leaving it
        shift = (row - mine)[mine > 0]
        np.testing.assert_allclose(shift, shift[0], rtol=1e-13)
        assert (row[mine == 0] <= shift[0]).all()
    inside = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(project(inside), inside, rtol=0, atol=1e-15)


@pytest.mark.parametrize("rows", ["simplex", "softmax"])
def test_frozen_or_pulled_hard_the_matrix_stays_uniform(rows):
    uniform = torch.full((4, 4), 0.25, dtype=torch.float64)
    assert torch.equal(learn(uniform, soft(), KTpFLHyper(coefficient_lr=0.0)), uniform)
    alike = soft()[:1].expand(4, -1, -1)  # nobody differs: nothing to learn
    torch.testing.assert_close(learn(uniform, alike, KTpFLHyper(rows=rows)), uniform, rtol=1e-12, atol=0)


def test_alike_clients_find_each_other():
    a, b = soft(1, seed=1)[0], soft(1, seed=2)[0]
    s = torch.stack([a, a, b, b])
    c = learn(torch.full((4, 4), 0.25, dtype=torch.float64), s, KTpFLHyper(rho=0.01))
    torch.testing.assert_close(c.sum(1), torch.ones(4, dtype=torch.float64))
    assert (c[:2, :2].min() > c[:2, 2:].max()).item()
    assert (c[2:, 2:].min() > c[2:, :2].max()).item()


def test_frozen_uniform_equals_plain_averaging():
    """With c = 1/N every client gets FedMD's consensus: the mean of all soft predictions."""
    from fedfuse.wire.sums import Sum

    with federation("ktpfl", "strategy.coefficient_lr=0", "rounds=1") as (built, _):
        sent = uploads(built, "soft")
        built.run()
        total = Sum()
        for one in sent:
            total.add(0, one, 1.0)
        for client in range(3):
            got = built.strategy.published("target", to=client)["p"]
            torch.testing.assert_close(got, total.mean()["p"], rtol=2e-7, atol=0)
        assert torch.equal(built.strategy.state["coefficients"], torch.full((3, 3), 1 / 3, dtype=torch.float64))


def test_absent_clients_keep_their_rows_and_columns():
    with federation("ktpfl", "participation=0.5", "clients=4", "rounds=1") as (built, _):
        built.run()
        server = built.strategy
        present = server.plan(1)
        absent = [i for i in range(4) if i not in present]
        c = server.state["coefficients"]
        assert (c[absent] == 0.25).all()
        assert (c[:, absent] == 0.25).all()
        torch.testing.assert_close(c.sum(1), torch.ones(4, dtype=torch.float64))
        assert (c[present][:, present] != 0.25).any()


def test_the_matrix_is_logged_and_rows_sum_to_one():
    rows = []
    with federation("ktpfl", "rounds=1") as (built, _):
        log = built.strategy.log
        built.strategy.log = lambda name, value, **o: (rows.append((name, value)), log(name, value, **o))
        built.run()
    found = {name: value for name, value in rows if name.startswith("similarity/")}
    assert set(found) == {f"similarity/{i}/{j}" for i in range(3) for j in range(3)}
    assert sum(found[f"similarity/1/{j}"] for j in range(3)) == pytest.approx(1, rel=1e-12)


def test_three_architectures_and_another_loss():
    pool = "model.pool=[mlp_small,mlp,mlp_wide]"
    assert play("ktpfl", pool, "strategy.subset=10").digest
    assert play("ktpfl", "loss=mse").digest != play("ktpfl").digest


def test_rows_that_are_no_distributions_are_refused():
    p = soft(1)[0]
    p[2, 0] += 0.5
    with pytest.raises(InvalidArrays, match="1 rows are no distributions"):
        registry.entry("ktpfl").server.examine(None, {"soft": {"p": p}})


def test_the_step_is_rescaled_by_row_as_in_the_code():
    """Rows of three sizes: divided by 5 twice, multiplied by 5 as often as may be, and once."""
    slope = torch.tensor([[0.4, -0.4], [1e-9, 1e-9], [0.012, 0.012]], dtype=torch.float64)
    slope = torch.cat([slope, torch.zeros(3, 1, dtype=torch.float64)], 1)  # 3 × 3: means 0.267, 7e-10, 0.008
    # 0.267 → 0.0533 → 0.0107 → 0.00213 and ×5 = 0.0107 → the same again, twice
    # 0.008 < 0.01: ×5 = 0.04; then ÷5 and ×5 in each of the four that follow
    torch.testing.assert_close(rates(slope)[:, 0], torch.tensor([1 / 25, 3125.0, 5.0], dtype=torch.float64))


def test_coefficients_move_at_the_defaults():
    """Two pairs of clients: one step of the default tells them apart; a fixed small rate would not."""
    a, b = soft(1, seed=1)[0], soft(1, seed=2)[0]
    s = torch.stack([a, a, b, b])
    c = learn(torch.full((4, 4), 0.25, dtype=torch.float64), s, KTpFLHyper())
    assert (c[:2, :2].min() - c[:2, 2:].max()).item() > 0.01
    once = learn(c, s, KTpFLHyper(rows="softmax", coefficient_steps=3))
    torch.testing.assert_close(once.sum(1), torch.ones(4, dtype=torch.float64))
    same = learn(c, s, KTpFLHyper(coefficient_steps=3))  # its projections change nothing: all steps stay inside
    free = c
    for _ in range(3):
        slope = gradient(free, s, 0.5, "kl")
        free = free - rates(slope) * slope
    torch.testing.assert_close(once, (5 * free).softmax(1))  # once, not after each step
    assert bool((same >= 0).all())


@pytest.mark.parametrize("rows", ["simplex", "softmax"])
def test_a_step_is_felt_at_the_default_temperature(rows):
    """At T = 10 all predictions are nearly uniform, and of KL's slope nearly everything is alike in a row's entries."""
    h = KTpFLHyper(rows=rows)
    a, b = soft(1, seed=1)[0], soft(1, seed=2)[0]
    s = torch.stack([a, a, b, b]) ** (1 / h.temperature)
    s = s / s.sum(-1, keepdim=True)
    slope = gradient(torch.full((4, 4), 0.25, dtype=torch.float64), s, h.rho, h.distance)
    assert (slope - 1).abs().max().item() < 0.05  # the 1 moves no row whose sum is 1
    assert torch.equal(rates(slope), rates(slope + 3))
    c = learn(torch.full((4, 4), 0.25, dtype=torch.float64), s, h)
    assert (c[:2, :2].min() - c[:2, 2:].max()).item() > 0.01
    assert (c[2:, 2:].min() - c[2:, :2].max()).item() > 0.01


CLASSROOM = ("strategy.neighbours=classroom", "transfer.labelled=true")


def test_classroom_ranks_on_the_rounds_rows_at_temperature_1():
    """Shared at T = 10 on 9 rows of the round: the ranks are those of the predictions themselves."""
    strategy = server("ktpfl", *CLASSROOM, "strategy.subset=9")
    y = strategy.workspace.tensors("transfer")[1][transfer_rows(strategy.scenario, 9, 1)]
    right = torch.nn.functional.one_hot(y, 10).double()
    p = torch.stack([a * right + (1 - a) * soft(1, 9, 10, seed=8)[0] for a in (0.6, 0.1, 0.3)])
    sent = (p.log() / 10).softmax(-1)
    strategy.fuse(shares(strategy, *({"soft": {"p": one}} for one in sent)))
    r = [np.exp(p[n][torch.arange(9), y].log().mean().item()) for n in range(3)]
    w = [2 * x / sum(r) for x in r]
    for n, teachers in enumerate(([], [0, 2], [0])):
        got = strategy.published("target", to=n)
        assert got["own"].item() == pytest.approx(w[n], rel=1e-6)
        torch.testing.assert_close(got["p"], sent[teachers].float(), rtol=0, atol=0)
        assert got["weight"].tolist() == pytest.approx([w[m] for m in teachers], rel=1e-6)
        assert got["temperature"].tolist() == pytest.approx([1 + 12 * (w[m] - w[n]) / w[m] for m in teachers], rel=1e-6)


def test_classroom_runs_alike_on_a_wire_and_says_what_does_nothing_beside_it():
    first = play("ktpfl", *CLASSROOM)
    assert first.strategy.inbox.failures == {"replies": 0, "rejected": 0, "retried": 0}
    assert play("ktpfl", *CLASSROOM, grid="serial").digest == first.digest
    with pytest.raises(UserError, match=r"ranks by labels: set transfer.labelled=true"):
        play("ktpfl", CLASSROOM[0])
    beside = {"rho": 2.0, "coefficient_lr": 1.0, "coefficient_steps": 3, "distance": "mse", "rows": "softmax"}
    for key, value in (beside | {"temperature": 2.0}).items():
        hyper = KTpFLHyper(neighbours="classroom", **{key: value})
        with pytest.raises(UserError, match=f"strategy.{key}={value} does nothing with strategy.neighbours=classroom"):
            registry.entry("ktpfl").server(hyper, first.strategy.workspace)
