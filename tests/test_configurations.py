"""Every shipped configuration composes, and what it names can be built."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedfuse import models
from fedfuse.config import registry
from fedfuse.config.compose import compose, options, presets
from fedfuse.train.losses import loss

DATA = Path(os.environ.get("FEDFUSE_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))


@pytest.mark.parametrize("name", sorted(registry.listed()))
def test_strategies_compose_with_their_defaults(name: str) -> None:
    config = compose([f"strategy={name}"])
    assert config.strategy.name == name
    assert isinstance(config.strategy, registry.entry(name).hyper)


@pytest.mark.parametrize("group", ["data", "partition", "runtime"])
def test_groups_compose(group: str) -> None:
    for name in options(group):
        config = compose([f"{group}={name}"])
        assert getattr(config, group).name == name


OTHERS = ("auto", "custom", "causal_lm", "text_classifier")  # need a directory or a builder: tests/models builds them


@pytest.mark.parametrize("name", [n for n in options("model") if n not in OTHERS])
def test_models_build(name: str) -> None:
    config = compose([f"model={name}"])
    model = models.build(name, shape=(3, 32, 32), classes=10, config=config.model, seed=0)
    assert sum(p.numel() for p in model.parameters()) > 0


@pytest.mark.parametrize("name", [n for n in options("loss") if n not in ("default", "custom")])
def test_losses_build(name: str) -> None:
    chosen = compose([f"loss={name}"]).loss
    assert chosen.name == name
    loss(name, temperature=chosen.temperature, **chosen.options)


def test_data_sets_load() -> None:
    from fedfuse.data import prepare

    if not DATA.exists():
        pytest.skip("the data folder ../shared/data is not here (FEDFUSE_DATA)")
    for name in ("digits", "usps", "mnist"):
        config = compose([f"data={name}", "data.limit=300", "clients=3", "partition=iid", f"data.root={DATA / name}"])
        if name == "digits":
            config.data.root = None
        data = prepare(config.data, config.partition, config.transfer, config.clients, config.seed)
        assert data.clients == 3


def test_experiment_presets_compose() -> None:
    for name in presets():
        assert compose([f"experiment={name}"]).rounds >= 1


@pytest.mark.parametrize("name", presets())
def test_experiment_presets_run_short(name: str, tmp_path: Path) -> None:
    """Each preset, cut down: its own data, partition and models, two rounds, few examples."""
    from fedfuse.runs.experiment import run

    if name != "smoke" and not DATA.exists():
        pytest.skip("the data folder ../shared/data is not here (FEDFUSE_DATA)")
    words = [f"experiment={name}", "strategy=knfu", "rounds=1", "runtime=inline", f"out={tmp_path / 'run'}"]
    words += ["transfer.size=20", "transfer.subset=10", "train.epochs=1"]
    if name == "domains":
        words += ["model=cnn", "data.limit=400"]
    elif name != "smoke":
        words += ["data.limit=1200", "data.test_limit=50", "clients=6", "partition.min_size=2", "partition.examples=40"]
    config = compose(words)
    if name not in ("smoke",):
        config.data.root = str(DATA / config.data.name)
    assert (run(config, quiet=True) / "summary.json").exists()
