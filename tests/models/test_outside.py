"""Models by dotted path, as a user would bring them."""

import sys
import types

import pytest
import torch
from torch import nn

from fedfuse import models
from fedfuse.config.schema import ModelConfig
from fedfuse.errors import UserError


def build(path, extra=None, shape=(6,), classes=3, **options):
    config = ModelConfig(name="custom", build=path, extra=extra or {}, **options)
    return models.build("custom", shape=shape, classes=classes, config=config, seed=0)


@pytest.fixture(autouse=True)
def module():
    found = types.ModuleType("users_models")
    sys.modules["users_models"] = found
    yield found
    del sys.modules["users_models"]


def test_contract_call(module):
    def fn(shape, classes, hidden=4):
        return nn.Sequential(nn.Linear(shape[0], hidden), nn.BatchNorm1d(hidden), nn.Linear(hidden, classes))

    module.fn = fn
    first, second = (build("users_models:fn", {"hidden": 9}) for _ in range(2))
    assert first[0].out_features == 9
    assert torch.equal(first[0].weight, second[0].weight)
    assert first.training
    assert not first[1].num_batches_tracked.item()  # the check of its output trained nothing


def test_pool_entries_may_be_dotted_paths(module):
    module.fn = lambda shape, classes: nn.Linear(shape[0], classes)
    config = ModelConfig(pool=["mlp", "users_models:fn"])
    names = models.architectures(config, "features", (6,), 3)
    assert names == ["mlp", "users_models:fn", "mlp"]
    assert isinstance(models.build(names[1], shape=(6,), classes=3, config=config, seed=0), nn.Linear)


def test_only_the_arguments_it_takes(module):
    module.counted = lambda num_classes=1000: nn.Linear(6, num_classes)
    assert build("users_models:counted").out_features == 3
    module.plain = lambda out: nn.Linear(6, out)
    assert build("users_models:plain", {"out": 3}).out_features == 3
    module.sized = lambda classes, feature_dim=2: nn.Sequential(
        nn.Linear(6, feature_dim), nn.Linear(feature_dim, classes)
    )
    assert build("users_models:sized", feature_dim=5)[0].out_features == 5


def test_keyword_dictionaries_as_in_torchvision(module):
    class Net(nn.Linear):
        def __init__(self, num_classes=1000):
            super().__init__(6, num_classes)

    module.zoo = lambda *, weights=None, **kwargs: Net(**kwargs)
    assert build("users_models:zoo").out_features == 3

    def broken(**kwargs):
        raise TypeError("something else")

    module.broken = broken
    with pytest.raises(UserError, match="something else"):
        build("users_models:broken")


def test_outputs_with_logits_are_unwrapped(module):
    class Net(nn.Linear):
        def forward(self, x):
            return types.SimpleNamespace(logits=super().forward(x))

    module.fn = lambda shape, num_labels: Net(shape[0], num_labels)
    assert build("users_models:fn")(torch.zeros(4, 6)).shape == (4, 3)


def test_float64_models_become_float32(module):
    module.fn = lambda shape, classes: nn.Linear(shape[0], classes).double()
    assert build("users_models:fn").weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("nowhere_at_all:fn", "cannot import nowhere_at_all"),
        ("users_models:absent", "has no 'absent'"),
        ("users_models:__name__", "not a function"),
        ("users_models:wrong_type", "returned int"),
        ("users_models:wrong_size", r"shape \(2, 7\)"),
        ("users_models:wrong_input", "cannot take a batch"),
        ("users_models:raises", "ZeroDivisionError"),
    ],
)
def test_what_does_not_fit_is_named(module, path, line):
    module.wrong_type = lambda: 3
    module.wrong_size = lambda: nn.Linear(6, 7)
    module.wrong_input = lambda: nn.Linear(5, 3)
    module.raises = lambda: 1 / 0
    with pytest.raises(UserError, match=line):
        build(path)


def test_the_working_directory_is_searched(tmp_path, monkeypatch):
    (tmp_path / "my_own_nets.py").write_text(
        "from torch import nn\ndef fn(shape, classes): return nn.Linear(shape[0], classes)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    assert build("my_own_nets:fn").out_features == 3
