"""Counted bytes: what training needed, whatever evaluation, absence or bad luck did to the wire."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfuse import Metrics
from fedfuse.wire.knowledge import Board, Topic
from fedfuse.wire.records import nbytes
from fedfuse.wire.traffic import Traffic
from tests.federations import federation, play
from tests.ledger import LedgerClient, enter, grown, losing


def rows_of(path: Path) -> pl.DataFrame:
    return pl.read_parquet(path / "traffic.parquet")


@pytest.mark.parametrize("every", [1, 5])
def test_fedavg_costs_the_model_both_ways(every: int, tmp_path: Path) -> None:
    """Σ_t |S_t|·P, whatever is evaluated in between."""
    words = ("clients=5", "rounds=5", "participation=0.4", f"evaluate.every={every}")
    with federation("fedavg", *words, path=tmp_path / "run") as (built, _):
        built.run()
        size = nbytes(built.strategy.model)
        sampled = sum(len(built.strategy.plan(r)) for r in range(1, 6))
        assert sampled == 10
        totals = built.strategy.outbox.traffic.summary()
    assert totals["up_bytes"] == totals["down_bytes"] == sampled * size
    assert totals["down_unique_bytes"] == 5 * size
    assert totals["setup_bytes"] == totals["resent_bytes"] == totals["evaluate_up_bytes"] == 0
    assert totals["evaluate_down_bytes"] > 0
    rows = rows_of(tmp_path / "run")
    train = rows.filter(pl.col("message") == "train")
    per_client = train.group_by("round", "client", "direction").agg(pl.col("bytes").sum(), pl.len())
    assert per_client["bytes"].unique().to_list() == [size]
    assert per_client["len"].unique().to_list() == [1]
    assert per_client.height == 2 * sampled
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["traffic"] == totals


def test_evaluation_moves_no_training_byte() -> None:
    for name in ("fedavg", "knfu"):
        words = ("clients=4", "rounds=4", "participation=0.5")
        often, seldom = (play(name, *words, f"evaluate.every={n}").totals for n in (1, 4))
        for key in ("up_bytes", "down_bytes", "down_unique_bytes", "setup_bytes", "resent_bytes"):
            assert often[key] == seldom[key], (name, key)
        if name == "fedavg":  # each evaluation has to bring the model to everyone; a lesson travels once anyway
            assert often["evaluate_down_bytes"] > seldom["evaluate_down_bytes"]


def test_a_cache_that_grows_costs_training_the_same_however_often_it_is_evaluated() -> None:
    """Evaluations bring SCARLET's cache in increments, smaller together than the snapshot a late client would get."""
    words = ("clients=6", "rounds=6", "participation=0.34", "transfer.redraw=true")
    often, seldom = (play("scarlet", *words, f"evaluate.every={n}").totals for n in (1, 6))
    for key in ("up_bytes", "down_bytes", "down_unique_bytes", "resent_bytes"):
        assert often[key] == seldom[key], key


class Told(LedgerClient):
    """Sends its amount as a list among its metrics, too."""

    def fit(self) -> Metrics:
        return {**super().fit(), "again": [float(self.amount)] * 100, "alone": 1.0}


@pytest.mark.parametrize("words", [(), ("clock=devices",)], ids=["plain", "clock"])
def test_numbers_in_a_list_are_no_cheaper_than_in_an_array(words: tuple[str, ...], monkeypatch, tmp_path: Path) -> None:
    name = enter(monkeypatch, client=Told)
    with federation(name, "rounds=2", "clients=3", *words, path=tmp_path / "run") as (built, _):
        built.run()
        totals = built.strategy.outbox.traffic.summary()
    assert totals["up_bytes"] == 2 * 3 * (8 + 100 * 8)
    listed = rows_of(tmp_path / "run").filter(pl.col("record") == "metrics")
    assert listed.select("direction", "message", "bytes").unique().rows() == [("up", "train", 800)]
    if words:
        flights = pl.read_parquet(tmp_path / "run" / "schedule.parquet")
        assert flights["up_bytes"].unique().to_list() == [808]


@pytest.mark.parametrize("subset", [None, 10])
def test_knfu_costs_soft_labels(subset: int | None, tmp_path: Path) -> None:
    """|D_t|·C·4 bytes up, per client and round; down only to who took part before."""
    words = () if subset is None else (f"transfer.subset={subset}",)
    with federation("knfu", "rounds=3", *words, path=tmp_path / "run") as (built, _):
        built.run()
        lesson = (subset or 24) * built.scenario.classes * 4
        totals = built.strategy.outbox.traffic.summary()
    assert totals["up_bytes"] == 3 * 3 * lesson
    assert totals["down_bytes"] == 2 * 3 * lesson  # round 1 has nothing to bring, round 3's lessons serve evaluation
    assert totals["evaluate_down_bytes"] == 3 * lesson
    rows = rows_of(tmp_path / "run").filter((pl.col("direction") == "up") & (pl.col("message") == "train"))
    assert rows["bytes"].unique().to_list() == [lesson]
    assert rows["record"].unique().to_list() == ["soft_labels"]


def test_local_costs_nothing() -> None:
    assert set(play("local").totals.values()) == {0}


def test_a_lost_reply_costs_its_knowledge_once(monkeypatch) -> None:
    """Client 1's node holds the base, the server never heard: the next message brings the rest a second time."""
    name = enter(monkeypatch)
    words = ("rounds=3", "evaluate.every=3", "strategy.every=9")
    there = play(name, *words, grid="serial")
    lost = play(name, *words, grid="serial", drop=losing((1, 1)))
    base = 6 * 6 * 4
    assert there.totals["resent_bytes"] == 0
    assert lost.totals["resent_bytes"] == base
    # the lesson that client 1 did not earn in round 1, and the amount that was lost
    assert there.totals["down_bytes"] - lost.totals["down_bytes"] == 4
    assert there.totals["up_bytes"] - lost.totals["up_bytes"] == 8


