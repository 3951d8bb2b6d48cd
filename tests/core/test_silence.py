"""No silence: every key is read or named, a strategy that nobody hears is named, and so is what is no number."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from fedfuse.config import registry
from fedfuse.config.compose import compose
from fedfuse.config.idle import holds, idle
from fedfuse.config.keys import Key
from fedfuse.config.schema import Config, known, valued
from fedfuse.core.client import FusionClient
from fedfuse.core.scenario import prepare_scenario
from fedfuse.core.silence import constant, unheard
from fedfuse.core.strategy import FusionStrategy, Shares
from fedfuse.errors import UserError, WorldError
from fedfuse.runs.combinations import combine, possible
from fedfuse.runs.configuration import as_yaml
from fedfuse.runs.experiment import run
from fedfuse.train.scores import scores
from fedfuse.wire.knowledge import Topic
from tests.federations import TINY, UNDISTURBED, play
from tests.ledger import enter

# --- keys --------------------------------------------------------------------------------------------------

BASE = tuple(word for word in TINY if not word.startswith("partition="))
FOLDER = "FOLDER"  # stands for a directory with an npz file
CONTEXTS: dict[str, tuple[str, ...]] = {
    "adapted": ("strategy=fedavg", "partition=iid", "model.lora_rank=2", "train.schedule=cosine"),
    "pools": ("strategy=kafal", "partition=iid", "labels.rounds=1"),
    "knfu": ("strategy=knfu", "partition=dirichlet", "transfer.subset=12"),
    "foreign": ("strategy=fedmd", "partition=iid", "loss=kl", "transfer.source=digits"),
    "size": ("strategy=fedavg", "partition=size", "secure=on"),
    "guarded": ("strategy=fedavg", "partition=iid", "attack=scale", "defence=expguard"),
    "agreed": ("strategy=fedmd", "partition=iid", "attack=lma"),
    "trimmed": ("strategy=fedavg", "partition=iid", "defence=trimmed_mean"),
    "clustered": ("strategy=fedavg", "partition=clustered", "stop.patience=1", "tracking=csv"),
    "shards": ("strategy=local", "partition=shards", "participation=0.7"),
    "pathological": ("strategy=centralized", "partition=pathological"),
    "npz": ("strategy=fedavg", "partition=domain", "data=npz", f"data.root={FOLDER}", "data.groups=g", "clients=null"),
    "custom": ("strategy=fedavg", "partition=iid", "data=custom", "data.load=tests.core.test_silence:examples"),
    "model": ("strategy=fedavg", "partition=iid", "model=custom", "model.build=tests.core.test_silence:network"),
    "adam": ("strategy=fedavg", "partition=iid", "train.optimizer=adam"),
    "pool": ("strategy=local", "partition=iid", "model.pool=[mlp,mlp_small]", "train.pool=[sgd@0.1,adam@0.001]"),
    "timed": (
        "strategy=fedavg",
        "partition=iid",
        "clock=devices",
        "clock.availability=markov",
        "schedule=fedbuff",
        "schedule.buffer=2",
        "clock.on_s=900.0",
        "clock.watts=3.0",
        "stop.patience=1",
    ),
    "hinged": (
        "strategy=fedavg",
        "partition=iid",
        "clock=devices",
        "clock.availability=diurnal",
        "schedule=fedasync",
        "schedule.staleness=hinge",
        "clock.speeds=tiers",
        "clock.on_share=0.9",
    ),
    "deadline": ("strategy=fedavg", "partition=iid", "clock=devices", "schedule=deadline"),
    "overcommit": ("strategy=fedavg", "partition=iid", "clock=devices", "schedule=overcommit", "participation=0.5"),
    "trace": (
        "strategy=fedavg",
        "partition=iid",
        "clock=trace",
        f"clock.devices={FOLDER}/devices.csv",
        f"clock.intervals={FOLDER}/availability.csv",
    ),
    "private": ("strategy=fedavg", "partition=iid", "privacy.epsilon=50.0", "train.batch_size=64"),
}
# read by what these runs have no use for; where that is tested
ELSEWHERE = {
    "strategy": "chosen in compose: test_configurations.py",
    "search.trials": "a sweep's: test_sweep.py",
    "search.keys": "written by a search for its report: test_sweep.py",
    "search.edges": "written by a search for its report: test_sweep.py",
    "runtime.parallel": "a sweep's: test_sweep.py",
    "data.download": "only where no files are found: tests/data/test_layouts.py",
    "data.hub": "as data.download",
    "data.test_fraction": "only where the files bring no test split: tests/data/test_layouts.py",
    "model.checkpoint_head": "tests/models/test_checkpoint.py",
    "model.dtype": "of a Hugging Face model: tests/models/test_padding.py",
    "model.gradient_checkpointing": "as model.dtype",
    "model.quantize": "on a GPU alone: tests/models/test_quantized.py",
    "data.packing": "of texts: tests/contract/test_language.py",
    "evaluate.samples": "of next tokens: tests/core/test_samples.py",
    "evaluate.max_tokens": "as evaluate.samples",
    "loss.build": "tests/train/test_losses.py",
    "runtime.workers": "of Ray: tests/engines",
    "runtime.gpu_fraction": "of Ray: tests/engines",
    "runtime.address": "of Ray: tests/engines/test_cluster.py",
    "runtime.client_timeout": "of Ray: tests/engines/test_faults.py",
    "tracking.uri": "tests/runs/test_tracking.py",
    "tracking.experiment": "tests/runs/test_tracking.py",
}
HERE = {  # read nowhere in this context, and why that is no silence
    "train.precision": ("private",),  # anything but the default is refused there
    "clock.latency_ms": ("trace",),  # a CSV table has a latency of its own; FedScale's traces have none
    "evaluate.validation": ("clustered", "timed"),  # early stop turns it on
}


def examples(**options: Any) -> Any:
    """A data set of one's own."""
    from fedfuse.data.dataset import Dataset, Examples

    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(120, 8)).astype("float32"), np.arange(120) % 3
    return Dataset("mine", Examples(x[:90], y[:90]), Examples(x[90:], y[90:]), ("a", "b", "c"), "features")


