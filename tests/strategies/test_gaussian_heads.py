"""Gaussian heads are the pooled data's LDA, however the data are dealt; told once; singular sums are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedfuse.errors import UserError, WorldError
from fedfuse.strategies.gaussian_heads import NOBODY, discriminant, moments
from fedfuse.train import curvature
from fedfuse.wire.records import InvalidArrays
from tests.federations import play
from tests.halves import server, shares, wake

N, D, C = 90, 5, 4


def features(shift: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated features of unequal scale, and labels of whom class 2 is rare."""
    draw = torch.Generator().manual_seed(2)
    y = torch.tensor([0] * 40 + [1] * 30 + [2] * 3 + [3] * 17)
    z = torch.randn(N, D, generator=draw, dtype=torch.float64) @ torch.randn(D, D, generator=draw, dtype=torch.float64)
    return shift + z * torch.arange(1, D + 1) + y[:, None] * torch.tensor([1.0, -2, 0, 0.5, 1]), y


def centralised(z: torch.Tensor, y: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """LDA as a textbook has it, from centred rows and an explicit inverse."""
    classes = y.unique()
    means = torch.stack([z[y == c].mean(0) for c in classes])
    rows = torch.cat([z[y == c] - m for c, m in zip(classes, means, strict=True)])
    precision = torch.linalg.inv(rows.T @ rows / (len(z) - len(classes)) + epsilon * torch.eye(z.shape[1]).double())
    prior = torch.stack([(y == c).double().mean() for c in classes])
    weight = means @ precision
    return weight, prior.log() - torch.einsum("cd,de,ce->c", means, precision, means) / 2


def summed(parts, epsilon: float):
    told = [moments(z, y, C) for z, y in parts]
    n, s, outer = (sum(one[key].double() for one in told) for key in ("n", "s", "S"))
    return discriminant(n, s, curvature.unpacked(outer), epsilon)


PARTITIONS = {
    "one": [list(range(N))],
    "even": [list(range(i, N, 3)) for i in range(3)],
    "by class": [list(range(40)), list(range(40, 70)), list(range(70, 90))],
    "one has a row, one has none": [[71], [], [i for i in range(N) if i != 71]],
}


@pytest.mark.parametrize("parts", PARTITIONS.values(), ids=PARTITIONS)
@pytest.mark.parametrize("epsilon", [0.0, 0.3])
def test_any_partition_is_the_centralised_lda(parts, epsilon: float) -> None:
    z, y = features()
    got = summed([(z[rows], y[rows]) for rows in parts], epsilon)
    for ours, theirs in zip(got, centralised(z, y, epsilon), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_a_class_that_nobody_holds_is_never_predicted() -> None:
    z, y = features()
    kept = y != 1
    weight, bias = summed([(z[kept], y[kept])], 0.1)
    want = centralised(z[kept], y[kept], 0.1)
    rest = torch.tensor([0, 2, 3])
    torch.testing.assert_close(weight[rest], want[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(bias[rest], want[1], rtol=1e-10, atol=1e-10)
    assert float(bias[1]) == NOBODY
    assert not bool(weight[1].any())
    assert not bool((z @ weight.T + bias).argmax(1).eq(1).any())


def test_sums_that_have_no_inverse_are_refused_by_name() -> None:
    z, y = features()
    twice = torch.cat([z, z[:, :1] - 2 * z[:, 1:2]], 1)
    with pytest.raises(WorldError, match=r"singular: set strategy\.epsilon"):
        summed([(twice, y)], 0.0)
    with pytest.raises(WorldError, match=r"singular: set strategy\.epsilon"):
        summed([(z * torch.tensor([1.0, 0, 1, 1, 1]), y)], 0.0)
    with pytest.raises(WorldError, match="2 examples of 2 classes"):
        summed([(z[[0, 50]], y[[0, 50]])], 0.1)


def test_the_run_s_head_is_the_lda_of_all_clients_examples() -> None:
    played = play("gaussian_heads", "partition=dirichlet", "partition.alpha=0.3", "rounds=1").strategy
    clients = [wake(played, who) for who in range(3)]
    z = torch.cat([one.embed(one.x) for one in clients]).double()
    y = torch.cat([one.y for one in clients])
    weight, bias = centralised(z, y, 1e-3)
    head = played.published("head")
    torch.testing.assert_close(head["weight"], weight.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(head["bias"], bias.float(), rtol=1e-5, atol=1e-5)
    logits = clients[0].predict(clients[0].x).double()  # clients use it too
    torch.testing.assert_close(logits, clients[0].embed(clients[0].x).double() @ weight.T + bias, rtol=1e-3, atol=1e-3)


def test_further_rounds_change_nothing_and_complete_what_was_sampled() -> None:
    once = play("gaussian_heads", "rounds=1").strategy
    again = play("gaussian_heads", "rounds=3").strategy
    assert all(torch.equal(v, again.state["moments"][k]) for k, v in once.state["moments"].items())
    some = play("gaussian_heads", "participation=0.4", "rounds=8").strategy
    for name, value in once.state["moments"].items():
        torch.testing.assert_close(some.state["moments"][name], value, rtol=1e-12, atol=1e-12)


def test_bytes_are_the_formula_s() -> None:
    played = play("gaussian_heads", "rounds=1")
    assert played.totals["up_bytes"] == 3 * 8 * (10 * 32 + 32 * 33 // 2 + 10)


@pytest.mark.parametrize(
    ("key", "spoil", "words"),
    [
        ("n", lambda n: n - 1000, "negative"),
        ("n", lambda n: n * 0, "a class without examples"),
        ("s", lambda s: s * 100, "no sum of products"),
        ("S", lambda S: -S, "no sum of products"),
    ],
)
def test_moments_that_no_features_have_are_refused(key: str, spoil, words: str) -> None:
    strategy = server("gaussian_heads")
    told = wake(strategy, 0).share()
    type(strategy).examine(strategy.workspace.scope(0, strategy.hyper), told)
    told["moments"][key] = spoil(told["moments"][key])
    with pytest.raises(InvalidArrays, match=words):
        type(strategy).examine(strategy.workspace.scope(0, strategy.hyper), told)


def test_where_nobody_has_told_anything_nothing_is_published() -> None:
    strategy = server("gaussian_heads")
    nothing = wake(strategy, 0, {"told": True}).share()
    strategy.fuse(shares(strategy, nothing, nothing))
    assert not strategy.board.items
    assert strategy.server_models()["model"][0] == "mlp_small"


def bent(shape: tuple[int, ...], classes: int) -> nn.Module:
    """A model whose head is no linear layer."""
    model = nn.Module()
    model.body, model.feature_dim = nn.Flatten(), 64
    model.head = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, classes))
    model.features, model.forward = model.body, lambda x: model.head(model.body(x))
    return model


def test_a_head_that_is_not_linear_is_refused() -> None:
    with pytest.raises(UserError, match="sets a linear head with a bias, and its is Sequential"):
        server("gaussian_heads", "model=custom", f"model.build={__name__}:bent")


def test_a_random_encoder_is_told(tmp_path) -> None:
    built = server("gaussian_heads")
    assert "the encoder's weights are random" in built.notes()[0]
    torch.save(dict(built.workspace.build("mlp_small").state_dict()), tmp_path / "encoder.pt")
    assert server("gaussian_heads", f"model.checkpoint={tmp_path / 'encoder.pt'}").notes() == []