def test_rows_add_up_to_the_totals(monkeypatch, tmp_path: Path) -> None:
    name = enter(monkeypatch)
    words = ("clients=4", "rounds=6", "participation=0.5", "strategy.every=1")
    with federation(name, *words, path=tmp_path / "run", grid="serial", drop=losing((2, 0), (2, 1))) as (built, _):
        built.run()
        totals = built.strategy.outbox.traffic.summary()
    rows = rows_of(tmp_path / "run")
    found: Counter[str] = Counter()
    for _, _, direction, message, _, size in rows.iter_rows():
        key = {"train": f"{direction}_bytes", "setup": "setup_bytes", "resend": "resent_bytes"}
        found[key.get(message, f"evaluate_{direction}_bytes")] += size
    assert {k: v for k, v in totals.items() if k != "down_unique_bytes" and v} == dict(found)


# --- any run of a fold topic ------------------------------------------------------------------------------

TOPICS = {"base": Topic("fold", fold=grown), "model": Topic()}
STEP = st.tuples(
    st.sampled_from(["nothing", "base", "model", "both"]),  # what a round publishes
    st.sets(st.integers(0, 2)),  # who trains
    st.booleans(),  # whether everybody is evaluated after it
)


def charged(steps: list[tuple[str, set[int], bool]], evaluate: bool) -> tuple[dict[str, int], int]:
    """Play steps on a board; return the totals and the bytes that were really sent."""
    board, traffic, sent = Board(TOPICS), Traffic(), 0
    held: dict[int, dict] = {c: {} for c in range(3)}
    board.publish("base", {"w": torch.zeros(6, 6)}, None, 0)
    board.publish("model", {"w": torch.zeros(50)}, None, 0)

    def message(kind: str, round: int, client: int) -> None:
        nonlocal sent
        needed = list(board.addresses(client, "mlp"))
        parcels = [p for a in needed for p in board.path(a, held[client].get(a, -1))]
        sent += sum(p.nbytes for p in parcels)
        traffic.down(kind, round, client, needed, parcels, board)
        held[client] = {a: board.items[a].version for a in needed}

    for round, (published, cohort, scored) in enumerate(steps, 1):
        for client in sorted(cohort):
            message("train", round, client)
        if published in ("base", "both"):
            board.publish("base", {"a": torch.full((6,), float(round))}, None, round)
        if published in ("model", "both"):
            board.publish("model", {"w": torch.full((50,), float(round))}, None, round)
        if evaluate and scored:
            for client in range(3):
                message("evaluate", round, client)
    traffic.settle()
    return traffic.summary(), sent


@given(st.lists(STEP, max_size=10))
@settings(max_examples=80, deadline=None)
def test_training_pays_the_same_with_and_without_evaluation(steps) -> None:
    seldom, sent_seldom = charged(steps, False)
    often, sent_often = charged(steps, True)
    for key in ("up_bytes", "down_bytes", "down_unique_bytes", "setup_bytes"):
        assert often[key] == seldom[key], key
    for totals, sent in ((seldom, sent_seldom), (often, sent_often)):
        assert sum(v for k, v in totals.items() if k != "down_unique_bytes") == sent
        assert totals["resent_bytes"] == 0


def test_what_evaluations_carried_beyond_trainings_need_stays_theirs() -> None:
    """Four evaluations brought four versions, 200 bytes each; training needs one, and three stay with their rounds."""
    board, traffic = Board({"model": Topic()}), Traffic()
    address = ("model", "")
    for version in range(4):
        board.publish("model", {"w": torch.full((50,), float(version))}, None, version)
        traffic.down("evaluate", version, 2, [address], board.path(address, version - 1), board)
    traffic.down("train", 4, 2, [address], [], board)
    assert traffic.take_rows() == [
        (4, 2, "down", "train", "model", 200),
        *((version, 2, "down", "evaluate", "model", 200) for version in range(3)),
    ]
    totals = traffic.summary()
    assert (totals["down_bytes"], totals["evaluate_down_bytes"], totals["resent_bytes"]) == (200, 600, 0)


def test_saved_traffic_goes_on_as_before() -> None:
    board, traffic = Board(TOPICS), Traffic()
    board.publish("base", {"w": torch.zeros(6, 6)}, None, 0)
    parcels = board.path(("base", ""), -1)
    traffic.down("evaluate", 0, 1, [("base", "")], parcels, board)
    traffic.down("train", 1, 0, [("base", "")], parcels, board)
    again = Traffic.restored(json.loads(json.dumps(traffic.saved())))
    for one in (traffic, again):
        one.down("train", 1, 1, [("base", "")], [], board)
        one.settle()
    assert (
        again.summary()
        == traffic.summary()
        == {
            "up_bytes": 0,
            "down_bytes": 288,
            "down_unique_bytes": 144,
            "setup_bytes": 0,
            "evaluate_up_bytes": 0,
            "evaluate_down_bytes": 0,
            "resent_bytes": 0,
        }
    )


def test_a_one_off_topic_is_setup() -> None:
    topics = {"basis": Topic(once=True)}
    board, traffic = Board(topics), Traffic()
    board.publish("basis", {"w": torch.zeros(6)}, None, 0)
    traffic.down("train", 1, 0, [("basis", "")], board.path(("basis", ""), -1), board)
    assert traffic.summary()["setup_bytes"] == 24
    assert traffic.summary()["down_bytes"] == traffic.summary()["down_unique_bytes"] == 0