def network(shape: tuple[int, ...], classes: int, feature_dim: int = 4) -> Any:
    from torch import nn

    return nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), classes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("npz")
    draw = np.random.default_rng(0)
    np.savez(place / "all.npz", x=draw.normal(size=(120, 8)).astype("float32"), y=np.arange(120) % 3,
             g=np.repeat([0, 1, 2], 40))  # fmt: skip
    (place / "devices.csv").write_text(
        "client,gflops,down_kbps,up_kbps,latency_ms\n" + "".join(f"{client},1,9000,9000,1\n" for client in range(3))
    )
    (place / "availability.csv").write_text("client,on_s,off_s\n" + "".join(f"{c},0,50\n" for c in range(3)))
    return place


def words_of(context: str, folder: Path) -> list[str]:
    own = [word.replace(FOLDER, str(folder)) for word in CONTEXTS[context]]
    groups = {word.split("=")[0] for word in own}
    base = [word for word in BASE if word.split("=")[0] not in groups]
    if "data" in groups:
        base = [word for word in base if not word.startswith(("data.", "transfer."))]
    if any(word.startswith("model.pool") for word in own):
        base = [word for word in base if not word.startswith("model=")]
    return [*base, "partition.min_size=2", *own] if "=dirichlet" in own[1] or "=size" in own[1] else [*base, *own]


def watched(config: Config, seen: set[str]) -> Config:
    """The configuration, noting which of its keys are read."""

    def watch(node: Any, prefix: str) -> None:
        names = {field.name for field in dataclasses.fields(node)}
        kind = type(node)
        for name in names:
            if dataclasses.is_dataclass(inner := getattr(node, name)) and name != "strategy":
                watch(inner, f"{prefix}{name}.")

        def read(self: Any, name: str) -> Any:
            if name in names:
                seen.add(prefix + name)
            return object.__getattribute__(self, name)

        node.__class__ = type(kind.__name__, (kind,), {"__getattribute__": read})

    watch(config, "")
    return config


