"""Aggregation of adapters in float64, on a layer that is not square (fed_lora.md §1.8, §2, §6)."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from fedfuse.config.compose import compose
from fedfuse.errors import UserError
from fedfuse.families.averaging import server_step as step
from fedfuse.strategies.fedex_lora import residual
from fedfuse.strategies.fedsvd import refactor
from fedfuse.strategies.flexlora import truncated
from fedfuse.strategies.flora import stack
from fedfuse.strategies.hetlora import HetLoRAHyper, norm
from fedfuse.train.stack import compact, deltas, empty, fold
from tests.halves import shares, wake
from tests.strategies.adapter_updates import LAYER, D, K, drawn, own_update, server, update

COUNTS = [10, 25, 5]
P = torch.tensor(COUNTS, dtype=torch.float64) / sum(COUNTS)


def factors(clients: int = 3, rank: int = 4, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    bs = [torch.randn(D, rank, generator=draw, dtype=torch.float64) for _ in range(clients)]
    as_ = [torch.randn(rank, K, generator=draw, dtype=torch.float64) for _ in range(clients)]
    return bs, as_


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def fused(name: str, *overrides: str, kinds: tuple[str, ...] = (), counts: list[int] = COUNTS, round: int = 1):
    """One fuse on random shares; the server's ΔW and the weighted mean of the clients'."""
    strategy = server(name, *overrides)
    strategy.round = round
    records = [drawn(strategy, c) for c in range(len(counts))]
    if kinds:  # RoLoRA sends one factor
        for record in records:
            content = record["adapter"]
            for key in list(content):
                if ".lora_" in key and not any(kind in key for kind in kinds):
                    content[key] = content[key][:0] if "lora_A" in key else content[key][:, :0]
    key = "R" if name == "fed_sb" else "adapter"
    p = torch.tensor(counts, dtype=torch.float64)
    p = (
        p / p.sum()
        if strategy.hyper.weighting == "examples"
        else torch.full((len(counts),), 1 / len(counts), dtype=torch.float64)
    )
    sent = [{n: v for n, v in record[key].items() if v.numel()} for record in records]
    want = sum(w * own_update(strategy, content) for w, content in zip(p, sent, strict=True))
    strategy.fuse(shares(strategy, *records, examples=counts))
    return strategy, update(strategy), want


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
@pytest.mark.parametrize(
    ("name", "kinds", "round"),
    [
        ("fed_sb", (), 1),
        ("ffa_lora", (), 1),
        ("fedex_lora", (), 1),
        ("flora", (), 1),
        ("fedsvd", (), 1),
        ("rolora", ("lora_B",), 1),
        ("rolora", ("lora_A",), 2),
    ],
)
def test_exact_methods_reproduce_the_mean_update(name, kinds, round, weighting) -> None:
    overrides = [f"strategy.weighting={weighting}", "strategy.alpha=3"]
    if name == "rolora" and round == 2:  # B is zero at the start: give it something to multiply
        strategy = server(name, *overrides)
        first = [drawn(strategy, c) for c in range(3)]
        for record in first:
            record["adapter"] = {k: v[:0] if "lora_A" in k else v for k, v in record["adapter"].items()}
        strategy.fuse(shares(strategy, *first, examples=COUNTS))
        strategy.round = 2
        records = [drawn(strategy, c, seed=7) for c in range(3)]
        for record in records:
            record["adapter"] = {k: v[:, :0] if "lora_B" in k else v for k, v in record["adapter"].items()}
        p = P if weighting == "examples" else torch.full((3,), 1 / 3, dtype=torch.float64)
        sent = [{n: v for n, v in r["adapter"].items() if v.numel()} for r in records]
        want = sum(w * own_update(strategy, s) for w, s in zip(p, sent, strict=True))
        strategy.fuse(shares(strategy, *records, examples=COUNTS))
        assert relative(update(strategy), want) < 1e-12
        return
    _, got, want = fused(name, *overrides, kinds=kinds, round=round)
    assert relative(got, want) < 1e-12


def test_fedit_does_not() -> None:
    _, got, want = fused("fedit")
    assert relative(got, want) > 0.3


def test_partial_participation_stays_exact() -> None:
    for name in ("fed_sb", "fedex_lora", "flora", "ffa_lora"):
        _, got, want = fused(name, counts=[7, 11])
        assert relative(got, want) < 1e-12, name


@pytest.mark.parametrize("alpha", [2.0, 4.0, 16.0])
@pytest.mark.parametrize("name", ["fedex_lora", "flora", "fed_sb"])
def test_alpha_over_r_enters_every_residual_and_stack(name, alpha) -> None:
    """Defect 3 of the released code: the residual scaled by 1 where α/r is 1/2."""
    strategy, got, want = fused(name, f"strategy.alpha={alpha}")
    assert strategy.workspace.model(strategy.architecture).get_submodule(LAYER).scale == alpha / 4
    assert relative(got, want) < 1e-12


def test_residual_has_rank_at_most_c_minus_1_times_r() -> None:
    bs, as_ = factors(clients=5)
    p = [0.1, 0.3, 0.2, 0.25, 0.15]
    b, a = residual(bs, as_, p, 0.5)
    mean_b = sum(w * x for w, x in zip(p, bs, strict=True))
    mean_a = sum(w * x for w, x in zip(p, as_, strict=True))
    want = 0.5 * (sum(w * x @ y for w, x, y in zip(p, bs, as_, strict=True)) - mean_b @ mean_a)
    assert b.shape == (D, 16)
    assert a.shape == (16, K)
    assert relative(b @ a, want) < 1e-12
    assert torch.linalg.matrix_rank(b @ a) == 16


def test_residual_is_not_transposed_and_one_client_has_none() -> None:
    bs, as_ = factors(clients=2)
    b, a = residual(bs, as_, [0.5, 0.5], 1.0)
    assert (b @ a).shape == (D, K)
    b, a = residual(bs[:1], as_[:1], [1.0], 1.0)
    assert b.shape == (D, 0)
    assert (b @ a).abs().sum() == 0


def test_stack_weighs_once_and_takes_all_clients() -> None:
    """Defect 8: a misspelt accumulator kept the first client only."""
    bs, as_ = factors()
    b, a = stack(bs, as_, P.tolist(), 2.0)
    want = sum(2.0 * w * x @ y for w, x, y in zip(P, bs, as_, strict=True))
    assert relative(b @ a, want) < 1e-12
    assert b.shape == (D, 12)


def test_ranks_may_differ() -> None:
    ranks = [2, 4, 1]
    strategy = server("flora", "strategy.ranks=[2,4,1]")
    records = [drawn(strategy, c, ranks[c]) for c in range(3)]
    want = sum(w * own_update(strategy, r["adapter"]) for w, r in zip(P, records, strict=True))
    strategy.fuse(shares(strategy, *records, examples=COUNTS))
    assert relative(update(strategy), want) < 1e-12


@pytest.mark.parametrize("ranks", [[2, 4, 1], [2, 3, 1]])
def test_a_smaller_rank_does_not_shrink_what_others_hold(ranks) -> None:
    """Fed-SB: each entry of R is the mean over the clients that hold it; where nobody does, it stays."""
    strategy = server("fed_sb", f"strategy.ranks={ranks}".replace(" ", ""))
    key = f"{LAYER}.lora_R.weight"
    start = torch.randn(4, 4, generator=torch.Generator().manual_seed(9))
    strategy.state["R"] = {**strategy.state["R"], key: start}
    records = [drawn(strategy, c, ranks[c]) for c in range(3)]
    want = start.double().clone()
    for a in range(4):
        for b in range(4):
            holders = [c for c in range(3) if ranks[c] > max(a, b)]
            if holders:
                total = sum(P[c] * float(records[c]["R"][key][a, b]) for c in holders)
                want[a, b] = total / sum(P[c] for c in holders)
    strategy.fuse(shares(strategy, *records, examples=COUNTS))
    torch.testing.assert_close(strategy.state["R"][key].double(), want, rtol=1e-6, atol=1e-7)


def test_flexlora_is_the_best_approximation_of_the_mean_update() -> None:
    _, got, want = fused("flexlora", "strategy.alpha=8")
    singular = torch.linalg.svdvals(want)
    assert torch.linalg.matrix_rank(got, rtol=1e-9) == 4
    assert abs((got - want).norm() - singular[4:].norm()) < 1e-9
    b, a = truncated(want, 4, 2.0)
    assert relative(2.0 * b @ a, got) < 1e-12


def test_flexlora_gives_each_factor_its_half_of_the_singular_values() -> None:
    """BᵀB = A Aᵀ = S/s, so that a step of SGD moves both alike; the paper's split has A Aᵀ = 1 and BᵀB = (S/s)²."""
    _, _, want = fused("flexlora", "strategy.alpha=8")
    singular = torch.diag(torch.linalg.svdvals(want)[:4] / 2)
    b, a = truncated(want, 4, 2.0)
    assert relative(b.T @ b, singular) < 1e-12
    assert relative(a @ a.T, singular) < 1e-12
    b, a = truncated(want, 4, 2.0, "left")
    assert relative(2.0 * b @ a, truncated(want, 4, 2.0)[0] @ truncated(want, 4, 2.0)[1] * 2) < 1e-12
    assert relative(a @ a.T, torch.eye(4, dtype=torch.float64)) < 1e-12
    assert relative(b.T @ b, singular**2) < 1e-12


