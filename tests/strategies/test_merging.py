"""Merging rules in closed form, float64, on clients of unequal size; what each reduces to; what is refused."""

from __future__ import annotations

import pytest
import torch

from fedfuse.config import registry
from fedfuse.core.shares import Share, Shares
from fedfuse.errors import UserError
from fedfuse.families import merging
from fedfuse.strategies import sce, ties, twin_merging
from fedfuse.strategies.dare import mask
from fedfuse.wire.records import Scope, layout_of
from tests.federations import play
from tests.halves import server, shares, wake

COUNTS = [3, 7, 5]
LISTED = ("task_arithmetic", "ties", "sce", "twin_merging")
ALL = (*LISTED, "dare", "fisher", "regmean")


def double(name: str, *words: str):
    """A server half whose θ₀ is float64, and random models of three clients."""
    strategy = server(name, *words)
    strategy.publish("model", {k: v.double() for k, v in strategy.model.items()})
    strategy.round = 2
    draw = torch.Generator().manual_seed(5)
    models = [
        {k: v + 0.1 * (i + 1) * torch.randn(v.shape, generator=draw, dtype=v.dtype) for k, v in strategy.model.items()}
        for i in range(3)
    ]
    return strategy, dict(strategy.model), models


def fused(strategy, models, counts=COUNTS):
    strategy.fuse(shares(strategy, *({"model": m} for m in models), examples=list(counts)))
    return strategy.model


def t(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# --- task arithmetic ----------------------------------------------------------------------------------------


def test_task_arithmetic_is_the_start_and_lambda_times_the_sum() -> None:
    strategy, start, models = double("task_arithmetic", "strategy.lam=0.4")
    for name, value in fused(strategy, models).items():
        want = start[name] + 0.4 * sum(m[name] - start[name] for m in models)
        torch.testing.assert_close(value, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["task_arithmetic", "twin_merging"])
def test_lambda_of_nothing_said_is_six_fifths_of_the_mean_step(name: str) -> None:
    strategy, start, models = double(name)
    for key, value in fused(strategy, models).items():
        want = start[key] + 1.2 * sum(m[key] - start[key] for m in models) / 3
        torch.testing.assert_close(value, want, rtol=0, atol=1e-12)


def test_lambda_of_one_kth_is_the_mean_of_all_alike() -> None:
    ours = play("task_arithmetic", f"strategy.lam={1 / 3}", "rounds=1").strategy.model
    theirs = play("fedavg", "strategy.weighting=uniform", "rounds=1").strategy.model
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-6)


# --- TIES ---------------------------------------------------------------------------------------------------


def test_ties_by_hand() -> None:
    tau = t([5.0, -1.0, 4.0, 0.5], [-2.0, -3.0, 0.1, 0.2], [-9.0, 0.3, 8.0, 0.0])
    trim = ties.trimmed(tau, 0.5)
    assert torch.equal(trim, t([5.0, 0, 4.0, 0], [-2.0, -3.0, 0, 0], [-9.0, 0, 8.0, 0]))
    sign = ties.elected(trim)
    assert sign.tolist() == [-1, -1, 1, -1]  # the last weight has no vote: the majority of (−, −, +) is −
    assert ties.agreed(trim, sign).tolist() == [-5.5, -3.0, 6.0, 0.0]


def test_ties_a_tied_vote_goes_with_the_majority_of_the_weights() -> None:
    trim = t([1.0, 2.0, 3.0], [-1.0, 1.0, 1.0])
    assert ties.elected(trim).tolist() == [1, 1, 1]
    assert ties.agreed(trim, ties.elected(trim)).tolist() == [1.0, 1.5, 2.0]
    assert ties.elected(-trim).tolist() == [-1, -1, -1]


