"""A network's layers, from shallow to deep, as following one example finds them; and networks without an order."""

import pytest
import torch
from torch import nn

from fedfuse import models
from fedfuse.errors import UserError
from fedfuse.models import parts


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("mlp", (1, 8, 8), {"body.1": 128, "body.3": 64, "head": 3}),
        ("cnn", (3, 12, 12), {"body.0": 8, "body.3": 16, "body.7": 64, "head": 3}),
        ("resnet8_bn", (3, 8, 8), {"norm1": 16, "layer1": 16, "layer2": 32, "layer3": 64, "head": 3}),
    ],
)
def test_layers_of_built_in_models(name, shape, expected):
    model = models.build(name, shape=shape, classes=3, seed=0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = parts.layers(model)
    assert list(found.items()) == list(expected.items())
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())  # also running statistics


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.step, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.step(self.step(x)))


class Idle(Twice):
    def forward(self, x):
        return self.head(x)


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.left(x) + self.right(x))


class Backwards(nn.Module):
    """Registered in another order than it works in: the order of work counts."""

    def __init__(self):
        super().__init__()
        self.head, self.step = nn.Linear(5, 3), nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.step(x))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Twice, "Twice cannot be ordered: step works 2 times"),
        (Idle, "Idle cannot be ordered: step works 0 times"),
        (Towers, "Towers cannot be ordered: left does not feed right"),
    ],
)
def test_what_has_no_order_is_named(kind, said):
    model = kind()
    model.input_shape = (4,)
    with pytest.raises(UserError, match=said) as caught:
        parts.layers(model)
    assert "\n" not in str(caught.value)


def test_the_order_is_that_of_work():
    model = Backwards()
    model.input_shape = (4,)
    assert list(parts.layers(model).items()) == [("step", 5), ("head", 3)]


def test_tokens_have_no_layers_here():
    model = nn.Sequential(nn.Embedding(5, 4))
    model.input_shape = (4,)
    with pytest.raises(UserError, match="does not take images or vectors"):
        parts.layers(model)
