"""Labelled and unlabelled pools: what a client sees, what it may ask for, and who is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedfuse.config import registry
from fedfuse.config.compose import compose
from fedfuse.config.idle import Idle
from fedfuse.config.schema import LabelsConfig
from fedfuse.core.build import build_strategy
from fedfuse.core.client import FusionClient
from fedfuse.core.labels import Pools, exhausted, share
from fedfuse.errors import UserError
from fedfuse.runs import remote
from tests.federations import TINY, federation, intercept, play, scenario_of
from tests.halves import client

HALF = ("labels.initial=0.25", "labels.budget=0.1", "labels.rounds=2")


def pools(examples: int = 70, seed: int = 3, who: int = 1, state=None, **config) -> Pools:
    return Pools(
        LabelsConfig(**{"initial": 0.1, "budget": 0.05, "rounds": 5, **config}), seed, who, examples, state or {}
    )


def test_shares_are_rounded_up_and_never_by_a_last_bit() -> None:
    assert [share(0.1, 70), share(0.1, 71), share(0.05, 1), share(1.0, 9), share(0.0, 9)] == [7, 8, 1, 9, 0]


def test_the_first_labels_follow_from_seed_and_client_alone() -> None:
    first = pools().labelled
    assert torch.equal(first, pools(budget=0.5, rounds=1).labelled)
    assert not torch.equal(first, pools(seed=4).labelled)
    assert not torch.equal(first, pools(who=2).labelled)
    assert set(pools(initial=0.3).labelled.tolist()) > set(first.tolist())
    both = torch.cat([first, pools().unlabelled]).sort().values
    assert torch.equal(both, torch.arange(70))


def test_a_client_sees_what_is_labelled_and_reveals_the_rows_it_names() -> None:
    half = client("kafal", *HALF, round=2)
    whole_x, whole_y = half.workspace.tensors(0, "train")
    n = len(whole_x)
    known, without = half.pools.labelled, half.pools.unlabelled
    assert len(half.x) == len(half.y) == share(0.25, n)
    assert torch.equal(half.x, whole_x[known])
    assert torch.equal(half.unlabelled, whole_x[without])
    assert half.allowance == share(0.1, n)
    asked = torch.tensor([5, 0, 9])
    half.reveal(asked)
    now = torch.cat([known, without[asked]]).sort().values
    assert torch.equal(half.x, whole_x[now])
    assert torch.equal(half.y, whole_y[now])
    assert torch.equal(half.unlabelled, whole_x[[row for row in range(n) if row not in set(now.tolist())]])
    assert half.allowance == share(0.1, n) - 3
    half.begin("evaluate")
    assert torch.equal(half.examples("personal")[1], half.workspace.tensors(0, "personal")[1])


@pytest.mark.parametrize(
    ("rows", "round", "words"),
    [
        (torch.tensor([63]), 5, "row 63 is not there; allowed are different rows of 0 … 62"),
        (torch.tensor([-1]), 5, "row -1 is not there"),
        (torch.tensor([2, 2]), 5, "named twice"),
        (torch.arange(5), 5, "5 labels asked for in round 5; labels.budget allows 4"),
        (torch.arange(1), 4, "1 labels asked for in round 4; labels.budget allows 0"),
        (torch.tensor([0.5]), 5, "a list of row numbers is needed"),
        (torch.tensor(3), 5, "a list of row numbers is needed"),
    ],
)
def test_what_may_not_be_asked_for_is_refused_and_labels_nothing(rows, round: int, words: str) -> None:
    one = pools()
    with pytest.raises(UserError, match=words):
        one.reveal(rows, round)
    assert one.state == {}


def test_the_allowance_grows_by_cycles_and_ends_with_the_pool() -> None:
    one = pools(budget=0.4)
    assert [one.allowance(r) for r in (0, 4, 5, 9, 10, 100)] == [0, 0, 28, 28, 56, 63]
    one.reveal(torch.arange(28), 5)
    assert [one.allowance(r) for r in (5, 9, 10)] == [0, 0, 28]
    one.reveal(torch.arange(28), 10)
    assert one.allowance(15) == 7
    one.reveal(torch.arange(7), 15)
    assert one.allowance(20) == 0
    assert torch.equal(one.labelled, torch.arange(70))
    again = pools(budget=0.4, state=one.state)
    assert torch.equal(again.labelled, one.labelled)


def test_a_pool_that_runs_out_is_named_and_nothing_is_lost() -> None:
    words = ("labels.initial=0.8", "labels.budget=0.15", "labels.rounds=1", "rounds=3")
    played = play("kafal", *words)
    assert [note for note in played.notes if note.startswith("labels:")] == [
        "labels: nothing is left to label at 3 of 3 clients (0, 1, 2), first in round 3; "
        "they train on, and ask for no more"
    ]
    assert played.strategy.inbox.failures == {"replies": 0, "rejected": 0, "retried": 0}
    assert played.digest
    assert not [note for note in play("kafal", "labels.rounds=1").notes if note.startswith("labels:")]


def test_who_ran_out_is_told_in_one_line() -> None:
    rows = [(2, "client", c, "train", "unlabelled", 0.0) for c in range(12)]
    rows += [(1, "client", 11, "train", "unlabelled", 0.0), (1, "client", 12, "train", "unlabelled", 4.0)]
    (line,) = exhausted(rows, 20)
    assert line.startswith(
        "labels: nothing is left to label at 12 of 20 clients (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, …), first"
    )
    assert "round 1;" in line
    assert exhausted(rows[-1:], 20) == []


def test_a_request_whose_answer_was_lost_is_made_up_for() -> None:
    """Client 1's reply at the end of the first cycle never arrives: it asks for twice as many at the next."""
    words = ("labels.rounds=1", "labels.budget=0.1", "strategy.acquisition=random")
    with federation("kafal", *words) as (built, directory):
        intercept(built, lambda reply: [], kind="train.annotate", round=1, client=1)
        built.run()
        tags = [built.strategy.outbox.tags[c] for c in range(3)]
        states = [directory.clients.load(c, tag) for c, tag in enumerate(tags)]
    assert built.strategy.inbox.failures["replies"] == 1
    n = [built.scenario.examples(c) for c in range(3)]
    assert [len(state["annotated"]) for state in states] == [2 * share(0.1, count) for count in n]
    assert all(len(state["annotated"].unique()) == len(state["annotated"]) for state in states)