@pytest.mark.parametrize("split", ["even", "left"])
def test_a_direction_that_the_mean_lacks_can_still_be_learnt(split: str) -> None:
    """With zeros in B and in A no gradient reaches either."""
    (b, *_), (a, *_) = factors(rank=2)
    left, right = truncated(b @ a, 4, 1.0, split)
    assert relative(left @ right, b @ a) < 1e-12
    assert (right[2:].norm(dim=1) - 1).abs().max() < 1e-12
    assert left[:, 2:].abs().max() < 1e-9
    nothing = truncated(torch.zeros(D, K, dtype=torch.float64), 2, 1.0, split)
    assert nothing[0].abs().max() == 0
    assert (nothing[1].norm(dim=1) - 1).abs().max() < 1e-12
    small = truncated(1e-10 * b @ a, 2, 1.0)  # what is small is not nothing: the largest value is the measure
    assert relative(small[0].T @ small[0], small[1] @ small[1].T) < 1e-12


def test_hetlora_weighs_by_the_norm_of_the_product() -> None:
    bs, as_ = factors()
    arrays = {"x.lora_B.weight": bs[0], "x.lora_A.weight": as_[0]}
    assert abs(norm(arrays) - (bs[0] @ as_[0]).norm().item()) < 1e-9
    strategy, ranks = server("hetlora", "strategy.ranks=[2,4,1]"), [2, 4, 1]
    records = [drawn(strategy, c, ranks[c]) for c in range(3)]
    weights = torch.tensor([norm(r["adapter"]) for r in records], dtype=torch.float64)
    weights /= weights.sum()
    want = torch.zeros(4, K, dtype=torch.float64)
    for w, r in zip(weights, records, strict=True):
        a = r["adapter"][f"{LAYER}.lora_A.weight"]
        want[: len(a)] += w * a
    strategy.fuse(shares(strategy, *records, examples=COUNTS))
    assert torch.allclose(strategy.state["whole"][f"{LAYER}.lora_A.weight"].double(), want, atol=1e-12)


