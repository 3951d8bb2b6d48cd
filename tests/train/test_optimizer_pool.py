"""`train.pool`: clients with optimisers and rates of their own."""

from __future__ import annotations

import pytest

from fedfuse.config.compose import compose
from fedfuse.errors import UserError
from tests.federations import TINY, play, scenario_of
from tests.halves import final_states


def test_optimisers_are_dealt_round_robin() -> None:
    _, scenario = scenario_of((*TINY, "strategy=local", "train.pool=[sgd@0.1,adam]", "train.lr=0.02"))
    dealt = [(t.optimizer, t.lr, t.batch_size) for t in map(scenario.training, range(3))]
    assert dealt == [("sgd", 0.1, 16), ("adam", 0.02, 16), ("sgd", 0.1, 16)]


def test_each_client_trains_with_its_own() -> None:
    _, mixed = final_states("local", "train.pool=[sgd@0.1,adam@0.001]")
    for i, words in enumerate((("train.lr=0.1",), ("train.optimizer=adam", "train.lr=0.001"))):
        _, alike = final_states("local", *words)
        for key, value in alike[i]["model"].items():
            assert value.equal(mixed[i]["model"][key])
        assert not mixed[1 - i]["model"]["head.weight"].equal(alike[1 - i]["model"]["head.weight"])


def test_kept_states_are_of_each_ones_optimiser() -> None:
    words = ("train.pool=[sgd,adam@0.001]", "train.optimizer_state=keep", "model.pool=[mlp_small,mlp,mlp_wide]")
    played = play("fedmd", *words)
    assert played.strategy.inbox.failures == {"replies": 0, "rejected": 0, "retried": 0}
    _, states = final_states("fedmd", *words)
    assert [set(state["optimizer"]["0"]) for state in states[:2]] == [
        {"momentum_buffer"}, {"exp_avg", "exp_avg_sq", "step"},
    ]  # fmt: skip
    assert play("fedmd", *words, grid="serial").digest == played.digest


@pytest.mark.parametrize("word", ["rmsprop", "sgd@", "sgd@-1", "adam@nan", "adam@fast"])
def test_what_is_no_optimiser_is_refused(word: str) -> None:
    with pytest.raises(UserError, match=r"train\.pool=.*allowed is sgd, adam or adamw, and a rate after @"):
        compose([f"train.pool=[sgd,'{word}']"])


def test_scaffold_looks_at_every_client() -> None:
    with pytest.raises(UserError, match=r"train\.optimizer=adam"):
        play("scaffold", "strategy.variate=difference", "train.pool=[sgd,adam]")
