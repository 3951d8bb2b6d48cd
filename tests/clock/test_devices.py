"""Devices and intervals: drawn, read from tables, imported; what cannot be is refused in one line."""

from __future__ import annotations

import math
import os
import pickle
from bisect import bisect_right
from pathlib import Path
from statistics import NormalDist

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfuse.clock import draws
from fedfuse.clock.availability import ALWAYS, Intervals, availability, joined
from fedfuse.clock.devices import TIERS, Device, devices
from fedfuse.clock.staleness import discount
from fedfuse.config.clock_keys import ClockConfig
from fedfuse.errors import UserError

HEAD = "client,gflops,s_per_example,down_kbps,up_kbps,latency_ms\n"


def clock(**keys) -> ClockConfig:
    return ClockConfig(name="trace", **keys)


def test_a_device_takes_the_time_that_its_numbers_say() -> None:
    fast = Device(2.0, None, 8.0, 4.0, 100.0)
    assert fast.latency == 100_000_000
    assert fast.downloading(1000) == 10**9  # 8,000 bits at 8,000 bits a second
    assert fast.uploading(1000) == 2 * 10**9
    assert fast.computing(6 * 10**9, 1) == 3 * 10**9
    assert fast.computing(6 * 10**9, 1, 0.5) == 1_500_000_000
    assert Device(None, 0.25, 8.0, 4.0, 0.0).computing(3000, 1000) == 750_000_000  # three examples
    assert Device(3.0, None, 7.0, 4.0, 0.0).downloading(1) == 1_142_858  # rounded up


def test_drawn_devices_are_fixed_and_no_draw_depends_on_another() -> None:
    config = ClockConfig(name="devices", spread=1.5)
    few, many = devices(config, 3, 7), devices(config, 50, 7)
    assert many[:3] == few
    assert devices(config, 3, 8) != few
    speeds = sorted(one.gflops for one in devices(config, 1000, 0))
    assert 8 < speeds[500] < 12.5
    assert 3.2 < speeds[841] / speeds[500] < 6.2  # one σ above the median: e^1.5 = 4.5
    assert (
        devices(ClockConfig(name="devices", spread=0.0, link_spread=0.0), 2, 0)
        == [Device(10.0, None, 20000.0, 5000.0, 50.0)] * 2
    )


def test_draws_are_what_their_names_say() -> None:
    drawn = draws.uniform(3, "x", 1)
    assert 0 < drawn < 1
    assert draws.normal(3, "x", 1) == NormalDist().inv_cdf(drawn)
    assert draws.exponential(5.0, 3, "x", 1) == -5.0 * math.log(drawn)
    assert draws.lognormal(5.0, 0.5, 3, "x", 1) == 5.0 * math.exp(0.5 * NormalDist().inv_cdf(drawn))
    assert draws.lognormal(5.0, 0.0, 3, "x", 1) == 5.0
    assert draws.nanoseconds(1.5e-9) == 2
    assert draws.nanoseconds(2.5) == 2_500_000_000


def test_the_ends_of_a_draw_are_numbers(monkeypatch) -> None:
    monkeypatch.setattr(draws, "seed_of", lambda *_: 0)
    assert draws.uniform(0) == 2.0**-64
    assert draws.normal(0) == NormalDist().inv_cdf(2.0**-64)
    monkeypatch.setattr(draws, "seed_of", lambda *_: 2**63 - 1)
    assert draws.normal(0) == NormalDist().inv_cdf(1 - 2.0**-53)
    assert draws.exponential(1.0, 0) == 0


def test_a_good_line_is_good_both_ways() -> None:
    config = ClockConfig(name="devices", link_spread=0.7)
    for client, one in enumerate(devices(config, 5, 3)):
        link = draws.lognormal(1.0, 0.7, 3, "link", client)
        assert (one.down_kbps, one.up_kbps) == (20_000.0 * link, 5_000.0 * link)
        assert one.gflops == draws.lognormal(10.0, 1.0, 3, "speed", client)
    with pytest.raises(AttributeError):
        one.gflops = 1.0


