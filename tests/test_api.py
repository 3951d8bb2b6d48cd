"""From Python: what a notebook holds is enough, and what comes back can be looked at."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn

import fedfuse
from fedfuse.config import registry
from fedfuse.config.compose import compose
from fedfuse.core.client import FusionClient
from fedfuse.core.strategy import FusionStrategy, Shares
from fedfuse.data.from_python import dataset
from fedfuse.errors import UserError
from fedfuse.runs.experiment import resume
from fedfuse.runs.from_python import overrides

DRAW = np.random.default_rng(0)
X, Y = DRAW.normal(size=(150, 6)).astype("float32"), np.arange(150) % 3
SHORT = {"clients": 3, "rounds": 1, "partition": "iid", "runtime": "inline", "transfer.size": 10}
OWN = {**SHORT, "data": (X, Y)}


class Pairs(torch.utils.data.Dataset):
    """Images as a torch data set gives them."""

    def __len__(self) -> int:
        return 60

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.full((1, 12, 12), float(i % 3)), i % 3


@pytest.fixture
def median():
    class Median(FusionStrategy):
        """Median of the clients' models."""

        def fuse(self, shares: Shares) -> None:
            everyone = [share.records["model"] for share in shares]
            self.publish("model", {k: torch.stack([one[k] for one in everyone]).median(0).values for k in everyone[0]})

        def server_models(self):
            return {"model": (self.architecture, self.model)}

    registry.strategy("median_here", client=FusionClient)(Median)
    yield Median
    registry.registered.pop("median_here")


def test_a_class_a_callable_and_arrays(median, tmp_path) -> None:
    width = 5

    def network(shape, classes):  # a closure, which no dotted path could name
        return nn.Sequential(nn.Linear(shape[0], width), nn.ReLU(), nn.Linear(width, classes))

    run = fedfuse.run({**OWN, "strategy": median, "model": network, "out": tmp_path / "run"})
    assert run.config["strategy"]["name"] == "median_here"
    assert run.config["model"]["build"].startswith("python:")
    assert run.summary["digest"]
    assert repr(run).startswith("Run(")
    assert "median_here on custom, seed 0, 1 rounds: global" in repr(run)
    assert "<table>" in run._repr_html_()
    again = fedfuse.run({**OWN, "strategy": median, "model": network}, out=tmp_path / "again")
    assert again.digest == run.digest
    assert run.predict(X[:4]).shape == (4, 3)


def test_the_same_on_ray(median, tmp_path, ray_session) -> None:
    def network(shape, classes):
        return nn.Linear(shape[0], classes)

    asked = {**OWN, "strategy": median, "model": network}
    inline = fedfuse.run(asked, out=tmp_path / "inline")
    workers = fedfuse.run({**asked, "runtime": "ray", "runtime.workers": 2}, out=tmp_path / "ray")
    assert workers.digest == inline.digest


def test_a_torch_data_set_on_both_engines(tmp_path, ray_session) -> None:
    """From a `Dataset` to a digest and a prediction."""
    asked = {**SHORT, "strategy": "fedavg", "data": Pairs(), "rounds": 2, "model": "mlp_small"}
    inline = fedfuse.run(asked, out=tmp_path / "inline")
    workers = fedfuse.run({**asked, "runtime": "ray", "runtime.workers": 2}, out=tmp_path / "ray")
    assert workers.digest == inline.digest
    images = torch.stack([Pairs()[i][0] for i in range(3)])
    assert workers.predict(images).shape == (3, 3)


def test_what_is_gone_is_named(tmp_path, monkeypatch) -> None:
    run = fedfuse.run({**OWN, "strategy": "local", "out": tmp_path / "run"})
    (run.dir / "summary.json").unlink()
    monkeypatch.setattr("fedfuse.config.dotted.handed_over", {})
    with pytest.raises(UserError, match="was handed over from Python and is not here; run it from there again"):
        resume(run.dir, allow_code=True)


