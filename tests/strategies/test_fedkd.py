"""FedKD: truncation with the full rank among the candidates, adaptive losses, private teachers, a folded student."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F

from fedfuse.strategies.fedkd import FedKDHyper, apply, energy
from fedfuse.train.truncate import check_packed, most, pack, packed_layout, truncate, unpack
from fedfuse.wire.records import InvalidArrays, layout_nbytes, layout_of, nbytes, validate
from tests.federations import play
from tests.halves import PLAIN, final_states, server, shares, wake


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def released(matrix: torch.Tensor, threshold: float) -> int:
    """Rank that the released loop finds: k = len(σ) is never tried, and 0 is what is left."""
    s = torch.linalg.svdvals(matrix).square()
    return next((k for k in range(1, len(s)) if float(s[:k].sum() / s.sum()) > threshold), 0)


@pytest.mark.parametrize("shape", [(10, 512), (6, 75), (5, 5), (1, 7)])
def test_full_rank_is_the_identity(shape: tuple[int, int]) -> None:
    matrix = randn(*shape)
    u, s, v = truncate(matrix, 1.0)
    assert len(s) == min(shape)
    torch.testing.assert_close((u * s) @ v, matrix, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(10, 512), (6, 75)])
def test_where_the_released_code_sends_zeros(shape: tuple[int, int]) -> None:
    matrix = randn(*shape)
    assert released(matrix, 0.95) == 0
    u, s, v = truncate(matrix, 0.95)
    kept = ((u * s) @ v).square().sum() / matrix.square().sum()
    assert len(s) == min(shape)
    assert kept >= 0.95


@pytest.mark.parametrize("share", [0.3, 0.7, 0.95])
def test_the_least_rank_that_keeps_the_energy(share: float) -> None:
    matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5], dtype=torch.float64))
    squares = torch.tensor([9.0, 4.0, 1.0, 0.25])
    _, s, _ = truncate(matrix, share)
    assert float(squares[: len(s)].sum() / squares.sum()) >= share
    assert float(squares[: len(s) - 1].sum() / squares.sum()) < share


def test_zeros_have_rank_zero() -> None:
    assert len(truncate(torch.zeros(4, 6), 0.95)[1]) == 0
    update = {"w": torch.zeros(20, 30), "b": torch.zeros(3)}
    assert all(torch.equal(v, update[k]) for k, v in unpack(pack(update, 0.95), update).items())


def test_packing_keeps_names_shapes_and_counters() -> None:
    low = randn(16, 2) @ randn(2, 27, seed=1)
    update = {
        "conv": low.reshape(16, 3, 3, 3).float(), "bias": randn(16).float(), "dense": randn(8, 9).float(),
        "count": torch.tensor(3),
    }  # fmt: skip
    packed = pack(update, 0.999999)
    validate("update", packed, packed_layout(layout_of(update)))
    check_packed(packed, layout_of(update))
    assert packed["conv.s"].shape == (2,)
    assert packed["conv.whole"].shape == (0, 27)
    assert nbytes({k: v for k, v in packed.items() if k.startswith("conv")}) == 2 * (16 + 27 + 1) * 4
    assert packed["dense.whole"].shape == (8, 9)  # its factors would be longer
    assert packed["count"].dtype == torch.int64
    for name, value in unpack(packed, update).items():
        assert value.shape == update[name].shape
        torch.testing.assert_close(value, update[name], rtol=1e-5, atol=1e-5)


def test_a_packed_matrix_is_never_longer_than_the_matrix() -> None:
    for shape in ((32, 64), (10, 32), (3, 3), (1, 9), (64, 3, 3, 3)):
        update = {"w": randn(*shape).float()}
        for share in (0.5, 0.9, 1.0):
            assert nbytes(pack(update, share)) <= layout_nbytes(layout_of(update))
    assert most((5,)) == 0


def test_factors_that_do_not_fit_are_refused() -> None:
    update = {"w": randn(16, 2) @ randn(2, 27, seed=1)}
    packed = pack(update, 0.99)
    for part, spoilt in (("s", packed["w.s"][:1]), ("u", packed["w.u"][:, :1]), ("whole", torch.zeros(3, 27))):
        with pytest.raises(InvalidArrays, match="do not fit"):
            check_packed({**packed, f"w.{part}": spoilt}, layout_of(update))


def test_energy_rises_linearly() -> None:
    h = FedKDHyper()
    assert energy(h, 10, 10) == pytest.approx(0.98)
    assert energy(h, 0, 10) == 0.95
    meanings = {field.name: field.metadata["meaning"] for field in fields(FedKDHyper)}
    assert meanings["energy_start"].startswith("e_0,")  # e_1 is one T-th of the way on
    assert energy(h, 5, 10) == pytest.approx(0.965)
    assert energy(h, 1, 30) == pytest.approx(0.951)


def test_losses_are_weighted_by_how_wrong_both_are() -> None:
    client = wake(server("fedkd", *PLAIN))
    with torch.no_grad():
        t, s, z, mapped = (out.double() for out in client.model.everything(client.x))
    p, q = t.softmax(1), s.softmax(1)
    right = F.cross_entropy(t, client.y) + F.cross_entropy(s, client.y)
    mutual = (q * (q / p).log()).sum(1).mean() + (p * (p / q).log()).sum(1).mean()
    expected = right + (mutual + F.mse_loss(mapped, z)) / right
    assert client.fit()["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_the_gradient_does_not_flow_through_the_weight_unless_asked() -> None:
    """Through it, a large lesson would reward a larger cross-entropy."""
    ends = []
    for through in ("false", "true"):
        client = wake(server("fedkd", *PLAIN, f"strategy.through={through}"))
        client.fit()
        ends.append(client.weights()["own.head.weight"])
    assert not torch.equal(*ends)


def test_teacher_and_bridge_never_leave() -> None:
    client = wake(server("fedkd", "strategy.student=mlp"))
    client.fit()
    assert set(client.share()) == {"update"}
    travels = {name.rsplit(".", 1)[0] if name[-2:] in (".u", ".s", ".v") else name.removesuffix(".whole")
               for name in client.share()["update"]}  # fmt: skip
    assert travels == {name for name, _ in client.model.shared.named_parameters()}
    assert {n.split(".")[0] for n in client.state["own"]} == {"own", "bridge"}


def test_a_share_at_full_energy_is_the_update() -> None:
    client = wake(server("fedkd", "strategy.energy_start=1", "strategy.energy_end=1"))
    start = {k: v.clone() for k, v in client.start.items()}
    client.fit()
    update = unpack(client.share()["update"], start)
    for name, value in client.model.shared.state_dict().items():
        torch.testing.assert_close(start[name] + update[name], value, rtol=1e-5, atol=1e-6)


def test_truncation_saves_bytes_and_the_student_folds() -> None:
    truncated = play("fedkd", "strategy.energy_start=0.5", "strategy.energy_end=0.5")
    whole = play("fedkd", "strategy.energy_start=1", "strategy.energy_end=1")
    assert truncated.totals["up_bytes"] < 0.5 * whole.totals["up_bytes"]
    start = server("fedkd").published("student")
    assert apply(start, pack({k: torch.zeros_like(v) for k, v in start.items()}, 0.9)).keys() == start.keys()


def test_absent_clients_and_pools() -> None:
    pool = ("model.pool=[mlp_small,mlp,mlp_wide]", "strategy.student=mlp_small", "participation=0.6", "rounds=3")
    strategy, states = final_states("fedkd", *pool)
    assert strategy.inbox.failures == {"replies": 0, "rejected": 0, "retried": 0}
    assert any(states)


def test_a_student_of_one_architecture_with_batchnorm() -> None:
    options = ("model=resnet8_bn", "model.width=0.25", "strategy.student=resnet8_bn", "data.limit=60", "rounds=1")
    student = play("fedkd", *options).strategy.published("student")
    counters = [value for name, value in student.items() if name.endswith("num_batches_tracked")]
    assert counters
    assert all(value.dtype == torch.int64 and int(value) > 0 for value in counters)


def test_the_student_moves_by_the_mean_update_weighted_by_examples() -> None:
    """Three clients of 10, 30 and 0 examples, at full energy."""
    strategy = server("fedkd", "strategy.energy_start=1", "strategy.energy_end=1")
    start = strategy.published("student")
    moved = [{name: randn(*v.shape, seed=seed).float() for name, v in start.items()} for seed in (1, 2, 3)]
    strategy.fuse(shares(strategy, *[{"update": pack(one, 1.0)} for one in moved], examples=[10, 30, 0]))
    for name, value in strategy.published("student").items():
        wanted = start[name] + (10 * moved[0][name].double() + 30 * moved[1][name].double()) / 40
        torch.testing.assert_close(value, wanted.float(), rtol=1e-4, atol=1e-5)


def test_counters_move_by_the_nearest_whole_number() -> None:
    strategy = server("fedkd")
    strategy.published("student")["counter"] = torch.tensor(100)
    still = {name: torch.zeros_like(value) for name, value in strategy.published("student").items()}
    told = [{"update": pack({**still, "counter": torch.tensor(n)}, 1.0)} for n in (1, 2)]
    strategy.fuse(shares(strategy, *told, examples=[10, 30]))  # by 1.75
    counter = strategy.published("student")["counter"]
    assert (int(counter), counter.dtype) == (102, torch.int64)


def test_nobody_with_examples_moves_nothing() -> None:
    strategy = server("fedkd")
    start = strategy.published("student")
    nothing = {name: torch.ones_like(v) for name, v in start.items()}
    strategy.fuse(shares(strategy, {"update": pack(nothing, 1.0)}, examples=[0]))
    assert all(torch.equal(v, start[name]) for name, v in strategy.published("student").items())


def test_each_round_keeps_the_energy_of_its_place() -> None:
    strategy = server("fedkd", "rounds=4", "strategy.energy_start=0.2", "strategy.energy_end=0.9")
    name = next(n for n, v in strategy.published("student").items() if v.ndim == 2)
    start = strategy.published("student")
    moved = {n: randn(*v.shape, seed=4).float() for n, v in start.items()}
    strategy.round = 3
    strategy.fuse(shares(strategy, {"update": pack(moved, 1.0)}))
    wanted = unpack(pack(moved, 0.2 + 0.7 * 3 / 4), start)[name]
    torch.testing.assert_close(strategy.published("student")[name] - start[name], wanted, rtol=1e-4, atol=1e-5)
