"""Whole clients hidden: clip and noise by closed forms, ε by Opacus's accountant and by the Gaussian's own formula."""

from __future__ import annotations

import json
import math

import pytest
import torch

pytest.importorskip("opacus", reason="the extra `privacy` is not installed")

from scipy.optimize import brentq
from scipy.stats import norm as normal

from fedfuse.config.compose import compose
from fedfuse.core.client_level import clipped
from fedfuse.errors import Refused, UserError, WorldError
from fedfuse.network.policy import Policy
from tests.federations import federation, play
from tests.halves import server, wake

UNEQUAL = ("partition=dirichlet", "partition.alpha=0.3", "clients=4")
CLIENT = ("privacy.level=client", "privacy.clip=0.05")


def test_an_update_is_shortened_over_all_arrays_together() -> None:
    anchor = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[5.0]])}
    arrays = {"a": torch.tensor([4.0, 2.0]), "b": torch.tensor([[9.0]])}  # moved by (3, 0) and 4: norm 5
    short, norm = clipped(arrays, anchor, 2.0)
    assert norm == pytest.approx(5)
    torch.testing.assert_close(short["a"], torch.tensor([1 + 3 * 0.4, 2.0]))
    torch.testing.assert_close(short["b"], torch.tensor([[5 + 4 * 0.4]]))
    kept, norm = clipped(arrays, anchor, 5.1)
    assert kept is arrays
    assert norm == pytest.approx(5)


def vector(arrays) -> torch.Tensor:
    return torch.cat([arrays[name].double().flatten() for name in sorted(arrays)])


@pytest.fixture
def silent(monkeypatch):
    """No noise, but what it would have cost."""
    monkeypatch.setattr("fedfuse.core.client_level.gaussian", lambda like, deviation, source: torch.zeros_like(like))


@pytest.mark.usefixtures("silent")
def test_a_round_is_the_mean_of_clipped_updates_each_client_alike() -> None:
    """Without noise, against the clients' own training; one of them moves less than the clip allows."""
    built = server("fedavg", *UNEQUAL)
    start, moved = vector(built.model), []
    for client in range(4):
        half = wake(built, client)
        half.fit()
        moved.append(vector(half.weights()) - start)
    norms = sorted(float(m.norm()) for m in moved)
    clip = (norms[0] + norms[1]) / 2
    examples = [built.scenario.examples(c) for c in range(4)]
    assert len(set(examples)) > 1
    words = ("privacy.level=client", f"privacy.clip={clip}", "privacy.noise=1", "rounds=1")
    played = play("fedavg", *UNEQUAL, *words).strategy
    wanted = start + sum(m * min(1, clip / float(m.norm())) for m in moved) / 4
    torch.testing.assert_close(vector(played.model), wanted, rtol=0, atol=1e-5)
    weighted = start + sum(n * m for n, m in zip(examples, moved, strict=True)) / sum(examples)
    assert (vector(played.model) - weighted).abs().max() > 1e-3


def test_the_noise_has_the_deviation_it_should_have(request) -> None:
    """σ·C on the sum, so σ·C/m on the mean; m is the cohort, three of four clients."""
    words = (*UNEQUAL, *CLIENT, "privacy.noise=3", "rounds=1", "participation=0.75")
    loud = play("fedavg", *words).strategy.model
    request.getfixturevalue("silent")
    quiet = play("fedavg", *words).strategy.model
    drawn = (vector(loud) - vector(quiet)) * 3 / (3.0 * 0.05)
    assert len(drawn) > 2000
    assert abs(float(drawn.std()) - 1) < 0.05
    assert abs(float(drawn.mean())) < 4 / math.sqrt(len(drawn))


def gaussian_epsilon(noise: float, rounds: int, delta: float) -> float:
    """ε of `rounds` Gaussian releases: one of σ/√rounds (Balle and Wang 2018, theorem 8)."""
    mu = math.sqrt(rounds) / noise

    def excess(epsilon: float) -> float:
        return normal.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * normal.cdf(-mu / 2 - epsilon / mu) - delta

    return brentq(excess, 0, 100)


