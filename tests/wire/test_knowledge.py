"""Board, cache and folds: whatever is published and whoever is absent, a served node holds the server's bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfuse.wire.knowledge import Board, Cache, Item, Parcel, Stale, Topic, address_of, model_topic, reaches
from fedfuse.wire.records import nbytes, sha_arrays


def merged(value, increment):
    """A fold whose result depends on the order: accumulate in float32, rotated."""
    return {"w": (value["w"] * 0.5).roll(1) + increment["a"].sum() * 0.3}


TOPICS = {
    "model": model_topic(),
    "advice": Topic("lesson"),
    "base": Topic("fold", fold=merged),
}
CLIENTS = {0: "mlp", 1: "mlp", 2: "cnn"}


def value(seed: int, size: int = 8) -> dict[str, torch.Tensor]:
    return {"w": torch.randn(size, generator=torch.Generator().manual_seed(seed))}


def increment(seed: int, size: int) -> dict[str, torch.Tensor]:
    return {"a": torch.randn(size, generator=torch.Generator().manual_seed(seed))}


def serve(board: Board, cache: Cache, held: dict, client: int) -> None:
    """What a message does: send a node what the server believes it lacks, and believe the rest from then on."""
    for address in board.addresses(client, CLIENTS[client]):
        for parcel in board.path(address, held.get(address, -1)):
            cache.take(parcel, TOPICS)
        held[address] = board.items[address].version


ROUND = st.fixed_dictionaries(
    {
        "publish": st.lists(
            st.tuples(
                st.sampled_from(["model", "advice", "base"]),
                st.sampled_from([None, 0, 2, "mlp", "cnn"]),
                st.integers(1, 9),
            ),
            max_size=3,
            unique_by=lambda p: p[:2],
        ),
        "present": st.sets(st.sampled_from([0, 1, 2])),
        "lost": st.sets(st.sampled_from([0, 1, 2])),
    }
)


@given(st.lists(ROUND, max_size=12))
@settings(max_examples=80, deadline=None)
def test_served_nodes_hold_exactly_what_the_server_holds(rounds) -> None:
    board = Board(TOPICS)
    caches = {c: Cache() for c in CLIENTS}
    held: dict[int, dict] = {c: {} for c in CLIENTS}
    for number, plan in enumerate(rounds):
        for topic, to, size in plan["publish"]:
            fresh = (topic, address_of(to)) not in board.items
            arrays = increment(number, size) if topic == "base" and not fresh else value(number)
            board.publish(topic, arrays, to, number)
        for client in sorted(plan["present"]):
            before = dict(held[client])
            serve(board, caches[client], held[client], client)
            for address in board.addresses(client, CLIENTS[client]):
                have, want = caches[client][address], board.items[address]
                assert have.version == want.version
                assert sha_arrays(have.arrays) == sha_arrays(want.arrays)
            if client in plan["lost"]:  # the node took it in, the server never heard: it will send again
                held[client] = before


def test_an_architectures_and_a_clients_own_value_go_before_the_common_one() -> None:
    cache = Cache()
    cache["model", ""] = Item(value(0), 1)
    cache["model", "model:cnn"] = Item(value(1), 1)
    cache["model", "client:2"] = Item(value(2), 1)
    assert cache.for_client(2, "cnn", TOPICS)["model"] is cache["model", "client:2"]
    assert cache.for_client(1, "cnn", TOPICS)["model"] is cache["model", "model:cnn"]
    assert cache.for_client(1, "mlp", TOPICS)["model"] is cache["model", ""]
    cache["model", ""] = Item(value(3), 2)  # newer goes before special
    assert cache.for_client(2, "cnn", TOPICS)["model"].version == 2


@given(st.integers(0, 20), st.integers(0, 20))
@settings(max_examples=40)
def test_receivers(client: int, other: int) -> None:
    assert reaches(address_of(None), client, "mlp")
    assert reaches(address_of("mlp"), client, "mlp")
    assert not reaches(address_of("cnn"), client, "mlp")
    assert reaches(address_of(other), client, "mlp") == (client == other)


def folded(sizes: list[int], start: int = 8) -> Board:
    board = Board(TOPICS)
    board.publish("base", value(0, start), None, 0)
    for version, size in enumerate(sizes, 1):
        board.publish("base", increment(version, size), None, version)
    return board


@given(st.lists(st.integers(1, 6), min_size=1, max_size=8), st.data())
@settings(max_examples=80, deadline=None)
def test_chain_or_snapshot_whichever_is_smaller(sizes: list[int], data) -> None:
    board, address = folded(sizes), ("base", "")
    have = data.draw(st.integers(-1, len(sizes)))
    path = board.path(address, have)
    whole = nbytes(board.items[address].arrays)
    chain = 4 * sum(sizes[have:]) if have >= 0 else whole
    assert sum(p.nbytes for p in path) == min(chain, whole)
    if have == len(sizes):
        assert path == []
    elif chain < whole:
        assert [p.since for p in path] == list(range(have, len(sizes)))
    else:
        assert [p.since for p in path] == [-1]


def test_a_gap_is_stale_and_changes_nothing() -> None:
    board, cache = folded([1, 1, 1], start=64), Cache()
    first, second, third = board.path(("base", ""), 0)
    with pytest.raises(Stale, match="holds nothing"):
        cache.take(first, TOPICS)
    cache.take(Parcel("base", "", 0, -1, value(0, 64)), TOPICS)
    cache.take(first, TOPICS)
    with pytest.raises(Stale, match="holds version 1, the increment starts from 2"):
        cache.take(third, TOPICS)
    assert cache["base", ""].version == 1
    cache.take(second, TOPICS)
    cache.take(first, TOPICS)  # an old increment that comes again is skipped, not folded twice
    cache.take(third, TOPICS)
    assert torch.equal(cache["base", ""].arrays["w"], board.items["base", ""].arrays["w"])


def test_a_version_the_fold_skipped_is_no_gap() -> None:
    board, cache = Board(TOPICS), Cache()
    board.publish("base", value(0, 64), None, 0)
    cache.take(board.path(("base", ""), -1)[0], TOPICS)
    board.publish("base", increment(1, 2), None, 3)  # rounds 1 and 2 published nothing
    board.publish("base", increment(2, 2), None, 7)
    for parcel in board.path(("base", ""), 0):
        cache.take(parcel, TOPICS)
    assert cache["base", ""].version == 7
    assert torch.equal(cache["base", ""].arrays["w"], board.items["base", ""].arrays["w"])


def test_another_hash_is_stale_and_drops_the_value() -> None:
    board, cache = folded([1], start=64), Cache()
    cache.take(Parcel("base", "", 0, -1, value(99, 64)), TOPICS)  # not the server's bits
    with pytest.raises(Stale, match="differs from the server's"):
        cache.take(board.path(("base", ""), 0)[0], TOPICS)
    assert ("base", "") not in cache


def test_a_snapshot_of_a_fold_is_hashed_too() -> None:
    board, cache = folded([1], start=64), Cache()
    whole = board.path(("base", ""), -1)[0]
    spoilt = Parcel("base", "", whole.version, -1, value(99, 64), whole.sha)
    with pytest.raises(Stale, match="differs from the server's"):
        cache.take(spoilt, TOPICS)
    cache.take(whole, TOPICS)
    assert cache["base", ""].version == 1


def test_an_increment_of_what_does_not_fold_is_refused() -> None:
    cache = Cache()
    cache["model", ""] = Item(value(0), 1)
    with pytest.raises(Stale, match="does not fold"):
        cache.take(Parcel("model", "", 2, 1, value(1)), TOPICS)
    assert cache["model", ""].version == 1


def test_publishing_needs_a_declared_topic_and_a_new_round() -> None:
    board = Board(TOPICS)
    with pytest.raises(ValueError, match="'modle' is not declared; declared: advice, base, model"):
        board.publish("modle", value(0), None, 0)
    board.publish("model", value(0), None, 1)
    with pytest.raises(ValueError, match="was published for all in round 1 already"):
        board.publish("model", value(1), None, 1)
    board.publish("model", value(1), 3, 1)


def test_what_is_published_is_a_copy() -> None:
    board, arrays = Board(TOPICS), value(0)
    board.publish("model", arrays, None, 0)
    arrays["w"].zero_()
    assert board.items["model", ""].arrays["w"].abs().sum() > 0


def test_a_fold_needs_its_function_and_only_a_fold_has_one() -> None:
    with pytest.raises(ValueError, match="needs a fold function"):
        Topic("fold")
    with pytest.raises(ValueError, match="needs a fold function"):
        Topic("state", fold=merged)


def test_a_restored_board_goes_on_as_before() -> None:
    board = folded([1, 2], start=64)
    board.publish("model", value(1), 2, 2)
    again = Board(TOPICS)
    again.restore(dict(board.items), {k: list(v) for k, v in board.chains.items()})
    for one in (board, again):
        one.publish("base", increment(3, 1), None, 3)
    assert sha_arrays(again.items["base", ""].arrays) == sha_arrays(board.items["base", ""].arrays)
    assert list(again.addresses(2, "cnn")) == [("base", ""), ("model", "client:2")]
    assert [p.since for p in again.path(("base", ""), 1)] == [1, 2]
