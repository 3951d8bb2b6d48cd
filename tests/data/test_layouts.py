"""Every layout on tiny files made here, and what is said when files are missing or damaged."""

import gzip
import io
import json
import os
import re
import struct

import numpy as np
import polars as pl
import pytest
from PIL import Image

from fedfuse.config.compose import compose
from fedfuse.config.schema import DataConfig, PartitionConfig, TransferConfig
from fedfuse.data import prepare
from fedfuse.data.load import load
from fedfuse.errors import UserError


def pixels(count, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def config(layout, root, **settings):
    return DataConfig(name=layout, layout=layout, root=str(root), **settings)


def write_idx(root, packed=True):
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for split, count in (("train", 30), ("t10k", 10)):
        images, labels = pixels(count, 28, 28), (np.arange(count) % 10).astype(np.uint8)
        parts = {
            f"{split}-images-idx3-ubyte": struct.pack(">IIII", 2051, count, 28, 28) + images.tobytes(),
            f"{split}-labels-idx1-ubyte": struct.pack(">II", 2049, count) + labels.tobytes(),
        }
        for name, content in parts.items():
            path = folder / (name + ".gz" if packed else name)
            path.write_bytes(gzip.compress(content) if packed else content)
    return folder


@pytest.mark.parametrize("packed", [True, False])
def test_idx(tmp_path, packed):
    write_idx(tmp_path, packed)
    dataset = load(DataConfig(name="mnist", root=str(tmp_path)))
    assert dataset.shape == (1, 28, 28)
    assert (len(dataset.train), len(dataset.test)) == (30, 10)
    assert (dataset.train.inputs[:, 0] == pixels(30, 28, 28)).all()
    assert dataset.mean == (0.1307,)


def test_idx_missing_or_damaged(tmp_path):
    with pytest.raises(UserError, match=r"data.root=.*does not exist"):
        load(DataConfig(name="mnist", root=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte.* is missing"):
        load(DataConfig(name="mnist", root=str(tmp_path)))
    folder = write_idx(tmp_path)
    path = folder / "train-labels-idx1-ubyte.gz"
    whole = path.read_bytes()
    for content in (whole[:-12], b"junk", gzip.compress(b"\0\0\x08\x01\0\0\0\x09abc"), gzip.compress(b"")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"train-labels-idx1-ubyte.gz.*expected"):
            load(DataConfig(name="mnist", root=str(tmp_path)))


def write_parquet(path, images, labels, names=None, **columns):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"img": [{"bytes": png(image), "path": None} for image in images], "label": labels, **columns})
    if names:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        meta = {"huggingface": json.dumps({"info": {"features": features}})}
        table = table.replace_schema_metadata(meta)
    pq.write_table(table, path)


def test_parquet_images_and_their_cache(tmp_path, monkeypatch):
    train, test = pixels(12, 5, 4, 3), pixels(6, 5, 4, 3, seed=1)
    write_parquet(tmp_path / "train-00000-of-00001.parquet", train, np.arange(12) % 3, ["a", "b", "c"])
    write_parquet(tmp_path / "test-00000-of-00001.parquet", test, np.arange(6) % 3)
    dataset = load(config("parquet", tmp_path))
    assert dataset.classes == ("a", "b", "c")
    assert dataset.kind == "image"
    assert (dataset.train.inputs == train.transpose(0, 3, 1, 2)).all()
    assert (dataset.test.inputs == test.transpose(0, 3, 1, 2)).all()
    assert np.allclose(dataset.mean, train.mean(axis=(0, 1, 2)) / 255, atol=1e-5)
    assert np.allclose(dataset.std, train.std(axis=(0, 1, 2)) / 255, atol=1e-5)
    # The second time nothing is decoded, and arrays are mapped rather than read.
    monkeypatch.setattr("fedfuse.data.read_parquet.decode", lambda *_: pytest.fail("decoded again"))
    again = load(config("parquet", tmp_path))
    assert again.preprocessing() == dataset.preprocessing()
    assert type(again.train.inputs) is np.ndarray
    assert isinstance(again.train.inputs.base, np.memmap)
    # An unwritable cache is no error.
    monkeypatch.undo()
    monkeypatch.setenv("FEDFUSE_CACHE", "/proc/nowhere")
    assert (load(config("parquet", tmp_path)).train.inputs == dataset.train.inputs).all()


def test_parquet_per_domain(tmp_path):
    write_parquet(tmp_path / "amazon.parquet", pixels(20, 4, 4, 3), np.arange(20) % 2)
    write_parquet(tmp_path / "dslr.parquet", pixels(10, 4, 4), np.arange(10) % 2)
    data = DataConfig(name="office_caltech10", root=str(tmp_path))
    f = prepare(data, PartitionConfig(name="domain"), TransferConfig(size=0), None, 0)
    assert f.dataset.group_names == ("amazon", "dslr")
    assert f.sizes().sum(axis=1).tolist() == [16, 8]
    assert f.dataset.shape == (3, 4, 4)
    assert len(f.dataset.test) == 6
    for client in range(2):
        assert (f.split(client, "train").groups == client).all()


def test_parquet_numbers_and_groups(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"a": np.arange(20.0), "b": np.ones(20), "who": [f"u{i % 4}" for i in range(20)]}
    pq.write_table(pa.table({**columns, "y": ["no", "yes"] * 10}), tmp_path / "all.parquet")
    dataset = load(config("parquet", tmp_path, inputs="a,b", groups="who", test_fraction=0))
    assert dataset.kind == "features"
    assert dataset.shape == (2,)
    assert dataset.classes == ("no", "yes")
    assert dataset.group_names == ("u0", "u1", "u2", "u3")
    assert dataset.test is None
    with pytest.raises(UserError, match=r"all.parquet: no column 'z'; set data.inputs=<one of a, b, who, y>"):
        load(config("parquet", tmp_path, inputs="z"))


def test_parquet_damaged(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"train.parquet cannot be read.*expected a parquet file"):
        load(config("parquet", tmp_path))
    (tmp_path / "train.parquet").unlink()
    with pytest.raises(UserError, match=r"expected \*\.parquet"):
        load(config("parquet", tmp_path))
    write_parquet(tmp_path / "train.parquet", [pixels(1, 4, 4)[0], pixels(1, 5, 5)[0]], [0, 1])
    with pytest.raises(UserError, match=r"set data.extra.size"):
        load(config("parquet", tmp_path))
    assert load(config("parquet", tmp_path, extra={"size": 6}, test_fraction=0)).shape == (1, 6, 6)


def test_npz(tmp_path):
    keras = tmp_path / "keras"
    keras.mkdir()
    np.savez(
        keras / "mnist.npz",
        x_train=pixels(9, 6, 6),
        y_train=np.arange(9) % 3,
        x_test=pixels(3, 6, 6),
        y_test=np.arange(3),
    )
    dataset = load(config("npz", keras))
    assert (dataset.shape, len(dataset.test), dataset.kind) == ((1, 6, 6), 3, "image")
    surf = tmp_path / "surf"
    surf.mkdir()
    for name, count in (("amazon", 20), ("webcam", 10)):
        np.savez(surf / f"{name}.npz", features=pixels(count, 7), labels=np.arange(count) % 2)
    dataset = load(config("npz", surf))
    assert dataset.kind == "features"
    assert dataset.train.inputs.dtype == np.float32
    assert dataset.group_names == ("amazon", "webcam")
    single = tmp_path / "one.npz"
    np.savez(single, tokens=np.arange(40).reshape(10, 4), cls=np.arange(10) % 2, site=np.arange(10) // 5)
    dataset = load(config("npz", single, inputs="tokens", targets="cls", groups="site"))
    assert dataset.kind == "tokens"
    assert dataset.tensor(dataset.train.inputs).dtype.is_floating_point is False
    np.savez(single, x=np.full((4, 2), np.nan), y=np.arange(4) % 2)
    with pytest.raises(UserError, match="NaN"):
        load(config("npz", single, test_fraction=0))
    single.write_bytes(b"PK\3\4")
    with pytest.raises(UserError, match=r"one.npz cannot be read"):
        load(config("npz", single))
    np.savez(single, x=np.array([{}], dtype=object), y=np.arange(1))
    with pytest.raises(UserError, match=r"one.npz cannot be read"):
        load(config("npz", single))


def test_image_folder(tmp_path):
    for split, count in (("train", 3), ("test", 1)):
        for name in ("cat", "dog"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(pixels(1, 6, 6, seed=index)[0]).save(folder / f"{index}.png")
    dataset = load(config("images", tmp_path))
    assert (dataset.classes, dataset.shape) == (("cat", "dog"), (1, 6, 6))
    assert (len(dataset.train), len(dataset.test)) == (6, 2)
    (tmp_path / "train" / "cat" / "1.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"1.png cannot be decoded"):
        load(config("images", tmp_path))
    with pytest.raises(UserError, match=r"no images under"):
        load(config("images", tmp_path / "train" / "cat"))


def test_image_folder_of_domains(tmp_path):
    for domain in ("photo", "sketch"):
        for name in ("cat", "dog"):
            folder = tmp_path / domain / name
            folder.mkdir(parents=True)
            for index in range(5):
                Image.fromarray(pixels(1, 6, 6, 3, seed=index)[0]).save(folder / f"{index}.png")
    dataset = load(config("images", tmp_path, groups="domain"))
    assert dataset.classes == ("cat", "dog")
    assert dataset.group_names == ("photo", "sketch")
    assert np.bincount(dataset.train.groups).tolist() == [8, 8]


def test_json_lines(tmp_path):
    rows = [{"text": f"word{i % 2} and more", "label": i % 2, "domain": "ab"[i % 2]} for i in range(20)]
    lines = "\n".join(json.dumps(row) for row in rows) + "\n"
    (tmp_path / "reviews.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    dataset = load(config("jsonl", tmp_path, groups="domain", extra={"buckets": 128}))
    assert (dataset.kind, dataset.shape, dataset.group_names) == ("features", (128,), ("a", "b"))
    assert np.allclose(np.linalg.norm(dataset.train.inputs, axis=1), 1)
    dataset = load(config("jsonl", tmp_path, extra={"text": "tokens", "length": 5}))
    assert (dataset.kind, dataset.shape) == ("tokens", (5,))
    assert (dataset.train.inputs[:, 3:] == 0).all()
    assert (dataset.train.inputs[:, :3] > 0).all()
    (tmp_path / "reviews.jsonl.gz").unlink()
    (tmp_path / "train.jsonl").write_text('{"x": [1, 2], "y": 0}\n{"x": [1, 2]}\n')
    with pytest.raises(UserError, match="example 2 has no 'y'"):
        load(config("jsonl", tmp_path))
    (tmp_path / "train.jsonl").write_text('{"x": [1, 2], "y": 0}\n{"x": [')
    with pytest.raises(UserError, match=r"train.jsonl: line 2 is not JSON"):
        load(config("jsonl", tmp_path))
    (tmp_path / "train.jsonl").write_text('{"x": [1, 2], "y": 0}\n{"x": [1], "y": 1}\n')
    with pytest.raises(UserError, match="lists of numbers of one length"):
        load(config("jsonl", tmp_path))


def test_a_csv_of_numbers_is_taken_whole_if_one_says_so(tmp_path):
    (tmp_path / "cells.csv").write_text("site,width,height,label\n1,2,0.5,0\n2,4,1.5,1\n1,6,2.5,0\n2,8,3.5,1\n")
    whole = load(config("csv", tmp_path, inputs="*", groups="site", test_fraction=0.0))
    assert whole.train.inputs.tolist() == [[2, 0.5], [4, 1.5], [6, 2.5], [8, 3.5]]
    assert load(config("csv", tmp_path, inputs="*", test_fraction=0.0)).train.inputs.shape == (4, 3)
    with pytest.raises(UserError, match=r"data\.inputs=<one of site, width, height>, or data\.inputs=\*"):
        load(config("csv", tmp_path, test_fraction=0.0))
    (tmp_path / "cells.csv").write_text("name,width,label\na,2,0\nb,4,1\n")
    with pytest.raises(UserError, match=r"example 1, column 'name': 'a' is no number; fill it in"):
        load(config("csv", tmp_path, inputs="*", test_fraction=0.0))


def test_json_lines_and_parquet_take_several_columns_as_csv_does(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"site": ["u", "v"] * 4, "a": [float(i) for i in range(8)], "b": [1.0] * 8, "label": [0, 1] * 4}
    for folder in ("jsonl", "parquet", "dated"):
        (tmp_path / folder).mkdir()
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    (tmp_path / "jsonl/all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.table(columns), tmp_path / "parquet/all.parquet")
    for layout in ("jsonl", "parquet"):
        for asked in ("*", "a,b"):
            found = load(config(layout, tmp_path / layout, inputs=asked, groups="site", test_fraction=0.0))
            assert found.train.inputs.tolist() == [[float(i), 1.0] for i in range(8)]
        with pytest.raises(UserError, match=r"data\.inputs=<one of site, a, b>, or data\.inputs=\*"):
            load(config(layout, tmp_path / layout))
    (tmp_path / "jsonl/all.jsonl").write_text('{"a": 1, "day": "2024-01-02", "label": 0}\n' * 3)
    with pytest.raises(UserError, match=r"column 'day': '2024-01-02' is no number.*take the others: data.inputs=\[a\]"):
        load(config("jsonl", tmp_path / "jsonl", inputs="*"))
    pq.write_table(pa.table({**columns, "site": [1, 2] * 4, "day": ["x"] * 8}), tmp_path / "dated/a.parquet")
    with pytest.raises(UserError, match="column 'day' holds no numbers"):
        load(config("parquet", tmp_path / "dated", inputs="*"))
    pq.write_table(pa.table({**columns, "pair": [[1.0, 2.0]] * 8}), tmp_path / "dated/a.parquet")
    with pytest.raises(UserError, match="column 'pair' holds no numbers"):
        load(config("parquet", tmp_path / "dated", inputs="a,pair"))


def test_columns_of_another_scale_are_told(tmp_path):
    (tmp_path / "a.csv").write_text("age,income,label\n" + "".join(f"{20 + i},{9000 * i},{i % 2}\n" for i in range(9)))
    assert [note for note in load(config("csv", tmp_path, inputs="*")).notes if "63000" in note or "72000" in note]
    assert not load(config("csv", tmp_path, inputs="age")).notes


@pytest.mark.parametrize("layout", ["csv", "jsonl", "parquet", "npz"])
def test_labels_are_no_inputs(layout, tmp_path):
    table = pl.DataFrame({"a": [1.0, 2.0, 3.0], "label": [0, 1, 0]})
    if layout == "npz":
        np.savez(tmp_path / "all.npz", a=table["a"].to_numpy()[:, None], label=table["label"].to_numpy())
    else:
        write = {"csv": table.write_csv, "jsonl": table.write_ndjson, "parquet": table.write_parquet}[layout]
        write(tmp_path / f"all.{layout}")
    for inputs in ("label", *(() if layout == "npz" else ("a,label",))):
        with pytest.raises(UserError, match=f"data.inputs={inputs}: 'label' holds the labels"):
            load(config(layout, tmp_path, inputs=inputs))
    assert load(config(layout, tmp_path, inputs="a")).train.inputs.shape[0] > 0


def test_some_columns_of_a_csv(tmp_path):
    (tmp_path / "cells.csv").write_text("id,width,height,label\np0,2,0.5,0\np1,4,1.5,1\np2,6,2.5,0\np3,8,3.5,1\n")
    for typed in ("data.inputs=[width,height]", "data.inputs=[width, 'height']"):
        asked = compose(["data=csv", f"data.root={tmp_path}", "data.test_fraction=0", typed]).data
        assert load(asked).train.inputs.tolist() == [[2, 0.5], [4, 1.5], [6, 2.5], [8, 3.5]]
    with pytest.raises(UserError, match=r"no column 'wide'; set data.inputs=<one of id, width, height, label>"):
        load(config("csv", tmp_path, inputs="wide,height"))
    with pytest.raises(UserError, match=r"data.inputs=id,width: example 1, column 'id': 'p0' is no number"):
        load(config("csv", tmp_path, inputs="id,width"))
    with pytest.raises(UserError, match=r"no column 'hospitl'; set data.groups=<one of id, width, height, label>"):
        load(config("csv", tmp_path, inputs="*", groups="hospitl"))


def test_csv(tmp_path):
    """Texts with commas and quotes, words as labels; the same inputs as from JSON lines."""
    texts = [f'word{i % 3}, "and" more' for i in range(20)]
    table = "text,label,domain\n" + "".join(
        f'"{t.replace(chr(34), chr(34) * 2)}",{["no", "yes"][i % 2]},{i % 2}\n' for i, t in enumerate(texts)
    )
    (tmp_path / "reviews.csv").write_text(table)
    dataset = load(config("csv", tmp_path, groups="domain", test_fraction=0.0, extra={"buckets": 128}))
    assert (dataset.kind, dataset.shape, dataset.classes) == ("features", (128,), ("no", "yes"))
    rows = [json.dumps({"text": t, "label": ["no", "yes"][i % 2]}) for i, t in enumerate(texts)]
    (tmp_path / "reviews.jsonl").write_text("\n".join(rows))
    same = load(config("jsonl", tmp_path, test_fraction=0.0, extra={"buckets": 128}))
    assert (same.train.inputs == dataset.train.inputs).all()
    assert (same.train.targets == dataset.train.targets).all()
    (tmp_path / "reviews.csv").unlink()
    (tmp_path / "train.tsv").write_text("x\ty\n1.5\t0\n2\t1\n")
    numbers = load(config("csv", tmp_path, test_fraction=0.0))
    assert numbers.train.inputs.tolist() == [[1.5], [2.0]]
    assert numbers.classes == ("0", "1")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("text,label\na, b,1\n", r"line 2 has 3 columns, the header 2; put text with commas into quotes"),
        ("a;b;label\n1;2;0\n", "the header holds 'a;b;label'; save the file with commas"),
        ("text,label\n", "is empty; expected a header"),
        ("text,label\na,1\n,0\n", "example 2 has no 'text'"),
        ("what,label\na,1\n", "no column of a usual name; set data.inputs=<one of what>, or"),
    ],
)
def test_a_damaged_csv_is_told(text, said, tmp_path):
    (tmp_path / "train.csv").write_text(text)
    with pytest.raises(UserError, match=said):
        load(config("csv", tmp_path))


def write_leaf(root, test_users):
    for split, users in (("train", ["u1", "u0"]), ("test", test_users)):
        folder = root / "data" / split
        folder.mkdir(parents=True)
        data = {name: {"x": np.ones((4, 6)).tolist(), "y": [0, 1, 2, 0]} for name in users}
        content = {"users": users, "num_samples": [4] * len(users), "user_data": data}
        (folder / "part.json").write_text(json.dumps(content))


def test_leaf(tmp_path):
    write_leaf(tmp_path / "sample", ["u0", "u1"])
    f = prepare(config("leaf", tmp_path / "sample"), PartitionConfig(), TransferConfig(), None, 0)
    assert f.dataset.provided.names == ("u0", "u1")
    assert f.sizes().tolist() == [[4, 0, 4], [4, 0, 4]]
    assert f.transfer is None
    assert f.dataset.test is None
    assert f.tensors(0, "validation")[0].shape == (0, 6)
    write_leaf(tmp_path / "user", ["u7"])
    dataset = load(config("leaf", tmp_path / "user", extra={"shape": [1, 2, 3]}))
    assert dataset.kind == "image"
    assert dataset.shape == (1, 2, 3)
    assert len(dataset.test) == 4
    (tmp_path / "user" / "data" / "test" / "part.json").write_text("{")
    with pytest.raises(UserError, match=r"part.json cannot be read"):
        load(config("leaf", tmp_path / "user"))


def test_leaf_text(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        data = {"u": {"x": ["abc", "bca"], "y": ["a", "b"]}}
        (tmp_path / split / "all.json").write_text(json.dumps({"users": ["u"], "user_data": data}))
    dataset = load(config("leaf", tmp_path))
    assert (dataset.kind, dataset.classes) == ("tokens", ("0", "1"))
    assert dataset.train.inputs[:2].tolist() == [[0, 1, 2], [1, 2, 0]]


@pytest.mark.parametrize("form", ["tokens", "counts"])
def test_words_fill_the_buckets_that_there_are_but_the_first(form, tmp_path):
    rows = [{"text": "one two three four five six", "label": i % 2} for i in range(10)]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for size in (2, 3):
        made = load(config("jsonl", tmp_path, extra={"text": form, "buckets": size, "length": 6})).train.inputs
        buckets = {*made[0].tolist()} if form == "tokens" else {*np.flatnonzero(made[0]).tolist()}
        assert buckets == {*range(1, size)}


@pytest.mark.parametrize(
    "extra", [{"buckets": 1}, {"buckets": "x"}, {"buckets": -5}, {"length": 0}, {"length": 1.5}, {"length": None}]
)
def test_what_is_no_number_of_buckets_or_words_is_refused(extra, tmp_path):
    (tmp_path / "all.jsonl").write_text('{"text": "one", "label": 0}\n{"text": "two", "label": 1}\n' * 4)
    with pytest.raises(UserError, match=rf"data.extra.{next(iter(extra))}=.*: .*allowed is a whole number from"):
        load(config("jsonl", tmp_path, extra=extra))


def test_mixed_sources_become_domains(tmp_path):
    for name, side, channels in (("usps", 4, ()), ("mnist_m", 6, (3,))):
        (tmp_path / name).mkdir()
        write_parquet(tmp_path / name / "train.parquet", pixels(20, side, side, *channels), np.arange(20) % 2)
    data = DataConfig(name="mixed", root=str(tmp_path), extra={"sources": ["usps", "mnist_m"], "per_source": 10})
    dataset = load(data)
    assert dataset.shape == (3, 6, 6)
    assert dataset.group_names == ("usps", "mnist_m")
    assert np.bincount(dataset.train.groups).tolist() == [10, 10]
    assert float(dataset.tensor(dataset.train.inputs).mean()) == pytest.approx(0, abs=1e-4)  # of all sources together
    with pytest.raises(UserError, match="two or more"):
        load(DataConfig(name="mixed"))


def test_places(tmp_path, monkeypatch):
    write_idx(tmp_path / "mnist")
    monkeypatch.setenv("FEDFUSE_DATA", str(tmp_path))
    assert len(load(DataConfig(name="mnist")).train) == 30
    with pytest.raises(UserError, match=r"data=cifar10: no files; looked in .*data.download=true"):
        load(DataConfig(name="cifar10"))
    with pytest.raises(UserError, match=r"set data.hub"):
        load(DataConfig(name="parquet", download=True))


@pytest.mark.parametrize("layout", ["images", "parquet", "text", "mnist"])
def test_a_folder_in_which_things_come_and_go_is_told_in_a_line(tmp_path, monkeypatch, layout):
    (tmp_path / "gone").mkdir()
    scandir = os.scandir

    def late(path="."):
        if str(path).endswith("gone"):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", late)
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        load(DataConfig(name="mnist", root=str(tmp_path)) if layout == "mnist" else config(layout, tmp_path))