@pytest.mark.parametrize(
    ("tier", "milliseconds"),
    [
        ("workstation", (10, 2, 5, 1)),
        ("laptop", (20, 10, 100 / 3, 10)),
        ("phone", (50, 50, 200, 50)),
        ("board", (80, 200, 1000, 500)),
    ],
)
def test_what_a_tier_takes_for_a_megabit_and_a_gigaflop(tier: str, milliseconds: tuple[float, ...]) -> None:
    """First byte, a megabit down, a megabit up, 10⁹ operations."""
    (one,) = devices(ClockConfig(name="devices", speeds="tiers", tiers=[tier]), 1, 0)
    took = one.latency, one.downloading(125_000), one.uploading(125_000), one.computing(10**9, 1)
    assert [t / 1e6 for t in took] == pytest.approx(milliseconds, rel=1e-6)


def test_tiers_are_dealt_in_turn() -> None:
    found = devices(ClockConfig(name="devices", speeds="tiers", tiers=["board", "phone"]), 3, 0)
    assert [one.gflops for one in found] == [TIERS["board"][0], TIERS["phone"][0], TIERS["board"][0]]


def test_a_table_of_devices(tmp_path: Path) -> None:
    path = tmp_path / "devices.csv"
    path.write_text(HEAD + "1,,0.5,10,20,3\n0,7,,1,2,0\n")
    assert devices(clock(devices=str(path)), 2, 0) == [Device(7, None, 1, 2, 0), Device(None, 0.5, 10, 20, 3)]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("0,0,,1,2,0\n1,1,,1,1,0\n", "gflops=0; allowed is more than 0"),
        ("0,-3,,1,2,0\n1,1,,1,1,0\n", "gflops=-3"),
        ("0,inf,,1,2,0\n1,1,,1,1,0\n", "gflops=inf"),
        ("0,1,,0,2,0\n1,1,,1,1,0\n", "down_kbps=0"),
        ("0,1,,2,-2,0\n1,1,,1,1,0\n", "up_kbps=-2"),
        ("0,1,,2,2,-1\n1,1,,1,1,0\n", "latency_ms=-1"),
        ("0,1,,2,2,nan\n", "latency_ms=nan"),
        ("0,1,2,2,2,1\n", "gflops and s_per_example"),
        ("0,,,2,2,1\n", "no speed"),
        ("0,1,,1,2,0\n", "client 1 has no row"),
        ("0,1,,1,2,0\n0,1,,1,2,0\n", "client 0 has a row already"),
        ("0,fast,,1,2,0\n", "gflops='fast'; a number is needed"),
        ("0.5,1,,1,2,0\n", "client=0.5"),
        ("-1,1,,1,2,0\n", "client=-1"),
        ("0,1,,1\n", "up_kbps=''"),
    ],
)
def test_a_wrong_table_of_devices_is_refused_in_one_line(tmp_path: Path, rows: str, said: str) -> None:
    path = tmp_path / "devices.csv"
    path.write_text(HEAD + rows)
    with pytest.raises(UserError, match=said) as told:
        devices(clock(devices=str(path)), 2, 0)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(("head", "said"), [("client,gflops\n", "no column"), (HEAD[:-1] + ",colour\n", "unknown")])
def test_columns_are_named(tmp_path: Path, head: str, said: str) -> None:
    path = tmp_path / "devices.csv"
    path.write_text(head)
    with pytest.raises(UserError, match=said):
        devices(clock(devices=str(path)), 1, 0)


def test_a_missing_table_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        devices(clock(devices=str(tmp_path / "nowhere.csv")), 1, 0)


# --- intervals -----------------------------------------------------------------------------------------------


def test_intervals_turn_with_their_period() -> None:
    night = Intervals(((0, 3), (8, 10)), 10)
    assert [night.on(t) for t in range(10)] == [True] * 3 + [False] * 5 + [True] * 2
    assert night.on(10**9) == night.on(0)
    assert night.off_after(8) == 13  # on across the turn
    assert night.off_after(1) == 3
    assert night.off_after(4) == 4  # off already
    assert night.on_from(4) == 8
    assert night.on_from(104) == 108
    assert Intervals(((2, 5),), 10).on_from(7) == 12
    assert Intervals((), 10).on_from(3) is None
    assert (ALWAYS.on(5), ALWAYS.off_after(5), ALWAYS.on_from(5)) == (True, None, 5)
    assert Intervals(((0, 10),), 10).off_after(3) is None


