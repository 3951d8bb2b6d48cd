"""DP-SGD: gradients by hand, ε by Opacus's own accountant, and what a private run says or refuses.

The five defects of the released private code (fed_lora.md §1.4) are caught by the tests named in
`tests/strategies/test_adapter_defects.py`.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("opacus", reason="the extra `privacy` is not installed")

from fedfuse.config.schema import PrivacyConfig, TrainConfig
from fedfuse.core.fit import remarks
from fedfuse.errors import UserError, WorldError
from fedfuse.train import privacy
from fedfuse.train.adapters import LoRA, LoRASB, inject
from fedfuse.train.ledger import Ledger
from fedfuse.train.privacy import Budget, check, drawn, epsilon, joined, noise_for, own_entropy, train
from fedfuse.train.task import IGNORED, task_loss, task_losses
from fedfuse.train.work import counting
from tests.federations import federation, play
from tests.halves import server

NOISY = ("privacy.noise=4.0", "privacy.clip=0.5")


def model(layer: type | None = LoRASB) -> nn.Module:
    torch.manual_seed(0)
    plain = nn.ModuleDict({"body": nn.Linear(6, 5), "head": nn.Linear(5, 3)})
    built = nn.Sequential(plain["body"], nn.Tanh())
    whole = nn.Sequential()
    whole.add_module("body", built)
    whole.add_module("head", plain["head"])
    if layer is None:
        return whole
    inject(whole, layer, rank=2, scale=1.0)
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return whole


def data(n: int = 12):
    draw = torch.Generator().manual_seed(1)
    return torch.randn(n, 6, generator=draw), torch.randint(0, 3, (n,), generator=draw)


def by_hand(start: nn.Module, rows: torch.Tensor, clip: float, expected: float, lr: float) -> dict[str, torch.Tensor]:
    """One step of SGD on the mean of clipped gradients, one example after another."""
    x, y = data()
    whole = copy.deepcopy(start)
    names = [n for n, p in whole.named_parameters() if p.requires_grad]
    total = {n: torch.zeros_like(whole.get_parameter(n)) for n in names}
    for i in rows.tolist():
        whole.zero_grad()
        F.cross_entropy(whole(x[i : i + 1]), y[i : i + 1]).backward()
        grads = {n: whole.get_parameter(n).grad for n in names}
        norm = torch.stack([g.norm() for g in grads.values()]).norm()
        for n, g in grads.items():
            total[n] += g * (clip / (norm + 1e-6)).clamp(max=1.0)
    return {n: start.get_parameter(n).detach() - lr * total[n] / expected for n in names}


@pytest.mark.parametrize("layer", [None, LoRA, LoRASB])
@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("clipping", ["ghost", "plain"])
def test_a_step_clips_every_example_over_all_that_is_trained(clipping, chunk, layer) -> None:
    x, y = data()
    net = model(layer)
    privacy = PrivacyConfig(noise=1.0, clip=0.3, clipping=clipping, chunk=chunk)
    rows = drawn(len(x), 0.5, torch.Generator().manual_seed(5))
    assert 0 < len(rows) < len(x)
    want = by_hand(net, rows, 0.3, 6.0, 0.2)
    config = TrainConfig(lr=0.2, momentum=0.0)
    before = {n: p.detach().clone() for n, p in net.named_parameters() if not p.requires_grad}
    train(net, x, y, config, privacy, (0.0, 0.5, 1), torch.Generator().manual_seed(5), torch.Generator())
    for name, value in want.items():
        assert torch.allclose(net.get_parameter(name), value, atol=1e-6), name
    for name, value in before.items():
        assert torch.equal(net.get_parameter(name), value)
    assert "head.weight" in want
    assert not any(hasattr(p, "grad_sample") for p in net.parameters())


class Mean(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(1)


def network(kind: str) -> tuple[nn.Sequential, torch.Tensor]:
    """A small model and four rows for it."""
    torch.manual_seed(0)
    if kind == "tokens":
        layers = [nn.Embedding(9, 6), nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8), Mean(), nn.Linear(8, 3)]
        return nn.Sequential(*layers), torch.randint(0, 9, (4, 5))
    if kind == "images":
        layers = [nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(8, 3)]
        return nn.Sequential(*layers), torch.rand(4, 1, 6, 6)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), torch.rand(4, 6)


def summed(net: nn.Module, x: torch.Tensor, y: torch.Tensor, clip: float, clipping: str) -> torch.Tensor:
    """What a step adds up of all rows, next to no noise on it."""
    seen: list[torch.Tensor] = []

    def look(net: nn.Module) -> None:
        seen.append(torch.cat([p.grad.double().flatten() for p in net.parameters()]) * len(x))

    train(net, x, y, TrainConfig(lr=0.0, momentum=0.0), PrivacyConfig(noise=1.0, clip=clip, clipping=clipping),
          (1e-30, 1.0, 1), torch.Generator().manual_seed(0), torch.Generator(), after_backward=look)  # fmt: skip
    return seen[0]


@pytest.mark.parametrize("kind", ["features", "tokens", "images"])
@pytest.mark.parametrize("clipping", ["ghost", "plain"])
def test_no_weights_make_an_example_add_more_than_it_may(clipping: str, kind: str) -> None:
    scales = (1e-30, 1e-18, 1.0, 1e18, 1e30)
    net, x = network(kind)
    start, y = copy.deepcopy(net.state_dict()), torch.tensor([0, 1, 2, 1])
    trained = [name for name, module in net.named_children() if list(module.parameters())]
    worst = 0.0
    for clip in (1e-3, 1.0):
        for first, last in itertools.product(scales, scales):
            for bias in (0.0, 1e18):
                state = copy.deepcopy(start)
                for name, value in state.items():
                    value *= first if name.startswith(trained[0]) else last if name.startswith(trained[-1]) else 1.0
                for name in trained[:-1]:
                    if f"{name}.bias" in state:
                        state[f"{name}.bias"] += bias
                state[f"{trained[-1]}.bias"][0] += 52.0 if bias else 0.0
                net.load_state_dict(state)
                with_it, without = (summed(net, x[i:], y[i:], clip, clipping) for i in (0, 1))
                worst = max(worst, float((with_it - without).norm()) / clip)
                assert worst <= 1.001, (clip, first, last, bias)
    assert worst > 0.9


@pytest.mark.parametrize("clipping", ["ghost", "plain"])
def test_squares_that_vanish_in_float32_hide_no_gradient(clipping: str) -> None:
    """The attack of an audit: activations of 1e18 and slopes of 1e-23, and an example added a thousandfold."""
    net = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1000))
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
        net[0].bias[:], net[1].bias[0] = 8e18, 52.08
    found = summed(net, torch.ones(1, 2), torch.tensor([0]), 1e-3, clipping).norm()
    assert 0.9e-3 < found <= 1.001e-3


def test_what_cancels_in_one_pass_and_not_in_the_next_is_why_sites_that_require_privacy_clip_plain() -> None:
    net = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 2), nn.Linear(2, 2))
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
        net[1].weight[:, 0] = torch.tensor([5, -3]) * 2.0**50  # 5 · 3δ - 3 · 5δ is 0 of δ = 1, and of some shares of it
        net[2].weight[0] = torch.tensor([3.0, 5.0])
        net[2].bias[0] = 200.0  # δ = 1 and -1
    x, y, clips = torch.ones(1, 2), torch.tensor([1]), (1.0, 0.9, 0.8, 0.7)
    added = {c: [float(summed(net, x, y, clip, c).norm()) / clip for clip in clips] for c in ("plain", "ghost")}
    assert max(added["plain"]) <= 1.001
    assert max(added["ghost"]) > 1000


class Falling(nn.Module):
    """Dropout as attention has it: a function's, in a module without parameters."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x, 0.5, self.training)


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), Falling()])
@pytest.mark.parametrize("clipping", ["ghost", "plain"])
def test_one_example_more_moves_no_other_ones_dropout(clipping: str, layer: nn.Module) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(layer, nn.Linear(6, 3))
    x, y = torch.rand(40, 6), torch.arange(40) % 3
    with_it, without = (summed(net, x[rows], y[rows], 0.5, clipping) for rows in (slice(0, 40), slice(1, 40)))
    assert (with_it - without).norm() <= 0.5 * 1.001


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("clipping", ["ghost", "plain"])
def test_an_example_without_a_finite_gradient_adds_nothing(clipping: str, rows: int) -> None:
    """The attack of an audit: weights that overflow only beyond a threshold made the noised sum a yes or no."""
    net, x = network("features")
    y = torch.tensor([0, 1, 2, 1])
    with torch.no_grad():
        net[0].weight[0, 0], net[2].weight[:, 0] = 3e38, 1e30
    x[:, 0] = 0.0
    without = summed(net, x[1:], y[1:], 1.0, clipping)
    x[0, 0] = 2.0  # overflows
    assert not task_losses(net(x), y)[0].isfinite()
    found = summed(net, x[:rows], y[:rows], 1.0, clipping)
    assert torch.allclose(found, without if rows == 4 else torch.zeros_like(found), atol=1e-7)