def test_hetlora_weighs_by_examples_while_nobodys_product_differs_from_zero() -> None:
    strategy = server("hetlora")
    records = [drawn(strategy, c) for c in range(3)]
    for record in records:
        record["adapter"][f"{LAYER}.lora_B.weight"].zero_()
    want = sum(p * r["adapter"][f"{LAYER}.lora_A.weight"] for p, r in zip(P, records, strict=True))
    strategy.fuse(shares(strategy, *records, examples=COUNTS))
    assert torch.allclose(strategy.state["whole"][f"{LAYER}.lora_A.weight"].double(), want, atol=1e-12)


@pytest.mark.parametrize(
    ("word", "heard_with"),
    [("strategy.gamma=0.5", "strategy.prune=0.1"), ("strategy.weighting=uniform", "strategy.sparsity=false")],
)
def test_hetlora_refuses_what_does_nothing(word: str, heard_with: str) -> None:
    with pytest.raises(UserError, match=f"{word} does nothing with strategy"):
        compose(["strategy=hetlora", word])
    key, _, value = word.removeprefix("strategy.").partition("=")
    assert str(getattr(compose(["strategy=hetlora", word, heard_with]).strategy, key)) == value
    meanings = {field.name: field.metadata["meaning"] for field in fields(HetLoRAHyper)}
    assert heard_with.removeprefix("strategy.").partition("=")[0] in meanings[key]


def test_hetlora_prunes_by_the_norms_of_both_factors_of_the_trailing_ranks() -> None:
    half, (bs, as_) = wake(server("hetlora")), factors(clients=1)
    layer = half.model.get_submodule(LAYER)
    with torch.no_grad():
        layer.lora_B.weight.copy_(bs[0])
        layer.lora_A.weight.copy_(as_[0])
    for kept in (1, 3):
        want = bs[0][:, kept:].norm() * as_[0][kept:].norm()
        assert half.trailing(kept).item() == pytest.approx(want.item(), rel=1e-5)


