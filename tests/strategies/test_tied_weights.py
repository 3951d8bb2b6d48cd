"""A weight under two names, and one that nobody trains: they move as one, by the rule, or not at all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.federations import play


class Tied(nn.Module):
    """Two layers of one weight, behind a layer that is not trained."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.feature_dim = 12
        self.still = nn.Linear(inputs, 12).requires_grad_(False)
        self.one, self.two, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, classes)
        self.two.weight = self.one.weight

    def features(self, x: Tensor) -> Tensor:
        return self.two(self.one(self.still(x.flatten(1)).relu()).relu()).relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def tied(shape: tuple[int, ...], classes: int) -> nn.Module:
    return Tied(int(torch.tensor(shape).prod()), classes)


OWN = ("model=custom", f"model.build={__name__}:tied")
RULES = {
    "fednova": ("strategy.server_lr=0.5",),
    "feddyn": ("strategy.alpha=0.2",),
    "scaffold": ("strategy.server_lr=0.5",),
    "dare": ("strategy.drop=0.5",),
    "ties": ("strategy.keep=0.31",),
    "sce": (),
    "task_arithmetic": (),
    "twin_merging": (),
    "fisher": ("strategy.floor=0.01",),
    "regmean": (),
    "flwr_fedadam": (),
}


@pytest.mark.parametrize("name", RULES)
def test_what_is_published_of_a_weight_is_the_same_under_each_name(name: str) -> None:
    strategy = play(name, *OWN, *RULES[name]).strategy
    start, model = strategy.workspace.initial("custom"), strategy.model
    assert not torch.equal(model["one.weight"], start["one.weight"])
    assert torch.equal(model["one.weight"], model["two.weight"])
    torch.testing.assert_close(model["still.weight"], start["still.weight"], rtol=1e-5, atol=1e-5)


def test_server_learning_rates_scale_the_step_of_a_tied_weight() -> None:
    for name in ("fednova", "scaffold"):
        whole, half = (play(name, *OWN, "rounds=1", f"strategy.server_lr={rate}").strategy for rate in (1, 0.5))
        for key in ("one.weight", "two.weight", "head.weight"):
            start = whole.workspace.initial("custom")[key]
            torch.testing.assert_close(half.model[key] - start, (whole.model[key] - start) / 2, rtol=1e-4, atol=1e-6)


def test_twin_mergings_clients_predict_with_one_weight() -> None:
    """θ* + v under both names: the second is not θ*'s alone."""
    from tests.halves import wake

    strategy = play("twin_merging", *OWN, "rounds=1").strategy
    end = {name: value + 0.1 for name, value in strategy.model.items()}
    names = ("one.weight", "one.bias", "two.bias", "head.weight", "head.bias", "still.weight", "still.bias")
    half = wake(strategy, state={"own": {name: end[name] for name in names}})
    assert not torch.equal(half.model.one.weight, strategy.model["one.weight"])