def test_a_basis_takes_no_gradient_that_is_not_finite() -> None:
    from fedfuse.train.basis import gradients

    net = model()
    x, y = data()
    rows = torch.arange(3)
    x[1] = math.inf
    found, alone = (
        gradients(net, lambda i: task_loss(net(x[i]), y[i]), chosen, 1, 0.5) for chosen in (rows, rows[::2])
    )
    for name, value in alone.items():
        assert torch.equal(found[name], value)
        assert value.any()


@pytest.mark.parametrize("clipping", ["ghost", "plain"])
def test_noise_has_the_deviation_it_should_have_and_an_empty_draw_is_noise_alone(clipping) -> None:
    x, y = data()
    net = nn.Sequential(nn.Linear(6, 400), nn.Linear(400, 3))
    start = copy.deepcopy(net)
    privacy = PrivacyConfig(noise=1.0, clip=0.5, clipping=clipping)
    config = TrainConfig(lr=1.0, momentum=0.0)
    train(net, x, y, config, privacy, (2.0, 1e-9, 1), torch.Generator(), torch.Generator().manual_seed(0))
    moved = torch.cat([(a - b).flatten() for a, b in zip(net.parameters(), start.parameters(), strict=True)])
    assert abs(moved.std() * 1e-9 * len(x) - 1.0) < 0.05  # σ·C = 1, divided by q·N


