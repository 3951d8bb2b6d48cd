"""FedNova: normalisers in closed form, FedAvg at equal steps, and the objective it ends at."""

from __future__ import annotations

import pytest
import torch

from fedfuse.errors import UserError
from fedfuse.strategies.fednova import normaliser
from tests.federations import play
from tests.halves import PLAIN, server, wake


@pytest.mark.parametrize(("steps", "momentum"), [(1, 0.9), (7, 0.9), (5, 0.5), (4, 0.0), (3, 1.0)])
def test_normaliser_is_the_sum_of_the_gradients_weights(steps: int, momentum: float) -> None:
    """Heavy ball on a constant gradient of 1 moves by the sum of all weights."""
    velocity, moved = 0.0, 0.0
    for _ in range(steps):
        velocity = momentum * velocity + 1.0
        moved += velocity
    assert normaliser(steps, momentum) == pytest.approx(moved, rel=1e-12)


def test_no_step_no_progress() -> None:
    assert normaliser(0, 0.9) == 0.0
    assert normaliser(0) == 0.0


def test_equal_steps_give_fedavg() -> None:
    ours, theirs = play("fednova").strategy.model, play("fedavg").strategy.model
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6)


def test_unequal_steps_against_numbers_by_hand() -> None:
    """n = (30, 10), a = (2, 6), x − y = (4, 6) of a parameter: x − τ_eff Σ p d = 1 − 3·(¾·2 + ¼·1)."""
    n, a, moved = torch.tensor([30.0, 10.0]), torch.tensor([2.0, 6.0]), torch.tensor([4.0, 6.0])
    p = n / n.sum()
    assert float(1 - (p * a).sum() * (p * moved / a).sum()) == pytest.approx(1 - 3 * 1.75)
    strategy, shares = _two(n, a, moved)
    strategy.round = 1
    strategy.fuse(shares)
    for name, start in strategy.workspace.initial("mlp_small").items():
        torch.testing.assert_close(strategy.model[name], start - 3 * 1.75)


def _two(n, a, moved):
    from fedfuse.core.strategy import Share, Shares
    from fedfuse.wire.sums import Sum

    strategy, total = server("fednova"), Sum()

    def stream():
        for i in range(2):
            arrays = {k: torch.full_like(v, float(moved[i] / a[i])) for k, v in strategy.model.items()}
            total.add(0, arrays, float(n[i]))
            yield Share(i, {}, {"num-examples": int(n[i]), "progress": float(a[i])})

    return strategy, Shares(stream(), {"update": total})


def test_it_ends_at_the_weighted_objective_where_fedavg_does_not() -> None:
    """Two quadratics ½(x − e_i)², equal weights, 1 and 10 steps: the optimum is the mean of e; FedAvg leans to e_2."""
    e, steps, lr = torch.tensor([0.0, 1.0], dtype=torch.float64), (1, 10), 0.01
    ends = {}
    for rule in ("fedavg", "fednova"):
        x = torch.tensor(0.0, dtype=torch.float64)
        for _ in range(4000):
            y = torch.stack([e[i] + (1 - lr) ** k * (x - e[i]) for i, k in enumerate(steps)])
            if rule == "fedavg":
                x = y.mean()
            else:
                a = torch.tensor([normaliser(k) for k in steps], dtype=torch.float64)
                x = x - a.mean() * ((x - y) / a).mean()
        ends[rule] = float(x)
    assert ends["fednova"] == pytest.approx(0.5, abs=0.02)
    assert ends["fedavg"] > 0.85


def test_a_client_says_its_own_progress() -> None:
    client = wake(server("fednova", *PLAIN, "train.epochs=4"))
    start = client.weights()
    assert client.fit()["progress"] == 4
    shared, end = client.share()["update"], client.weights()
    for name, value in shared.items():
        torch.testing.assert_close(value, (start[name] - end[name]) / 4)


def test_progress_knows_the_momentum_of_sgd_alone() -> None:
    for words, progress in (
        (("train.momentum=0.9",), normaliser(4, 0.9)),
        (("train.momentum=0.9", "train.optimizer=adam", "train.lr=0.001"), 4.0),
    ):
        client = wake(server("fednova", *PLAIN, "train.epochs=4", *words))
        assert client.fit()["progress"] == pytest.approx(progress, rel=1e-12)


@pytest.mark.parametrize(
    ("word", "told"),
    [("train.schedule=cosine", "cosine train.warmup=0"), ("train.warmup=0.1", "constant train.warmup=0.1")],
)
def test_a_rate_that_changes_is_refused(word: str, told: str) -> None:
    """With momentum the weights of gradients are then not what the normaliser sums."""
    with pytest.raises(UserError, match=rf"train.schedule={told}: fednova's .* is of steps of one rate; allowed"):
        server("fednova", word)