@pytest.fixture(scope="module")
def read(folder, tmp_path_factory) -> dict[str, tuple[Config, set[str]]]:
    """For each context its configuration, and the keys that a run of it read."""
    out = {}
    for context in CONTEXTS:
        seen: set[str] = set()
        config = compose(words_of(context, folder))
        config.out = str(tmp_path_factory.mktemp("runs") / context)
        text, plain = as_yaml(config), compose(words_of(context, folder))
        with (
            mock.patch("fedfuse.runs.directory.as_yaml", lambda _, text=text: text),
            mock.patch("fedfuse.core.scenario.idle", return_value={}),
        ):
            run(watched(config, seen), quiet=True)
        out[context] = (plain, seen)
    return out


def changed(key: Key) -> Any:
    """Another value of a key's kind."""
    if isinstance(key.default, bool):
        return not key.default
    if isinstance(key.default, int | float):
        return key.default + 1
    return {"list": ["x"], "mapping": {"x": "y"}}.get(key.kind.split()[0], 7 if "number" in key.kind else "other")


def put(config: Config, name: str, value: Any) -> None:
    *path, last = name.split(".")
    node: Any = config
    for part in path:
        node = getattr(node, part)
    setattr(node, last, value)


@pytest.mark.parametrize("key", known().values(), ids=lambda key: key.name)
def test_every_key_is_read_or_named(key: Key, read) -> None:
    """Wherever a key's condition holds, a run reads it; wherever it does not, another value is named."""
    holding = 0
    for context, (config, seen) in read.items():
        if holds(key.only, config, sweep=False) if key.only else True:
            holding += 1
            assert key.name in seen or key.name in ELSEWHERE or context in HERE.get(key.name, ()), context
            continue
        before = valued(config, key.name)
        put(config, key.name, changed(key))
        try:
            named = idle(config, sweep=False)
        finally:
            put(config, key.name, before)
        assert "it goes with" in named[key.name]
    if key.name not in ELSEWHERE:
        assert holding


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("model.build=nowhere:fn", "model.build=nowhere:fn does nothing here: it goes with model=custom"),
        ("data.load=nowhere:fn", "data.load=nowhere:fn does nothing here: it goes with data.layout=custom"),
        ("loss=kl strategy=fedavg", "loss=kl does nothing here: it goes with a strategy that trains on soft labels"),
    ],
)
def test_what_is_typed_and_does_nothing_is_refused(words: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        compose(words.split())
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "partition=iid partition.alpha=0.1",
            "partition.alpha=0.1 does nothing here: it goes with partition=dirichlet",
        ),
        ("model=cnn model.pool=[mlp,mlp_small]", "model=cnn does nothing here: it goes with model.pool=null"),
        ("train.optimizer=adam train.momentum=0.5", "train.momentum=0.5 does nothing here"),
        ("strategy=centralized participation=0.5", "participation=0.5 does nothing here"),
        ("privacy.clip=2", "privacy.clip=2.0 does nothing here: it goes with privacy.epsilon or privacy.noise"),
        ("runtime=inline runtime.workers=2", "runtime.workers=2 does nothing here: it goes with runtime=ray|flower"),
    ],
)
def test_what_else_is_typed_and_does_nothing_is_a_line_of_the_run(words: str, said: str) -> None:
    lines = list(idle(compose(words.split()), sweep=False).values())
    assert any(said in line for line in lines), lines
    assert not any("\n" in line for line in lines)


def test_what_is_typed_counts_at_its_default_too() -> None:
    config = compose(["partition=iid"])
    assert idle(config, sweep=False) == {}
    assert "does nothing here" in idle(config, sweep=False, typed=["partition.alpha"])["partition.alpha"]
    with pytest.raises(UserError, match=r"attack.fraction=0.2 does nothing here"):
        compose(["attack.fraction=0.2"])
    compose(["strategy=fedavg", "loss=default", "schedule=sync", "clock.dropout=0", "secure=off"])  # which ask for none


def test_auto_on_tokens_is_a_language_model() -> None:
    assert "model.dtype" in idle(compose(["model.dtype=bf16"]), sweep=False)
    assert idle(compose(["data=trec", "model.dtype=bf16"]), sweep=False) == {}


def test_what_a_preset_sets_and_does_nothing_is_a_note() -> None:
    config = compose(["experiment=smoke", "data.limit=100"])
    config.partition.alpha = 0.1
    assert "partition.alpha=0.1 does nothing here" in prepare_scenario(config).data.notes[-1]