@pytest.mark.parametrize("seed", [0, 1])
def test_the_examples_it_tells_of_are_those_to_be_expected(seed) -> None:
    x, y = data()
    draws = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(0)
    with counting() as tally:
        train(model(None), x, y, TrainConfig(), PrivacyConfig(noise=1.0), (1.0, 0.3, 5), *draws)
    assert tally.examples == 18  # 5 times 0.3 of 12


def test_plain_gradients_are_held_a_few_at_a_time(monkeypatch) -> None:
    net, (x, y) = model(None), data()
    held = []
    real = privacy.plain_sum
    monkeypatch.setattr(privacy, "plain_sum", lambda *given: held.append(len(given[2])) or real(*given))
    monkeypatch.setattr(privacy, "HELD", 5 * sum(p.numel() for p in net.parameters()))
    settings = PrivacyConfig(noise=0.0, clipping="plain")
    train(net, x, y, TrainConfig(), settings, (0.0, 1.0, 1), torch.Generator(), torch.Generator())
    assert held == [5, 5, 2]


def test_losses_by_example_have_the_mean_of_the_task() -> None:
    logits, labels = torch.randn(4, 7, 5), torch.randint(0, 5, (4, 7))
    assert torch.allclose(task_losses(logits, labels).mean(), task_loss(logits, labels))
    labels[0, 3:] = IGNORED
    whole = F.cross_entropy(logits[0, :2], labels[0, 1:3])
    assert torch.allclose(task_losses(logits, labels)[0], whole)


def accountant(*steps: tuple[float, float, int]):
    from opacus.accountants import PRVAccountant

    made = PRVAccountant()
    for noise, rate, count in steps:
        for _ in range(count):
            made.step(noise_multiplier=noise, sample_rate=rate)
    return made


def told(path, metric: str) -> dict[tuple[int, int], float]:
    """(round, client) to a figure that clients sent after training."""
    import polars as pl

    rows = pl.read_parquet(path / "metrics.parquet").filter(metric=metric, scope="client", split="train")
    return {(r["round"], r["client"]): r["value"] for r in rows.iter_rows(named=True)}


