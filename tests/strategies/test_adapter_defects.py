"""The defects of the public code that fed_lora.md lists, each with the test that would catch it here.

§1.8, nine found by reading:

1. R of all rounds so far averaged: `test_1_a_round_averages_only_its_own_latents`.
2. An aggregator that calls a function that is not there: `test_2_every_aggregation_rule_runs`.
3. α/r taken for 1 in the residual: `test_3_the_residual_is_scaled_by_alpha_over_r`.
4. A setting read that nobody defined: `test_4_every_setting_is_one_that_changes_the_model`.
5. One seed for every layer's A: `test_5_layers_of_one_shape_start_from_different_factors`.
6. R averaged in bf16: `test_6_means_are_taken_in_float64_whatever_the_base_is`.
7. The residual added transposed, A not frozen in FFA: `test_7_residuals_are_not_transposed_and_a_frozen_factor_stays`.
8. A baseline that keeps the first client's weights only: `test_8_every_client_counts`.
9. The decomposition of the transpose: `test_9_decompositions_are_of_the_update_not_of_its_transpose`.

§1.4, five of the private variant:

1. δ = 1 / number of batches: `test_dp_1_delta_is_at_most_one_over_n`.
2. An initialisation outside the budget: `test_dp_2_a_basis_of_private_gradients_is_paid_for`.
3. ε of the last client only, at a pooled δ: `test_dp_3_every_client_has_its_own_epsilon_and_delta`.
4. A physical batch size that is never used: `test_dp_4_examples_are_held_in_chunks`.
5. A head that is trained beside the budget: `test_dp_5_the_head_is_clipped_and_noised_with_the_rest`.
"""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from fedfuse.config import registry
from fedfuse.config.schema import PrivacyConfig, TrainConfig
from fedfuse.strategies.fedex_lora import residual
from fedfuse.train.adapters import LoRA, LoRASB, adapted, inject
from fedfuse.train.svd import leading
from tests.federations import federation, play
from tests.halves import shares
from tests.strategies.adapter_updates import LAYER, D, K, drawn, own_update, server, update

NAMES = (
    "fed_sb", "fedex_lora", "fedit", "fedsa_lora", "fedsvd", "ffa_lora", "flexlora", "flora", "hetlora", "rolora",
)  # fmt: skip
COUNTS = [10, 25, 5]
NOISY = ("privacy.noise=4.0", "privacy.clip=0.5")


def fuse(strategy, records, counts=COUNTS):
    key = "R" if "R" in records[0] else "adapter"
    p = [n / sum(counts) for n in counts]
    want = sum(w * own_update(strategy, r[key]) for w, r in zip(p, records, strict=True))
    strategy.fuse(shares(strategy, *records, examples=counts))
    return want


def test_1_a_round_averages_only_its_own_latents() -> None:
    strategy = server("fed_sb")
    for round, value in ((1, 1.0), (2, 5.0)):
        strategy.round = round
        like = drawn(strategy, 0)["R"]
        same = {"R": {n: torch.full_like(v, value) for n, v in like.items()}}
        strategy.fuse(shares(strategy, same, same, same, examples=COUNTS))
    assert torch.all(strategy.state["R"][f"{LAYER}.lora_R.weight"] == 5)


@pytest.mark.parametrize("name", NAMES)
def test_2_every_aggregation_rule_runs(name) -> None:
    played = play(name, "strategy.rank=2", "rounds=1")
    assert played.federation.done == 1
    assert played.strategy.inbox.failures == {"replies": 0, "rejected": 0, "retried": 0}


@pytest.mark.parametrize("alpha", [2, 8])  # s = 1/2 and 2 at rank 4
@pytest.mark.parametrize("name", ["fedex_lora", "flora"])
def test_3_the_residual_is_scaled_by_alpha_over_r(name, alpha) -> None:
    strategy = server(name, f"strategy.alpha={alpha}")
    want = fuse(strategy, [drawn(strategy, c) for c in range(3)])
    assert (update(strategy) - want).norm() < 1e-12 * want.norm()


