"""A client without a single training example takes part, changes no average, and makes nothing non-finite."""

import pytest
import torch

from fedfuse.config import registry
from fedfuse.core.client import FusionClient
from fedfuse.core.scenario import Scenario
from fedfuse.errors import WorldError
from tests.federations import TINY, federation, play, scenario_of
from tests.strategies.test_bad_input import DISTIL


@pytest.mark.parametrize("name", DISTIL)
def test_a_client_without_examples(name, monkeypatch):
    whole = FusionClient.examples

    def examples(self, split):
        found = whole(self, split)
        return (found[0][:0], found[1][:0]) if split == "train" and self.client == 1 else found

    count = Scenario.examples
    monkeypatch.setattr(FusionClient, "examples", examples)
    monkeypatch.setattr(Scenario, "examples", lambda self, client: 0 if client == 1 else count(self, client))
    played = play(name)
    assert played.strategy.inbox.failures == {"replies": 0, "rejected": 0, "retried": 0}, played.strategy.inbox.left_out
    assert played.digest
    for item in played.strategy.board.items.values():
        assert all(bool(torch.isfinite(v).all()) for v in item.arrays.values() if v.is_floating_point())


MEANS = {
    "fedmd": "consensus",
    "dsfl": "labels",
    "knfu": "soft_labels",
    "cfd": "labels",
    "ktpfl": "target",
    "comet": "means",
    "scarlet": "cache",
}


def without_examples(monkeypatch, *clients: int) -> None:
    whole, count = FusionClient.examples, Scenario.examples

    def examples(self, split):
        found = whole(self, split)
        return (found[0][:0], found[1][:0]) if split == "train" and self.client in clients else found

    monkeypatch.setattr(FusionClient, "examples", examples)
    monkeypatch.setattr(Scenario, "examples", lambda self, client: 0 if client in clients else count(self, client))


@pytest.mark.parametrize("name", MEANS)
def test_what_a_client_without_examples_says_enters_no_mean(name, monkeypatch):
    """Whatever it says, everybody else is taught the same."""
    without_examples(monkeypatch, 1)
    client = registry.entry(name).client
    predict = client.predict

    def published():
        board = play(name, "rounds=1").strategy.board.items
        return {to: item.arrays for (topic, to), item in board.items() if topic == MEANS[name] and to != "client:1"}

    before = published()
    monkeypatch.setattr(
        client, "predict", lambda self, x: predict(self, x).roll(3, 1) if self.client == 1 else predict(self, x)
    )
    after = published()
    assert before.keys() == after.keys()
    assert before
    for to, arrays in before.items():
        assert all(torch.equal(value, after[to][key]) for key, value in arrays.items()), to


ADAPTERS = {
    "fedit": (),
    "fedex_lora": (),
    "hetlora": ("strategy.sparsity=false",),
    "rolora": (),
    "flexlora": ("strategy.split=left",),
    "fed_sb": ("strategy.init=random_orthonormal",),
}


@pytest.mark.parametrize("name", [*ADAPTERS, "hetlora by norm"])
def test_adapters_that_nobody_trained_enter_no_mean(name, monkeypatch):
    """With equal weights, or by the norm of what was sent, the mean is of those who have examples."""
    from fedfuse.families.adapters import AdapterClient

    words = ("strategy.weighting=uniform", *ADAPTERS[name]) if name in ADAPTERS else ()
    name = name.split()[0]
    without_examples(monkeypatch, 1)
    parts = AdapterClient.parts

    def published():
        played = play(name, "rounds=2", *words)
        assert played.strategy.inbox.failures == {"replies": 0, "rejected": 0, "retried": 0}
        return {topic: item.arrays for (topic, _), item in played.strategy.board.items.items()}

    before = published()
    monkeypatch.setattr(
        AdapterClient, "parts",
        lambda self, *k, **o: {n: v + (self.client == 1) for n, v in parts(self, *k, **o).items()},
    )  # fmt: skip
    after = published()
    for topic, arrays in before.items():
        assert all(torch.equal(value, after[topic][key]) for key, value in arrays.items()), topic