# --- strategies --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(registry.listed()))
def test_every_strategy_is_heard(name: str) -> None:
    # selectivefd: at this size no sample is sure enough to be shared, which its runs say
    told = unheard(UNDISTURBED(name).strategy)
    assert told == [] or name == "selectivefd"


@pytest.fixture
def made(monkeypatch):
    """Register a pair of halves for one test."""

    def make(server: type[Any], client: type[Any] = FusionClient) -> str:
        return enter(monkeypatch, server, client, registry.NoHyper, f"silent_{server.__name__}")

    return make


def test_a_fuse_that_publishes_nothing_and_a_topic_that_nobody_gets_are_named(made, tmp_path: Path) -> None:
    class Mute(FusionStrategy):
        def fuse(self, shares: Shares) -> None:
            list(shares)

    class Half(FusionStrategy):
        topics = {**FusionStrategy.topics, "hints": Topic("lesson", None)}
        sums = {"model": "num-examples"}

        def fuse(self, shares: Shares) -> None:
            self.publish("model", shares.mean("model"))

    done = play(made(Mute), path=tmp_path / "mute")
    assert unheard(done.strategy) == ["silent_Mute: fuse published nothing, so that no client learned from another"]
    assert unheard(done.strategy)[0] in json.loads((tmp_path / "mute/summary.json").read_text())["notes"]
    told = unheard(play(made(Half)).strategy)
    assert told == ["silent_Half: declares the topic 'hints', and nobody ever got any of it"]


def test_who_publishes_in_a_later_phase_is_not_named_before_it(made) -> None:
    class Late(FusionStrategy):
        when = 3

        def phases(self, round: int) -> tuple[str, ...]:
            return ("train", "vote") if round == self.when else ("train",)

        def fuse(self, shares: Shares) -> None:
            list(shares)

        fuse_vote = fuse

    class Voter(FusionClient):
        def vote(self):
            return {}

    strategy = play(made(Late, Voter), "rounds=3").strategy
    said = [bool(unheard(strategy)) for strategy.round in (1, 2, 3)]
    assert said == [False, False, True]
    strategy.when = 1  # nothing is awaited that has been
    assert unheard(strategy)


def test_a_declaration_that_cannot_be_is_refused_where_it_stands() -> None:
    with pytest.raises(UserError, match=r"Typo.transfer='client': did you mean 'clients'"):
        type("Typo", (FusionStrategy,), {"transfer": "client"})
    with pytest.raises(UserError, match=r"Typo.heterogenous: nothing reads it; did you mean 'heterogeneous'"):
        type("Typo", (FusionStrategy,), {"heterogenous": False})
    with pytest.raises(UserError, match="setup names 'measure', and there is no method fuse_measure"):
        type("Typo", (FusionStrategy,), {"setup": ("measure",)})
    with pytest.raises(UserError, match=r"Typo.metrics\['x'\] is 1; its least and greatest value are needed"):
        type("Typo", (FusionStrategy,), {"metrics": {"x": 1}})
    with pytest.raises(UserError, match=r"topics\['x'\] is str; a fedfuse.Topic is needed"):
        type("Typo", (FusionStrategy,), {"topics": {"x": "lesson"}})


def test_a_phase_without_its_method_and_an_undeclared_transfer_set_are_named(made) -> None:
    class Two(FusionStrategy):
        sums = {"model": "num-examples"}

        def phases(self, round: int) -> tuple[str, ...]:
            return ("warm", "train")

        def fuse_warm(self, shares: Shares) -> None:
            list(shares)

        def fuse(self, shares: Shares) -> None:
            self.publish("model", shares.mean("model"))

    class Peeks(FusionClient):
        def fit(self) -> dict[str, Any]:
            return {**self.train(), "rows": len(self.transfer)}

    class Mean(FusionStrategy):
        sums = {"model": "num-examples"}

        def fuse(self, shares: Shares) -> None:
            self.publish("model", shares.mean("model"))

    with pytest.raises(UserError, match=r"has a phase 'warm', and there is no method FusionClient.warm"):
        play(made(Two))
    with pytest.raises(WorldError, match="declare transfer = 'clients', 'server' or 'both'"):
        play(made(Mean, Peeks))


