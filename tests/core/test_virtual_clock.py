"""Whole runs in virtual time: the same models where nobody is lost, the same bits everywhere, and every limit."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import polars as pl
import pytest
import torch
from torch.utils import flop_counter

from fedfuse.config import registry
from fedfuse.config.compose import compose
from fedfuse.core.loop import Callback
from fedfuse.core.timed import shape
from fedfuse.errors import UserError, WorldError
from fedfuse.runs.experiment import run
from fedfuse.train.work import warm_up
from tests.federations import TINY, federation, play

ON = ("clients=6", "clock=devices", "rounds=4")
AWAY = ("clock.dropout=0.2", "clock.availability=markov", "clock.on_s=2", "clock.off_s=1", "clock.period_s=100")
SCHEDULES = [
    ("schedule=sync",),
    ("schedule=deadline", "schedule.seconds=0.15"),
    ("schedule=overcommit", "participation=0.5"),
    ("schedule=semiasync", "schedule.seconds=0.12"),
    ("schedule=fedbuff", "schedule.buffer=2"),
    ("schedule=fedasync",),
]


class Killed(Exception):
    pass


class Kill(Callback):
    """Ends a run after a commit, as a signal would."""

    def __init__(self, after: int) -> None:
        self.after = after

    def round(self, built) -> None:
        if built.done == self.after:
            raise Killed


def told(played):
    return played.digest, played.federation.clock.book.chain


@pytest.mark.parametrize(("name", "schedule"), [*(("fedavg", s) for s in SCHEDULES), ("fedmd", SCHEDULES[4])])
def test_killed_anywhere_and_resumed_gives_the_same_bits(name: str, schedule, tmp_path: Path) -> None:
    words = (*ON, *AWAY, *schedule)
    whole = play(name, *words)
    assert told(play(name, *words, "evaluate.every=3", reverse=True)) == told(whole)
    for after in (2,):
        path = tmp_path / str(after)
        with pytest.raises(Killed), federation(name, *words, path=path, callbacks=(Kill(after),)) as (built, _):
            built.run()
        resumed = play(name, *words, path=path)
        assert told(resumed) == told(whole)
        assert resumed.totals == whole.totals
        rows = pl.read_parquet(path / "schedule.parquet")
        assert rows.height == sum(
            v for k, v in resumed.federation.clock.book.totals.items() if k.startswith("flights/")
        )


@pytest.mark.parametrize("schedule", [SCHEDULES[0], SCHEDULES[4]])
def test_killed_in_the_middle_of_any_version_and_resumed_gives_the_same_bits(schedule, tmp_path: Path) -> None:
    """At every batch of work in turn: after it was done, and before anything of it was fused or committed."""
    words, kills = (*ON, *AWAY, *schedule, "rounds=3"), 0
    whole = play("fedavg", *words)
    for at in itertools.count():
        path = tmp_path / str(at)
        with federation("fedavg", *words, path=path) as (built, _):
            carry, batches = built.exchange, itertools.count()

            def cut(messages, carry=carry, batches=batches, at=at):
                done = list(carry(messages))
                if next(batches) == at:
                    raise Killed
                return iter(done)

            built.exchange = cut
            try:
                built.run()
                break
            except Killed:
                kills += 1
        assert told(play("fedavg", *words, path=path)) == told(whole)
    assert kills >= 3  # a batch a version at least


@pytest.mark.parametrize("workers", [1, 2])
def test_ray_keeps_the_same_time(workers: int) -> None:
    words = (*ON, *AWAY, "schedule=fedbuff", "schedule.buffer=2")
    assert told(play("fedavg", *words, grid="ray", workers=workers)) == told(play("fedavg", *words))


def test_a_full_buffer_of_fresh_updates_is_fedavg_to_rounding() -> None:
    plain = play("fedavg", "clients=6", "rounds=3")
    words = ("clients=6", "rounds=3", "clock=devices", "schedule=fedbuff", "schedule.buffer=6")
    buffered = play("fedavg", *words)
    for name, value in plain.strategy.model.items():
        assert torch.allclose(value, buffered.strategy.model[name], atol=1e-6)
    far = play("fedavg", *words, "schedule.server_lr=0.5")
    assert not torch.allclose(far.strategy.model["body.1.weight"], plain.strategy.model["body.1.weight"], atol=1e-4)


@pytest.mark.parametrize("mixing", [0.6, 1.0])
def test_fedasync_mixes_and_its_constant_does_not_compound(mixing: float) -> None:
    """One client at work, no staleness: x ← (1 − α)·x + α·x_new each time, so α = 1 is that client's own training."""
    words = ("clients=1", "rounds=6", "clock=devices", "schedule=fedasync", f"schedule.mixing={mixing}")
    seen: list = []

    class Watch(Callback):
        def round(self, built) -> None:
            seen.append({k: v.clone() for k, v in built.strategy.model.items()})

    with federation("fedavg", *words, callbacks=(Watch(),)) as (built, _):
        built.run()
    plain = play("fedavg", "clients=1", "rounds=6").strategy.model
    if mixing == 1.0:
        assert all(torch.allclose(seen[-1][k], plain[k], atol=1e-6) for k in plain)
    moves = [sum(float((a[k] - b[k]).norm()) for k in a) for a, b in itertools.pairwise(seen)]
    assert min(moves) > 0.2 * max(moves)  # a compounding α would have shrunk them to 0.6⁵ = 0.08