@pytest.fixture(scope="module")
def private_run(tmp_path_factory):
    """FedAvg on digits, Dirichlet, two of three clients a round."""
    path = tmp_path_factory.mktemp("private") / "run"
    words = (*NOISY, "partition=dirichlet", "participation=0.67", "rounds=3", "evaluate.every=3")
    with federation("fedavg", *words, path=path) as (built, _):
        start = copy.deepcopy(built.strategy.workspace.initial("mlp_small"))
        built.run()
    return built, path, start


def test_epsilon_adds_up_over_rounds_by_participation(private_run) -> None:
    built, path, _ = private_run
    spent, deltas = told(path, "epsilon"), told(path, "delta")
    assert len(spent) == 6
    counts = {}
    for (round, client), value in sorted(spent.items()):
        n = built.scenario.examples(client)
        counts[client] = counts.get(client, 0) + 1
        passes = -(-n // 16)
        assert deltas[round, client] == min(1e-5, 1 / (10 * n))  # its own, never that of batches or of all clients
        want = accountant((4.0, 1 / passes, passes * counts[client])).get_epsilon(min(1e-5, 1 / (10 * n)))
        assert abs(value - want) < 1e-9
    assert max(counts.values()) > 1


def test_weights_moved_and_the_loss_is_not_told(private_run) -> None:
    built, path, start = private_run
    assert max((built.strategy.model[n] - v).abs().max() for n, v in start.items()) > 1e-3
    assert not told(path, "loss")


def test_a_simulation_says_that_it_is_one(private_run) -> None:
    _, path, _ = private_run
    summary = json.loads((path / "summary.json").read_text())
    assert summary["dp"] == "simulated"
    assert any("which no private example has touched" in note for note in summary["notes"])
    with federation("fedavg") as (built, directory):
        built.run()
        assert "dp" not in json.loads((directory.path / "summary.json").read_text())


@pytest.mark.parametrize("name", ["fed_sb", "scaffold"])
def test_private_runs_are_deterministic_and_resume_with_what_was_spent(name, tmp_path) -> None:
    from tests.contract.test_matrix import Crash

    words = (*NOISY, "strategy.rank=8") if name == "fed_sb" else NOISY
    digest = play(name, *words).digest
    assert play(name, *words, grid="serial").digest == digest
    assert play(name, *words, "privacy.clip=0.4").digest != digest
    crashed = federation(name, *words, path=tmp_path / "run", callbacks=(Crash(1),))
    with crashed as (built, _), pytest.raises(KeyboardInterrupt):
        built.run()
    assert play(name, *words, path=tmp_path / "run").digest == digest


def test_the_least_noise_is_found_and_lasts_exactly_as_long_as_planned(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FEDFUSE_CACHE", str(tmp_path))
    noise = noise_for(0.2, 0.01, ((0.25, 8),))
    assert 0.198 <= epsilon(((noise, 0.25, 8),), 0.01) <= 0.2
    noise_for.cache_clear()
    monkeypatch.setattr("fedfuse.train.privacy.epsilon", None)  # found in the cache, not computed again
    assert noise_for(0.2, 0.01, ((0.25, 8),)) == noise
    monkeypatch.undo()
    state: dict = {}
    config = PrivacyConfig(epsilon=0.2, delta=0.01)
    for _ in range(2):  # state survives between rounds, the object does not
        budget = Budget(config, TrainConfig(epochs=1, batch_size=25), 2, 100, state)
        rate, steps = budget.steps()
        assert (rate, steps) == (0.25, 4)
        budget.spend(budget.noise([(rate, steps)]), rate, steps)
    assert budget.noise([(rate, steps)]) == noise
    assert budget.epsilon == epsilon(((noise, 0.25, 8),), 0.01)
    with pytest.raises(UserError, match=r"privacy.epsilon=0.2 is spent"):
        budget.spend(noise, rate, steps)


@pytest.mark.parametrize(
    ("c", "target", "trials"),
    [
        # too little: a twentieth beyond the line's end; then, enough: back by the secant, 95 % of the way at most
        (3, 0.2, [4, y := 4 * 1.05 * 0.75 / 0.199, 4 * (y / 4) ** 0.95, 3 / 0.199]),
        (0.3, 0.2, [4, 0.3 / 0.199]),  # more than enough: along the line
        (0.01, 0.2, [4, 1, 0.25, 0.0625, 0.01 / 0.199]),  # a quarter at most
        (300, 0.2, [4, 64, 1024, 1.05 * 300 / 0.199, 300 / 0.199]),  # sixteenfold
        (0.7984, 0.2, [4]),  # within 1 %: at once
        (0.7999, 0.2, [4]),
        (0.8004, 0.2, [4, 4 * 1.1, 0.8004 / 0.199]),  # a tenth at least
    ],
)
def test_the_search_for_noise_follows_log_epsilon_over_log_noise(c, target, trials, tmp_path, monkeypatch) -> None:
    """With ε = c/σ every trial has a closed form; a target of 0.2 is aimed at with 0.199."""
    from fedfuse.train import accounting

    seen: list[float] = []

    def counted(history, delta: float) -> float:
        assert [one[1:] for one in history] == [(0.25, 8), (0.5, 3)]
        assert len({one[0] for one in history}) == 1
        assert delta == 0.01
        seen.append(history[0][0])
        return c / seen[-1]

    monkeypatch.setenv("FEDFUSE_CACHE", str(tmp_path))
    monkeypatch.setattr(accounting, "epsilon", counted)
    search = accounting.noise_for.__wrapped__  # without its memory
    assert search(target, 0.01, ((0.25, 8), (0.5, 3))) == seen[-1]
    assert seen == pytest.approx(trials, rel=1e-12)
    assert search(target, 0.01, ((0.25, 8), (0.5, 3))) == seen[-1]
    assert len(seen) == len(trials)  # kept in the cache


def test_no_noise_up_to_ten_thousand(tmp_path, monkeypatch) -> None:
    from fedfuse.train import accounting

    seen: list[float] = []
    monkeypatch.setenv("FEDFUSE_CACHE", str(tmp_path))
    monkeypatch.setattr(accounting, "epsilon", lambda history, delta: (seen.append(history[0][0]), 9.0)[1])
    with pytest.raises(UserError, match=r"privacy.epsilon=0.2 at δ=0.01: no noise multiplier up to 10,000 reaches it"):
        accounting.noise_for.__wrapped__(0.2, 0.01, ((0.25, 8),))
    assert seen == [4, 64, 1024, 16384]


def test_a_budget_plans_what_is_asked_for_and_lasts_to_the_last_step(tmp_path, monkeypatch) -> None:
    from fedfuse.train import privacy

    plans = []
    monkeypatch.setattr(privacy, "noise_for", lambda *asked: (plans.append(asked), 2.5)[1])
    monkeypatch.setattr(privacy, "epsilon", lambda history, delta: sum(steps / noise for noise, _, steps in history))
    config, plan = PrivacyConfig(epsilon=4.0, delta=1 / 50), TrainConfig(batch_size=16, epochs=3)
    state: dict = {}
    budget = Budget(config, plan, 7, 50, state)  # δ = 1/N is allowed
    assert (budget.delta, budget.history, budget.epsilon) == (1 / 50, (), 0.0)
    with pytest.raises(UserError, match=r"privacy.delta=0.02: client has 51 examples; allowed is at most 1/N"):
        Budget(config, plan, 7, 51, {})
    assert budget.steps() == (1 / 4, 12)
    assert budget.steps(2) == (1 / 4, 8)
    assert budget.steps(2, 25) == (1 / 2, 4)
    assert budget.steps(5, 64) == (1, 5)
    bounded = Budget(config, TrainConfig(batch_size=16, epochs=3, max_steps=7), 7, 50, {})
    assert (bounded.steps(), bounded.steps(2)) == ((1 / 4, 7), (1 / 4, 8))
    assert budget.noise([(0.25, 12), (0.5, 0), (1.0, 2)], (0.1, 1)) == 2.5
    assert budget.noise([(0.25, 99)]) == 2.5  # fixed before the first release
    assert plans == [(4.0, 1 / 50, ((0.1, 1), (0.25, 84), (1.0, 14)))]
    longer = Budget(PrivacyConfig(epsilon=4.0, trainings=9), plan, 7, 50, {})
    longer.noise([(0.25, 12)])
    assert plans[1] == (4.0, 1e-5, ((0.25, 108),))
    assert Budget(PrivacyConfig(noise=0.8), plan, 7, 50, {}).noise([(0.25, 12)]) == 0.8
    assert len(plans) == 2
    budget.spend(2.5, 0.25, 4)
    budget.spend(2.0, 0.25, 2)
    again = Budget(config, plan, 7, 50, state)
    assert again.metrics() == {"epsilon": 2.6, "delta": 1 / 50, "noise": 2.0}
    with pytest.raises(UserError, match=r"privacy.epsilon=4 is spent \(2.6 so far, 4.6 with this training\)"):
        again.spend(1.0, 1.0, 2)
    again.spend(2.5, 0.25, 3)
    assert again.epsilon == pytest.approx(3.8)
    exact = Budget(PrivacyConfig(epsilon=4.0), plan, 7, 50, {})
    exact.spend(0.5, 1.0, 2)  # all of it
    assert exact.epsilon == 4.0


def test_different_releases_compose() -> None:
    history = joined(joined((), ((6.0, 0.1, 1),)), ((4.0, 0.2, 3), (4.0, 0.2, 2)))
    assert history == ((6.0, 0.1, 1), (4.0, 0.2, 5))
    want = accountant((6.0, 0.1, 1), (4.0, 0.2, 5)).get_epsilon(0.01)
    assert epsilon(history, 0.01) == want


def test_a_gradient_basis_is_noised_inside_the_budget() -> None:
    words = ("strategy.init=raw_grad", "strategy.init_rows=20", "strategy.rank=4", "rounds=1")
    found = []
    for grid in ("inline", "serial"):
        with federation("fed_sb", *words, *NOISY, grid=grid) as (built, directory):
            built.run()
            rate = 20 / built.scenario.examples(0)
            if grid == "inline":
                kept = directory.clients.load(0, built.strategy.outbox.tags[0])["privacy"]
                assert json.loads(kept["history"])[0] == [4.0, rate, 1]
                assert len(json.loads(kept["history"])) == 2
            assert "inside each client's budget" in built.strategy.made_from
            found.append(built.strategy.published("basis")["body.1.basis_B"])
    assert torch.equal(*found)
    plain = play("fed_sb", *words).strategy.published("basis")["body.1.basis_B"]
    assert not torch.allclose(plain, found[0], atol=1e-2)


def test_a_deployed_site_uses_its_own_entropy_and_a_ledger_that_forgets_nothing(tmp_path) -> None:
    from flwr.app import Message  # noqa: F401 - Flower is there

    seen = []
    for attempt in range(2):
        with federation("fedavg", *NOISY, "rounds=1") as (built, _):
            ledger = tmp_path / f"{attempt}.jsonl"
            built.grid.node.workspace.ledger = Ledger(ledger)
            built.run()
            seen.append(next(iter(built.strategy.model.values())))
        assert len(ledger.read_text().splitlines()) == 3
    assert not torch.equal(*seen)
    budget = Budget(PrivacyConfig(noise=1.0), TrainConfig(), 1, 50, {}, Ledger(tmp_path / "0.jsonl"))
    assert sum(steps for *_, steps in budget.history) > 3


def test_a_deployed_sites_noise_is_a_ciphers_and_has_the_deviation_it_should_have(monkeypatch) -> None:
    """torch's generator keeps 32 bits of its seed, all of which can be tried: it is not asked at all."""
    from fedfuse.train import entropy

    keys: list[int] = []
    token = entropy.secrets.token_bytes
    monkeypatch.setattr(entropy.secrets, "token_bytes", lambda n: (keys.append(n), token(n))[1])
    monkeypatch.setattr("torch.normal", lambda *a, **k: pytest.fail("torch's generator was asked for noise"))
    x, y = data()
    for clipping in ("ghost", "plain"):
        net = nn.Sequential(nn.Linear(6, 400), nn.Linear(400, 3))
        start = copy.deepcopy(net)
        privacy, config = PrivacyConfig(noise=1.0, clip=0.5, clipping=clipping), TrainConfig(lr=1.0, momentum=0.0)
        train(net, x, y, config, privacy, (2.0, 1e-9, 1), own_entropy(), own_entropy())
        moved = torch.cat([(a - b).flatten() for a, b in zip(net.parameters(), start.parameters(), strict=True)])
        assert abs(moved.std() * 1e-9 * len(x) - 1.0) < 0.05
        assert abs(float(moved.mean() * 1e-9 * len(x))) < 0.1
    assert keys == [32] * 4  # 256 bits for every stream


def test_the_keystream_is_normal_and_uniform_and_changes_its_key() -> None:
    from scipy import stats

    from fedfuse.train import entropy

    stream = entropy.Keystream()
    assert stats.kstest(stream.normal(20_001), "norm").pvalue > 1e-6
    assert stats.kstest(stream.uniform(20_000), "uniform").pvalue > 1e-6
    assert stream.normal(0).shape == (0,)
    stream.left = 5
    assert len(stream.bytes(100)) == 100
    assert stream.left == entropy.LONGEST - 95
    draws = stream.normal(20_000)
    assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 0.05
    rows = drawn(100_000, 0.1, stream)
    assert abs(len(rows) / 1e4 - 1) < 0.05


def refused(match: str, name: str, *words: str) -> None:
    with pytest.raises((UserError, WorldError), match=match) as caught:
        play(name, *words)
    assert "\n" not in str(caught.value)


def test_what_is_refused() -> None:
    refused("BatchNorm, which mixes the examples", "fedavg", *NOISY, "model=resnet8_bn", "data.limit=60")
    refused(r"privacy.delta=0.1: client \d has 5\d examples", "fedavg", *NOISY, "privacy.delta=0.1")
    refused("a loss of its own", "fedkd", *NOISY)
    refused("outside of training", "moon", *NOISY, "rounds=2")
    refused("leave the clients", "fedgkt", *NOISY)
    refused("joins all examples at one client", "centralized", *NOISY)
    refused(r"what it trained privately is not finite, and stays", "fedavg", *NOISY, "train.lr=3e38", "rounds=1")
    refused(r"privacy.clip=0.0009: .* at least 0.001", "fedavg", "privacy.noise=4", "privacy.clip=0.0009")
    refused(r"privacy.epsilon=-1", "fedavg", "privacy.epsilon=-1")
    refused(r"privacy.clipping=half", "fedavg", *NOISY, "privacy.clipping=half")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        *((name, "class counts") for name in ("fedd2s", "fedgen", "fedhkd", "fedproto")),
        *((name, "label sets") for name in ("cofed", "fd")),
    ],
)
def test_who_tells_of_its_examples_is_refused_before_it_trains(name: str, what: str) -> None:
    with pytest.raises(UserError, match=f"strategy={name} lets {what} of private examples leave the clients"):
        server(name, *NOISY)


