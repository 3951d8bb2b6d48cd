"""FedFTG's losses in closed form, without the released code's defects; the generator it is taught by."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fedfuse.core.workspace import Workspace
from fedfuse.errors import UserError
from fedfuse.families import synthesis
from fedfuse.strategies import fedftg
from fedfuse.wire.records import InvalidArrays, Scope
from tests.federations import TINY, play, scenario_of
from tests.halves import server, shares, wake

FEW = ("strategy.iterations=2", "strategy.batch=16")


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_alpha_is_each_clients_share_of_a_class() -> None:
    alpha = fedftg.shares_of_classes(torch.tensor([[3, 0, 0], [1, 5, 0]]))
    assert alpha.tolist() == [[0.75, 0, 0], [0.25, 1, 0]]


def test_alpha_weighs_each_row_before_the_mean() -> None:
    t, s, y = logits(5, 3), logits(5, 3, seed=1), torch.tensor([0, 2, 1, 1, 0])
    alpha = torch.tensor([0.7, 0.1, 0.4], dtype=torch.float64)
    rows = [
        float(alpha[c]) * (float(t[i].logsumexp(0) - t[i, c]) - 1.5 * float((s[i] - t[i]).abs().sum()) / 3)
        for i, c in enumerate(y.tolist())
    ]
    got = fedftg.generator_loss(t, s, y, alpha, 1.5)
    assert float(got) == pytest.approx(sum(rows) / 5, rel=1e-12)
    # the released code multiplies the mean cross-entropy by α of each row
    theirs = (alpha[y] * F.cross_entropy(t, y)).mean() - 1.5 * (alpha[y] * (s - t).abs().mean(1)).mean()
    assert abs(float(theirs) - float(got)) > 0.01


def test_a_row_of_a_class_that_a_client_has_not_does_not_move_the_generator() -> None:
    t = logits(2, 3).requires_grad_()
    alpha = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    fedftg.generator_loss(t, logits(2, 3, seed=1), torch.tensor([0, 1]), alpha, 1.0).backward()
    assert not bool(t.grad[0].any())
    assert bool(t.grad[1].any())


def test_distillation_is_a_sum_over_classes_and_a_mean_over_rows() -> None:
    t, s, y = logits(2, 4, 3), logits(4, 3, seed=1), torch.tensor([0, 1, 1, 2])
    alpha = torch.tensor([[0.25, 0.9, 1.0], [0.75, 0.1, 0.0]], dtype=torch.float64)
    want = 0.0
    for b, c in enumerate(y.tolist()):
        for k in range(2):
            want -= float(alpha[k, c] * (t[k, b].softmax(0) * s[b].log_softmax(0)).sum()) / 4
    got = fedftg.student_loss(t, s, y, alpha)
    assert float(got) == pytest.approx(want, rel=1e-12)
    assert float(got) != pytest.approx(want / 3, rel=0.1)  # the released code divides by C
    s = t[0].clone().requires_grad_()  # one teacher of all: the student that says the same stands still
    fedftg.student_loss(t[:1], s, y, torch.ones(1, 3).double()).backward()
    assert float(s.grad.abs().max()) < 1e-15


def test_the_diversity_term_by_hand() -> None:
    x, noise = torch.tensor([[0.0, 0.0], [1.0, 3.0]]), torch.tensor([[0.0, 1.0], [2.0, 1.0]])
    far = (1 + 3) / 2 * (4 + 0) / 2  # of one pair, twice among four
    assert float(fedftg.diversity(x, noise)) == pytest.approx(float(torch.tensor(-2 * far / 4).exp()), rel=1e-6)
    assert float(fedftg.diversity(x[:1].repeat(2, 1), noise)) == 1.0


def test_without_iterations_it_is_fedavg_bit_for_bit() -> None:
    ours, theirs = (
        play("fedftg", "strategy.iterations=0", "strategy.batch=128").strategy.model,
        play("fedavg").strategy.model,
    )
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())


def test_the_test_set_is_not_read() -> None:
    assert play("fedftg", *FEW).digest == play("fedftg", *FEW, "data.test_limit=30").digest


def test_the_generator_lives_on_beside_a_client_without_examples() -> None:
    strategy = server("fedftg", *FEW)
    told = [wake(strategy, who).share() for who in range(3)]
    told[1]["counts"]["counts"] = torch.zeros(10, dtype=torch.int64)
    strategy.fuse(shares(strategy, *told, examples=[10, 0, 30]))
    first = dict(strategy.state["generator"])
    strategy.round = 2
    strategy.fuse(shares(strategy, *told, examples=[10, 0, 30]))
    assert any(not torch.equal(v, first[k]) for k, v in strategy.state["generator"].items())


def test_negative_counts_are_refused() -> None:
    with pytest.raises(InvalidArrays, match="counts: negative"):
        fedftg.FedFTG.examine(Scope({"examples": 9}, {}), {"counts": {"counts": torch.tensor([1, -1])}})
    fedftg.FedFTG.examine(Scope({"examples": 9}, {}), {"counts": {"counts": torch.tensor([0, 2])}})


# --- what makes inputs --------------------------------------------------------------------------------------


def workspace(*words: str) -> Workspace:
    return Workspace(scenario_of((*TINY, "strategy=local", *words))[1])


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 13, 10), (5,)])
@pytest.mark.parametrize("classes", [0, 4])
def test_a_generator_makes_inputs_of_the_shape(shape: tuple[int, ...], classes: int) -> None:
    low, high = torch.tensor([-0.5]).view(-1, 1, 1), torch.tensor([2.0]).view(-1, 1, 1)
    noise, y = torch.randn(6, 7), torch.tensor([0, 1, 2, 3, 0, 1])
    free = synthesis.Generator(shape, 7, 4, classes)(noise, y).detach()
    assert free.shape == (6, *shape)
    torch.testing.assert_close(free.transpose(0, 1).flatten(1).mean(1), torch.zeros(shape[0]), rtol=0, atol=1e-5)
    if len(shape) == 3:
        bound = synthesis.Generator(shape, 7, 4, classes, (low, high))(noise, y).detach()
        assert bound.shape == (6, *shape)
        assert -0.5 <= float(bound.min()) <= float(bound.max()) <= 2.0


def test_bounds_are_those_of_the_data() -> None:
    data = workspace().scenario.data.dataset
    low, high = synthesis.bounds(data)
    x, _ = workspace().scenario.data.test_tensors()
    assert float(low.min()) <= float(x.min())
    assert float(x.max()) == pytest.approx(float(high.max()), abs=1e-5)
    assert float(x.min()) == pytest.approx(float(low.min()), abs=1e-5)


def test_equal_seeds_build_equal_generators() -> None:
    one, same, other = (synthesis.build(workspace(), 8, 4, 0, "x", i) for i in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(next(one.parameters()), next(other.parameters()))


def test_statistics_of_batch_norm_by_hand() -> None:
    layer = torch.nn.BatchNorm2d(2).double().eval()
    layer.running_mean.copy_(torch.tensor([1.0, -2.0]))
    layer.running_var.copy_(torch.tensor([4.0, 0.5]))
    x = logits(3, 2, 4, 5)
    with synthesis.watched([torch.nn.Sequential(layer)]) as seen:
        layer(x)
    rows = x.transpose(0, 1).flatten(1)
    far = (rows.mean(1) - layer.running_mean).norm() + (rows.var(1, correction=0) - layer.running_var).norm()
    torch.testing.assert_close(seen.total, far)
    layer(x)  # watched no longer
    torch.testing.assert_close(seen.total, far)


def test_tokens_cannot_be_made(monkeypatch) -> None:
    place = workspace()
    monkeypatch.setitem(place.scenario.data.dataset.__dict__, "kind", "tokens")
    with pytest.raises(UserError, match="data=digits has tokens: a generator makes images and features"):
        synthesis.build(place, 8, 4, 0)