# --- what is not a number ----------------------------------------------------------------------------------


def test_what_is_not_a_number_is_counted_and_named(tmp_path: Path) -> None:
    play("local", "train.lr=1e9", path=tmp_path / "run")
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["final"]["accuracy/personal"] < 0.1
    assert "not a number: training loss of 2 of 3 clients" in " ".join(summary["notes"])
    assert "not a number: predictions on the personal test of 2 of 3 clients" in " ".join(summary["notes"])


def test_a_prediction_that_is_no_number_is_never_right() -> None:
    import torch

    logits = torch.tensor([[2.0, 1.0], [float("nan"), 1.0], [3.0, 1.0], [0.0, float("inf")]])
    found = scores(logits, torch.tensor([0, 0, 1, 1]), 2)
    assert found["accuracy"] == 0.25
    assert found["undefined"] == 0.5
    assert "undefined" not in scores(logits[[0, 2]], torch.tensor([0, 1]), 2)


def test_what_is_not_a_number_is_named_under_a_clock(tmp_path: Path) -> None:
    clocked = ("clock=devices", "clients=3", "rounds=1", "runtime=inline", "data.limit=240")
    run(compose(["strategy=local", "train.lr=1e9", *clocked, f"out={tmp_path / 'run'}"]))
    assert "not a number: " in " ".join(json.loads((tmp_path / "run/summary.json").read_text())["notes"])


def test_one_answer_for_everything_is_said_and_a_single_class_is_no_collapse() -> None:
    import torch

    logits = torch.tensor([[2.0, 1.0], [3.0, 1.0], [5.0, 0.0]])
    assert scores(logits, torch.tensor([0, 1, 1]), 2)["constant"] == 1
    assert "constant" not in scores(logits, torch.tensor([0, 0, 0]), 2)
    assert "constant" not in scores(logits.flip(1) * torch.tensor([[1.0], [1.0], [-1.0]]), torch.tensor([0, 1, 1]), 2)
    one = (2, "client", 4, "global", "constant", 1.0)
    rows = [one, (2, "server", -1, "global", "model/constant", 1.0), (2, "client", 1, "personal", "constant", 1.0)]
    said = constant(rows, clients=5, last=2)
    assert [line.partition(",")[0].rpartition(": ")[2] for line in said] == [
        "the server's model",
        "1 of 5 clients' models",
    ]
    assert constant([(*row, 3.5) for row in rows], clients=5, last=2) == said  # a clock adds a column
    assert constant(rows, clients=5, last=2, alone=[1]) == said
    told = constant(rows, clients=5, last=2, alone=[1, 4])[1]
    assert "1 of 5 clients' models (1 of them with training examples of one class alone), no better" in told
    assert constant(rows, clients=5, last=3) == []  # it got over it


def test_what_is_advised_where_a_model_names_one_class_helps(tmp_path: Path) -> None:
    """Too few steps leave one answer too, and smaller steps leave it so."""
    words = ["strategy=regmean", "model=cnn", "clients=4", "rounds=1", "runtime=inline"]
    for epochs in (1, 5):
        run(compose([*words, f"train.epochs={epochs}", f"out={tmp_path / str(epochs)}"]), quiet=True)
    few, more = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("1", "5"))
    assert any("one answer" in note and "train.epochs" in note for note in few["notes"])
    assert not any("one answer" in note for note in more["notes"])
    assert more["final"]["accuracy/global"] > 0.3 + few["final"]["accuracy/global"]


def test_a_run_whose_models_name_one_class_says_so(made, tmp_path: Path) -> None:
    class Blank(FusionStrategy):
        def fuse(self, shares: Shares) -> None:
            list(shares)
            self.publish("model", {name: 0 * value for name, value in self.model.items()})

    class Scored(Blank):
        def server_models(self) -> dict[str, Any]:
            return {"model": (self.architecture, self.model)}

    for kind, who in ((Scored, "the server's model"), (Blank, "3 of 3 clients' models")):
        play(made(kind), path=tmp_path / kind.__name__)
        notes = json.loads((tmp_path / kind.__name__ / "summary.json").read_text())["notes"]
        assert f"one answer for all of the global test: {who}, no better there" in " ".join(notes)


