"""PFLlib's files: read as plain data, whatever else is in them."""

import io
import pickle
import zipfile

import numpy as np
import pytest

from fedfuse.config.schema import DataConfig, PartitionConfig, TransferConfig
from fedfuse.data import prepare
from fedfuse.data.unpickle import read_client
from fedfuse.errors import UserError


def archive(path, body, shape="()", dtype="|O"):
    """Write an .npz whose one member `data` has the given pickled body."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype, "fortran_order": False, "shape": eval(shape)})
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("data.npy", header.getvalue() + body)
    return path


def write_clients(root, clients=3):
    for split, count in (("train", 6), ("test", 2)):
        (root / split).mkdir(parents=True)
        for client in range(clients):
            rng = np.random.default_rng(client)
            x = rng.standard_normal((count + client, 1, 4, 4)).astype(np.float32)
            np.savez_compressed(root / split / f"{client}.npz", data={"x": x, "y": np.arange(len(x)) % 2})
    (root / "config.json").write_text('{"num_classes": 3}')


def test_pfllib_as_given(tmp_path):
    write_clients(tmp_path, 11)
    data = DataConfig(name="pfllib", layout="pfllib", root=str(tmp_path))
    f = prepare(data, PartitionConfig(), TransferConfig(), None, 0)
    assert f.clients == 11
    assert f.sizes().tolist() == [[6 + client, 0, 2 + client] for client in range(11)]
    assert f.dataset.provided.names == tuple(str(client) for client in range(11))
    assert f.dataset.classes == ("0", "1", "2")
    assert f.dataset.kind == "image"
    assert f.transfer is None
    assert f.test_tensors() is None
    given = np.random.default_rng(10).standard_normal((16, 1, 4, 4)).astype(np.float32)
    assert (f.tensors(10, "train")[0].numpy() == given).all()
    assert prepare(data, PartitionConfig(), TransferConfig(source="noise", size=4), 11, 0).transfer is not None
    with pytest.raises(UserError, match=r"clients=5.*allowed: 11"):
        prepare(data, PartitionConfig(), TransferConfig(), 5, 0)
    data.limit = 5
    with pytest.raises(UserError, match="never cut again"):
        prepare(data, PartitionConfig(), TransferConfig(), None, 0)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol(tmp_path, protocol):
    x, y = np.asfortranarray(np.arange(12.0).reshape(4, 3)), np.arange(4, dtype=">i4")
    content = np.array({"x": x, "y": y, "n": np.int64(4), "name": "site"}, dtype=object)
    found = read_client(archive(tmp_path / "0.npz", pickle.dumps(content, protocol=protocol)))
    assert (found["x"] == x).all()
    assert (found["y"] == y).all()
    assert found["n"] == 4
    assert found["name"] == "site"


class Evil:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def test_nothing_in_a_file_runs(tmp_path):
    import os
    import subprocess

    mark = tmp_path / "ran"
    attacks = [
        Evil(os.system, (f"touch {mark}",)),
        Evil(subprocess.getoutput, (f"touch {mark}",)),
        Evil(eval, (f"open({str(mark)!r}, 'w')",)),
        Evil(np.load, (str(mark),)),
        Evil(getattr, ("x", "upper")),
        Evil(np.memmap, (str(mark), "u1", "w+", 0, (3,))),
        {"x": Evil(exec, ("1",)), "y": [1]},
    ]
    for attack in attacks:
        for content in (attack, np.array({"x": attack, "y": np.arange(2)}, dtype=object)):
            body = pickle.dumps(content, protocol=4)
            with pytest.raises(UserError, match=r"0.npz (is refused|cannot be read)"):
                read_client(archive(tmp_path / "0.npz", body))
    assert not mark.exists()


def test_bytes_are_never_taken_for_pointers(tmp_path):
    """NumPy's own reconstruction believes a dtype state that says objects are no objects."""
    reconstruct, dtype = "cnumpy.core.multiarray\n_reconstruct\n", "cnumpy\ndtype\n"
    body = (
        "("
        + reconstruct
        + "(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I1\nt"
        + dtype
        + "(S'O8'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntbI00\nS'AAAAAAAA'\ntb"
    )
    body = body[1:] + "."
    with pytest.raises(UserError, match=r"0.npz"):
        read_client(archive(tmp_path / "0.npz", body.encode()))


def test_damaged(tmp_path):
    with pytest.raises(UserError, match="is missing"):
        read_client(tmp_path / "9.npz")
    good = pickle.dumps(np.array({"x": np.zeros((2, 2)), "y": np.arange(2)}, dtype=object))
    cases = [
        good[:-20],
        b"",
        b"\x80\x04.",
        pickle.dumps(np.array({"x": 1}, dtype=object)),
        pickle.dumps([1, 2]),
    ]
    for body in cases:
        with pytest.raises(UserError, match=r"0.npz"):
            read_client(archive(tmp_path / "0.npz", body))
    (tmp_path / "0.npz").write_bytes(b"PK\3\4 broken")
    with pytest.raises(UserError, match=r"0.npz cannot be read"):
        read_client(tmp_path / "0.npz")


def test_random_damage_only_ever_refuses(tmp_path):
    write_clients(tmp_path, 1)
    content = bytearray(pickle.dumps(np.array({"x": np.zeros((3, 2)), "y": np.arange(3)}, dtype=object)))
    rng = np.random.default_rng(0)
    for _ in range(400):
        damaged = bytearray(content)
        for _ in range(rng.integers(1, 4)):
            damaged[rng.integers(len(damaged))] = rng.integers(256)
        # Undamaged content, a changed number or one refusal of one line; anything else fails the test.
        said = ""
        try:
            read_client(archive(tmp_path / "0.npz", bytes(damaged)))
        except UserError as error:
            said = str(error)
        assert "\n" not in said