@pytest.mark.parametrize(
    ("word", "allowed"),
    [
        ("labels.initial=0", "more than 0 and at most 1"),
        ("labels.initial=1.5", "more than 0 and at most 1"),
        ("labels.budget=-0.1", "0 to 1"),
        ("labels.rounds=0", "at least 1"),
    ],
)
def test_impossible_values_are_refused(word: str, allowed: str) -> None:
    with pytest.raises(UserError, match=f"{word.split('=')[0]}=.*allowed is {allowed}"):
        scenario_of((*TINY, "strategy=kafal", word))


@pytest.mark.parametrize("word", ["labels.initial=0.2", "labels.budget=0.2", "labels.rounds=2"])
def test_a_strategy_that_asks_for_nothing_refuses_the_keys(word: str) -> None:
    with pytest.raises(Idle, match="does nothing here: it goes with a strategy that asks for labels"):
        compose(["strategy=fedavg", word])
    assert compose(["strategy=kafal", word])


def test_no_privacy_no_site_no_text_without_classes(monkeypatch) -> None:
    with pytest.raises(UserError, match="privacy: strategy=kafal asks for labels"):
        play("kafal", "privacy.noise=1")
    config, scenario = scenario_of((*TINY, "strategy=kafal"))
    with pytest.raises(UserError, match="asks an annotator for labels, and a site has none"):
        remote._serve(None, config, None, False, True, False, None)  # type: ignore[arg-type]
    data = scenario.data
    texts = replace(scenario, data=replace(data, dataset=replace(data.dataset, next_token=True)))
    with pytest.raises(UserError, match="data=digits has none to ask for"):
        build_strategy(registry.entry("kafal"), texts)


def test_other_clients_have_all_labels() -> None:
    assert not FusionClient.partly_labelled
    half = client("fedavg")
    assert len(half.x) == half.scenario.examples(0)
