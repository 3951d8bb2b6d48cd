"""What bad input gets: one line that names the thing, the value and what is allowed; nothing is written."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import numpy as np
import pytest

from fedfuse.config.compose import compose
from fedfuse.errors import UserError
from fedfuse.runs.experiment import run
from tests.federations import TINY
from tests.ledger import Ledger, LedgerClient, LedgerHyper, enter


def refused(*words: str, out: Path | None = None) -> str:
    """The one line that a command gets, and the promise that it left nothing behind."""
    more = [] if out is None else [f"out={out}"]
    with pytest.raises(UserError) as caught:
        run(compose([*TINY, *words, *more]), quiet=True)
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 1200
    if out is not None:
        assert not out.exists()
    return line


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["clientss=3"], "clientss: no such key; did you mean 'clients'"),
        (["train.learning_rate=1"], "train.learning_rate: no such key"),
        (["train.epoch=1"], "train.epoch: no such key; did you mean 'train.epochs'"),
        (["+train.epoch=1"], "train.epoch: no such key; did you mean 'train.epochs'"),
        (["strategy=fedavgg"], "strategy=fedavgg: unknown; did you mean 'fedavg'"),
        (["strategy="], "strategy=: unknown"),
        (["strategy=knfu", "strategy.betta=1"], "strategy.betta: no such key; did you mean 'strategy.beta'"),
        (["strategy=knfu", "strategy.distance=kl"], "strategy.distance=kl: knfu allows kl_nm, kl_mn, sym_kl, js"),
        (["data=digit"], "data=digit: unknown; did you mean 'digits'"),
        (["partition=dirichlett"], "partition=dirichlett: unknown; did you mean 'dirichlet'"),
        (["model=mpl"], "model=mpl: unknown; did you mean 'mlp'"),
        (["model.pool=[mlp,nope]"], "nope"),
        (["loss=klx"], "loss=klx: unknown"),
        (["runtime=rai"], "runtime=rai: unknown; did you mean 'ray'"),
        (["clients"], "'clients': not of the form key=value"),
        (["clients=0"], "clients=0: allowed is at least 1"),
        (["clients=-3"], "clients=-3: allowed is at least 1"),
        (["clients=2.5"], "clients=2.5"),
        (["clients=many"], "clients=many"),
        (["clients=100000"], "clients=100000"),
        (["rounds=0"], "rounds=0: allowed is at least 1"),
        (["participation=0"], "participation=0.0: allowed is more than 0 and at most 1"),
        (["participation=1.5"], "participation=1.5: allowed is more than 0 and at most 1"),
        (["participation=nan"], "participation=nan: allowed is more than 0"),
        (["partition=dirichlet", "partition.alpha=0"], "partition.alpha=0"),
        (["partition=dirichlet", "partition.alpha=-1"], "partition.alpha=-1"),
        (["partition=dirichlet", "partition.alpha=nan"], "partition.alpha=nan"),
        (["partition=dirichlet", "partition.alpha=1e-6", "clients=20"], "alpha=1e-06"),
        (["transfer.size=-1"], "transfer.size=-1"),
        (["transfer.size=100000"], "transfer.size=100000"),
        (["transfer.size=240"], "transfer.size=240"),
        (["transfer.source=nowhere"], "transfer.source=nowhere"),
        (["data.limit=0"], "data.limit=0"),
        (["data.limit=-4"], "data.limit=-4"),
        (["data.validation=1.5"], "data.validation=1.5"),
        (["data.validation=0.5", "data.personal_test=0.5"], "leave nothing to train on"),
        (["train.lr=0"], "train.lr=0.0: allowed is more than 0"),
        (["train.lr=inf"], "train.lr=inf: allowed is more than 0"),
        (["train.lr=fast"], "train.lr=fast"),
        (["train.batch_size=0"], "train.batch_size=0: allowed is at least 1"),
        (["train.optimizer=lion"], "train.optimizer=lion: "),
        (["evaluate.every=0"], "evaluate.every=0: allowed is at least 1"),
        (["runtime.workers=0"], "runtime.workers=0: allowed is at least 1"),
        (["train.precision=fp8"], "train.precision=fp8: "),
        (["runtime.memory=64"], "runtime.memory=64: allowed is at least 320"),
        (["runtime.gpu_fraction=0"], "runtime.gpu_fraction=0.0: allowed is more than 0 and at most 1"),
        (["runtime.client_timeout=-1"], "runtime.client_timeout=-1.0: allowed is more than 0"),
        (["runtime.device=tpu"], "runtime.device=tpu: "),
        (["seed=-1"], "seed=-1: allowed is at least 0"),
        (["loss=kl", "loss.temperature=0"], "loss.temperature=0.0: allowed is more than 0"),
        (["strategy=fedavg", "model.pool=[mlp,cnn]"], "strategy=fedavg needs one architecture"),
        (["strategy=fedavg", "train.optimizer_state=keep"], "train.optimizer_state=keep"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(words: list[str], says: str, tmp_path: Path) -> None:
    line = refused(*words, out=tmp_path / "run")
    assert says in line, line


def test_a_client_too_many(tmp_path: Path) -> None:
    """240 examples, 24 of them held out: 216 clients can have one each, 217 cannot."""
    line = refused("clients=217", out=tmp_path / "run")
    assert "clients=217" in line
    assert "216" in line


# --- data that is not there, or not what it says ----------------------------------------------------------


def test_missing_data_is_refused(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDFUSE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("mnist", "cifar10"):
        line = refused(f"data={name}", out=tmp_path / "run")
        assert f"data={name}" in line
    line = refused("data=mnist", f"data.root={tmp_path / 'nowhere'}", out=tmp_path / "run")
    assert "nowhere" in line
    assert not (tmp_path / "data").exists()


def idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """A tiny MNIST with the real layout."""
    root = tmp_path / "mnist"
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for name, n in (("train", 400), ("t10k", 100)):
        idx(raw / f"{name}-images-idx3-ubyte.gz", draw.integers(0, 256, (n, 28, 28)))
        idx(raw / f"{name}-labels-idx1-ubyte.gz", np.arange(n) % 10)
    return root


def test_the_small_copy_is_good(mnist: Path, tmp_path: Path) -> None:
    out = run(compose([*TINY, "data=mnist", f"data.root={mnist}", "rounds=1", f"out={tmp_path / 'run'}"]), quiet=True)
    assert (out / "summary.json").exists()


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "garbage", "labels", "other"])
def test_corrupt_data_is_refused(damage: str, mnist: Path, tmp_path: Path) -> None:
    raw = mnist / "MNIST" / "raw"
    images, labels = raw / "train-images-idx3-ubyte.gz", raw / "train-labels-idx1-ubyte.gz"
    if damage == "missing":
        labels.unlink()
    elif damage == "empty":
        images.write_bytes(b"")
    elif damage == "cut":
        images.write_bytes(images.read_bytes()[:-500])
    elif damage == "garbage":
        images.write_bytes(b"<html>404</html>")
    elif damage == "labels":
        idx(labels, np.zeros(399))
    else:
        shutil.copy(labels, images)
    line = refused("data=mnist", f"data.root={mnist}", out=tmp_path / "run")
    assert "train-" in line or "mnist" in line


@pytest.mark.parametrize("damage", ["missing", "garbage", "classes"])
def test_corrupt_checkpoints_of_models_are_refused(damage: str, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "weights.safetensors"
    if damage == "garbage":
        path.write_bytes(b"no weights")
    elif damage == "classes":
        save_file({"head.weight": torch.zeros(3, 3)}, path)
    line = refused("strategy=fedavg", f"model.checkpoint={path}", out=tmp_path / "run")
    assert "weights.safetensors" in line


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["data=custom", "data.load=no.such:thing"], "no.such"),
        (["data=custom", "data.load=os:getcwd"], "data.load"),
        (["data=custom"], "data.load"),
        (["model=custom", "model.build=no.such:thing"], "no.such"),
        (["model=custom", "model.build=os:getcwd"], "model.build"),
        (["model=custom"], "model.build"),
        (["strategy=knfu", "loss=custom", "loss.build=no.such:thing"], "no.such"),
    ],
)
def test_dotted_paths_that_lead_nowhere_are_refused(words: list[str], says: str, tmp_path: Path) -> None:
    assert says in refused(*words, out=tmp_path / "run")


def test_a_strategy_may_refuse_at_its_start(monkeypatch, tmp_path: Path) -> None:
    class Refuses(Ledger):
        def begin(self) -> None:
            raise UserError("strategy.every=2: not with digits")

    enter(monkeypatch, Refuses, LedgerClient, LedgerHyper, "refuses")
    assert refused("strategy=refuses", out=tmp_path / "deep" / "run") == "strategy.every=2: not with digits"
    assert list(tmp_path.iterdir()) == []
