"""Every architecture on every kind of input, and the names that lead to them."""

import pytest
import torch

from fedfuse import models
from fedfuse.config.schema import ModelConfig
from fedfuse.errors import UserError

SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 64)]
LANGUAGE = ("causal_lm", "text_classifier", "hf")  # see test_language.py
NAMES = [name for name in models.names() if name not in LANGUAGE]


def make(name, shape=(1, 8, 8), classes=10, seed=0, **options):
    return models.build(name, shape=shape, classes=classes, config=ModelConfig(**options), seed=seed)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward_reach_every_parameter(name, shape):
    model = make(name, shape, width=0.5)
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    z = model.features(x)
    assert z.shape == (2, model.feature_dim)
    assert z.dtype == torch.float32
    out = model(x)
    assert out.shape == (2, 10)
    model.eval()
    assert torch.equal(model(x), model.head(model.features(x)))
    out.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_mlp_takes_feature_vectors():
    assert make("mlp", (64,))(torch.zeros(3, 64)).shape == (3, 10)


def test_known_parameter_counts():
    def count(name, shape):
        return sum(p.numel() for p in make(name, shape).parameters())

    assert count("cnn_large", (1, 28, 28)) == 1_663_370  # McMahan et al. 2017, §3
    assert count("lenet", (1, 28, 28)) == 61_706
    assert count("resnet20_bn", (3, 32, 32)) == 269_722  # 0.27 M, He et al. 2016
    assert count("resnet20", (3, 32, 32)) == 269_722


@pytest.mark.parametrize("name", NAMES)
def test_equal_seed_equal_weights_and_global_generator_untouched(name):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = make(name, seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    second, other = make(name, seed=3).state_dict(), make(name, seed=4).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_pool_shares_feature_size_and_is_dealt_round_robin():
    config = ModelConfig(pool=["mlp", "cnn@0.5", "lenet", "resnet8", "resnet8_bn"], feature_dim=48)
    names = models.architectures(config, "images", (1, 28, 28), 7)
    assert names == ["mlp", "cnn@0.5", "lenet", "resnet8", "resnet8_bn", "mlp", "cnn@0.5"]
    x = torch.zeros(2, 1, 28, 28)
    for name in names[:5]:
        model = models.build(name, shape=(1, 28, 28), classes=10, config=config, seed=0)
        assert model.feature_dim == 48
        assert model.eval().features(x).shape == (2, 48)


def test_width_in_a_name_multiplies_the_configured_one():
    halved = make("cnn@0.5", (1, 28, 28))
    assert halved.body[0].out_channels == 4
    assert make("cnn", (1, 28, 28), width=0.5).body[0].out_channels == 4
    assert make("cnn@0.5", (1, 28, 28), width=2.0).body[0].out_channels == 8


@pytest.mark.parametrize(
    ("kind", "shape", "name"),
    [
        ("features", (64,), "mlp"),
        ("features", (3, 32, 32), "mlp"),
        ("images", (1, 8, 8), "mlp"),
        ("images", (3, 32, 32), "cnn"),
    ],
)
def test_auto(kind, shape, name):
    assert models.architectures(ModelConfig(), kind, shape, 2) == [name, name]


@pytest.mark.parametrize(("next_token", "name"), [(False, "text_classifier"), (True, "causal_lm")])
def test_auto_reads_tokens(next_token, name):
    assert models.architectures(ModelConfig(), "tokens", (32,), 2, next_token) == [name, name]


@pytest.mark.parametrize(
    ("name", "options", "shape", "line"),
    [
        ("cnn_larg", {}, (1, 8, 8), "did you mean 'cnn_large'"),
        ("cnn@x", {}, (1, 8, 8), "must be a width"),
        ("cnn@0", {}, (1, 8, 8), "must be positive"),
        ("cnn", {"width": -1.0}, (1, 8, 8), "model.width"),
        ("cnn", {"feature_dim": 0}, (1, 8, 8), "model.feature_dim=0"),
        ("mlp", {"width": 1e9}, (1, 8, 8), r"model.width=1e\+09 .* does not fit this machine's memory"),
        ("cnn", {"width": 1e300}, (1, 8, 8), "does not fit this machine's memory"),
        ("mlp", {"feature_dim": 10**14}, (1, 8, 8), "model.feature_dim=100000000000000 does not fit"),
        ("cnn", {}, (1, 3, 3), "at least 4×4"),
        ("resnet8", {}, (64,), "needs images"),
        ("custom", {}, (64,), "model.build"),
        ("custom", {"build": "torch.nn.Linear"}, (64,), "pkg.mod:fn"),
    ],
)
def test_what_cannot_be_built_is_named(name, options, shape, line):
    with pytest.raises(UserError, match=line):
        make(name, shape, **options)


def test_one_class_is_refused():
    with pytest.raises(UserError, match="2 classes"):
        make("mlp", classes=1)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"pool": []}, "empty"),
        ({"pool": ["mlp", "cn"]}, "'cnn'"),
        ({"name": "mlp", "extra": {"depth": 3}}, "model.extra"),
        ({"pool": ["mlp", "cnn"], "checkpoint": "x.th"}, "model.checkpoints"),
        ({"pool": ["mlp", "cnn"], "checkpoints": {"lenet": "x.th"}}, "'lenet'"),
    ],
)
def test_pools_that_make_no_sense_are_refused(options, line):
    with pytest.raises(UserError, match=line):
        models.architectures(ModelConfig(**options), "images", (1, 28, 28), 4)


def test_listing_does_not_import_torch():
    import subprocess
    import sys

    code = "import sys, fedfuse.models as m, fedfuse.train.losses as l; m.names(), l.names()"
    code += "; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
