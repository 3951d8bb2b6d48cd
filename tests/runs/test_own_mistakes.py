"""What a user's own data and code can get wrong: each is one line that names it, exit 2, and nothing is left behind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fedfuse
from fedfuse.cli import main

TINY = ("runtime=inline", "rounds=1", "clients=3", "partition=iid")
CODE = """
import numpy as np, torch
from torch import nn
class Rows(torch.utils.data.Dataset):
    def __len__(self): return 90
    def __getitem__(self, i): return torch.zeros(4), i % 3
class Empty(Rows):
    def __len__(self): return 0
class Words(Rows):
    def __getitem__(self, i): return "a", 1
class Ragged(Rows):
    def __getitem__(self, i): return torch.zeros(1 + i % 2), 1
class Torn(Rows):
    def __getitem__(self, i): return {}["x"] if i == 2 else (torch.zeros(4), 1)
def rows(**_): return Rows()
def empty(**_): return Empty()
def words(**_): return Words()
def ragged(**_): return Ragged()
def torn(**_): return Torn()
def nothing(**_): return None
def pair(**_): return np.zeros((90, 4), "float32"), np.arange(90) % 3
def seven(*_, **__): return nn.Sequential(nn.Flatten(), nn.LazyLinear(7))
def narrow(*_, **__): return nn.Linear(3, 10)
def raising(*_, **__): raise ValueError("my own fault")
class Mean(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.table, self.head = nn.Embedding(50, 8), nn.Linear(8, classes)
    def forward(self, x): return self.head(self.table(x).mean(1))
def several(shape, classes):
    class Two(nn.Linear):
        def forward(self, x): return super().forward(x.flatten(1)), x
    return Two(64, classes)
class Zero(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.classes = classes
    def forward(self, x): return x.flatten(1)[:, :self.classes]
def frozen(shape, classes): return nn.Sequential(nn.Flatten(), nn.Linear(64, classes)).requires_grad_(False)
def normed(shape, classes): return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, classes))
class InCh(nn.Linear):
    def __init__(self, in_features, classes): super().__init__(in_features, classes)
