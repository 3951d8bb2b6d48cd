"""Small files that would take much memory: refused in one line before they take any."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from fedfuse.config.schema import DataConfig
from fedfuse.data.inflate import INFLATED, room
from fedfuse.data.load import load
from fedfuse.data.read_npz import load as arrays
from fedfuse.data.unpickle import read_client
from fedfuse.errors import UserError


def member(shape: tuple[int, ...], descr: str = "<f4", body: int = 0) -> bytes:
    head = io.BytesIO()
    np.lib.format.write_array_header_2_0(head, {"descr": descr, "fortran_order": False, "shape": shape})
    return head.getvalue() + bytes(body)


def bomb(path: Path, megabytes: int = 256, packing: int = zipfile.ZIP_DEFLATED) -> Path:
    """An archive a thousand times smaller than what it holds."""
    with zipfile.ZipFile(path, "w", packing) as file, file.open("x.npy", "w") as x:
        x.write(member((megabytes * 2**10, 2**10), "|u1"))
        for _ in range(megabytes):
            x.write(bytes(2**20))
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("y.npy", member((megabytes * 2**10,), "|u1", megabytes * 2**10))
    return path


MEASURED = """
import sys, resource
from fedfuse.config.schema import DataConfig
from fedfuse.data.load import load
from fedfuse.errors import UserError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    load(DataConfig(name=sys.argv[1], layout=sys.argv[1], root=sys.argv[2]))
except UserError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("layout", ["npz", "pfllib"])
def test_a_small_archive_does_not_take_much_memory(layout: str, tmp_path: Path) -> None:
    """In a process of its own, whose peak is looked at."""
    (tmp_path / "train").mkdir()
    path = bomb(tmp_path / "train" / "0.npz")
    assert path.stat().st_size < 2**20
    root = path if layout == "npz" else tmp_path
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, layout, str(root)], capture_output=True, text=True, check=True, timeout=120
    )
    *told, taken = done.stdout.strip().splitlines()
    assert int(taken) < 100, f"{taken} MB"
    (said,) = told
    assert said.startswith(f"{path}: would inflate to ")
    assert f"allowed are {room(path)} (set FEDFUSE_INFLATED for more)" in said


def test_the_limit_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bomb(tmp_path / "x.npz", 2)
    assert arrays(path)["x"].nbytes == 2 * 2**20
    monkeypatch.setenv(INFLATED, "1000000")
    with pytest.raises(UserError, match="allowed are 1000000"):
        arrays(path)
    monkeypatch.setenv(INFLATED, "3000000")
    assert arrays(path)["x"].nbytes == 2 * 2**20
    monkeypatch.setenv(INFLATED, "much")
    with pytest.raises(UserError, match="FEDFUSE_INFLATED=much: a whole number of bytes is needed"):
        arrays(path)