FEW = ("clients=4", "participation=0.25", "rounds=3", "++strategy.min_train_nodes=1")


@pytest.mark.parametrize("name", sorted(registry.listed()))
def test_a_round_of_nobody_with_examples_leaves_all_as_it_is(name, monkeypatch):
    words = FEW if name.startswith("flwr_") else FEW[:-1]
    if name in ("flwr_krum", "flwr_multikrum", "flwr_bulyan"):
        words = ("clients=4", "participation=0.75", "rounds=3")
    if registry.entry(name).server.pooled:
        pytest.skip("has everybody's examples at one place")
    with federation(name, *words) as (built, _):
        strategy = built.strategy
        strategy.ensure_begun()
        for phase in strategy.setup:
            built.play(0, phase)
        without_examples(monkeypatch, *built.scenario.sampled(1))
        before = strategy.sha()
        for place, phase in enumerate(strategy.phases(1)):
            built.play(1, phase, place)
        assert strategy.sha() == before
        assert ("server", -1, "train", "kept", float(strategy.quorum)) in strategy.logged
        assert strategy.inbox.failures == {"replies": 0, "rejected": 0, "retried": 0}, strategy.inbox.left_out


@pytest.mark.parametrize("words", [(), ("clock=devices",), ("clock=devices", "schedule=fedbuff", "schedule.buffer=1")])
def test_a_run_goes_on_after_a_round_of_nobody_and_says_so(words, monkeypatch):
    (able,) = scenario_of((*TINY, "strategy=fedavg", *FEW[:-1]))[1].sampled(2)
    without_examples(monkeypatch, *({0, 1, 2, 3} - {able}))
    played = play("fedavg", *FEW[:-1], "rounds=5", *words)
    assert played.federation.done == 5
    assert [note for note in played.notes if note.startswith("nothing to fuse in ")]
    assert played.strategy.board.items["model", ""].version > 1


RULES = ("trimmed_mean", "krum", "multi_krum", "cronus", "median")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        *(("fedavg", (f"defence={rule}",)) for rule in RULES),
        ("fedmd", ("defence=trimmed_mean",)),
        ("flwr_krum", ("strategy.num_malicious_nodes=1",)),
        ("flwr_multikrum", ("strategy.num_malicious_nodes=1",)),
        ("flwr_bulyan", ()),
    ],
)
def test_a_round_of_too_few_for_its_rule_leaves_all_as_it_is(name, words, monkeypatch):
    """One of three, or two of five, have examples: no rule holds against a liar among so few."""
    many = 5 if "krum" in str((name, words)) else 3
    without_examples(monkeypatch, *range(many // 2, many))
    played = play(name, f"clients={many}", "rounds=2", *words)
    assert played.federation.done == 2
    items = played.strategy.board.items
    assert all(item.version == 0 for item in items.values())
    (note,) = [note for note in played.notes if note.startswith("nothing to fuse in 2 of 2 rounds")]
    assert f"fewer than the {many} clients that the rule needs" in note or many == 3


def test_who_an_overcommitted_cohort_does_without_is_not_missed_by_the_rule():
    """Of four that are asked three count: the rule needs three, as it would not of four with two liars."""
    words = ("clients=4", "participation=0.75", "clock=devices", "schedule=overcommit", "schedule.factor=1.3")
    played = play("fedavg", *words, "defence=trimmed_mean", "defence.fraction=0.3")
    assert played.strategy.board.items["model", ""].version == 2


def test_a_basis_of_nobodys_gradients_is_refused_in_a_line(monkeypatch):
    without_examples(monkeypatch, 0, 1, 2)
    with pytest.raises(WorldError, match="round 0, setup: no client that answered has a training example"):
        play("fed_sb")
