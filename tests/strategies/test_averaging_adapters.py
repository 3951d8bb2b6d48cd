"""Strategies that average weights, over LoRA (`model.lora_rank`): the base neither changes nor travels."""

from __future__ import annotations

import pytest
import torch

from fedfuse.config.compose import compose
from fedfuse.errors import UserError
from tests.federations import play

BASE = (
    "data=digits", "data.limit=90", "data.test_limit=10", "partition=iid", "clients=3", "rounds=2", "model=mlp",
    "transfer.size=0", "train.epochs=1", "train.batch_size=16", "evaluate.every=2", "runtime.name=inline",
)  # fmt: skip
LORA = ("model.lora_rank=4", "model.lora_alpha=8")


def final(played) -> dict[str, torch.Tensor]:
    return dict(played.strategy.published(played.strategy.averaged))


def test_fedavg_over_lora_is_fedit() -> None:
    ours, fedit = play("fedavg", *LORA, base=BASE), play("fedit", "strategy.rank=4", "strategy.alpha=8", base=BASE)
    one, other = final(ours), final(fedit)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", ["fedprox", "scaffold", "fednova", "flwr_fedadam", "flwr_fedyogi", "flwr_fedavgm"])
def test_what_travels_is_what_is_trained(name: str) -> None:
    found = play(name, *LORA, base=BASE)
    names = {key for item in found.strategy.board.items.values() for key in item.arrays}
    assert names
    assert not any(key.endswith("base.weight") for key in names)
    assert found.digest == play(name, *LORA, base=BASE, grid="serial").digest
    assert found.digest != play(name, base=BASE).digest


def test_degenerate_rules_over_adapters_are_fedavg_over_adapters() -> None:
    plain = final(play("fedavg", *LORA, base=BASE))
    prox = play("fedprox", "strategy.mu=0", *LORA, base=BASE).strategy.model
    assert all(torch.equal(plain[name], prox[name]) for name in plain)
    pulled = play("fedprox", "strategy.mu=1", *LORA, base=BASE).strategy.model
    assert any(not torch.equal(plain[name], pulled[name]) for name in plain)


def test_dropout_targets_and_rank_are_heard() -> None:
    digests = [
        play("fedavg", "model.lora_rank=4", *words, base=BASE).digest
        for words in ((), ("model.lora_alpha=1",), ("model.lora_dropout=0.5",), ("model.lora_targets=body.1",))
    ]
    assert len(set(digests)) == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("strategy=fedit", "model.lora_rank=4"), "model.lora_rank=4 does nothing here"),
        (("model.lora_alpha=4",), "model.lora_alpha=4.0 does nothing here: it goes with model.lora_rank"),
        (("model.lora_rank=0",), "model.lora_rank=0: allowed is at least 1"),
        (("model.lora_rank=2", "model.lora_dropout=1"), "model.lora_dropout=1"),
    ],
)  # fmt: skip
def test_what_is_not_allowed(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        compose(words)


def test_messages_name_the_key_that_was_typed() -> None:
    with pytest.raises(UserError, match=r"^model.lora_rank=65: body"):
        play("fedavg", "model.lora_rank=65", base=BASE)
    with pytest.raises(UserError, match=r"^model.lora_targets=nowhere: matches no linear layer"):
        play("fedavg", "model.lora_rank=2", "model.lora_targets=nowhere", base=BASE)