@pytest.mark.parametrize(
    ("value", "kind", "train", "test"),
    [
        ((X, Y), "features", 120, 30),
        ((torch.tensor(X), torch.tensor(Y), X[:30], Y[:30]), "features", 150, 30),
        (Pairs(), "image", 48, 12),
        ({"train": Pairs(), "test": Pairs()}, "image", 60, 60),
    ],
)
def test_kinds_of_data(value, kind, train, test) -> None:
    made = dataset(value)
    assert (made.kind, len(made.train), len(made.test)) == (kind, train, test)
    assert made.classes == ("0", "1", "2")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"data": 5}, "data: got int; expected"),
        ({"data": {"train": (X, Y), "valid": (X, Y)}}, "got a mapping of train, valid"),
        ({"data": (Pairs(), Pairs())}, "got .Pairs, Pairs., whose x and y are no arrays"),
        ({"data": ([[1, 2], [3]], [0, 1])}, "list is no array"),
        ({"model": nn.Linear(2, 2)}, "hand over what makes one"),
        ({"strategy": FusionStrategy}, "FusionStrategy: is not registered"),
    ],
)
def test_what_cannot_be_used_is_refused(settings, said) -> None:
    with pytest.raises(UserError, match=said):
        fedfuse.run({**SHORT, **settings})


def test_runs_of_one_second_and_wrong_inputs(tmp_path, monkeypatch) -> None:
    """A loop without `out`, and `predict` with what the model does not take."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda form, *when: "now")
    few = {**SHORT, "strategy": "local", "data": "digits"}
    runs = [fedfuse.run(few) for _ in range(3)]
    assert [run.dir.name.removeprefix("now-local-") for run in runs] == [f"digits-s0{end}" for end in ("", "-2", "-3")]
    x = np.zeros((2, 1, 8, 8), dtype=np.uint8)
    assert runs[0].predict(x, client=0).shape == (2, 10)
    for wrong in (x[0], x[:, :, :5], np.zeros((2, 64))):
        with pytest.raises(UserError, match=r"predict: inputs have shape .*; \(n, 1, 8, 8\) is needed"):
            runs[0].predict(wrong, client=0)
    with pytest.raises(UserError, match=r"^client=9: the run has clients 0 to"):
        runs[0].model(client=9)
    with pytest.raises(UserError, match=r"seed=.0,1.: a run has one seed; fedfuse.compare"):
        fedfuse.run({**few, "seed": [0, 1]})
    with pytest.raises(UserError, match=r"search.trials=3: one run tunes nothing"):
        fedfuse.run({**few, "search.trials": 3})
    with pytest.raises(UserError, match="strategy=<lambda>: is no class"):
        fedfuse.run({**few, "strategy": lambda: 0})


def test_compare_and_load_many(tmp_path) -> None:
    settings = {**OWN, "strategy": ["local", "fedavg"], "seed": [0, 1], "runtime.parallel": 1, "out": tmp_path / "c"}
    found = fedfuse.compare(settings)
    assert len(found) == 4
    assert found.report.exists()
    table = found.table()
    assert table["strategy"].to_list() == ["fedavg", "local"]
    assert table["seeds"].to_list() == [2, 2]
    assert set(found.metrics.columns) >= {"run", "strategy", "seed", "round", "metric", "value"}
    assert found.metrics["seed"].unique().to_list() == [0, 1]
    assert "4 runs" in repr(found)
    assert "<table>" in found._repr_html_()
    assert len(fedfuse.load(tmp_path / "c")) == 4
    assert len(fedfuse.load(tmp_path / "c/local", tmp_path / "c/fedavg")) == 4
    assert fedfuse.load(found[0].dir).digest == found[0].digest
    with pytest.raises(UserError):
        fedfuse.load(tmp_path / "nowhere")


class Squares(nn.Module):
    """A loss of one's own."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, student, teacher):
        return self.scale * (student - teacher).square().mean()


