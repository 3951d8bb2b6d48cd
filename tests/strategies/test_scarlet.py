"""SCARLET in closed form: Enhanced ERA, and a cache that never serves an expired row."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedfuse.strategies import scarlet
from fedfuse.strategies.scarlet import enhanced_era, lookup, merge
from tests.federations import play
from tests.halves import random_labels, server, shares

SMALL = ("strategy.subset=8", "rounds=7", "strategy.duration=2")


def test_enhanced_era():
    p = random_labels(30, 6)
    np.testing.assert_allclose(enhanced_era(p, 1.0), p, rtol=1e-12)
    np.testing.assert_allclose(enhanced_era(p, 1.7), p**1.7 / (p**1.7).sum(1, keepdim=True), rtol=1e-12)
    entropies = torch.stack([-(q * q.log()).sum(1) for q in (enhanced_era(p, b) for b in (1.0, 1.25, 1.5, 2.0))])
    assert bool((entropies[1:] < entropies[:-1]).all())


@pytest.mark.parametrize("duration", [0, 1, 3])
def test_cache_against_a_dictionary(duration):
    """Thirty random rounds: what is served is of age at most D, is what was put in, and nothing else is requested."""
    draw = torch.Generator().manual_seed(duration)
    reference, cache = {}, None
    for t in range(1, 31):
        rows = torch.randperm(20, generator=draw)[:6].sort().values
        served, at = lookup(cache, rows, t, duration)
        for i, row in enumerate(rows.tolist()):
            fresh = row in reference and t - reference[row][1] <= duration
            assert bool(served[i]) == fresh
        for row, place in zip(rows[served].tolist(), at.tolist(), strict=True):
            label, stamp = reference[row]
            assert torch.equal(cache["p"][place], label)
            assert t - stamp <= duration
            assert int(cache["stamp"][place]) == stamp
        wanted, now = rows[~served].int(), torch.tensor([t], dtype=torch.int32)
        p = torch.rand(len(wanted), 3, generator=draw)
        reference |= {row: (label, t) for row, label in zip(wanted.tolist(), p, strict=True)}
        if cache is None:
            cache = {"index": wanted, "p": p, "stamp": now.expand(len(wanted)).clone()}
        else:
            old = cache["index"][t - cache["stamp"] > duration]
            cache = merge(cache, {"index": wanted, "p": p, "expired": old[~torch.isin(old, wanted)], "round": now})
        assert bool((cache["index"][1:] > cache["index"][:-1]).all())
        assert bool((t - cache["stamp"] <= duration).all())  # expired rows are gone from the cache altogether


def test_an_expired_row_is_not_served_even_if_it_is_still_there():
    cache = {"index": torch.tensor([2, 5]).int(), "p": torch.eye(2), "stamp": torch.tensor([1, 4]).int()}
    served, at = lookup(cache, torch.tensor([0, 2, 5]), 4, 2)
    assert served.tolist() == [False, False, True]
    assert at.tolist() == [1]
    assert lookup(cache, torch.tensor([2]), 3, 2)[0].tolist() == [True]  # age D exactly is still served


def test_a_run_never_serves_an_expired_row(monkeypatch):
    served_ages, requests, inner = [], [], scarlet.lookup

    def spy(cache, rows, round, duration):
        served, at = inner(cache, rows, round, duration)
        if cache is not None:
            served_ages.extend((round - cache["stamp"][at]).tolist())
        return served, at

    monkeypatch.setattr(scarlet.Scarlet, "log", lambda self, name, value, **_: requests.append((name, value)))
    monkeypatch.setattr(scarlet, "lookup", spy)
    done = play("scarlet", *SMALL)
    assert max(served_ages) <= 2
    assert 1 in served_ages or 2 in served_ages  # something did come from the cache
    asked = [value for name, value in requests if name == "cache/requested"]
    assert len(asked) == 7
    assert done.totals["up_bytes"] == 3 * 10 * 4 * sum(asked)
    assert done.totals["resent_bytes"] == 0


def test_cached_rows_travel_once():
    done = play("scarlet", "strategy.subset=24", "rounds=4")
    assert done.totals["up_bytes"] == 3 * 24 * 10 * 4  # all of them, in the first round alone
    assert done.totals["down_bytes"] == 3 * (24 * (10 * 4 + 8) + 2 * 4)  # the cache once, then two empty increments
    always = play("scarlet", "strategy.subset=24", "rounds=4", "strategy.duration=0")
    assert always.totals["up_bytes"] == 4 * done.totals["up_bytes"]


def test_sharpened_mean_enters_the_cache():
    strategy = server("scarlet", "strategy.subset=24", "strategy.beta=2", "strategy.server_model=false")
    sent = [random_labels(24, 10, seed).float() for seed in range(3)]
    strategy.fuse(shares(strategy, *[{"labels": {"p": p}} for p in sent]))
    expected = enhanced_era(torch.stack(sent).double().mean(0), 2.0)
    np.testing.assert_allclose(strategy.published("cache")["p"], expected, rtol=1e-5)


def test_answers_to_another_request_are_excluded():
    strategy = server("scarlet", "strategy.subset=5", "strategy.server_model=false")
    good, bad = random_labels(5, 10).float(), random_labels(4, 10).float()
    strategy.fuse(shares(strategy, {"labels": {"p": good}}, {"labels": {"p": bad}}))
    assert strategy.inbox.failures["rejected"] == 1
    np.testing.assert_allclose(strategy.published("cache")["p"], enhanced_era(good.double(), 1.5), rtol=1e-5)


def test_who_was_away_catches_up():
    over = (*SMALL, "participation=0.5", "clients=4")
    assert play("scarlet", *over, grid="serial").digest == play("scarlet", *over).digest


def test_without_cache_and_sharpening_it_is_dsfl_with_plain_averaging():
    one = play("scarlet", "strategy.subset=24", "strategy.duration=0", "strategy.beta=1")
    two = play("dsfl", "strategy.aggregation=sa", "loss=kl")
    for name, value in one.strategy.state["model"].items():
        torch.testing.assert_close(value, two.strategy.state["model"][name], rtol=1e-4, atol=1e-5)


def test_by_default_a_tenth_of_the_transfer_set_is_drawn_rounded():
    for rows, tenth in ((24, 2), (25, 3)):
        assert server("scarlet", f"transfer.size={rows}").rows_distilled == tenth
    assert server("scarlet", "strategy.subset=7").rows_distilled == 7


@pytest.mark.parametrize(("total", "rows"), [(1, 1), (4, 1), (14, 1), (15, 2), (24, 2), (25, 3)])
def test_a_round_has_a_tenth_of_the_rows_rounded_and_at_least_one(monkeypatch, total, rows):
    monkeypatch.setattr(scarlet, "transfer_rows", lambda scenario, size, round: (size, round))
    scenario = SimpleNamespace(data=SimpleNamespace(transfer=range(total)))
    assert scarlet.round_rows(scenario, scarlet.ScarletHyper(), 3) == (rows, 3)
    assert scarlet.round_rows(scenario, scarlet.ScarletHyper(subset=7), 4) == (7, 4)