def test_stale_updates_are_discounted_by_their_age() -> None:
    words = (*ON, "schedule=fedbuff", "schedule.buffer=2", "clock.spread=2")
    with federation("fedavg", *words, "rounds=8") as (built, directory):
        built.run()
        rows = pl.read_parquet(directory.path / "schedule.parquet").filter(pl.col("outcome") == "arrived")
    age = (rows["round"] - rows["since"]).to_list()
    assert max(age) >= 2
    assert rows["weight"].to_list() == pytest.approx([(1 + a) ** -0.5 for a in age])


@pytest.mark.parametrize("name", ["fedmd", "knfu", "fedproto"])
def test_buffered_distillation_fuses_the_newest_share_of_each(name: str, monkeypatch) -> None:
    kind, seen = registry.entry(name).server, []
    fuse = kind.fuse

    def spying(self, shares):
        members = dict(self.outbox.weights)
        seen.append((set(self.outbox.awaited), members))
        fuse(self, shares)

    monkeypatch.setattr(kind, "fuse", spying)
    played = play(name, *ON, "rounds=6", "schedule=fedbuff", "schedule.buffer=2", "schedule.concurrency=3")
    sizes = [len(members) for members, _ in seen]
    assert sizes == sorted(sizes)
    assert sizes[-1] > 2
    assert any(0 < w < 1 for _, weights in seen for w in weights.values())
    assert played.digest


def test_a_strategy_that_is_wrong_under_staleness_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="strategy=scaffold is wrong under staleness"):
        play("scaffold", *ON, "schedule=fedbuff", "schedule.buffer=2")
    with pytest.raises(UserError, match="strategy=cofed does not say"):
        play("cofed", *ON, "schedule=fedasync")
    with pytest.raises(UserError, match=r"transfer\.redraw=false"):
        play("fedmd", *ON, "schedule=fedasync", "transfer.subset=8")


def test_every_strategy_gets_the_same_virtual_time() -> None:
    ended = {}
    for name in ("fedavg", "knfu"):
        with federation(name, *ON, "rounds=1000", "until.seconds=1", "clock.latency_ms=100") as (built, directory):
            built.run()
            summary, rows = directory.summary(built), pl.read_parquet(directory.path / "metrics.parquet")
        assert built.stop == "until.seconds=1"
        assert 0.5 < summary["virtual_s"] <= 1
        assert summary["rounds_done"] == built.done == rows["round"].max()
        assert built.digest
        last = rows.filter((pl.col("round") == built.done) & (pl.col("metric") == "accuracy/personal"))
        assert last.height == 1  # evaluated again as the last, and written once
        assert rows["virtual_s"].is_sorted()
        ended[name] = summary
    assert ended["fedavg"]["schedule_digest"] != ended["knfu"]["schedule_digest"]