@pytest.mark.parametrize("packing", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_what_inflates_at_once_is_refused(packing: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'x\.npy' is packed in a way that no \.npz is"):
        arrays(bomb(tmp_path / "x.npz", 2, packing))


def test_a_directory_that_lies_gives_no_more_than_it_says(tmp_path: Path) -> None:
    path = bomb(tmp_path / "x.npz", 2)
    content, size = path.read_bytes(), struct.pack("<I", 2 * 2**20 + 128)
    assert content.count(size) >= 1
    path.write_bytes(content.replace(size, struct.pack("<I", 1000)))
    with pytest.raises(UserError, match=r"x\.npz(: 'x\.npy' declares 2097152 bytes and holds 1000| cannot be read)"):
        arrays(path)


@pytest.mark.parametrize(("shape", "descr"), [((2**40,), "<f8"), ((2**31, 2**31), "|u1"), ((2**40,), "<U0")])
def test_a_header_that_declares_more_than_follows(shape: tuple[int, ...], descr: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "0.npz", "w") as file:
        file.writestr("x.npy", member(shape, descr, 64))
    for read in (arrays, read_client):
        with pytest.raises(UserError, match=r"'x\.npy' declares \d+ bytes and holds "):
            read(tmp_path / "0.npz")


@pytest.mark.parametrize(("shape", "descr"), [((2 * 10**8, 0), "<f4"), ((2 * 10**8,), "|S0"), ((2 * 10**8, 0), "|V0")])
@pytest.mark.parametrize("version", [1, 2, 3])
def test_items_and_rows_without_bytes_count(version: int, shape: tuple[int, ...], descr: str, tmp_path: Path) -> None:
    head = member(shape, descr)
    if version == 1:
        head = head[:6] + b"\1\0" + head[8:10] + head[12:]
    elif version == 3:
        head = head[:6] + b"\3" + head[7:]
    with zipfile.ZipFile(tmp_path / "0.npz", "w") as file:
        file.writestr("x.npy", head)
    said = "is of npy format 3.0; allowed: 1.0, 2.0" if version == 3 else r"declares [28]0+ bytes and holds "
    for read in (arrays, read_client):
        with pytest.raises(UserError, match=rf"0\.npz: 'x\.npy' {said}"):
            read(tmp_path / "0.npz")


def test_empty_arrays_are_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "0.npz", x=np.zeros((0, 3, 64, 64)), y=np.zeros(0))
    for read in (arrays, read_client):
        assert read(tmp_path / "0.npz")["x"].shape == (0, 3, 64, 64)


def test_object_arrays_are_never_unpickled_from_an_archive(tmp_path: Path) -> None:
    mark = tmp_path / "mark"

    class Trap:
        def __reduce__(self) -> object:
            return (Path.touch, (mark,))

    trapped = np.empty(1, dtype=object)
    trapped[0] = Trap()
    np.savez(tmp_path / "a.npz", x=trapped, y=np.arange(1))
    np.save(tmp_path / "b.npy", trapped, allow_pickle=True)
    (tmp_path / "b.npy").rename(tmp_path / "b.npz")
    (tmp_path / "c.npz").write_bytes(pickle.dumps(Trap()))
    for name in ("a", "b", "c"):
        for read in (arrays, read_client):
            with pytest.raises(UserError):
                read(tmp_path / f"{name}.npz")
    assert not mark.exists()


def pickled(body: bytes, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("data.npy", member((), "|O") + body)
    return path


def test_a_pickle_takes_no_more_than_there_is_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INFLATED, str(2**20))
    # a list of the list before it, twice, thirty times over: 2**30 items in 200 bytes
    laughs = b"\x80\x02]q\x00" + b"".join(b"]q%c(h%ch%ce" % (i + 1, i, i) for i in range(30)) + b"."
    many: list[np.ndarray] = [np.zeros(2**12, dtype=np.uint8)] * 2000
    wanted = {
        "memo": (b"\x80\x02]r\xff\xff\xff\x7f.", "it numbers a value 2147483647"),
        "laughs": (laughs, "it takes more than 1048576 bytes"),
        "copies": (pickle.dumps({"x": many, "y": [0] * 2000}, protocol=2), "it takes more than 1048576 bytes"),
        "long": (b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b".", "cannot be read"),
    }
    for name, (body, said) in wanted.items():
        with pytest.raises(UserError, match=said):
            read_client(pickled(body, tmp_path / f"{name}.npz"))


def test_a_small_parquet_file_does_not_take_much_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal values of a column lie in it as a few bytes and a count."""
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setenv(INFLATED, str(2**20))
    column, path = pyarrow.array(np.zeros(2**20, np.int8)), tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"x": column, "label": column}), path)
    assert path.stat().st_size < 2**17
    with pytest.raises(
        UserError, match=r"train\.parquet: would inflate to 16777216 bytes or more; allowed are 1048576"
    ):
        load(DataConfig(name="parquet", layout="parquet", root=str(tmp_path)))


@pytest.mark.parametrize("kind", ["text", "image", "label", "categories", "zeros", "nested", "texts", "one row"])
def test_what_parquet_says_once_counts_in_every_row(kind: str, tmp_path: Path) -> None:
    """Equal texts, and lists of equal numbers, lie in a page once. In a process of its own, whose peak is looked at."""
    import pyarrow
    import pyarrow.parquet

    n, long, zeros = 300, "x" * 2**20, [0.0] * 10**6
    other: dict[str, object] = {"label": [i % 2 for i in range(n)]}
    if kind == "text":
        x = pyarrow.array([long] * n)
    elif kind == "image":
        x = pyarrow.array([{"bytes": long.encode(), "path": None}] * n)
    elif kind == "label":
        x, other = pyarrow.array([1.0] * n), {"label": pyarrow.array([long] * n)}
    elif kind == "categories":
        x = pyarrow.array([long] * n).dictionary_encode()
    elif kind == "zeros":
        x, other = pyarrow.array([zeros] * 30), {"label": [0] * 30}
    elif kind == "nested":
        x, other = pyarrow.array([[zeros]] * 30), {"label": [0] * 30}
    elif kind == "texts":
        x, other = pyarrow.array([[long] * 10] * 30), {"label": [0] * 30}
    else:
        x, other = (
            pyarrow.ListArray.from_arrays([0, 3 * 10**7], pyarrow.array(np.zeros(3 * 10**7, "f4"))),
            {"label": [0]},
        )
    path = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"x": x, **other}), path, compression="zstd")
    del x, other
    assert path.stat().st_size < 2**15
    done = subprocess.run(
        [sys.executable, "-c", "import pyarrow.parquet, pyarrow.compute\n" + MEASURED, "parquet", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    said, taken = done.stdout.strip().splitlines()
    assert said.startswith(f"{path}: " + ("column" if kind == "texts" else "would inflate to ")), said
    assert int(taken) < 250, f"{taken} MB"


@pytest.mark.parametrize("layout", ["builtin", "jsonl", "csv"])
def test_gzipped_files_have_a_limit_too(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INFLATED, str(2**20))
    if layout == "builtin":
        (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(
            gzip.compress(struct.pack(">IIII", 2051, 4096, 32, 32) + bytes(2**22))
        )
    elif layout == "csv":
        (tmp_path / "train.csv.gz").write_bytes(gzip.compress(b"x,y\n" + b"0.0,0\n" * 2**20))
    else:
        line = json.dumps({"x": [0.0] * 2**17, "y": 0}) + "\n"
        (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(line.encode() * 8))
    name = "mnist" if layout == "builtin" else layout
    with pytest.raises(UserError, match=r"\.gz: would inflate to \d+ bytes or more; allowed are 1048576"):
        load(DataConfig(name=name, layout=layout, root=str(tmp_path)))


def test_small_images_do_not_take_much_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A square of one colour lies in a few bytes; its size stands before it."""
    from PIL import Image

    for name in "ab":
        (tmp_path / name).mkdir()
        Image.new("L", (2048, 2048)).save(tmp_path / name / "0.png")
    config = DataConfig(name="images", layout="images", root=str(tmp_path), test_fraction=0.0)
    monkeypatch.setattr("PIL.Image.Image.load", lambda self: pytest.fail("decoded"))
    monkeypatch.setenv(INFLATED, str(2**22))  # as much as the array takes; decoding takes more
    for size in (None, 8):
        config.extra = {"size": size}
        with pytest.raises(
            UserError, match="data=images: would inflate to 16777216 bytes or more; allowed are 4194304"
        ):
            load(config)
    monkeypatch.setenv(INFLATED, str(2**24))
    config.extra = {"size": [2**14, 2**14]}
    with pytest.raises(UserError, match="data=images: would inflate to 536870912 bytes or more"):
        load(config)


def test_an_image_that_pillow_warns_of_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    (tmp_path / "a").mkdir()
    Image.new("L", (64, 64)).save(tmp_path / "a" / "0.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    with pytest.raises(UserError, match=r"0\.png cannot be decoded \(Image size \(4096 pixels\) exceeds limit"):
        load(DataConfig(name="images", layout="images", root=str(tmp_path)))


@pytest.mark.parametrize(
    ("layout", "extra", "taken"),
    [
        ("csv", {}, 4 * 1024 * 2000),
        ("csv", {"text": "tokens", "length": 10**6}, 8 * 10**6 * 2000),
        ("jsonl", {"buckets": 10**9}, 4 * 10**9 * 2000),
        ("parquet", {"buckets": 2**20}, 4 * 2**20 * 2000),
        ("text", {"tokenizer": "bytes", "length": 10**8}, 9 * 10**8),
    ],
)
def test_short_texts_do_not_become_many_numbers(
    layout: str, extra: dict[str, object], taken: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setenv(INFLATED, str(2**20))
    if layout == "csv":
        (tmp_path / "train.csv.gz").write_bytes(gzip.compress(b"text,label\n" + b"a,0\nb,1\n" * 1000))
    elif layout == "jsonl":
        (tmp_path / "train.jsonl").write_text('{"text": "a", "label": 0}\n' * 2000)
    elif layout == "text":
        (tmp_path / "a.txt").write_text("some words")
    else:
        table = pyarrow.table({"text": ["a", "b"] * 1000, "label": [0, 1] * 1000})
        pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(
        UserError, match=f"data={layout}.*: would inflate to {taken} bytes or more; allowed are 1048576"
    ):
        load(DataConfig(name=layout, layout=layout, root=str(tmp_path), extra=extra))


def test_one_long_text_does_not_give_others_its_room(tmp_path: Path) -> None:
    """NumPy's arrays of texts do: 3,000 labels, of which one has a million letters, would take 12 GB."""
    long = "x" * 10**6
    rows = [{"x": 1, "y": "a", "who": "b"}] * 3000
    for one in ({"x": 1, "y": long, "who": long}, {"x": long, "y": "a", "who": "b"}, {"x": [[long]], "y": 0, "who": 0}):
        (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row) for row in [*rows, one]))
        script = MEASURED.replace("root=sys.argv[2]", "root=sys.argv[2], groups='who', test_fraction=0.0")
        done = subprocess.run(
            [sys.executable, "-c", script, "jsonl", str(tmp_path)], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert int(done.stdout.split()[-1]) < 200, done.stdout
        assert ("expected text, numbers" in done.stdout) == (one["x"] != 1)


def test_mixed_images_are_not_made_larger_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INFLATED, str(2**30))
    extra = {"sources": ["digits", "digits"], "shape": [3, 20_000, 20_000]}
    with pytest.raises(UserError, match=r"data\.extra\.shape=\[3, 20000, 20000\]: would inflate to \d+ bytes or more"):
        load(DataConfig(name="mixed", layout="mixed", extra=extra))
