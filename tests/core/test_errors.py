"""No traceback: what a user gets wrong is one line that names cause and cure, and the whole story on request."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
from torch import nn

from fedfuse.cli import main
from fedfuse.config import registry
from fedfuse.core.client import FusionClient
from fedfuse.core.strategy import FusionStrategy, Shares
from fedfuse.errors import TRACEBACK, UserError, WorldError
from fedfuse.results.statistics import mean_interval
from fedfuse.results.table import percent
from fedfuse.wire.records import arrays
from tests.federations import TINY, play
from tests.ledger import enter

SMALL = [word for word in TINY if not word.startswith(("model=", "data"))]


def load(folder: str) -> None:
    """Return no data set."""


def broken() -> None:
    raise KeyError("label")


class Headless(nn.Module):
    """A model that strategies cannot part."""

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(shape[0] * shape[1] * shape[2], classes)

    def features(self, x: Any) -> Any:
        return x.flatten(1)

    def forward(self, x: Any) -> Any:
        return self.layer(x.flatten(1))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        *(
            (
                f"strategy={name} model=custom model.build=tests.core.test_errors:Headless",
                f"strategy={name} needs models with features(x), head(z) and feature_dim, where forward(x) is "
                "head(features(x)); tests.core.test_errors:Headless has no head and no feature_dim",
            )
            for name in ("fedproto", "moon", "fedrep")
        ),
        (
            "data=custom data.load=tests.core.test_errors:load",
            "data.load=tests.core.test_errors:load was called with no data.extra: load() missing 1 required",
        ),
        (
            "data=custom data.load=tests.core.test_errors:load +data.extra.foldr=x",
            "was called with data.extra.foldr: load() got an unexpected keyword argument 'foldr'",
        ),
        (
            "data=custom data.load=tests.core.test_errors:load data.extra.folder=x",
            "returned NoneType: got NoneType; expected (x, y)",
        ),
        ("data=custom data.load=tests.core.test_errors:broken", "failed: KeyError: 'label' (broken, test_errors.py"),
        ("data=images data.root=WHERE", "data=images: no images under WHERE; expected <class>/*.png"),
        ("strategy=knfu transfer.size=0", "transfer.size=0: strategy=knfu needs a transfer set; allowed is 1 or more"),
        (
            "data=jsonl data.root=WHERE model=text_classifier",
            "reads tokens, and data=jsonl gives features",
        ),
        (
            "data=jsonl data.root=WHERE model=text_classifier data.inputs=ids",
            "model=text_classifier: the data have a token",
        ),
    ],
)
def test_one_line_names_cause_and_cure(words: str, said: str, tmp_path: Path) -> None:
    if "classifier" in words:
        pytest.importorskip("transformers")
    rows = [{"text": f"word{i} and word{i * 7}", "ids": [i, 40000 + i], "label": i % 2} for i in range(60)]
    lines = map(json.dumps, rows)
    (tmp_path / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    errors, out = io.StringIO(), tmp_path / "run"
    typed = [word.replace("WHERE", str(tmp_path)) for word in words.split()]
    own = {word.split("=")[0] for word in typed}
    with contextlib.redirect_stderr(errors):
        code = main(["run", *(word for word in SMALL if word.split("=")[0] not in own), *typed, f"out={out}"])
    assert code == 2, errors.getvalue()
    assert said.replace("WHERE", str(tmp_path)) in errors.getvalue()
    assert errors.getvalue().count("\n") == 1
    assert not out.exists()


def test_a_run_without_a_transfer_set_is_allowed_where_none_is_needed() -> None:
    assert play("fedavg", "transfer.size=0").digest


def test_a_strategy_file_that_cannot_be_read_is_named_first(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "mine.py").write_text("def half(:\n", encoding="utf-8")
    registry.read(tmp_path / "mine.py", "mine")
    monkeypatch.setitem(registry.unreadable, "mine.py", registry.unreadable["mine.py"])
    with pytest.raises(UserError, match=r"^strategy=mine: mine.py cannot be read \(invalid syntax"):
        registry.entry("mine")
    registry.unreadable.pop("mine.py")


def test_halves_that_return_nothing_or_name_an_unknown_size_are_told(monkeypatch) -> None:
    class Mean(FusionStrategy):
        def fuse(self, shares: Shares) -> None:
            self.publish("model", shares.mean("model"))

    class Silent(FusionClient):
        def share(self) -> Any:
            return None

    class Misspelt(Mean):
        records = {"soft": arrays(p=("transfr", "classes"))}

    class Soft(FusionClient):
        def share(self) -> Any:
            import torch

            return {"soft": {"p": torch.zeros(2, 2)}}

    class Sums(Mean):
        sums = {"modle": None}

    class Foreign(FusionClient):
        def share(self) -> Any:
            import torch

            return {"model": {"w": torch.zeros(3).numpy()}}

    class Loose(FusionStrategy):
        def fuse(self, shares: Shares) -> None:
            self.publish("model", {name: 1 for share in shares for name in share.records["model"]})

    class Undeclared(Mean):
        sums: ClassVar[dict[str, str | None]] = {}

    class Early(Mean):
        def begin(self) -> None:
            self.published("model")

    class Counts(FusionClient):
        def fit(self) -> Any:
            return {"rows": len(self.subset(-1))}

    class Exits(Mean):
        def fuse(self, shares: Shares) -> None:
            sys.exit(0)

    for name, server, client, said in (
        ("early", Early, FusionClient, r"round 0, begin of early failed: KeyError: .*published: none yet"),
        ("counts", Mean, Counts, "a subset of -1 rows of the transfer set: allowed are 1 or more, or None"),
        ("exits", Exits, FusionClient, r"round 1, fuse of exits failed: SystemExit: 0 \(fuse, test_errors.py"),
        ("loose", Loose, FusionClient, "loose publishes 'model' with '.*', which is int; what is published are torch"),
        ("undeclared", Undeclared, FusionClient, "record 'model' is no sum: declare sums = {'model': 'num-examples'}"),
        ("sums", Sums, FusionClient, "strategy=sums: sums names 'modle', no record; did you mean 'model'"),
        ("foreign", Mean, Foreign, "array 'w' is ndarray; what is shared is a torch.Tensor"),
        ("mute", Mean, Silent, r"share\(\) of Silent returned None; a dict is needed"),
        ("misspelt", Misspelt, Soft, "a layout names the size 'transfr': unknown; did you mean 'transfer'"),
    ):
        with pytest.raises((UserError, WorldError), match=said):
            play(enter(monkeypatch, server, client, registry.NoHyper, name))


def test_the_whole_story_on_request(capfd, monkeypatch) -> None:
    class Fails(FusionClient):
        def fit(self) -> Any:
            raise RuntimeError("deep inside")

    class Mean(FusionStrategy):
        def fuse(self, shares: Shares) -> None:
            pass

    enter(monkeypatch, Mean, Fails, registry.NoHyper, "fails")
    words = ["run", *TINY, "strategy=fails", "runtime.retries=0", "out=/nonexistent/run"]
    monkeypatch.delenv(TRACEBACK, raising=False)
    for traced in (False, True):
        monkeypatch.setenv(TRACEBACK, "1") if traced else None
        with pytest.raises(WorldError, match="deep inside"):
            play("fails", "runtime.retries=0")
        told = capfd.readouterr().err
        assert ("Traceback" in told and "client 0:" in told) is traced
    monkeypatch.delenv(TRACEBACK)
    assert main(["run", "--traceback", "rundz=3"]) == 2
    assert "Traceback" in capfd.readouterr().err
    monkeypatch.delenv(TRACEBACK)
    assert main([*words, "rundz=3"]) == 2
    assert "Traceback" not in capfd.readouterr().err


def test_an_interrupted_run_says_how_to_go_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    line = [sys.executable, "-m", "fedfuse.cli", "run", "strategy=local", *TINY, "rounds=100000", f"out={out}"]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 100
    while not (out / "checkpoint/state.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"fedfuse: interrupted: fedfuse resume {out} goes on" in said
    assert "Traceback" not in said


def test_no_interval_leaves_what_is_possible() -> None:
    wide = mean_interval([0.05, 0.09]).within(0, 1)
    assert wide.low == 0.0
    assert percent(wide, 1) == "7.0 (0.0–32.4)"
    assert percent(mean_interval([0.5, 0.52]).within(0, 1), 1) == "51.0 ± 12.7"
    assert percent(mean_interval([0.99, 1.0]).within(0, 1), 1) == "99.5 (93.1–100.0)"