def test_ties_keeps_exactly_as_many_as_said_where_the_released_code_keeps_one_more() -> None:
    tau = torch.randn(2, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert (ties.trimmed(tau, 0.2) != 0).sum(1).tolist() == [20, 20]
    assert torch.equal(ties.trimmed(tau, 1.0), tau)  # and 100 % does not fail
    threshold = tau.abs().kthvalue(80, dim=1, keepdim=True).values
    assert ((tau.abs() >= threshold).sum(1) == 21).all()


def test_equal_scores_are_kept_in_order_and_at_least_one() -> None:
    assert merging.largest(torch.ones(2, 3), 0.5).tolist() == [[True, True, True], [False, False, False]]
    assert merging.largest(t([1.0, 9.0, 3.0]), 0.01).tolist() == [[False, True, False]]


def test_ties_of_one_client_that_keeps_all_is_fedavg_bit_for_bit() -> None:
    words = ("clients=1", "strategy.keep=1", "strategy.lam=1")
    assert play("ties", *words).digest == play("fedavg", "clients=1").digest


def test_ties_trims_all_arrays_together() -> None:
    strategy, start, models = double("ties", "strategy.keep=0.3", "strategy.lam=0.7")
    tau = torch.stack([torch.cat([(m[n] - start[n]).flatten() for n in start]) for m in models])
    trim = ties.trimmed(tau, 0.3)
    want = 0.7 * ties.agreed(trim, ties.elected(trim))
    got = torch.cat([(v - start[n]).flatten() for n, v in fused(strategy, models).items()])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    ((_, _, _, name, agreement),) = strategy.logged
    assert name == "agreement"
    assert agreement == pytest.approx(float((trim.sign() == ties.elected(trim))[trim != 0].double().mean()))
    assert 0.5 < agreement < 1


# --- SCE ----------------------------------------------------------------------------------------------------


def test_sce_by_hand() -> None:
    """Variances 9, 0, 16, 1 (over two clients): half of them are selected, the first and the third."""
    delta = t([7.0, 2.0, 5.0, 1.0], [1.0, 2.0, -3.0, 3.0])
    chosen = sce.selected(delta, 0.5)
    assert torch.equal(chosen, t([7.0, 0, 5.0, 0], [1.0, 0, -3.0, 0]))
    w = t([74.0, 10.0])[0] / 84  # sums of squares stand in the ratio of the means
    first = (w[0] * 7 + w[1] * 1) / 1.0
    assert sce.merged(chosen).tolist() == pytest.approx([float(first), 0.0, 5.0, 0.0])  # −3 is a minority's


def test_sce_of_one_client_is_its_own_and_nothing_moves_nothing() -> None:
    alone = t([1.0, -2.0, 0.5])
    assert torch.equal(sce.selected(alone, 0.1), alone)
    assert torch.equal(sce.merged(alone), alone[0])
    assert torch.equal(sce.merged(torch.zeros(2, 3)), torch.zeros(3))
    assert play("sce", "clients=1", "strategy.lam=1").digest == play("fedavg", "clients=1").digest


def test_sce_erases_what_cancels_out() -> None:
    assert sce.merged(t([2.0, 1.0], [-2.0, 3.0])).tolist() == pytest.approx([0.0, (5 * 1 + 13 * 3) / 18])
    # w = (5, 13)/18 of 2² + 1² and 2² + 3²


def test_sce_goes_array_by_array() -> None:
    strategy, start, models = double("sce", "strategy.keep=0.25", "strategy.lam=1")
    for name, value in fused(strategy, models).items():
        stack = torch.stack([m[name] - start[name] for m in models])
        moved = value - start[name]
        torch.testing.assert_close(moved, sce.merged(sce.selected(stack, 0.25)), rtol=0, atol=1e-12)
        assert 0 < int((moved != 0).sum()) <= max(1, round(0.25 * moved.numel()))


# --- DARE ---------------------------------------------------------------------------------------------------


def test_dare_that_drops_nothing_is_fedavg() -> None:
    words = ("partition=size", "partition.min_size=5", "rounds=1")
    ours = play("dare", "strategy.drop=0", *words).strategy.model
    theirs = play("fedavg", *words).strategy.model
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-6)


def test_dare_is_the_task_vector_in_expectation_and_sends_what_is_left() -> None:
    strategy = server("dare", "strategy.drop=0.75")
    client = wake(strategy)
    assert client.fit()["drawn"] == 1
    end = client.weights()
    tau = torch.cat([(end[n].double() - client.start[n].double()).flatten() for n in end])
    mean, sizes = torch.zeros_like(tau), []
    for client.round in range(400):
        sent = client.share()
        sizes.append(len(sent["update"]["entries"]))
        whole = strategy.widened(Share(0, sent, {"num-examples": 10, "drawn": client.round}))
        flat = torch.cat([v.flatten() for v in whole.values()])
        kept = flat != 0
        torch.testing.assert_close(flat[kept], 4 * tau[kept], rtol=1e-6, atol=0)  # 1/(1 − p)
        mean += flat / 400
    assert sum(sizes) / 400 == pytest.approx(len(tau) / 4, rel=0.01)
    assert len(set(sizes)) > 1  # Bernoulli, entry by entry
    moved = tau != 0
    error = (mean[moved] / tau[moved] - 1).square().mean()
    assert float(error) == pytest.approx(3 / 400, rel=0.1)  # p/(1 − p) of a mean of 400


