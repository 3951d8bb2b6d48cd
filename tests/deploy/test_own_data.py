"""Sites with data of their own: one task, several folders, nothing of them at the server."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedfuse.config.compose import compose
from fedfuse.config.message import as_json
from fedfuse.config.schema import Config
from fedfuse.core.scenario import prepare_scenario
from fedfuse.data.read_digits import digits
from fedfuse.data.transfer import cut_transfer
from fedfuse.errors import UserError, WorldError
from fedfuse.network.exchange import Patience
from fedfuse.network.own_data import counts_of, site_scenario, task_of
from fedfuse.network.policy import Policy
from fedfuse.network.site import AT_HOME, Site, SiteConfig
from tests.deploy import network
from tests.deploy.network import Network


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedfuse.network.exchange.POLL", 0.01)


def archive(folder: Path, rows: np.ndarray, shift: int = 0) -> str:
    pixels, labels = digits()
    folder.mkdir(parents=True)
    images = np.rint(pixels[rows] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    np.savez(folder / "all.npz", x=images, y=labels[rows] + shift)
    return str(folder)


@pytest.fixture
def sites(tmp_path: Path) -> tuple[Config, Network]:
    """A reference at the server; site 0 has digits 0-4 only, site 1 5-9, site 2 all."""
    labels, rows = digits()[1], np.arange(1797)
    server = archive(tmp_path / "reference", rows[1500:])
    roots = [
        archive(tmp_path / "a", rows[:1000][labels[:1000] < 5]),
        archive(tmp_path / "b", rows[:1000][labels[:1000] >= 5]),
        archive(tmp_path / "c", rows[1000:1300]),
    ]
    config = compose(
        ["data=npz", f"data.root={server}", "data.test_fraction=0.8", "clients=3", "rounds=2", "seed=0",
         "model=mlp_small", "runtime=inline", "transfer.source=noise", "transfer.size=24", "strategy=fedavg"]
    )  # fmt: skip
    return config, Network([SiteConfig(i, tmp_path / f"site-{i}", None, root) for i, root in enumerate(roots)])


@pytest.mark.parametrize("strategy", ["fedavg", "knfu"])
def test_sites_learn_together(strategy: str, sites: tuple[Config, Network], tmp_path: Path) -> None:
    config, grid = sites
    if strategy == "knfu":
        config.strategy = compose(["strategy=knfu"]).strategy
    built, _ = network.run(config, grid, tmp_path / "run", own=True)
    assert built.digest
    sizes = built.scenario.data.sizes().sum(axis=1).tolist()
    assert sum(sizes) == 1300
    # without a server model only the sites could score the reference's test set, and they do not have it
    assert built.headline["accuracy/global" if strategy == "fedavg" else "accuracy/personal"] > 0.15
    assert (tmp_path / "run" / "partition.parquet").exists()


def test_a_foreign_class_is_refused(
    sites: tuple[Config, Network], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, grid = sites
    archive(tmp_path / "odd", np.arange(100), shift=7)
    grid.seats[102] = SiteConfig(2, tmp_path / "site-2", None, str(tmp_path / "odd"))
    with pytest.raises(WorldError, match="the site's own log says"):
        network.run(config, grid, tmp_path / "run", Patience(join=0.3), own=True)
    assert "class '10' of this site's data is not one of the task's 10" in capsys.readouterr().out


@pytest.mark.parametrize("words", [{"targets": "name"}, {"inputs": "nothing"}, {"groups": "nothing"}])
def test_no_refusal_quotes_a_sites_data(
    words: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The attack of an audit: hellos alone read a column value by value, each refusal named the next."""
    folder = tmp_path / "cohort"
    folder.mkdir()
    rows = [f"{i},{i % 2},{name}" for i, name in enumerate(("Alice", "Bob", "Carla", "Dora"))]
    (folder / "all.csv").write_text("\n".join(["inputs,label,name", *rows]))
    told = compose(["data=csv", "clients=2", "rounds=1", "model=mlp_small", "strategy=fedavg"])
    text = as_json(replace(told, data=replace(told.data, **words)))
    task = json.dumps({"classes": ["0", "1"], "mean": None, "std": None, "transfer": 0})
    setting = ConfigRecord({"config": text, "run": "0" * 32, "attempt": 1, "task": task})
    site = Site(SiteConfig(0, tmp_path / "site", None, str(folder)))
    reply = site.handle(Message(RecordDict({"setting": setting}), 100, "query.hello"))
    assert reply.error.reason == f"refused: {AT_HOME}"
    said = capsys.readouterr().out
    assert "Alice" in said or "inputs, label, name" in said