# --- sweeps ------------------------------------------------------------------------------------------------


def test_a_setting_goes_to_the_runs_that_have_it() -> None:
    runs, notes = combine([*TINY, "strategy=fedavg,fedprox", "strategy.mu=0.1,0.2", "seed=0,1"])
    assert [run.varied for run in runs] == [
        ["strategy=fedavg", "seed=0"],
        ["strategy=fedavg", "seed=1"],
        *(["strategy=fedprox", f"strategy.mu={mu}", f"seed={seed}"] for mu in (0.1, 0.2) for seed in (0, 1)),
    ]
    assert notes == ["strategy.mu=0.1,0.2: left out of 4 of 8 runs (fedavg has no such setting)"]


def test_a_setting_of_one_strategy() -> None:
    runs, _ = combine([*TINY, "strategy=local,knfu", "strategy.knfu.beta=1,5"])
    assert [(run.config.strategy.name, getattr(run.config.strategy, "beta", None)) for run in runs] == [
        ("local", None),
        ("knfu", 1.0),
        ("knfu", 5.0),
    ]
    with pytest.raises(UserError, match="fedmd is not among the compared: knfu, local"):
        combine([*TINY, "strategy=local,knfu", "strategy.fedmd.epochs=1"])


def test_a_word_that_does_something_in_some_runs() -> None:
    words = [word for word in TINY if not word.startswith("partition")]
    runs, notes = combine([*words, "partition=iid,dirichlet", "partition.min_size=2,3"])
    assert [run.varied for run in runs] == [
        ["partition=iid"],
        ["partition=dirichlet", "partition.min_size=2"],
        ["partition=dirichlet", "partition.min_size=3"],
    ]
    assert "left out of 2 of 4 runs (it goes with partition=dirichlet|size)" in notes[0]
    with pytest.raises(UserError, match="does nothing in any of these runs"):
        combine([*words, "partition=iid", "partition.min_size=2,3"])


def test_what_is_named_twice_runs_once_and_is_said() -> None:
    runs, notes = combine(["seed=0,0"])
    assert (len(runs), notes) == (1, ["1 of 2 runs are named twice, and run once"])


def test_a_default_that_does_nothing_does_not_multiply_a_run() -> None:
    runs, notes = combine(["partition=iid,dirichlet", "partition.alpha=0.1,0.5"])
    assert [run.varied for run in runs] == [
        ["partition=iid"],
        ["partition=dirichlet", "partition.alpha=0.1"],
        ["partition=dirichlet", "partition.alpha=0.5"],
    ]
    assert notes[0].startswith("partition.alpha=0.1,0.5: left out of 2 of 4 runs")


def test_an_impossible_combination_is_refused_before_the_first_run(tmp_path: Path) -> None:
    from fedfuse.runs.sweep import sweep

    words = [word for word in TINY if not word.startswith("model")] + ["model.pool=[mlp,mlp_small]"]
    out = tmp_path / "sweep"
    with pytest.raises(UserError, match="strategy=fedavg: strategy=fedavg needs one architecture"):
        sweep([*words, "strategy=local,fedavg", f"out={out}"])
    assert not out.exists()
    assert possible(combine([*TINY, "strategy=local,fedavg"])[0], lambda strategy: strategy.name) == ["local", "fedavg"]


def test_one_run_has_nothing_to_be_compared_with(tmp_path: Path, capsys) -> None:
    from fedfuse.runs.sweep import sweep

    sweep([*TINY, "strategy=fedavg", f"out={tmp_path / 'one'}"], report=True, dry=True)
    assert "note: one run: there is nothing to compare it with" in capsys.readouterr().out


def test_a_dry_sweep_runs_nothing(tmp_path: Path, capsys) -> None:
    from fedfuse.cli import main

    out = tmp_path / "sweep"
    assert main(["compare", *TINY, "strategy=local,fedavg", "seed=0,1", f"out={out}", "--dry-run"]) == 0
    assert not out.exists()
    said = capsys.readouterr().out
    assert "4 runs; nothing was run" in said
    assert f"{out}/fedavg/seed=1: 2 rounds, a round at most" in said
