"""CoFED in closed form: margins, shares among owners, rows two classes claim, class weights; one vote only."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedfuse.config import registry
from fedfuse.errors import UserError
from fedfuse.strategies.cofed import count_votes, inverse_frequency, own_pairs, votes
from fedfuse.wire.records import InvalidArrays, Scope, record
from tests.federations import answer, federation, intercept, play
from tests.halves import server, shares


def test_votes_by_hand():
    p = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.3, 0.65, 0.05]], dtype=torch.float64)
    owned = torch.tensor([True, True, False])
    assert votes(p, owned, 0.3).tolist() == [0, -1, -1, 1]  # unsure of the second, does not own the third's class
    assert votes(p, owned, 0.1).tolist() == [0, 0, -1, 1]


def test_shares_are_of_the_owners_not_of_all_clients():
    labels = torch.tensor([[0, 1], [0, -1], [1, 1], [-1, 1]])
    owned = torch.tensor([[1, 1], [1, 0], [0, 1], [0, 1]], dtype=torch.bool)
    ones = torch.ones(4)
    # row 0: class 0 has 2 of its 2 owners, class 1 has 1 of 3; row 1: class 1 has 3 of 3
    assert count_votes(labels, owned, ones, 0.5).tolist() == [[True, False], [False, True]]
    assert count_votes(labels, owned, ones, 0.3).tolist() == [[True, True], [False, True]]
    assert count_votes(labels, owned, ones, 1 / 3).tolist() == [[True, False], [False, True]]  # must exceed
    heavy = torch.tensor([1.0, 1.0, 8.0, 1.0])
    assert count_votes(labels, owned, heavy, 0.5)[0].tolist() == [True, True]
    nobody = torch.zeros(4, 2, dtype=torch.bool)
    assert not count_votes(labels, nobody, ones, 0.0).any()


def test_rows_that_two_own_classes_claim_are_dropped():
    rows, labels = torch.tensor([0, 0, 1, 2, 2, 4]), torch.tensor([0, 1, 2, 0, 2, 1])
    mine = own_pairs(rows, labels, torch.tensor([True, True, False]))
    assert [t.tolist() for t in mine] == [[2, 4], [0, 1]]  # 0 is claimed twice, 1 is foreign, 2 once among its own
    assert [len(t) for t in own_pairs(rows, labels, torch.zeros(3, dtype=torch.bool))] == [0, 0]
    assert [len(t) for t in own_pairs(rows[:0], labels[:0], torch.ones(3, dtype=torch.bool))] == [0, 0]


def test_class_weights_balance_the_classes():
    labels = torch.tensor([0, 0, 0, 2])
    weight = inverse_frequency(labels, 4)
    np.testing.assert_allclose(weight, [4 / (2 * 3), 0, 4 / 2, 0], rtol=1e-6)
    logits = torch.randn(4, 4, dtype=torch.float64)
    each = F.cross_entropy(logits, labels, reduction="none")
    balanced = (each[:3].mean() + each[3]) / 2
    torch.testing.assert_close(F.cross_entropy(logits, labels, weight.double()), balanced, rtol=1e-6, atol=0)


def test_the_vote_is_held_once_and_counted():
    once = play("cofed", "rounds=3", "train.epochs=4", "strategy.vote_round=1")
    rows = once.strategy.published("pseudo_labels")["rows"]
    assert len(rows) > 0  # the case is worth something only if the vote accepts anything
    assert once.totals["up_bytes"] == 3 * (2 * 24 + 10)
    assert once.totals["down_bytes"] == 3 * 6 * len(rows)
    assert once.strategy.board.items["pseudo_labels", ""].version == 1
    again = play("cofed", "rounds=3", "train.epochs=4", "strategy.vote_round=1", "strategy.repeat=true")
    assert again.totals["up_bytes"] == 9 * (2 * 24 + 10)


def test_an_empty_vote_is_local_training_with_balanced_classes():
    silent = play("cofed", "strategy.margin=1")
    assert len(silent.strategy.published("pseudo_labels")["rows"]) == 0
    assert server("cofed").notes() == []


def test_a_vote_that_accepted_nothing_is_told() -> None:
    (said,) = play("cofed", "strategy.margin=1", "strategy.vote_round=1").strategy.notes()
    assert "the vote accepted no row, so that nobody learned from another" in said
    assert "class weights alone" in said  # the one thing that tells its headline from that of local training
    some = play("cofed", "strategy.margin=0", "strategy.threshold=0", "strategy.vote_round=1").strategy
    assert len(some.published("pseudo_labels")["rows"])
    assert some.notes() == []


def test_a_vote_that_nobody_learns_from_is_refused_or_told() -> None:
    for rounds, asked in ((3, 3), (3, 9), (1, 1)):
        with pytest.raises(UserError, match=rf"strategy.vote_round={asked}: no round of rounds={rounds} comes after"):
            server("cofed", f"rounds={rounds}", f"strategy.vote_round={asked}", "strategy.repeat=true")
    server("cofed", "rounds=3", "strategy.vote_round=2")
    once = play("cofed", "rounds=1")
    assert once.federation.headline == play("local", "rounds=1").federation.headline
    (said,) = once.strategy.notes()
    assert "nobody learns from it: this is local training" in said


def test_three_architectures_a_restart_and_a_subset():
    pool = "model.pool=[mlp_small,mlp,mlp_wide]"
    assert play("cofed", pool, "strategy.subset=10", "strategy.restart=true", "strategy.learn=all").digest


def test_hostile_votes_are_refused():
    share = {"votes": {"labels": torch.tensor([0, 10], dtype=torch.int16)}}
    with pytest.raises(InvalidArrays, match="not a class"):
        registry.entry("cofed").server.examine(Scope({"classes": 10}, {}), share)
    with federation("cofed", "rounds=1") as (built, _):
        long = record({"labels": torch.zeros(25, dtype=torch.int16)})
        intercept(built, lambda reply: answer(reply, votes=long) if "votes" in reply.content else None, client=1)
        built.run()
        assert built.strategy.inbox.failures["rejected"] == 1


def test_votes_weigh_one_each_or_by_examples() -> None:
    """Of two owners the smaller says class 2: half of the votes, a quarter of the examples."""
    for weighting, rows in (("uniform", [0]), ("examples", [])):
        strategy = server("cofed", f"strategy.weighting={weighting}", "strategy.threshold=0.3")
        strategy.phase = "vote"
        owned, nobody = torch.arange(10) < 3, torch.full((24,), -1, dtype=torch.int16)
        sure = torch.where(torch.arange(24) == 0, 2, nobody).to(torch.int16)
        votes = [{"votes": {"labels": said, "owned": owned}} for said in (sure, nobody)]
        strategy.fuse_vote(shares(strategy, *votes, examples=[10, 30]))
        assert strategy.published("pseudo_labels")["rows"].tolist() == rows
        assert strategy.published("pseudo_labels")["labels"].tolist() == [2] * len(rows)


def test_the_vote_ends_the_round_in_the_middle_or_the_one_that_is_said() -> None:
    def held(*words: str) -> list[int]:
        strategy = server("cofed", "rounds=7", *words)
        return [r for r in range(1, 8) if strategy.phases(r) == ("train", "vote")]

    assert held() == [4]
    assert held("rounds=6") == [3]
    assert held("strategy.vote_round=2") == [2]
    assert held("strategy.vote_round=5", "strategy.repeat=true") == [5, 6, 7]
    assert server("cofed").planned()
    assert not server("cofed", "strategy.vote_round=1").planned()