@pytest.mark.parametrize("runtime", ["inline", "ray"])
def test_a_loss_of_ones_own_is_handed_over(runtime, tmp_path) -> None:
    settings = {**OWN, "strategy": "fedmd", "loss": Squares, "runtime": runtime, "rounds": 2}
    one = fedfuse.run({**settings, "out": tmp_path / "a"})
    other = fedfuse.run({**settings, "loss.options": {"scale": 3.0}, "out": tmp_path / "b"})
    known = fedfuse.run({**settings, "loss": "mse", "out": tmp_path / "c"})
    assert one.digest == known.digest != other.digest  # which computes the same
    assert one.config["loss"]["build"] == "python:Squares"


def test_a_loss_that_is_made_already_is_refused() -> None:
    with pytest.raises(UserError, match=r"^loss: is a Squares; hand over the class"):
        overrides({"loss": Squares()})


def test_runs_with_and_without_a_clock_are_one_frame(tmp_path) -> None:
    for name, clock in (("a", "off"), ("b", "devices")):
        fedfuse.run({**SHORT, "strategy": "fedavg", "data": (X, Y), "clock": clock, "out": tmp_path / name})
    both = fedfuse.load(tmp_path)
    assert both.metrics.height == sum(one.metrics.height for one in both)
    assert both.metrics.group_by("run").agg(pl.col("virtual_s").is_null().all())["virtual_s"].sort().to_list() == [
        False,
        True,
    ]
    with pytest.raises(UserError, match="client=-1: the run has clients 0 to 2"):
        both[0].model(client=-1)


@pytest.mark.parametrize("call", [fedfuse.run, fedfuse.compare])
def test_words_of_a_command_line_are_told_apart(call) -> None:
    with pytest.raises(UserError, match=r"^'strategy=knfu': allowed are keywords"):
        call("strategy=knfu")


def test_other_data_under_the_same_name_are_other_runs(tmp_path) -> None:
    """What was computed on one's data as they were is no result of what they are now."""
    settings = {**SHORT, "strategy": "fedavg", "out": tmp_path / "c"}
    one = fedfuse.compare({**settings, "data": (X, Y)})
    assert fedfuse.compare({**settings, "data": (X, Y)})[0].digest == one[0].digest  # alike: left alone
    other = (X, Y[::-1].copy())
    with pytest.raises(UserError, match="began with other data than data=custom holds now"):
        fedfuse.compare({**settings, "data": other})
    again = fedfuse.run({**settings, "data": other, "out": tmp_path / "d"})
    fedfuse.run({**settings, "data": (X, Y), "out": tmp_path / "e"})
    with pytest.raises(UserError, match="began with other data"):
        resume(again.dir, allow_code=True, rounds=2)
    assert again.summary["rounds_done"] == 1
    both = fedfuse.load(one[0].dir, again.dir).table()
    assert both["seeds"].to_list() == [1, 1]  # neither left out as the other's double, nor averaged with it
    assert both["setting"].n_unique() == 2


def test_lists_are_swept_where_the_key_takes_none() -> None:
    words = overrides(
        {"seed": [0, 1], "model.pool": ["mlp", "cnn"], "strategy": {"name": "knfu", "beta": [1, 2]}}, swept=True
    )
    assert words == ["seed=0,1", "model.pool=[mlp,cnn]", "strategy=knfu", "strategy.beta=1,2"]
    assert overrides({"model.pool": [["mlp"], ["mlp", "cnn"]]}, swept=True) == ["model.pool=[mlp],[mlp,cnn]"]


@pytest.mark.parametrize(
    "text", ["data#1", "a;b", "a~b!", "back\\slash d", "c:\\x\\", "it's", "a\\'b", "x&y", "a,b=[c]", "Übung 1"]
)
def test_a_text_of_a_program_is_what_hydra_reads(text: str) -> None:
    """Whatever letters a path has."""
    (word,) = overrides({"data.root": text})
    assert compose([word, "data=csv"]).data.root == text
