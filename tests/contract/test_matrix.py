"""Every registered strategy through the same contract. A new strategy enters by being registered."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord

from fedfuse.config import registry
from fedfuse.core.loop import Callback
from fedfuse.errors import UserError
from fedfuse.runs.preview import bytes_a_round
from fedfuse.wire.records import record, tensors
from tests.differences import assert_same
from tests.federations import UNDISTURBED, Undisturbed, answer, federation, intercept, play

NAMES = sorted(registry.listed())
SILENT = ("local", "centralized")  # they send nothing


class Crash(Callback):
    """Ends the process' work in the middle of a round."""

    def __init__(self, after: int) -> None:
        self.after = after

    def round(self, federation) -> None:
        if federation.done == self.after:
            phase = federation.strategy.phases(self.after + 1)[0]
            federation.play(self.after + 1, phase)  # the clients have worked and the server has fused …
            raise KeyboardInterrupt  # … but nothing of it was committed


@pytest.fixture
def undisturbed() -> Undisturbed:
    """What every other run is compared with."""
    return UNDISTURBED


@pytest.mark.parametrize("name", NAMES)
def test_deterministic_and_order_free(name: str, undisturbed) -> None:
    assert_same(undisturbed(name), play(name, reverse=True))


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_is_a_number(name: str, undisturbed) -> None:
    assert [note for note in undisturbed(name).notes if note.startswith("not a number")] == []


@pytest.mark.parametrize("name", NAMES)
def test_all_that_lasts_is_in_the_state(name: str, undisturbed) -> None:
    assert [note for note in undisturbed(name).notes if "belongs into self.state" in note] == []


@pytest.mark.parametrize("name", NAMES)
def test_another_seed_is_another_run(name: str, undisturbed) -> None:
    """Where a first round tells: what is sent, published and kept in it is other than with the first seed."""
    other, before = play(name, "seed=1", "rounds=1").steps, undisturbed(name).steps
    assert any(before.get(step, sha) != sha for step, sha in other.items())


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_and_virtual_time_with_everybody_there_change_no_bit(name: str, undisturbed) -> None:
    timed = play(name, "evaluate.every=2", "clock=devices")
    assert_same(undisturbed(name), timed)
    for key in ("up_bytes", "down_bytes", "down_unique_bytes", "setup_bytes"):
        assert timed.totals[key] == undisturbed(name).totals[key], key
    # each phase takes two latencies and more
    assert timed.federation.clock.seconds > 0.1 * len(timed.strategy.phases(1)) or name in SILENT


@pytest.mark.parametrize("name", NAMES)
def test_resumed_equals_undisturbed(name: str, undisturbed, tmp_path: Path) -> None:
    where = tmp_path / "run"
    with federation(name, path=where, callbacks=(Crash(1),)) as (built, _), pytest.raises(KeyboardInterrupt):
        built.run()
    resumed = play(name, path=where)
    assert resumed.federation.done == 2
    assert_same(undisturbed(name), resumed)


@pytest.mark.parametrize("name", NAMES)
def test_network_equals_simulation(name: str, undisturbed) -> None:
    if registry.entry(name).server.pooled:
        pytest.skip("pools data at one place: an upper bound that no network of sites can run")
    assert_same(undisturbed(name), play(name, grid="serial"))


@pytest.mark.parametrize("name", NAMES)
def test_workers_equal_inline(name: str, undisturbed, ray_session) -> None:
    many = play(name, grid="ray", workers=2)
    assert_same(undisturbed(name), many)
    assert many.totals == undisturbed(name).totals


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_true(name: str, undisturbed) -> None:
    """The rows of traffic.parquet add up to the arrays put into messages, and no round to more than a dry run says."""
    played = undisturbed(name)
    totals, most = played.totals, bytes_a_round(played.strategy)
    for way, bound in zip(("up", "down"), most, strict=True):
        assert totals[f"{way}_bytes"] <= played.federation.done * bound, way
    names = ("down_bytes", "up_bytes", "setup_bytes", "evaluate_up_bytes", "evaluate_down_bytes", "resent_bytes")
    assert sum(totals[key] for key in names) == undisturbed.carried[name] > 0 or name in SILENT
    assert totals["resent_bytes"] == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_pool_of_architectures_runs_or_is_refused(name: str) -> None:
    pool = ("model.pool=[mlp_small,mlp,mlp_wide]", "model.feature_dim=16", "rounds=1")
    if not registry.entry(name).server.heterogeneous:
        with pytest.raises(UserError, match="one architecture"):
            play(name, *pool)
        return
    played = play(name, *pool)
    assert played.strategy.inbox.failures == {"replies": 0, "rejected": 0, "retried": 0}, played.strategy.inbox.left_out
    assert played.digest


def _nan(content: ArrayRecord) -> ArrayRecord:
    arrays = {k: v.clone() for k, v in tensors(content).items()}
    key = next(k for k, v in arrays.items() if v.is_floating_point())
    arrays[key].view(-1)[0] = float("nan")
    return record(arrays)


def _renamed(content: ArrayRecord) -> ArrayRecord:
    return record({f"{k}x": v for k, v in tensors(content).items()})


def _larger(content: ArrayRecord) -> ArrayRecord:
    return record({k: torch.cat([v.reshape(-1)] * 101) for k, v in tensors(content).items()})


def _double(content: ArrayRecord) -> ArrayRecord:
    return record({k: v.double() if v.is_floating_point() else v.float() for k, v in tensors(content).items()})


def _floats(content: ArrayRecord) -> bool:
    return any(array.dtype.startswith("float") for array in content.values())


SPOIL = {2: _nan, 3: _renamed, 4: _larger, 5: _double}  # by round


@pytest.mark.parametrize("name", NAMES)
def test_hostile_replies_are_refused(name: str) -> None:
    """Client 1 sends nonsense of another kind each round: it is rejected, counted, and nothing is averaged in."""
    server = registry.entry(name).server
    if not server.records:
        pytest.skip("shares no arrays, so there is nothing to spoil")
    with federation(name, "rounds=5", "evaluate.every=5") as (built, _):
        spoilt: dict[int, int] = {}

        def tampered(reply):
            spoil = SPOIL[built.strategy.round]
            arrays = dict(reply.content.array_records.items()) if reply.has_content() else {}
            bad = {k: spoil(v) for k, v in arrays.items() if spoil is not _nan or _floats(v)}
            if not bad:
                return None
            spoilt[built.strategy.round] = spoilt.get(built.strategy.round, 0) + 1
            return answer(reply, **bad)

        refused: dict[int, int] = {}

        class Count(Callback):
            def round(self, federation) -> None:
                refused[federation.done] = federation.strategy.inbox.failures["rejected"]

        for round in SPOIL:
            intercept(built, tampered, kind="train", round=round, client=1)
        built.callbacks.append(Count())
        built.run()
        if not spoilt:
            pytest.skip("no round after its first carries an array that can be spoilt so")
        for round in spoilt:
            assert refused[round] > refused[round - 1], SPOIL[round]
        for item in built.strategy.board.items.values():
            assert all(bool(torch.isfinite(v).all()) for v in item.arrays.values() if v.is_floating_point())
