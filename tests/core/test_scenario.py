"""What of a model travels and is overwritten: the same as `state_dict` and `load_state_dict`, whatever the model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedfuse import models
from fedfuse.config.schema import ModelConfig
from fedfuse.models.in_place import overlay, variable


class Odd(nn.Module):
    """Tied weights, a missing bias, a missing module, buffers that stay and buffers that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.inner = nn.Sequential(nn.BatchNorm1d(4), self.second)
        self.none = None
        self.register_module("absent", None)
        self.register_buffer("kept", torch.arange(3))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


class Own(nn.Linear):
    """A module with something more to save."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.ones(1)

    def set_extra_state(self, state: torch.Tensor) -> None:
        pass


def built(name: str) -> nn.Module:
    if name == "odd":
        return Odd()
    if name == "own":
        return nn.Sequential(Own(4, 2))
    if name in ("saving hook", "loading hook"):
        model = nn.Sequential(nn.Linear(4, 2))
        if name == "saving hook":
            model[0].register_state_dict_post_hook(lambda module, found, prefix, meta: found.update(more=torch.ones(1)))
        else:
            model[0].register_load_state_dict_pre_hook(
                lambda module, found, prefix, *rest: found[prefix + "bias"].zero_()
            )
        return model
    if name == "parametrised":
        return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 2)))
    return models.build(name, shape=(1, 28, 28), classes=10, config=ModelConfig(), seed=0)


CASES = ["odd", "own", "saving hook", "loading hook", "parametrised", "mlp", "cnn", "resnet8", "resnet8_bn"]


@pytest.mark.parametrize("name", CASES)
def test_variable_is_the_state_dict(name: str) -> None:
    model = built(name)
    expected, found = model.state_dict(), variable(model)
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert torch.equal(found[key], value)
        assert not found[key].requires_grad
        assert name in ("own", "saving hook") or found[key].data_ptr() == value.data_ptr()


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("own", "saving hook")])
def test_overlay_is_load_state_dict(name: str) -> None:
    one, other = built(name), built(name)
    draw = torch.Generator().manual_seed(0)
    given = {key: torch.rand(value.shape, generator=draw).to(value.dtype) for key, value in one.state_dict().items()}
    if name == "odd":  # tied: one tensor under three names
        given |= dict.fromkeys(("first.weight", "second.weight", "inner.1.weight"), given["first.weight"])
        given |= dict.fromkeys(("second.bias", "inner.1.bias"), given["second.bias"])
    overlay(one, {key: value.clone() for key, value in given.items()})
    other.load_state_dict({key: value.clone() for key, value in given.items()})
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())


def test_a_replaced_layer_is_seen() -> None:
    model = built("mlp")
    before = variable(model)
    model.head = nn.Linear(model.head.in_features, 3)  # type: ignore[assignment]
    assert variable(model)["head.weight"].shape == (3, model.head.in_features)
    assert list(variable(model)) == list(before)


def test_what_does_not_fit_is_refused_by_name() -> None:
    model = built("mlp")
    whole = variable(model)
    with pytest.raises(RuntimeError, match=r"missing \['head.bias'\]"):
        overlay(model, {key: value for key, value in whole.items() if key != "head.bias"})
    with pytest.raises(RuntimeError, match="unexpected"):
        overlay(model, {**whole, "strange": torch.ones(1)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        overlay(model, {**whole, "head.bias": torch.ones(7)})


def test_what_is_frozen_neither_travels_nor_is_asked_for() -> None:
    model = built("mlp")
    model.frozen = frozenset({"head.weight"})  # type: ignore[assignment]
    rest = {key: torch.ones_like(value) for key, value in variable(model).items()}
    assert set(model.state_dict()) - set(rest) == {"head.weight"}
    kept = model.head.weight.clone()
    overlay(model, rest)
    assert torch.equal(model.head.weight, kept)
    assert bool((model.head.bias == 1).all())