def test_dare_weighs_by_examples_and_leaves_out_another_number_of_entries() -> None:
    strategy, start, models = double("dare", "strategy.drop=0.5")

    def said(i, extra=0, counts=COUNTS):
        size = sum(v.numel() for v in start.values())
        kept = mask(size, 0.5, 0, i, 4)
        tau = torch.cat([(models[i][n] - start[n]).flatten() for n in start])
        entries = torch.cat([2 * tau[kept], torch.zeros(extra)])
        return Share(i, {"update": {"entries": entries}}, {"num-examples": counts[i], "drawn": 4})

    strategy.fuse(Shares(iter([said(0), said(1, extra=1), said(2)]), {}))
    (line,) = strategy.inbox.left_out
    assert "client 1: update/entries" in line
    size, at = sum(v.numel() for v in start.values()), 0
    masks = [mask(size, 0.5, 0, i, 4) for i in (0, 2)]
    for name, value in strategy.model.items():
        part = slice(at, at := at + value.numel())
        taus = [2 * (models[i][name] - start[name]).flatten() * m[part] for i, m in zip((0, 2), masks, strict=True)]
        want = start[name].flatten() + (3 * taus[0] + 5 * taus[1]) / 8
        torch.testing.assert_close(value.flatten(), want, rtol=0, atol=1e-12)
    uniform = double("dare", "strategy.drop=0.5", "strategy.weighting=uniform")[0]
    uniform.fuse(Shares(iter([said(0), said(1, counts=[3, 0, 5]), said(2)]), {}))  # who has none does not count
    name = "body.1.weight"
    first = slice(start[name].numel())
    taus = [2 * (models[i][name] - start[name]).flatten() * m[first] for i, m in zip((0, 2), masks, strict=True)]
    assert next(iter(start)) == name
    torch.testing.assert_close((uniform.model[name] - start[name]).flatten(), sum(taus) / 2, rtol=0, atol=1e-12)


def test_dare_costs_a_tenth_on_the_way_up() -> None:
    ours, theirs = play("dare").totals, play("fedavg").totals
    assert 0.08 < ours["up_bytes"] / theirs["up_bytes"] < 0.12
    assert ours["down_bytes"] == theirs["down_bytes"]


# --- Twin-Merging -------------------------------------------------------------------------------------------


def test_the_exclusive_expert_by_hand() -> None:
    own, common = {"a": t([3.0, 1.0]), "b": t([0.5, -4.0])}, {"a": t([1.0, 2.0]), "b": t([0.0, 2.0])}
    v = twin_merging.exclusive(own, common, 0.5)  # apart by 2, −1, 0.5, −6
    assert v["a"].tolist() == [[2.0, 0.0]]
    assert v["b"].tolist() == [[0.0, -6.0]]
    none = twin_merging.exclusive(own, common, 0.0)
    assert not any(bool(value.any()) for value in none.values())


def test_twin_merging_predicts_with_both_experts_and_trains_from_the_common_one() -> None:
    strategy = server("twin_merging", "strategy.keep=1", "train.momentum=0")
    first = wake(strategy)
    metrics = first.fit()
    own = {k: v.clone() for k, v in first.weights().items()}
    assert metrics["num-examples"] > 0
    moved = {k: v + 1 for k, v in strategy.model.items()}
    second = wake(strategy, state=first.state, model=moved)
    for name, value in second.weights().items():  # keep = 1: θ* + (θ_k − θ*) = θ_k
        torch.testing.assert_close(value, own[name], rtol=0, atol=1e-6)
    second.fit()
    plain = wake(server("task_arithmetic", "train.momentum=0"), model=moved)
    plain.fit()
    for name, value in second.weights().items():
        assert torch.equal(value, plain.weights()[name])
    sparse = server("twin_merging", "strategy.keep=0.1")
    third = wake(sparse, state={"own": own}, model=moved)
    away = sum(int((v != moved[n]).sum()) for n, v in third.weights().items())
    assert away == round(0.1 * sum(v.numel() for v in moved.values()))