UNCOVERED = {
    **dict.fromkeys(("fedkd", "fml", "fedov", "comet"), "trains on private examples with a loss of its own"),
    **dict.fromkeys(
        ("ditto", "fisher", "flwr_qfedavg", "moon", "selectivefd", "knfu strategy.epd_source=oracle_label_histogram"),
        "looks at private examples outside of training",
    ),
}


@pytest.mark.parametrize("words", UNCOVERED)
def test_what_dp_sgd_does_not_cover_is_refused_before_it_trains(words: str) -> None:
    name, *more = words.split()
    with pytest.raises(UserError, match=f"strategy={name} {UNCOVERED[words]}"):
        server(name, *NOISY, *more)


@pytest.mark.parametrize("words", ["moon strategy.mu=0", "comet strategy.lam=0"])
def test_what_leaves_out_its_uncovered_part_trains_privately(words: str) -> None:
    name, *more = words.split()
    assert play(name, *NOISY, *more, "rounds=2", "data.limit=120").digest


@pytest.mark.parametrize("level", ["example", "client"])
def test_a_budget_that_ends_before_the_rounds_is_said_before_the_run(level: str) -> None:
    def told(*words: str) -> bool:
        strategy = server("fedavg", "privacy.epsilon=8", f"privacy.level={level}", "rounds=3", *words)
        return any("ε is planned for so many of rounds=3" in remark for remark in remarks(strategy))

    assert told("privacy.trainings=2")
    assert not told("privacy.trainings=3")
    assert not told()
    assert told("privacy.trainings=2", "participation=0.6") == (level == "client")  # whose noise is of every round