spans = st.lists(st.tuples(st.integers(0, 29), st.integers(1, 9)), max_size=5)


@settings(max_examples=100, deadline=None)
@given(spans, st.integers(0, 10**6))
def test_bisection_agrees_with_looking_at_every_moment(pieces: list[tuple[int, int]], at: int) -> None:
    """Wrap and long jumps, against a model that knows each of the period's 30 moments."""
    marks = [False] * 30
    for start, length in pieces:
        for moment in range(start, min(start + length, 30)):
            marks[moment] = True
    found = joined(sorted((s, s + n) for s, n in pieces), 30)
    assert found.on(at) == marks[at % 30]
    ahead = [marks[(at + step) % 30] for step in range(31)]
    expected = None if all(marks) else at + ahead.index(False)
    assert found.off_after(at) == expected
    assert found.on_from(at) == (at + ahead.index(True) if any(marks) else None)
    starts = [a for a, _ in found.spans]
    assert starts == sorted(starts)
    assert bisect_right(starts, 30) == len(starts)


def test_generators_are_on_as_long_as_they_say() -> None:
    config = ClockConfig(name="devices", availability="markov", on_s=900, off_s=2700)
    found = availability(config, 300, 0)
    share = sum(sum(b - a for a, b in one.spans) / one.period for one in found) / 300
    assert abs(share - 0.25) < 0.03
    assert availability(config, 3, 0) == found[:3]
    config = ClockConfig(name="devices", availability="diurnal", on_share=0.3, period_s=100)
    found = availability(config, 200, 0)
    assert all(sum(b - a for a, b in one.spans) == 30 * 10**9 for one in found)
    assert 80 < sum(one.on(0) for one in found) + 30 < 120  # time zones are spread: 0.3 of 200, give or take
    assert availability(ClockConfig(name="devices"), 2, 0) == [ALWAYS] * 2


def test_generators_by_their_draws() -> None:
    """Each interval is its own draw: alternating exponential times, and a start by time zone."""
    config = ClockConfig(name="devices", availability="markov", on_s=30, off_s=10, period_s=100)
    for client, one in enumerate(availability(config, 6, 4)):
        on, now, expected = draws.uniform(4, "markov start", client) < 0.75, 0, []
        for step in range(200):
            mean = 30 * 10**9 if on else 10 * 10**9
            end = now + round(draws.exponential(mean, 4, "markov", client, step))
            if on and now < 100 * 10**9:
                expected.append((now, min(end, 100 * 10**9)))
            now, on = end, not on
        assert one == Intervals(tuple(expected), 100 * 10**9)
    config = ClockConfig(name="devices", availability="diurnal", on_share=0.5, period_s=100)
    whole, half = 100 * 10**9, 50 * 10**9
    for client, one in enumerate(availability(config, 6, 4)):
        start = round(draws.uniform(4, "time zone", client) * whole)
        turned = ((0, start - half), (start, whole)) if start > half else ((start, start + half),)
        assert one.spans == turned


def test_joined_intervals_are_cut_and_nothing_is_left_of_nothing() -> None:
    assert joined([(-5, 2), (2, 3), (4, 4), (6, 99)], 10) == Intervals(((0, 3), (6, 10)), 10)
    assert joined([(0, 5), (1, 2)], 10).spans == ((0, 5),)
    assert joined([(10, 12)], 10).spans == ()
    with pytest.raises(AttributeError):
        joined([], 10).period = 3


def test_nobody_ever_on_is_refused() -> None:
    never = ClockConfig(name="devices", availability="markov", on_s=1e-9, off_s=1e9, period_s=10)
    with pytest.raises(UserError, match=r"clock\.availability=markov: nobody is ever on"):
        availability(never, 2, 0)