@pytest.mark.parametrize("name", NAMES)
def test_4_every_setting_is_one_that_changes_the_model(name) -> None:
    """Dropout, the setting that crashed the released script, reaches the layers; so do rank and targets."""
    model = server(name, "strategy.dropout=0.3", "strategy.rank=3", "strategy.targets=body.1")
    found = adapted(model.workspace.model("mlp_small"))
    assert set(found) == {LAYER}
    assert found[LAYER].dropout.p == 0.3
    assert found[LAYER].rank == 3
    known = {field.name for field in dataclasses.fields(registry.entry(name).hyper)}
    assert {"rank", "alpha", "targets", "dropout", "head", "weighting"} <= known


@pytest.mark.parametrize("layer", [LoRA, LoRASB])
def test_5_layers_of_one_shape_start_from_different_factors(layer) -> None:
    model = inject(nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9)), layer, rank=2, scale=1.0)
    first, second = (m.lora_A.weight if layer is LoRA else m.basis_A for m in adapted(model).values())
    assert (first - second).abs().max() > 1e-2


def test_6_means_are_taken_in_float64_whatever_the_base_is() -> None:
    """Three numbers whose mean bf16 rounds away; and adapters stay float32 over a bf16 base."""
    strategy = server("fed_sb")
    like = drawn(strategy, 0)["R"]
    values = (1.0, 1.0 + 2**-12, 1.0 - 2**-11)
    records = [{"R": {n: torch.full(v.shape, x, dtype=torch.float32) for n, v in like.items()}} for x in values]
    strategy.fuse(shares(strategy, *records))
    assert abs(strategy.state["R"][f"{LAYER}.lora_R.weight"][0, 0].item() - sum(values) / 3) < 1e-7
    half = inject(nn.Sequential(nn.Linear(9, 9)).bfloat16(), LoRASB, rank=2, scale=1.0)
    (module,) = adapted(half).values()
    assert module.lora_R.weight.dtype == module.basis_A.dtype == torch.float32


def test_7_residuals_are_not_transposed_and_a_frozen_factor_stays() -> None:
    draw = torch.Generator().manual_seed(0)
    bs = [torch.randn(6, 2, generator=draw, dtype=torch.float64) for _ in range(3)]
    as_ = [torch.randn(2, 6, generator=draw, dtype=torch.float64) for _ in range(3)]  # square: shapes cannot tell
    b, a = residual(bs, as_, [1 / 3] * 3, 1.0)
    want = sum(x @ y for x, y in zip(bs, as_, strict=True)) / 3 - sum(bs) / 3 @ (sum(as_) / 3)
    assert torch.allclose(b @ a, want, atol=1e-12)
    assert not torch.allclose((b @ a).T, want, atol=1e-1)
    played = play("ffa_lora", "strategy.rank=4")
    start = server("ffa_lora").workspace.initial("mlp_small")
    end = played.strategy.state_of_model()
    assert torch.equal(end[f"{LAYER}.lora_A.weight"], start[f"{LAYER}.lora_A.weight"])
    assert not torch.equal(end[f"{LAYER}.lora_B.weight"], start[f"{LAYER}.lora_B.weight"])


@pytest.mark.parametrize("name", ["fedit", "fed_sb", "ffa_lora", "fedsvd", "fedex_lora", "flora", "flexlora"])
@pytest.mark.parametrize("who", range(3))
def test_8_every_client_counts(name, who) -> None:
    """What the server makes of the shares changes with each client's."""
    results = []
    for seed in (0, 7):
        strategy = server(name)
        records = [drawn(strategy, c, seed=seed if c == who else 0) for c in range(3)]
        strategy.fuse(shares(strategy, *records, examples=COUNTS))
        results.append(update(strategy))
    assert (results[0] - results[1]).norm() > 1e-2 * results[0].norm()


