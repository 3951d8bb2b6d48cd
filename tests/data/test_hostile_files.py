"""Files that whoever filled a folder of data may have put there: told in one line, or left alone."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedfuse.config.schema import DataConfig
from fedfuse.data.load import load
from fedfuse.errors import UserError

LOADED = """
import json, sys
from fedfuse.config.schema import DataConfig
from fedfuse.data.load import load
from fedfuse.errors import UserError
layout, root, extra = sys.argv[1:]
try:
    config = DataConfig(name=layout, layout=layout, root=root, test_fraction=0.0, extra=json.loads(extra))
    print(len(load(config).train))
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize("value", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, "[" + "1" * 5000 + "]"])
def test_numbers_and_lists_without_end_are_no_json(value: str, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(f'{{"x": [1, 2], "y": 0}}\n{{"x": {value}, "y": 0}}\n')
    with pytest.raises(UserError, match=r"train\.jsonl: line 2 is not JSON \(.*\); expected one object") as told:
        load(DataConfig(name="jsonl", layout="jsonl", root=str(tmp_path)))
    assert len(str(told.value)) < 500
    assert "\n" not in str(told.value)
    folder = tmp_path / "train"
    folder.mkdir()
    (folder / "0.json").write_text(f'{{"users": {value}}}')
    with pytest.raises(UserError, match=r"0\.json cannot be read"):
        load(DataConfig(name="leaf", layout="leaf", root=str(tmp_path)))


def folder_with_pipe(layout: str, root: Path) -> dict[str, str]:
    """Two good examples, and a pipe with the name of a file that would be read; `data.extra`."""
    x, y = np.zeros((2, 3)), np.arange(2)
    if layout == "images":
        for name in "ab":
            (root / name).mkdir()
            Image.new("L", (8, 8)).save(root / name / "0.png")
        os.mkfifo(root / "b" / "1.png")
    elif layout == "jsonl":
        (root / "good.jsonl").write_text('{"x": 1, "y": 0}\n{"x": 2, "y": 1}\n')
        os.mkfifo(root / "pipe.jsonl")
        return {"train": "*.jsonl"}
    elif layout == "pfllib":
        (root / "train").mkdir()
        (root / "test").mkdir()
        np.savez(root / "train" / "0.npz", x=x, y=y)
        for name in ("train/1.npz", "test/0.npz", "config.json"):
            os.mkfifo(root / name)
    else:
        for split in ("train", "test"):
            (root / split).mkdir()
            content = {"users": ["a"], "user_data": {"a": {"x": x.tolist(), "y": y.tolist()}}}
            (root / split / "0.json").write_text(json.dumps(content))
            os.mkfifo(root / split / "1.json")
    return {}


@pytest.mark.parametrize("layout", ["images", "jsonl", "pfllib", "leaf"])
def test_a_pipe_among_the_files_is_left_alone(layout: str, tmp_path: Path) -> None:
    """In a process of its own: who opens a pipe waits for ever."""
    extra = folder_with_pipe(layout, tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", LOADED, layout, str(tmp_path), json.dumps(extra)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.strip() in ("2", "4")  # LEAF's test rows are the user's own


def test_no_program_is_started_for_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow has Ghostscript draw a PostScript file, whatever its name."""
    (tmp_path / "a").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "a" / "0.png", "EPS")
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was started"))
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was called"))
    with pytest.raises(UserError, match=r"0\.png cannot be decoded \(cannot identify image file"):
        load(DataConfig(name="images", layout="images", root=str(tmp_path)))


def test_clients_files_together_have_the_room_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The attack: any file may take 64 MiB, and a folder had 800 of 60 kB."""
    (tmp_path / "train").mkdir()
    np.savez_compressed(tmp_path / "train" / "0.npz", x=np.zeros((2000, 100)), y=np.arange(2000) % 2)
    for i in range(1, 9):
        (tmp_path / "train" / f"{i}.npz").write_bytes((tmp_path / "train" / "0.npz").read_bytes())
    monkeypatch.setattr("fedfuse.data.inflate.SMALL", 2**21)  # 1.6 MB each
    config = DataConfig(name="pfllib", layout="pfllib", root=str(tmp_path))
    with pytest.raises(UserError, match=r"would inflate to \d+ bytes or more; allowed are"):
        load(config)
    for i in range(1, 9):
        (tmp_path / "train" / f"{i}.npz").unlink()
    assert len(load(config).train) == 2000


@pytest.mark.parametrize("layout", ["pfllib", "leaf"])
def test_a_large_label_makes_no_billion_classes(layout: str, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    config = DataConfig(name=layout, layout=layout, root=str(tmp_path))
    if layout == "pfllib":
        np.savez(tmp_path / "train" / "0.npz", x=np.zeros((2, 3)), y=np.array([0, 10**9]))
    else:
        held = {"users": ["a"], "user_data": {"a": {"x": [[1.0], [2.0]], "y": [0, 10**9]}}}
        for split in ("train", "test"):
            (tmp_path / split / "0.json").write_text(json.dumps(held))
    with pytest.raises(UserError, match="1000000001 classes; allowed are 1000000"):
        load(config)
    if layout == "leaf":
        for split in ("train", "test"):
            (tmp_path / split / "0.json").write_text('{"users": [], "user_data": {}}')
        with pytest.raises(UserError, match="no client has an example"):
            load(config)
    else:
        np.savez(tmp_path / "train" / "0.npz", x=np.zeros((2, 3)), y=np.arange(2))
        (tmp_path / "config.json").write_text('{"num_classes": 1e999}')
        assert len(load(config).classes) == 2


@pytest.mark.parametrize("labels", [[[1], [2, 3]], [{"a": 1}, [1]], [[1, 2], [3, 4]]])
def test_labels_that_are_lists_are_told(labels: list[object], tmp_path: Path) -> None:
    rows = [json.dumps({"x": [1.5, 2], "y": label}) for label in labels]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    with pytest.raises(UserError, match="are lists; expected one text or number"):
        load(DataConfig(name="jsonl", layout="jsonl", root=str(tmp_path)))


@pytest.mark.parametrize(("name", "content"), [
    ("train.csv.gz", b"x,y\n" + b"1,0\n" * 300_000), ("train.jsonl.gz", b'{"x":1,"y":0}\n' * 200_000),
    ("train.jsonl.gz", b'{"x":1,"y":0}\n{"x":[' + b"{}," * 300_000 + b'{}],"y":0}\n'),
])  # fmt: skip
def test_rows_take_more_than_their_letters(
    name: str, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attack: 58 kB of `1,0` filled 4.6 GB, for each file inflated to no more than 64 MiB of letters."""
    monkeypatch.setattr("fedfuse.data.inflate.SMALL", 2**23)
    (tmp_path / name).write_bytes(gzip.compress(content))
    layout = name.split(".")[1]
    with pytest.raises(UserError, match=r"would inflate to \d+ bytes or more; allowed are"):
        load(DataConfig(name=layout, layout=layout, root=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "layout"),
    [("a.txt.gz", "text"), ("a.jsonl.gz", "jsonl"), ("a.csv.gz", "csv"), ("train-images-idx3-ubyte.gz", "idx")],
)
def test_a_compressed_file_whose_middle_is_damaged_is_told(name: str, layout: str, tmp_path: Path) -> None:
    content = bytearray(gzip.compress(bytes(range(256)) * 64))
    content[12:60] = b"\xff" * 48  # no blocks that a deflated stream may have
    (tmp_path / name).write_bytes(content)
    known = {"idx": "mnist"}.get(layout, layout)
    extra = {"tokenizer": "bytes"} if layout == "text" else {}
    with pytest.raises(UserError, match=f"{name} cannot be read"):
        load(DataConfig(name=known, root=str(tmp_path), extra=extra))
