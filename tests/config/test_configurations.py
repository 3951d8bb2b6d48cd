"""Every shipped configuration composes, and what it names can be built."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedfuse import models
from fedfuse.config import catalogue, hydra_words, registry
from fedfuse.config.compose import compose, expand, strategy_of
from fedfuse.config.hydra_words import GROUPS, by_hydra, by_parts, options, presets
from fedfuse.config.idle import idle
from fedfuse.train.losses import loss

DATA = Path(os.environ.get("FEDFUSE_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.mark.parametrize("name", sorted(registry.listed()))
def test_strategies_compose_with_their_defaults(name: str) -> None:
    config = compose([f"strategy={name}"])
    assert config.strategy.name == name
    assert isinstance(config.strategy, registry.entry(name).hyper)


@pytest.mark.parametrize("group", sorted(GROUPS))
def test_groups_compose(group: str) -> None:
    """Every word of a group gives the configuration of that name; a layout reads by itself."""
    for name in options(group):
        beside = ["clock=devices"] if group == "schedule" else []
        chosen = getattr(compose([f"{group}={name}", "strategy=fedmd", *beside]), group)  # which takes a loss, too
        assert chosen.name == (None if (group, name) == ("loss", "default") else name)
        if group == "data":
            assert chosen.layout == (name if name in catalogue.LAYOUTS else "builtin")


@pytest.mark.parametrize(
    "words",
    [
        [],
        [f"{group}={options(group)[-1]}" for group in GROUPS],  # among them words with files
        [
            "data=mnist",
            "loss=kl",
            "loss={name: js}",
            "++data.extra.a={b: 1}",
            "++data.extra.c=2",
            "train.lr=${privacy.clip}",
        ],
        ["strategy=knfu", "strategy.beta=2", "model.pool=[mlp,cnn]", "rounds=3", "rounds=4", "model=cnn", "model=mlp"],
        ["strategy=knfu", "experiment=label_skew", "data='usps'", "clients=7"],
    ],
)
def test_by_parts_is_what_hydra_makes_of_the_same_words(words: list[str]) -> None:
    from omegaconf import OmegaConf

    chosen = strategy_of(words) or "fedmd"
    words = words if strategy_of(words) else [*words, "strategy=fedmd"]
    parts, whole = by_parts(words, chosen), by_hydra(words, chosen)
    assert parts is not None
    assert OmegaConf.to_yaml(parts) == OmegaConf.to_yaml(whole)
    assert OmegaConf.to_object(parts) == OmegaConf.to_object(whole)  # of the same types


@pytest.mark.parametrize(
    "word",
    [
        "data.extra={a: 1}", "nothing=1", "rounds=many", "+rounds=1", "~rounds", "rounds=1,2", "++data=usps",
        "data=[usps,mnist]", "data=${model}", "data@model=usps", "hydra.verbose=true", "rounds=[", "data=null",
    ],
)  # fmt: skip
def test_what_is_not_plain_is_left_to_hydra(word: str) -> None:
    assert by_parts(["strategy=fedavg", word], "fedavg") is None


def test_a_composition_is_nobody_elses() -> None:
    """What one run changes of its configuration, or a preset's file on disk, is not what the next one finds."""
    words = ["strategy=fedavg", "data=mnist", "loss=kl"]
    first = by_parts(words, "fedavg")
    assert first is not None
    first.rounds, first.data.limit, first.loss.temperature = 77, 78, 79
    again = by_parts(words, "fedavg")
    assert again is not None
    assert (again.rounds, again.data.limit, again.loss.temperature) != (77, 78, 79)


def test_a_preset_that_changed_is_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.yaml"
    monkeypatch.setattr(hydra_words, "preset_files", lambda: {"mine": path})
    for rounds in (3, 4):
        path.write_text(f"rounds: {rounds}\n", encoding="utf-8")
        os.utime(path, ns=(0, rounds))
        assert compose(["experiment=mine"]).rounds == rounds


def test_a_file_is_shipped_only_for_what_says_more_than_its_name() -> None:
    import yaml

    for path in (Path(hydra_words.__file__).parent / "conf").glob("*/*.yaml"):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert path.stem in options(path.parent.name)
        assert content.pop("defaults") == ["schema", "_self_"]
        assert content.pop("name") == path.stem
        assert content


def test_names_are_listed_where_they_are_built() -> None:
    from fedfuse.models import feedforward, residual
    from fedfuse.train import divergences, relations, transformed, vocabularies

    built = {*feedforward.ARCHITECTURES, *residual.ARCHITECTURES}
    assert set(catalogue.MODELS) == built | {*catalogue.LANGUAGE, "hf"}
    assert set(catalogue.LOSSES) == {*divergences.LOSSES, *relations.LOSSES, *transformed.LOSSES, *vocabularies.LOSSES}


# need a directory or a builder: tests/models builds them
OTHERS = ("auto", "custom", "hf", "causal_lm", "text_classifier")


@pytest.mark.parametrize("name", [n for n in options("model") if n not in OTHERS])
def test_models_build(name: str) -> None:
    config = compose([f"model={name}"])
    model = models.build(name, shape=(3, 32, 32), classes=10, config=config.model, seed=0)
    assert sum(p.numel() for p in model.parameters()) > 0


@pytest.mark.parametrize("name", [n for n in options("loss") if n not in ("default", "custom")])
def test_losses_build(name: str) -> None:
    chosen = compose([f"loss={name}", "strategy=fedmd"]).loss
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
    if name == "feature_skew":
        words += ["model=cnn", "data.limit=400"]
    elif name != "smoke":
        words += ["data.limit=1200", "data.test_limit=50", "clients=6", "partition.min_size=2", "partition.examples=40"]
    config = compose(words)
    if name not in ("smoke",):
        config.data.root = str(DATA / config.data.name)
    assert (run(config, quiet=True) / "summary.json").exists()


def test_letters_that_hydra_does_not_know_are_taken_in_values() -> None:
    assert compose(["out=runs/Übung 2"]).out == "runs/Übung 2"
    assert compose(["data.inputs=[Größe,b]"]).data.inputs == "Größe,b"
    assert compose(["model.path='../日本'"]).model.path == "../日本"
    assert [compose(job).out for job in expand(["out=Ü,b"])] == ["Ü", "b"]


@pytest.mark.parametrize("name", ["runs/mine/knfu/seed=2", "runs/fedavg/partition=iid,seed=0"])
def test_a_directory_that_a_sweep_made_can_be_said(name: str) -> None:
    assert [compose(job).out for job in expand([f"out={name}"])] == [name]
    assert compose([f"out='{name}'"]).out == name


def test_how_long_a_given_sigma_lasts_is_nobodys_plan() -> None:
    """`privacy.trainings` plans σ, and does nothing where σ is said."""
    for words, told in (([], False), (["privacy.noise=1"], True)):
        words = ["privacy.epsilon=3", "privacy.trainings=3", *words]
        assert ("privacy.trainings=3" in str(idle(compose(words), typed=words))) == told