def line(shape, classes): return nn.Linear(shape[0], classes)
"""


def refused(words: list[str], tmp_path: Path, capsys) -> str:
    """The line that a command is refused with."""
    out = tmp_path / "out"
    assert main(["run", *TINY, f"out={out}", *words]) == 2
    told = capsys.readouterr().err
    lines = [line for line in told.splitlines() if not line.startswith("fedfuse: note: ")]
    assert len(lines) == 1, told
    assert not out.exists()
    return lines[0]


def pictures(root: Path, sizes: list[int]) -> None:
    for label in ("cat", "dog"):
        (root / label).mkdir(parents=True)
        for i, size in enumerate(sizes):
            Image.fromarray(np.full((8, size), 99, np.uint8)).save(root / label / f"{i}.png")


X, Y = np.zeros((30, 4), "float32"), np.arange(30) % 3
HOLE = X.copy()
HOLE[3, 2] = np.nan


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"inputs": X}, "no column of a usual name; set data.targets=<one of inputs>"),
        ({"inputs": X, "labels": Y[:20]}, "30 inputs but 20 labels; expected as many of each"),
        ({"inputs": HOLE, "labels": Y}, "train inputs hold NaN or infinite values, first in row 3 (from 0)"),
        ({"inputs": X, "labels": Y + 0.5}, "labels are not whole numbers: the label of row 0 (from 0) is 0.5"),
        (
            {"inputs": X, "labels": np.eye(3)[Y]},
            "labels of shape (30, 3); expected one a row: of one-hot labels take .argm",
        ),
        (
            {"inputs": X, "labels": Y.astype(str).astype(object)},
            "array 'labels' is of dtype object; save names with .as",
        ),
        ({"inputs": np.array([{"a": 1}] * 30), "labels": Y}, "expected an .npz of plain arrays"),
    ],
)
def test_arrays(arrays: dict, said: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "train.npz", **arrays)
    assert said in refused(["data=npz", f"data.root={tmp_path / 'data'}"], tmp_path, capsys)


def test_pictures(tmp_path: Path, capsys) -> None:
    pictures(tmp_path / "sizes", [8, 9])
    words = ["data=images", f"data.root={tmp_path / 'sizes'}"]
    assert "images of (8, 8) and (9, 8); set data.extra.size=<pixels>" in refused(words, tmp_path, capsys)
    (tmp_path / "flat").mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "flat" / "0.png")
    words = ["data=images", f"data.root={tmp_path / 'flat'}"]
    assert "expected <class>/*.png" in refused(words, tmp_path, capsys)


def test_lines(tmp_path: Path, capsys) -> None:
    (tmp_path / "data").mkdir()
    rows = [json.dumps({"inputs": [1.0] * (1 + i % 2), "label": i % 2}) for i in range(20)]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(rows))
    words = ["data=jsonl", f"data.root={tmp_path / 'data'}"]
    assert "lists of numbers of one length" in refused(words, tmp_path, capsys)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("data=custom data.load=CODE:nothing", "returned NoneType: got NoneType; expected (x, y)"),
        ("data=custom data.load=CODE:empty", "returned Empty: Empty holds no item; expected (x, y)"),
        ("data=custom data.load=CODE:words", "returned Words: item 0 holds <U1 inputs; numbers are needed"),
        ("data=custom data.load=CODE:ragged", "items of shapes (1,) and (2,); all of one shape are needed"),
        ("data=custom data.load=CODE:torn", "item 2 cannot be had: KeyError: 'x'"),
        ("data=custom data.load=CODE:gone", "has no 'gone'"),
        ("data=custom data.load=CODE", "must be written pkg.mod:name"),
        ("model=custom model.build=CODE:nothing", "returned NoneType, not an nn.Module"),
        ("model=custom model.build=CODE:narrow", "cannot take a batch of shape (2, 1, 8, 8)"),
        ("model=custom model.build=CODE:seven", "gives shape (2, 7) for a batch of 2, expected logits (2, 10)"),
        ("model=custom model.build=CODE:Zero", "my_own_mistakes:Zero: there is no parameter to train"),
        ("model=custom model.build=CODE:frozen", "my_own_mistakes:frozen: there is no parameter to train"),
        ("model=custom model.build=CODE:normed train.batch_size=1", "train.batch_size=1: model=my_own_mistakes:normed"),
        ("model=custom model.build=CODE:InCh", "it was given shape=(1, 8, 8) and classes=10 where it takes them"),
        ("model=custom model.build=torch.nn:Linear", "+model.extra.<argument>=… sets others"),
        ("model=custom model.build=CODE:raising", "failed: ValueError: my own fault"),
    ],
)
def test_code(words: str, said: str, tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "my_own_mistakes.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    assert said in refused(words.replace("CODE", "my_own_mistakes").split(), tmp_path, capsys)


@pytest.mark.parametrize("load", ["rows", "pair"])
def test_a_function_may_return_a_torch_data_set_or_arrays(load: str, tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "my_own_data.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["run", *TINY, "data=custom", f"data.load=my_own_data:{load}", "--dry-run"]) == 0
    assert "data: " in capsys.readouterr().out


def test_a_dry_run_counts_the_frozen_base(tmp_path: Path, capsys) -> None:
    def bytes_of(*words: str) -> int:
        assert main(["run", *TINY, "data=digits", "model=mlp_small", *words, "--dry-run"]) == 0
        out = capsys.readouterr().out
        assert ("frozen" in out.split("\nmodel ")[1].split("\n")[0]) == bool(words)
        return int(out.split("workers with ")[-1].split("worker with ")[-1].split(" bytes")[0].replace(",", ""))

    whole, adapted = bytes_of(), bytes_of("model.lora_rank=2")
    assert whole / 2 < adapted < 2 * whole  # the base once, its adapters twice


def whole_numbers(tmp_path: Path) -> str:
    """A directory with an archive of counts, which may be features or tokens."""
    (tmp_path / "data").mkdir()
    x = np.random.default_rng(0).integers(0, 50, (90, 6))
    np.savez(tmp_path / "data" / "data.npz", x=x, y=x.sum(1) % 3)
    return f"data.root={tmp_path / 'data'}"


@pytest.mark.parametrize("model", ["model=mlp_small", "model=custom model.build=my_own_net:line"])
def test_whole_numbers_are_features(model: str, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "my_own_net.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    words = ["data=npz", whole_numbers(tmp_path), f"out={tmp_path / 'out'}", "strategy=fedmd", *model.split()]
    assert main(["run", *TINY, *words]) == 0


def test_whole_numbers_are_tokens_to_a_model_that_embeds(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "my_own_embedding.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    words = ["data=npz", whole_numbers(tmp_path), f"out={tmp_path / 'out'}", "model=custom"]
    assert main(["run", *TINY, *words, "model.build=my_own_embedding:Mean"]) == 0


def test_arrays_of_whole_numbers_in_a_program(tmp_path: Path) -> None:
    x = np.arange(360).reshape(90, 4) % 7
    found = fedfuse.run({"data": (x, x[:, 0] % 3), "clients": 3, "rounds": 1, "partition": "iid", "runtime": "inline",
                         "out": str(tmp_path / "out")})  # fmt: skip
    assert found.dir.exists()


def test_tokens_are_refused_by_a_model_of_numbers(tmp_path: Path, capsys) -> None:
    (tmp_path / "data").mkdir()
    rows = [json.dumps({"text": f"row {i}", "label": i % 2}) for i in range(40)]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(rows))
    words = ["data=jsonl", f"data.root={tmp_path / 'data'}", "data.extra.text=tokens", "model=mlp"]
    told = refused(words, tmp_path, capsys)
    assert "model=mlp takes numbers, and data=jsonl gives tokens: choose causal_lm or text_classifier" in told


def test_a_tuple_is_not_a_matter_of_the_number_of_classes(tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "my_own_tuple.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    told = refused(["model=custom", "model.build=my_own_tuple:several"], tmp_path, capsys)
    assert told.endswith("gives tuple for a batch of 2, expected logits (2, 10)")


def test_a_dry_run_tells_what_was_found(tmp_path: Path, capsys) -> None:
    for domain in ("photo", "sketch"):
        pictures(tmp_path / "data" / domain, [8] * 10)
    words = ["data=images", f"data.root={tmp_path / 'data'}", "--dry-run"]
    assert main(["run", *TINY, *words, "data.groups=domain"]) == 0
    line = "inputs: uint8 (1, 8, 8) image; classes: cat, dog (2); groups: photo, sketch (2); global test: 8 examples"
    assert f"2 classes\n  {line}" in capsys.readouterr().out
    assert main(["run", *TINY, *words]) == 0
    assert "classes: photo, sketch (2); global test: 8 examples" in capsys.readouterr().out


def test_one_hot_labels_in_a_program() -> None:
    with pytest.raises(fedfuse.UserError, match=r"labels of shape \(30, 3\); expected one a row: of one-hot labels"):
        fedfuse.run({"data": (X, np.eye(3)[Y])})