def test_twin_merging_has_task_arithmetics_server() -> None:
    ours, theirs = play("twin_merging", "strategy.lam=0.3"), play("task_arithmetic", "strategy.lam=0.3")
    for name, value in ours.strategy.model.items():
        assert torch.equal(value, theirs.strategy.model[name])
    assert ours.totals["up_bytes"] == theirs.totals["up_bytes"]
    assert ours.digest != theirs.digest  # clients keep what is their own


# --- all of them --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ties", "sce", "regmean"])
def test_a_run_of_one_round_merges_as_the_papers_do(name: str) -> None:
    once = play(name, "rounds=1")
    assert once.digest == play(name, "rounds=1", "strategy.lam=1").digest
    assert once.digest != play(name, "rounds=1", "strategy.lam=0.3").digest
    assert play(name, "rounds=2").digest == play(name, "rounds=2", "strategy.lam=0.3").digest
    assert "strategy.lam=null is 1 in a run of one round" in once.strategy.planned()
    assert play(name, "rounds=1", "strategy.lam=1").strategy.planned() == ""


@pytest.mark.parametrize("name", ["ties", "sce"])
def test_where_merging_is_repeated_a_step_is_shorter_than_the_papers(name: str) -> None:
    """At λ = 1 nothing cancels, so the model goes several times as far as the mean, in every round anew."""
    steps = []
    for words in ((), ("strategy.lam=1",)):
        strategy, start, models = double(name, *words)
        steps.append({k: v - start[k] for k, v in fused(strategy, models).items()})
    for key, step in steps[0].items():
        torch.testing.assert_close(step, 0.3 * steps[1][key], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["ties", "sce"])
def test_a_client_without_examples_has_no_task(name: str) -> None:
    strategy, _, models = double(name)
    want = {k: v.clone() for k, v in fused(strategy, [models[0], models[2]], [3, 5]).items()}
    again, start, _ = double(name)
    for key, value in fused(again, [models[0], start, models[2]], [3, 0, 5]).items():
        torch.testing.assert_close(value, want[key], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_on_adapters_only_they_and_the_head_travel(name: str) -> None:
    played = play(name, "strategy.rank=2", "rounds=1")
    assert played.strategy.inbox.failures["rejected"] == 0, played.strategy.inbox.left_out
    kinds = {key.split(".")[-2] for key in played.strategy.model}
    assert kinds == {"lora_A", "lora_B", "head"}
    start = played.strategy.workspace.initial("mlp_small")
    moved = [key for key, value in played.strategy.model.items() if not torch.equal(value, start[key])]
    assert "body.1.lora_B.weight" in moved
    assert "head.weight" in moved


@pytest.mark.parametrize("word", ["alpha=4", "targets=body.1"])
def test_settings_of_adapters_without_adapters_are_refused(word: str) -> None:
    with pytest.raises(UserError, match=f"strategy.{word}.* goes with adapters: set strategy.rank"):
        play("ties", f"strategy.{word}")


def test_buffers_are_averaged_by_examples() -> None:
    strategy = server("ties", "model=resnet8_bn")
    start = strategy.model
    names = set(merging.parameters(strategy.workspace.model("resnet8_bn"), start))
    buffers = [key for key in start if key not in names]
    assert any(key.endswith("running_mean") for key in buffers)
    models = [{k: v + i if v.is_floating_point() else v + 2 * i for k, v in start.items()} for i in range(3)]
    new = fused(strategy, models)
    key = next(key for key in buffers if key.endswith("running_mean"))
    torch.testing.assert_close(new[key], start[key] + (7 * 1 + 5 * 2) / 15)
    scope = Scope({}, layout_of(start), strategy.hyper, module=strategy.workspace.model("resnet8_bn"))
    assert set(merging.rest_arrays(scope)) == set(buffers)


@pytest.mark.parametrize("name", ALL)
def test_papers_are_named_and_pools_refused(name: str) -> None:
    entry = registry.entry(name)
    assert "arXiv" in entry.paper
    assert not entry.server.heterogeneous