def test_a_task_is_compared_with_the_classes_that_a_site_states(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The attack of an audit: of two tasks, the one without a label was refused only where a row had it."""
    config = compose(["data=csv", "clients=2", "rounds=1", "model=mlp_small", "strategy=fedavg", "privacy.epsilon=1"])

    def heard(where: str, labels: list[str], classes: list[str] | None, *task: str) -> str:
        folder = tmp_path / where
        folder.mkdir(exist_ok=True)
        (folder / "all.csv").write_text("\n".join(["a,label", *(f"0.{i},{label}" for i, label in enumerate(labels))]))
        select = {"name": "csv", "inputs": "a", "targets": "label"} | ({} if classes is None else {"classes": classes})
        told = json.dumps({"classes": task, "mean": None, "std": None, "transfer": 0, "vocabulary": None})
        setting = ConfigRecord({"config": as_json(config), "run": "0" * 32, "attempt": 1, "task": told})
        seat = SiteConfig(0, tmp_path / "site", None, str(folder), Policy(require_dp=True, select=select))
        reply = Site(seat).handle(Message(RecordDict({"setting": setting}), 100, "query.hello"))
        return reply.error.reason if reply.has_error() else "taken"

    stated, rare = ["healthy", "flu", "hiv"], [*["healthy", "flu"] * 20, "hiv"]
    for labels in (rare, rare[:-1]):
        assert heard("data", labels, stated, "healthy", "flu") == f"refused: {AT_HOME}"
        assert "class 'hiv' of this site's data is not one of the task's 2" in capsys.readouterr().out
        assert heard("data", labels, stated, "healthy", "flu", "hiv", "cold") == "taken"
        assert heard("data", labels, None, "healthy", "flu", "hiv") == f"refused: {AT_HOME}"
        assert "require_dp needs classes = [...] in [select]" in capsys.readouterr().out
    assert heard("data", rare, stated[:-1], "healthy", "flu", "hiv") == f"refused: {AT_HOME}"
    assert "class 'hiv' of this site's data is not one of the classes of its [select]" in capsys.readouterr().out


def test_noise_tells_nothing_of_the_whole_numbers_of_a_site(tmp_path: Path) -> None:
    """The attack of an audit: drawn up to the largest private number, whose hash in a hello was then looked for."""
    made, draw = {}, np.random.default_rng(0)
    for largest in (9, 400, 437):
        folder = tmp_path / str(largest)
        folder.mkdir()
        rows = draw.integers(0, 9, (40, 12))
        rows[3, 4] = largest
        np.savez(folder / "all.npz", x=rows, y=np.arange(40) % 2)
        words = ["data=npz", f"data.root={folder}", "clients=1", "model=mlp_small", "transfer.source=noise", "seed=0"]
        made[largest] = prepare_scenario(compose([*words, "transfer.size=20", "strategy=fedmd"]))
    config, task = made[9].config, task_of(made[9])
    hashes = {one.data.transfer_hash() for one in made.values()}
    for one in made.values():
        found = site_scenario(replace(config, data=one.config.data), 0, 1, task).data
        hashes.add(found.transfer_hash())
        assert found.transfer is not None
        assert found.transfer.inputs.std() > 0.9
    assert len(hashes) == 1
    texts = [replace(one.data.dataset, kind="tokens") for one in made.values()]
    cut = [cut_transfer(config.transfer, one, 0, vocabulary=50)[0] for one in texts]
    assert all(np.array_equal(one.inputs, cut[0].inputs) and one.inputs.max() < 50 for one in cut)


@pytest.mark.parametrize("require_dp", [False, True])
def test_whole_numbers_of_a_site_are_told_apart_by_no_failure(require_dp: bool, tmp_path: Path) -> None:
    """Of an embedding's lookup: whether a number has none; with privacy, of a hello: whether one is negative."""
    pytest.importorskip("transformers", reason="the extra `lm` is not installed")
    words = ["data=npz", "clients=1", "rounds=1", "model=text_classifier", "strategy=fedavg", "evaluate.every=1"]
    config = compose([*words, *(["privacy.epsilon=5"] if require_dp else [])])
    select = {"name": "npz", "classes": ["0", "1"]} if require_dp else None
    heard = set()
    for number in (0, 40_000, *([-1] if require_dp else [])):
        rows = np.zeros((40, 12), np.int64)
        rows[:, ::2], rows[:, 1] = 7, number
        for where in ("site", "reference"):
            (tmp_path / f"{number}" / where).mkdir(parents=True)
            values = rows if where == "site" else rows.clip(0, 9)
            np.savez(tmp_path / f"{number}" / where / "all.npz", x=values, y=np.arange(40) % 2)
        seat = SiteConfig(
            0, tmp_path / f"{number}-state", None, str(tmp_path / f"{number}" / "site"),
            Policy(require_dp=require_dp, select=select),
        )  # fmt: skip
        config.data.root = str(tmp_path / f"{number}" / "reference")
        grid, said = Network([seat]), list[str]()
        grid.reply = lambda message, reply, said=said: (
            said.append(str(reply.has_error() and reply.error.reason)) or reply
        )
        try:
            network.run(config, grid, tmp_path / f"{number}-run", Patience(join=0.1), own=True)
        except WorldError as error:
            said.append(str(error))
        heard.add(tuple(said))
    assert len(heard) == 1
    assert ("reads tokens" in str(heard)) == require_dp


def test_a_node_without_the_classes_that_its_policy_needs_does_not_start(tmp_path: Path) -> None:
    from fedfuse.deploy.commands import main

    (tmp_path / "policy.toml").write_text('require_dp = true\n[select]\nname = "npz"\n')
    words = ["node", "--server", "x:1", "--insecure", "--client-id", "0", "--data", str(tmp_path)]
    with pytest.raises(UserError, match="require_dp needs classes"):
        main([*words, "--state-dir", str(tmp_path / "s"), "--policy", str(tmp_path / "policy.toml")])


HELLOS: dict[str, Any] = {
    "no examples": [0, 0, 0], "text": "many", "negative": [-5, 0, 0], "huge": [2**50, 0, 0], "short": [5],
    "floats": [1.5, 2.0, 3.0], "nothing": [],
}  # fmt: skip


@pytest.mark.parametrize("kind", list(HELLOS))
def test_counts_that_are_none_leave_out_their_site_alone(
    kind: str, sites: tuple[Config, Network], tmp_path: Path
) -> None:
    """The attack of the audit: `examples=[0, 0, 0]` in one site's hello refused the whole run."""
    config, grid = sites
    config.rounds = 1

    def forge(message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "query.hello" and message.metadata.dst_node_id == 102:
            told: Any = reply.content["hello:2"]
            told["examples"] = HELLOS[kind]
        return reply

    grid.reply = forge
    built, said = network.run(config, grid, tmp_path / "run", Patience(join=0.1, clients=2), own=True)
    assert any(line.startswith("fedfuse: node 102 is not taken: ") and "examples=" in line for line in said)
    assert built.done == 1
    assert built.scenario.data.sizes()[2].tolist() == [0, 0, 0]


def test_partitions_and_own_data_do_not_mix(sites: tuple[Config, Network], tmp_path: Path) -> None:
    config, grid = sites
    with pytest.raises(WorldError, match="this site acts on own data, the run is for a simulation"):
        network.run(config, grid, tmp_path / "run", Patience(join=0.3))
    grid.seats[100] = SiteConfig(0, tmp_path / "site-0", 3)
    with pytest.raises(WorldError, match="this site acts on a partition, the run is for own data"):
        network.run(config, grid, tmp_path / "again", Patience(join=0.3), own=True)


def test_a_holdout_nobody_shares_is_refused(sites: tuple[Config, Network], tmp_path: Path) -> None:
    config, grid = sites
    config.strategy = compose(["strategy=fedmd"]).strategy
    config.transfer.source = "holdout"
    with pytest.raises(UserError, match=r"transfer.source=holdout"):
        network.run(config, grid, tmp_path / "run", own=True)


def test_one_example_to_train_on_is_enough() -> None:
    assert counts_of({"examples": [1, 0, 0]}) == [1, 0, 0]
    for found in ([0, 1, 1], [1, 0], [1, 0, 2**40], [1, 0, -1]):
        with pytest.raises(UserError, match="examples="):
            counts_of({"examples": found})


TASK: dict[str, Any] = {"classes": ["0", "1"], "mean": None, "std": [0.5], "transfer": 0, "vocabulary": None}
BAD: dict[str, list[Any]] = {
    "classes": [["0"], ["0", "0"], ["0", 1], "01", None], "mean": [[1], ["a"], "a", 0.5], "std": [[0.5, None], 0.5],
    "transfer": [-1, 2**31, 0.5, None], "vocabulary": [0, -1, 2**31, 1.5],
}  # fmt: skip


@pytest.mark.parametrize("key", list(TASK))
def test_a_task_with_one_thing_amiss_is_refused(key: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "all.csv").write_text("\n".join(["a,label", *(f"0.{i},{i % 2}" for i in range(8))]))
    config = as_json(
        compose(["data=csv", "data.inputs=a", "clients=2", "rounds=1", "model=mlp_small", "strategy=fedavg"])
    )
    site = Site(SiteConfig(0, tmp_path / "site", None, str(folder)))

    def heard(task: dict[str, Any]) -> str:
        setting = ConfigRecord({"config": config, "run": "0" * 32, "attempt": 1, "task": json.dumps(task)})
        reply = site.handle(Message(RecordDict({"setting": setting}), 100, "query.hello"))
        return reply.error.reason if reply.has_error() else "taken"

    for value in BAD[key]:
        assert heard({**TASK, key: value}) == "refused: the task is not what a FedFuse server writes", value
    assert heard(TASK) == "taken"
