"""Starting from weights: what fits is loaded, what does not is named."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fedfuse import models
from fedfuse.config.schema import ModelConfig
from fedfuse.errors import UserError
from fedfuse.train.training import predict

DATA = Path(os.environ.get("FEDFUSE_DATA") or Path(__file__).parents[3] / "shared/data")
PUBLISHED = DATA.parent / "models/resnet_cifar10/resnet20-12fca82f.th"


def make(path=None, seed=1, classes=10, **options):
    config = ModelConfig(checkpoint=None if path is None else str(path), **options)
    return models.build("mlp_small", shape=(6,), classes=classes, config=config, seed=seed)


def test_torch_and_safetensors_round_trip(tmp_path):
    saved = make(seed=2).state_dict()
    torch.save({"state_dict": {f"module.{key}": value for key, value in saved.items()}}, tmp_path / "a.pt")
    save_file(saved, tmp_path / "a.safetensors")
    for name in ("a.pt", "a.safetensors"):
        loaded = make(tmp_path / name).state_dict()
        assert all(torch.equal(loaded[key], saved[key]) for key in saved)


def test_head_can_be_left_out(tmp_path):
    saved = make(seed=2)
    torch.save(saved.state_dict(), tmp_path / "a.pt")
    loaded, fresh = make(tmp_path / "a.pt", classes=4, checkpoint_head=False), make(classes=4)
    assert torch.equal(loaded.body[1].weight, saved.body[1].weight)
    assert torch.equal(loaded.head.weight, fresh.head.weight)


def test_in_a_pool_each_architecture_has_its_own(tmp_path):
    saved = make(seed=2).state_dict()
    torch.save(saved, tmp_path / "a.pt")
    config = ModelConfig(pool=["mlp", "mlp_small"], checkpoints={"mlp_small": str(tmp_path / "a.pt")})
    built = [models.build(n, shape=(6,), classes=10, config=config, seed=0) for n in ("mlp", "mlp_small")]
    assert torch.equal(built[1].head.weight, saved["head.weight"])


class Evil:
    def __reduce__(self):
        return (os.system, ("exit 1",))


def test_what_does_not_fit_is_named(tmp_path):
    good = make().state_dict()
    cases = {
        "missing": ({k: v for k, v in good.items() if k != "head.bias"}, "no weight 'head.bias'"),
        "unknown": ({**good, "extra": torch.zeros(1)}, "'extra'"),
        "shape": ({**good, "head.bias": torch.zeros(3)}, r"head.bias is \(3,\)"),
        "plain": ({"a": 3}, "no state dict"),
        "evil": (Evil(), "more than weights"),
    }
    for name, (content, line) in cases.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(UserError, match=line):
            make(tmp_path / name)
    (tmp_path / "garbage.pt").write_bytes(b"PK garbage")
    (tmp_path / "garbage.safetensors").write_bytes(b"garbage")
    for name in ("garbage.pt", "garbage.safetensors", "absent.pt"):
        with pytest.raises(UserError, match=name):
            make(tmp_path / name)


def test_published_resnet20_keeps_its_accuracy():
    if not PUBLISHED.is_file() or not (DATA / "cifar10/test.parquet").is_file():
        pytest.skip(f"needs CIFAR-10 under {DATA} and the published ResNet-20 beside it")
    x, y = cifar_test(200)
    config = ModelConfig(checkpoint=str(PUBLISHED))
    model = models.build("resnet20_bn", shape=(3, 32, 32), classes=10, config=config, seed=0)
    assert (predict(model, x, 100).argmax(1) == y).double().mean() > 0.87  # 91.7 % on all 10,000


def cifar_test(n):
    import pyarrow.parquet as pq
    from PIL import Image

    table = pq.read_table(DATA / "cifar10/test.parquet").slice(0, n)
    pixels = [np.asarray(Image.open(io.BytesIO(row["bytes"]))) for row in table["img"].to_pylist()]
    x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (x - mean[:, None, None]) / std[:, None, None], torch.tensor(table["label"].to_pylist())