def test_9_decompositions_are_of_the_update_not_of_its_transpose() -> None:
    matrix = torch.randn(D, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, vt = leading(matrix, D)
    assert (u.shape, vt.shape) == ((D, D), (D, K))
    assert torch.allclose(u * s @ vt, matrix, atol=1e-12)
    square = matrix[:, :D]  # where shapes cannot tell
    u, s, vt = leading(square, D)
    assert torch.allclose(u * s @ vt, square, atol=1e-12)


# --- the private variant ----------------------------------------------------------------------------------


@pytest.fixture
def opacus():
    return pytest.importorskip("opacus", reason="the extra `privacy` is not installed")


def spent(path, metric: str) -> dict[int, float]:
    import polars as pl

    rows = pl.read_parquet(path / "metrics.parquet").filter(metric=metric, scope="client", split="train")
    return {r["client"]: r["value"] for r in rows.sort("round").iter_rows(named=True)}


def test_dp_1_delta_is_at_most_one_over_n(opacus) -> None:
    from fedfuse.errors import UserError
    from fedfuse.train.privacy import Budget

    budget = Budget(PrivacyConfig(noise=4.0), TrainConfig(batch_size=10), 1, 100, {})
    assert budget.delta == 1e-5  # and not 1 / 10 batches
    million = Budget(PrivacyConfig(noise=4.0), TrainConfig(batch_size=10), 1, 1_000_000, {})
    assert million.delta == pytest.approx(1e-7)
    with pytest.raises(UserError, match=r"allowed is at most 1/N"):
        Budget(PrivacyConfig(noise=4.0, delta=1 / 10), TrainConfig(batch_size=10), 1, 100, {})


def test_dp_2_a_basis_of_private_gradients_is_paid_for(opacus) -> None:
    options = ("rounds=1", "strategy.rank=4", *NOISY)
    costs = {}
    for init in ("raw_grad", "random_orthonormal"):
        with federation("fed_sb", f"strategy.init={init}", *options) as (built, directory):
            built.run()
            costs[init] = spent(directory.path, "epsilon")[0]
    assert costs["raw_grad"] > 1.05 * costs["random_orthonormal"]


def test_dp_3_every_client_has_its_own_epsilon_and_delta(opacus) -> None:
    words = ("partition=dirichlet", "partition.alpha=0.5", "rounds=1")
    with federation("fed_sb", "strategy.rank=4", *words, *NOISY) as (built, directory):
        built.run()
        sizes = [built.scenario.examples(c) for c in range(3)]
        deltas, epsilons = spent(directory.path, "delta"), spent(directory.path, "epsilon")
    assert [deltas[c] for c in range(3)] == [1e-5] * 3
    assert len(set(sizes)) == len(set(epsilons.values())) == 3


@pytest.mark.parametrize("clipping", ["ghost", "plain"])
def test_dp_4_examples_are_held_in_chunks(opacus, clipping) -> None:
    from fedfuse.train.privacy import train

    seen: list[int] = []
    x, y = torch.randn(40, 6), torch.randint(0, 3, (40,))
    ends = []
    for chunk in (None, 7):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 3))
        model.register_forward_hook(lambda module, args, out: seen.append(len(out)))
        privacy = PrivacyConfig(noise=1.0, clip=0.2, clipping=clipping, chunk=chunk)
        draws = (torch.Generator().manual_seed(1), torch.Generator().manual_seed(2))
        train(model, x, y, TrainConfig(lr=0.1), privacy, (1.0, 0.5, 2), *draws)
        if chunk is None:
            assert max(seen) > 7
            seen.clear()
        ends.append(copy.deepcopy(model[0].weight))
    assert max(seen) <= 7
    assert torch.allclose(*ends, atol=1e-6)


def test_dp_5_the_head_is_clipped_and_noised_with_the_rest(opacus) -> None:
    """With next to no data in a batch, what moves the head is noise of the same deviation as moves R."""
    from fedfuse.train.privacy import train

    torch.manual_seed(0)
    model = nn.ModuleDict({"body": nn.Linear(40, 40), "head": nn.Linear(40, 40)})
    whole = nn.Sequential()
    whole.add_module("body", model["body"])
    whole.add_module("head", model["head"])
    inject(whole, LoRASB, rank=30, scale=1.0)
    before = {n: p.detach().clone() for n, p in whole.named_parameters() if p.requires_grad}
    privacy = PrivacyConfig(noise=1.0, clip=1.0, clipping="plain")
    draws = (torch.Generator().manual_seed(1), torch.Generator().manual_seed(2))
    x, y = torch.randn(50, 40), torch.randint(0, 40, (50,))
    train(whole, x, y, TrainConfig(lr=1.0, momentum=0.0), privacy, (1.0, 1e-9, 1), *draws)
    moved = {n: (whole.get_parameter(n) - v).std().item() * 1e-9 * 50 for n, v in before.items()}
    assert set(moved) == {"body.lora_R.weight", "head.weight", "head.bias"}
    assert all(abs(value - 1) < 0.35 for value in moved.values())