def test_epsilon_is_opacus_and_the_closed_form(tmp_path) -> None:
    import polars as pl
    from opacus.accountants import PRVAccountant

    words = (*CLIENT, "privacy.noise=2.5", "rounds=3", "participation=0.5", "privacy.delta=1e-4")
    with federation("fedavg", *UNEQUAL, *words, path=tmp_path / "run") as (built, directory):
        built.run()
        summary = directory.summary(built)
    rows = pl.read_parquet(tmp_path / "run" / "metrics.parquet").filter(scope="server")
    told = {m: rows.filter(metric=m).sort("round")["value"].to_list() for m in ("epsilon", "delta", "noise")}
    assert told["delta"] == [1e-4] * 3
    assert told["noise"] == [2.5] * 3
    accountant = PRVAccountant()
    for round, value in enumerate(told["epsilon"], 1):
        accountant.step(noise_multiplier=2.5, sample_rate=1.0)
        assert value == pytest.approx(accountant.get_epsilon(1e-4), abs=1e-9)
        exact = gaussian_epsilon(2.5, round, 1e-4)
        assert exact <= value < exact + 0.05
    assert f"dp: epsilon {told['epsilon'][-1]:.4g} at delta 0.0001, by client, after 3 rounds" in summary["notes"]
    assert summary["dp"] == "simulated"


def test_the_least_noise_lasts_as_long_as_planned(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FEDFUSE_CACHE", str(tmp_path))
    strategy = play("fedavg", *CLIENT, "privacy.epsilon=4", "privacy.delta=0.01").strategy
    kept = strategy.state["privacy"]
    assert json.loads(kept["history"]) == [[kept["noise"], 1.0, 2]]
    assert 3.9 < gaussian_epsilon(kept["noise"], 2, 0.01) <= 4
    with pytest.raises(UserError, match=r"privacy.epsilon=4 is spent.*privacy.trainings"):
        play("fedavg", *CLIENT, "privacy.epsilon=4", "privacy.delta=0.01", "privacy.trainings=1")


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "feddyn", "ditto", "moon", "fedrep", "fedit"])
def test_strategies_that_average_one_thing_can_be_hidden(name) -> None:
    played = play(name, *CLIENT, "privacy.noise=1.5")
    assert not played.strategy.inbox.ever_left_out
    assert played.digest == play(name, *CLIENT, "privacy.noise=1.5", grid="serial").digest
    assert played.digest != play(name, *CLIENT, "privacy.noise=1.6").digest
    rows = played.strategy.state["privacy"]
    assert json.loads(rows["history"]) == [[1.5, 1.0, 2]]


def test_a_resumed_run_goes_on_with_what_was_spent(tmp_path) -> None:
    from tests.contract.test_matrix import Crash

    words = (*CLIENT, "privacy.noise=1.5", "rounds=3")
    digest = play("fedavg", *words).digest
    crashed = federation("fedavg", *words, path=tmp_path / "run", callbacks=(Crash(1),))
    with crashed as (built, _), pytest.raises(KeyboardInterrupt):
        built.run()
    assert play("fedavg", *words, path=tmp_path / "run").digest == digest


@pytest.mark.parametrize(
    ("name", "words", "why"),
    [
        ("local", (), "shares nothing"),
        ("fedmd", (), "is no update of anything published"),
        ("scaffold", ("train.momentum=0",), "shares control, model"),
        ("fedhkd", (), "lets class counts of private examples leave the clients"),
        ("fednova", (), "'update', which is no update of anything published"),
        ("knfu", (), "of which not one sum is all that it needs"),
        ("fed_sb", ("strategy.init=weight_svd",), "of which not one sum"),
        ("flwr_fedavg", (), "of which not one sum"),
        ("centralized", (), "joins all examples at one client"),
        ("fedavg", ("model=resnet8_bn", "data.limit=60"), "is a BatchNorm, whose statistics"),
        ("fedavg", ("privacy.delta=0.5",), "3 clients; allowed is at most 1/N"),
        ("fedavg", ("privacy.level=site",), "privacy.level=site"),
    ],
)
def test_what_is_refused(name, words, why) -> None:
    with pytest.raises((UserError, WorldError), match=why) as caught:
        play(name, *CLIENT, "privacy.noise=1", *words)
    assert "\n" not in str(caught.value)


def test_a_fuse_that_looks_at_single_shares_is_refused() -> None:
    from fedfuse.core.client_level import Noised

    with pytest.raises(UserError, match="fedavg looks at each client's share"):
        list(Noised(iter([]), {}, server("fedavg")))


def test_the_level_alone_hides_nothing_and_is_refused_and_a_site_wants_its_examples_hidden() -> None:
    with pytest.raises(UserError, match=r"privacy.level=client does nothing here: it goes with privacy.epsilon"):
        compose(["strategy=fedavg", "privacy.level=client"])
    config = compose(["strategy=fedavg", "privacy.level=client", "privacy.noise=2"])
    with pytest.raises(Refused, match="the run has only clients'"):
        Policy(require_dp=True).check(config)
    Policy(require_dp=True).check(compose(["strategy=fedavg", "privacy.noise=2"]))