class Centred(nn.Module):
    """Keeps a running mean of what it sees, as no layer of torch but the normalisations does."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(features, classes)
        self.register_buffer("seen", torch.zeros(features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.seen += 0.1 * (x.flatten(1).mean(0) - self.seen)
        out: torch.Tensor = self.layer(x.flatten(1) - self.seen)
        return out


def centred(shape: tuple[int, ...], classes: int) -> nn.Module:
    return Centred(math.prod(shape), classes)


def test_a_buffer_that_training_moves_is_refused() -> None:
    """It would be shared as it is: one example of 100 moved a client's share by 0.3, at whatever ε."""
    words = ("model=custom", f"model.build={__name__}:centred")
    refused("seen changes with the examples that pass", "fedavg", *NOISY, *words)
    play("fedavg", *words, "rounds=1")


def test_without_opacus_it_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(UserError, match=r"fedfuse\[privacy\]"):
        check(model(None), "mlp")


def test_what_opacus_says_of_a_model_is_one_line_and_short() -> None:
    class Odd(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise NotImplementedError("no rule\n  for " + "a" * 148 + "b" * 200)

    x, y = data()
    draw = torch.Generator().manual_seed(0)
    with pytest.raises(UserError) as caught:
        train(Odd(6, 3), x, y, TrainConfig(), PrivacyConfig(noise=1.0), (1.0, 1.0, 1), draw, draw)
    words = f"no rule for {'a' * 148}"
    assert str(caught.value) == f"privacy.clipping=ghost: Opacus refuses this model ({words})"
    assert len(words) == 160


@pytest.mark.parametrize("name", ["flora", "flexlora", "hetlora", "fed_sb"])
def test_noise_stays_within_a_clients_rank(name, monkeypatch) -> None:
    """A private step adds noise to every trained number; those beyond the rank of a client have to stay zero."""
    from fedfuse.families.adapters import AdapterClient

    seen, keep = [], AdapterClient.keep

    def look(self) -> None:
        rank = [2, 4, 1][self.client]
        for name, value in self.weights().items():
            if "lora_A" in name or "lora_R" in name:
                seen.append((rank, bool(value[rank:].any()), bool(value[:rank].any())))
            if "lora_B" in name or "lora_R" in name:
                seen.append((rank, bool(value[:, rank:].any()), bool(value[:, :rank].any())))
        keep(self)

    monkeypatch.setattr(AdapterClient, "keep", look)
    words = ["strategy.init=weight_svd"] if name == "fed_sb" else []
    play(name, "strategy.rank=4", "strategy.ranks=[2,4,1]", "rounds=1", *words, *NOISY)
    assert {rank for rank, _, _ in seen} == {1, 2, 4}
    assert not any(beyond for _, beyond, _ in seen)
    assert all(within for _, _, within in seen)


def test_delta_is_far_below_what_would_let_an_example_out() -> None:
    from fedfuse.train.privacy import delta_of

    assert delta_of(50) == 1e-5
    assert delta_of(20_000) == pytest.approx(5e-6)


def test_a_strategy_that_trains_twice_a_round_has_both_planned() -> None:
    """FedRep: three epochs on the head and two on the body, every round; the budget lasts, and is all spent."""
    words = ("privacy.epsilon=6", "rounds=2", "strategy.head_epochs=3", "strategy.body_epochs=2", "partition=dirichlet")
    with federation("fedrep", *words) as (built, directory):
        built.run()
        assert not built.strategy.inbox.ever_left_out, built.strategy.inbox.left_out
        for client in range(3):
            kept = directory.clients.load(client, built.strategy.outbox.tags[client])["privacy"]
            ((noise, rate, steps),) = json.loads(kept["history"])  # one σ and one q for both
            examples = built.scenario.examples(client)
            assert steps == 2 * (3 + 2) * -(-examples // 16)
            assert 5.8 < accountant((noise, rate, steps)).get_epsilon(min(1e-5, 1 / (10 * examples))) <= 6


def test_what_an_example_of_language_data_is() -> None:
    from fedfuse.train.privacy import private_notes

    assert not any("tokens" in note for note in private_notes("s", False))
    assert any("cut into windows is several" in note for note in private_notes("s", False, tokens=True))
    assert "dp: epsilon 2.5 at most, of the client who spent most, at its delta" in private_notes(
        "s", False, spent=[1, 2.5]
    )
