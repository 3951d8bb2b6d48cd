"""The families' base classes: what follows from what a subclass says."""

from __future__ import annotations

import pytest
import torch

from fedfuse import (
    AdapterStrategy,
    AveragingStrategy,
    BasisStrategy,
    Part,
    PartStrategy,
    RankedStrategy,
    Scope,
    server_step,
)


def test_topics_and_records_of_adapters_follow_from_the_kinds() -> None:
    class Some(AdapterStrategy):
        kinds = ("lora_B",)
        folded = "base"

    class Heir(Some):
        """Says nothing: inherits all."""

    class Open(RankedStrategy):
        kinds = ("lora_B",)

    layout = dict.fromkeys(("l.lora_A.weight", "l.lora_B.weight", "head.weight"), ("float32", (4, 3)))
    scope = Scope({}, layout, type("Hyper", (), {"head": "personal"}))
    assert {n: t.kind for n, t in Heir.topics.items()} == {"adapter": "state", "base": "fold"}
    assert Heir.records["adapter"](scope) == {"l.lora_B.weight": ("float32", (4, 3))}
    assert Open.records["adapter"](scope) == {"l.lora_B.weight": ("float32", (4, -3))}
    assert type("Basis", (BasisStrategy,), {}).topics is BasisStrategy.topics
    assert "model" not in AdapterStrategy.topics


def test_a_part_is_kept_and_the_rest_travels() -> None:
    class Mine(PartStrategy):
        part = Part("first", "rest", lambda module, hyper: ["0.weight", "0.bias"])

    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    scope = Scope({}, {n: ("float32", tuple(v.shape)) for n, v in module.state_dict().items()}, None, module=module)
    assert list(Mine.topics) == list(Mine.records) == ["rest"]
    assert Mine.records["rest"](scope) == {"1.weight": ("float32", (1, 3)), "1.bias": ("float32", (1,))}


@pytest.mark.parametrize(
    ("weighting", "metric"), [("examples", "num-examples"), ("uniform", None), ("", "num-examples")]
)
def test_an_average_weighs_as_it_is_told(weighting: str, metric: str | None) -> None:
    strategy = object.__new__(type("Mean", (AveragingStrategy,), {"averaged": "body"}))
    strategy.hyper = type("Hyper", (), {"weighting": weighting} if weighting else {})
    assert strategy.sums == {"body": metric}


def test_the_servers_step_is_momentum_on_the_mean_update() -> None:
    old, mean = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 1.0])}
    new, momentum = server_step(old, mean, {"w": torch.tensor([10.0, 0.0])}, beta=0.5, rate=0.1)
    assert momentum["w"].tolist() == [7.0, -1.0]
    torch.testing.assert_close(new["w"], torch.tensor([1.7, 1.9]))
    assert server_step(old, mean, {}, beta=0, rate=1) == (mean, {})