def test_flora_draws_a_uniformly_in_both_directions_up_to_its_clients_rank() -> None:
    half = wake(server("flora", "strategy.ranks=[3,4,1]", "train.epochs=0"))
    half.fit()
    a = half.model.get_submodule(LAYER).lora_A.weight.detach()
    uniform = torch.rand(4, K, generator=half.generator("fresh A"))
    torch.testing.assert_close(a[:3], ((2 * uniform - 1) / K**0.5)[:3])
    assert not a[3:].any()
    assert a[:3].min() < -0.9 / K**0.5 < 0.9 / K**0.5 < a.max()


def test_fedsvd_keeps_the_product_and_makes_a_orthonormal() -> None:
    (b,), (a,) = factors(clients=1)
    fresh_b, fresh_a = refactor(b, a)
    assert relative(fresh_b @ fresh_a, b @ a) < 1e-12
    assert (fresh_a @ fresh_a.T - torch.eye(4)).abs().max() < 1e-12


def test_fedsvd_refreshes_a_in_its_rounds_and_leaves_it_while_b_is_zero() -> None:
    strategy = server("fedsvd", "strategy.period=2")
    first, record = strategy.state_of_model()[f"{LAYER}.lora_A.weight"], drawn(strategy, 0)
    b = record["adapter"][f"{LAYER}.lora_B.weight"].clone()
    for round, times in ((1, 1), (2, 0)):
        strategy.round = round
        record["adapter"][f"{LAYER}.lora_B.weight"] = times * b
        strategy.fuse(shares(strategy, record))
        now = strategy.state_of_model()
        assert torch.equal(now[f"{LAYER}.lora_A.weight"], first)
        assert torch.allclose(now[f"{LAYER}.lora_B.weight"].double(), times * b, rtol=1e-12, atol=0)
    strategy.round, record["adapter"][f"{LAYER}.lora_B.weight"] = 4, b
    strategy.fuse(shares(strategy, record))
    now = strategy.state_of_model()
    for name, value in zip("BA", refactor(b, first), strict=True):
        assert torch.allclose(now[f"{LAYER}.lora_{name}.weight"].double(), value, atol=1e-12)


def test_server_momentum_moves_r_alone() -> None:
    """Everything is linear in R: momentum on R is momentum on ΔW."""
    _, got, want = fused("fed_sb", "strategy.server_momentum=0.9", "strategy.server_lr=0.5")
    assert relative(got, 0.5 * want) < 1e-12
    old, mean = {"R": torch.eye(2)}, {"R": 3 * torch.eye(2)}
    new, m = step(old, mean, {"R": torch.eye(2).double()}, 0.5, 1.0)
    assert torch.allclose(m["R"], 2.5 * torch.eye(2).double())
    assert torch.allclose(new["R"], 3.5 * torch.eye(2))


def test_a_round_averages_its_own_latents_only() -> None:
    """Defect 1: the released multi-round code averages the R of all rounds so far."""
    strategy, _, _ = fused("fed_sb")
    strategy.round = 2
    records = [{"R": {n: torch.ones_like(v) for n, v in drawn(strategy, 0)["R"].items()}}] * 3
    strategy.fuse(shares(strategy, *records, examples=COUNTS))
    assert torch.equal(strategy.state["R"][f"{LAYER}.lora_R.weight"].double(), torch.ones(4, 4).double())


def test_layers_have_different_random_factors() -> None:
    """Defect 5: one seed for every layer gives equal factors to layers of one shape."""
    from fedfuse.train.adapters import LoRA, adapted, inject

    model = torch.nn.Sequential(torch.nn.Linear(9, 9), torch.nn.Linear(9, 9))
    first, second = adapted(inject(model, LoRA, rank=2, scale=1.0)).values()
    assert not torch.equal(first.lora_A.weight, second.lora_A.weight)


def test_folds_stay_factored_while_small_then_become_dense() -> None:
    value = empty({"l": (D, K)})
    total = torch.zeros(D, K, dtype=torch.float64)
    draw = torch.Generator().manual_seed(3)
    kinds = []
    for _ in range(8):
        b = torch.randn(D, 4, generator=draw, dtype=torch.float64)
        a = torch.randn(4, K, generator=draw, dtype=torch.float64)
        total += b @ a
        value = fold(value, {"l.B": b, "l.A": a})
        kinds.append("l.W" in value)
        assert relative(deltas(value)["l.delta"].double(), total) < 1e-12
    assert kinds == [4 * (i + 1) * (D + K) >= D * K for i in range(8)]


def test_compact_never_exceeds_the_layer() -> None:
    bs, as_ = factors(clients=20)
    b, a = torch.cat(bs, 1), torch.cat(as_, 0)
    small_b, small_a = compact(b, a)
    assert small_b.shape == (D, D)
    assert relative(small_b @ small_a, b @ a) < 1e-12