def test_a_table_of_intervals(tmp_path: Path) -> None:
    path = tmp_path / "availability.csv"
    path.write_text("client,on_s,off_s\n1,0,4\n0,2,3\n0,0.5,1\n1,4,8\n")
    found = availability(clock(intervals=str(path)), 2, 0)
    half = Intervals(((500_000_000, 10**9), (2 * 10**9, 3 * 10**9)), 8 * 10**9)
    assert found == [half, Intervals(((0, 8 * 10**9),), 8 * 10**9)]
    assert found[1].always


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("0,0,4\n0,3,5\n1,0,1\n", "client 0 is on from 0 to 4 s and from 3 s; intervals may not overlap"),
        ("0,4,4\n1,0,1\n", "on_s=4, off_s=4"),
        ("0,-1,4\n1,0,1\n", "on_s=-1"),
        ("0,5,inf\n1,0,1\n", "off_s=inf"),
        ("0,0,4\n", "client 1 has no row"),
    ],
)
def test_wrong_intervals_are_refused_in_one_line(tmp_path: Path, rows: str, said: str) -> None:
    path = tmp_path / "availability.csv"
    path.write_text("client,on_s,off_s\n" + rows)
    with pytest.raises(UserError, match=said) as told:
        availability(clock(intervals=str(path)), 2, 0)
    assert "\n" not in str(told.value)


# --- FedScale's traces ---------------------------------------------------------------------------------------


def test_fedscales_traces_are_read(tmp_path: Path) -> None:
    path = tmp_path / "capacity.pkl"
    path.write_bytes(
        pickle.dumps({1: {"computation": 120.0, "communication": 4000.0}, 2: {"computation": 30, "communication": 9}})
    )
    found = devices(clock(devices=str(path), latency_ms=5.0), 4, 0)
    assert sorted({(one.s_per_example, one.down_kbps, one.up_kbps) for one in found}) == [
        (0.03, 9, 9),
        (0.12, 4000, 4000),
    ]
    assert found[:2] == found[2:]  # fewer entries than clients: dealt again
    path = tmp_path / "behaviour.pkl"
    path.write_bytes(pickle.dumps({0: {"duration": 9, "active": [1, 2, 6], "inactive": [4, 7], "finish_time": 10}}))
    assert availability(clock(intervals=str(path)), 1, 0) == [
        Intervals(((10**9, 4 * 10**9), (6 * 10**9, 7 * 10**9)), 10 * 10**9)
    ]


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/fedfuse-evil",)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({0: Evil()}, "is refused"),
        ([1, 2], "not one of FedScale's"),
        ({}, "not one of FedScale's"),
        ({0: {"computation": 0, "communication": 1}}, "allowed is more than 0"),
        ({0: {"computation": "x", "communication": 1}}, "allowed is more than 0"),
        ({0: {"communication": 1}}, "allowed is more than 0"),
        ({0: {}, "a": {}}, "several kinds"),
    ],
)
def test_what_is_no_trace_is_refused_and_runs_nothing(tmp_path: Path, value, said: str) -> None:
    path = tmp_path / "capacity.pkl"
    path.write_bytes(pickle.dumps(value))
    with pytest.raises(UserError, match=said):
        devices(clock(devices=str(path)), 1, 0)
    assert not Path("/tmp/fedfuse-evil").exists()


@pytest.mark.parametrize("value", [{"active": [1]}, {"active": [11], "inactive": [], "finish_time": 10}])
def test_a_behaviour_that_makes_no_sense_is_refused(tmp_path: Path, value) -> None:
    path = tmp_path / "behaviour.pkl"
    path.write_bytes(pickle.dumps({0: value}))
    with pytest.raises(UserError, match="entry 0"):
        availability(clock(intervals=str(path)), 1, 0)


def test_staleness_by_the_papers_formulas() -> None:
    assert [discount("constant", age, 9, 9) for age in (0, 5)] == [1, 1]
    assert discount("polynomial", 3, 0.5, 0) == 0.5  # 1/√4, FedBuff's
    assert [discount("hinge", age, 10, 4) for age in (0, 4, 5, 6)] == [1, 1, 1 / 11, 1 / 21]