@pytest.mark.parametrize(("name", "seconds", "rounds"), [("fedavg", 0.7, 5), ("kafal", 0.7, 4)])
def test_nothing_counts_of_a_round_that_the_end_cuts(name: str, seconds: float, rounds: int) -> None:
    """As if it had not begun: not its bytes, and not its first phase where the second is over too late (KAFAL's)."""
    cut = play(name, *ON, "rounds=1000", f"until.seconds={seconds}")
    whole = play(name, *ON, f"rounds={rounds}")
    assert cut.federation.done == rounds
    assert told(cut) == told(whole)
    for key in ("up_bytes", "down_bytes", "down_unique_bytes", "evaluate_down_bytes"):
        assert cut.totals[key] == whole.totals[key], key


def test_a_run_too_short_for_any_round_says_so() -> None:
    played = play("fedavg", *ON, "until.seconds=0.01")
    assert (played.federation.done, played.federation.stop) == (0, "until.seconds=0.01")
    assert played.totals["down_bytes"] == 0


def test_evaluation_by_virtual_time() -> None:
    played = play("fedavg", *ON, "rounds=12", "evaluate.seconds=0.5")
    times = [h["virtual_s"] for h in played.federation.history]
    assert 2 < len(times) < 9
    assert all(b // 0.5 > a // 0.5 for a, b in itertools.pairwise(times[:-1]))  # and the last always
    assert played.digest == play("fedavg", *ON, "rounds=12").digest


def test_early_stop_by_virtual_time() -> None:
    words = (*ON, "rounds=40", "train.lr=0.00001", "stop.seconds=0.6")
    from fedfuse.core.callbacks import EarlyStop

    with federation("fedavg", *words, callbacks=(EarlyStop(None, 0.6),)) as (built, _):
        built.run()
    assert "0.6 virtual seconds" in built.stop
    assert built.done < 40


def test_whoever_is_lost_is_left_out_counted_and_goes_on_from_before() -> None:
    with federation("knfu", *ON, "rounds=5", "clock.dropout=0.4") as (built, directory):
        built.run()
        summary = directory.summary(built)
    lost = summary["clock"]["flights"]["dropped"]
    assert summary["failures"]["replies"] == lost > 3
    assert not summary["cohort_complete"]
    assert summary["clock"]["wasted_bytes"] >= 0
    assert summary["clock"]["flights"]["arrived"] + lost == 30


def test_who_would_have_been_lost_after_enough_came_is_no_failure() -> None:
    """`failures` and the table of flights say the same: who was lost in time, and not who was let go before."""
    words = ("clients=8", "rounds=6", "schedule=overcommit", "schedule.factor=3", "clock.dropout=0.3")
    played = play(
        "fedavg", *words, "participation=0.25", "clock=devices", "clock.down_kbps=1000", "clock.link_spread=2"
    )
    flights = played.federation.clock.book.summary(played.federation.clock.now)["flights"]
    assert flights["late"] > 0 < flights["dropped"]
    assert played.strategy.inbox.failures["replies"] == flights["dropped"]


def test_nobody_for_a_whole_period_stops_resumably() -> None:
    words = ("clock.availability=markov", "clock.on_s=0.001", "clock.off_s=0.01", "clock.period_s=5")
    with pytest.raises(WorldError, match="a whole period"):
        play("fedavg", *ON, *words)


@pytest.mark.parametrize("words", [(), SCHEDULES[3], SCHEDULES[4], SCHEDULES[5]])
def test_when_every_client_fails_the_run_stops_with_the_cause(words, monkeypatch) -> None:
    def fail(self):
        raise RuntimeError("no such layer")

    monkeypatch.setattr(registry.entry("fedavg").client, "fit", fail)
    with pytest.raises(
        WorldError, match=r"round 1, train: no client succeeded: client \d: RuntimeError: no such layer"
    ):
        play("fedavg", *ON, *words)


def test_slow_architectures_and_more_epochs_take_longer() -> None:
    network = ("clock.latency_ms=0", "clock.gflops=0.001", "clock.spread=0")
    seconds = [
        play("local", *ON, *network, *more).federation.clock.seconds
        for more in ((), ("train.epochs=2",), ("model=mlp",))
    ]
    assert seconds[1] == pytest.approx(2 * seconds[0], rel=1e-6)
    assert seconds[2] > 4 * seconds[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("schedule=fedbuff",), "needs a clock"),
        (("clock=trace",), "clock.devices"),
        (("clock=devices", "schedule=overcommit"), "participation=1.0"),
        (("clock=devices", "schedule=deadline", "schedule.seconds=0.01"), "nobody can meet this deadline"),
        (("clock=devices", "schedule=fedbuff", "schedule.buffer=4"), "there are 3 clients"),
        (("clock=trace", "clock.devices=nowhere.csv"), "nowhere.csv"),
        (("clock=devices", "runtime=flower"), "keeps its own time"),
        (
            ("clock=devices", "secure=on"),
            "clock=devices: secure=on needs everybody's reply at once; allowed is clock=off",
        ),
        (
            ("clock=devices", "privacy.level=client", "privacy.epsilon=5"),
            "clock=devices: privacy.level=client needs everybody's reply at once; allowed is clock=off",
        ),
    ],
)
def test_bad_input_is_one_line_before_anything_runs(words, said: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    base = [w for w in TINY if not w.startswith("runtime=")]
    with pytest.raises(UserError, match=said) as found:
        run(compose([*base, "runtime=inline", f"out={out}", "strategy=fedavg", *words]), quiet=True)
    assert "\n" not in str(found.value)
    assert not out.exists()


@pytest.mark.parametrize(
    "word",
    [
        "clock.gflops=0", "clock.up_kbps=-1", "clock.dropout=1", "clock.on_share=0", "clock.tiers=[moon]",
        "clock.policy=never", "clock.availability=tidal", "schedule.factor=1", "schedule.mixing=0", "schedule.buffer=0",
        "schedule.seconds=0", "schedule.staleness=old", "until.seconds=0", "clock.jitter=-1", "evaluate.seconds=0",
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_is_refused(word: str) -> None:
    with pytest.raises(UserError, match=word.split("=")[0]):
        compose(["clock=devices", "schedule=fedbuff", word])


def test_virtual_time_alone_needs_no_number_of_rounds() -> None:
    assert compose(["clock=devices", "until.seconds=60"]).rounds == 1_000_000
    assert compose(["clock=devices", "until.seconds=60", "rounds=5"]).rounds == 5
    with pytest.raises(UserError, match=r"until\.seconds=60\.0 does nothing here"):
        compose(["until.seconds=60"])


def test_what_the_first_count_of_a_process_takes_is_no_clients_time(monkeypatch, tmp_path: Path) -> None:
    slow = iter([1.0])

    class Slow(flop_counter.FlopCounterMode):
        def __enter__(self):
            time.sleep(next(slow, 0.0))
            return super().__enter__()

    monkeypatch.setattr(flop_counter, "FlopCounterMode", Slow)
    warm_up.cache_clear()
    path = run(compose([*TINY, "strategy=fedavg", *ON, "runtime=inline", f"out={tmp_path / 'run'}"]), quiet=True)
    assert next(slow, None) is None
    timing = pl.read_parquet(path / "timing.parquet").filter(pl.col("scope").str.starts_with("client"))
    assert 0 < timing["seconds"].max() < 1


@pytest.mark.parametrize(
    ("seconds", "said"), [(30, "is beyond the slowest client: it stops nobody"), (0.12, "stops 2 of 6 clients")]
)
def test_a_dry_run_says_whom_a_deadline_stops(seconds: float, said: str) -> None:
    words = (*ON, "schedule=deadline", f"schedule.seconds={seconds}")
    with federation("fedavg", *words) as (built, _):
        assert f"  the deadline {said}" in shape(built.strategy, built.clock)
