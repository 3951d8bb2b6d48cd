"""The site's policy decides: what a server asks for beyond it is refused, by what is really done, not by its name."""

from __future__ import annotations

import json
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedfuse.config.compose import compose
from fedfuse.config.message import as_json
from fedfuse.errors import Refused, UserError, WorldError
from fedfuse.network.policy import Policy, policy_from, read_policy
from fedfuse.network.remote_grid import Patience
from fedfuse.network.site import SiteConfig
from fedfuse.train.ledger import Ledger, Limits, entered
from tests.deploy.network import Network, run, seats, tiny

DP = ("privacy.noise=4", "train.batch_size=8", "data.limit=90")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedfuse.network.remote_grid.POLL", 0.01)


def under(policy: Policy, path: Path) -> Network:
    return Network([replace(seat, policy=policy) for seat in seats(path, 3)])


def refused(match: str, policy: Policy, path: Path, strategy: str = "fedavg", *words: str, **forge: Any) -> None:
    network = under(policy, path)
    for name, value in forge.items():
        setattr(network, name, value)
    with pytest.raises(WorldError, match=match):
        run(tiny(strategy, *words), network, path / f"run-{uuid.uuid4().hex}", Patience(join=0.2))


@pytest.mark.parametrize(
    ("policy", "words", "match"),
    [
        (Policy(require_dp=True), (), "differential privacy is required"),
        (Policy(max_epsilon=8.0), ("privacy.epsilon=999",), r"privacy.epsilon=999.0; allowed: at most 8"),
        (Policy(max_epsilon=8.0), ("privacy.noise=1e-9",), r"privacy.epsilon=None; allowed: at most 8"),
        (Policy(min_noise=0.5), ("privacy.noise=1e-9",), r"privacy.noise=1e-09; allowed: at least 0.5"),
        (Policy(min_noise=50.0), ("privacy.epsilon=8", *DP[1:]), r"noise multiplier \S+; allowed: at least 50"),
        (Policy(max_delta=1e-9), DP, r"delta \S+; allowed: at most 1e-09"),
        (Policy(max_delta=1e-9), ("privacy.delta=1e-3", *DP), r"privacy.delta=0.001; allowed: at most 1e-09"),
    ],
)
def test_weak_privacy_is_refused(policy: Policy, words: tuple[str, ...], match: str, tmp_path: Path) -> None:
    refused(match, policy, tmp_path, "fedavg", *words)


def test_a_new_run_is_no_new_budget(tmp_path: Path) -> None:
    words = ("privacy.epsilon=1", "privacy.delta=0.01", *DP[1:])
    network = under(Policy(max_epsilon=1.5, require_dp=True), tmp_path)
    run(tiny("fedavg", *words), network, tmp_path / "first")
    ledgers = sorted((tmp_path / "site-0" / "privacy").iterdir())
    assert len(ledgers) == 1
    spent = entered(ledgers[0])
    assert len(spent) == 2

    def again_and_again() -> None:
        for again in range(4):
            run(tiny("fedavg", *words, f"seed={again + 1}"), network, tmp_path / f"again-{again}")

    with pytest.raises(
        WorldError, match=r"epsilon \S+ of this data set over all runs with this training; allowed: at "
    ):
        again_and_again()
    ledger = Ledger(tmp_path / "x", ledgers[0], Limits(1.5))
    assert ledger.spent(delta=0.01) <= 1.5
    assert len(entered(ledgers[0])) > len(spent)


def test_a_ledger_survives_a_loss_of_power(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "run", tmp_path / "all" / "data")
    ledger.enter((4.0, 0.5, 2), 0.01)
    with open(tmp_path / "run", "a") as file:
        file.write("[4.0, 0.")  # cut short: never promised, and the next does not stick to it
    ledger.enter((3.0, 0.5, 1), 0.01)
    assert ledger.history == ((4.0, 0.5, 2), (3.0, 0.5, 1)) == entered(tmp_path / "all" / "data")


def test_rounds_are_those_of_the_messages(tmp_path: Path) -> None:
    """`max_rounds=1` answered round 10⁹: the order said one round, the messages another."""

    def later(message: Any) -> bool:
        if "run" in message.content:
            message.content["run"]["round"] = 10**9
        return True

    refused(r"round 1000000000; allowed: at most 2", Policy(max_rounds=2), tmp_path, before=later)


def test_a_run_cannot_train_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedfuse.network.policy.SPARE", 0)
    monkeypatch.setattr("fedfuse.network.site.counted", lambda path: 1000)
    refused(r"1000 trainings in this run; allowed: at most \d+", Policy(max_rounds=2), tmp_path)


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        ("fedmd", ("strategy.digest_epochs=50",)),
        ("fedrep", ("strategy.head_epochs=50",)),
        ("ditto", ("strategy.personal_epochs=50",)),
        ("fedavg", ("privacy.noise=4", "train.epochs=5", "data.limit=90")),
    ],
)
def test_epochs_count_whatever_they_are_called(strategy: str, words: tuple[str, ...], tmp_path: Path) -> None:
    policy = Policy(max_epochs=5) if "privacy.noise=4" not in words else Policy(max_epochs=4)
    match = r"epochs in one message; allowed: at most 5" if policy.max_epochs == 5 else r"train.epochs=5; allowed"
    refused(match, policy, tmp_path, strategy, *words)


def test_steps_are_counted_where_they_are_made(tmp_path: Path) -> None:
    refused(r"more than 3 steps of training", Policy(max_steps=3), tmp_path, "fedavg", "train.batch_size=1")
    built, _ = run(tiny("fedavg"), under(Policy(max_steps=10_000, max_epochs=50), tmp_path / "b"), tmp_path / "run")
    from tests.federations import play

    assert built.digest == play("fedavg").digest  # counting changes no bit


def test_data_names_its_layout_too() -> None:
    policy = Policy(data=("npz",))
    policy.check(compose(["strategy=fedavg", "data=npz"]))
    for layout in ("images", "jsonl", "pfllib", "custom"):
        config = compose(["strategy=fedavg", "data=npz"])
        config.data.layout = layout
        with pytest.raises(Refused, match=f"data=npz is not read as data.layout={layout}"):
            policy.check(config)


def test_a_site_says_which_of_its_data_is_used(tmp_path: Path) -> None:
    for i in range(2):
        folder = tmp_path / f"data-{i}"
        folder.mkdir()
        for name, count in (("train", 60 + i), ("secret", 90)):
            draw = np.random.default_rng(i)
            np.savez(folder / f"{name}.npz", x=draw.random((count, 8)).astype("float32"), y=np.arange(count) % 3)
    reference = tmp_path / "reference"
    reference.mkdir()
    draw = np.random.default_rng(9)
    np.savez(reference / "train.npz", x=draw.random((30, 8)).astype("float32"), y=np.arange(30) % 3)
    (reference / "secret.npz").write_bytes((reference / "train.npz").read_bytes())
    words = [
        "strategy=fedavg",
        "data=npz",
        f"data.root={reference}",
        "clients=2",
        "rounds=1",
        "data.extra.train=secret.npz",
    ]
    config = compose([*words, "model=mlp", "seed=0", "runtime=inline"])
    select = {"name": "npz", "extra": {"train": "train.npz"}}
    for chosen, count in ((None, 90), (select, 60)):
        policy = Policy(select=chosen)
        network = Network(
            [SiteConfig(i, tmp_path / f"{count}-{i}", None, str(tmp_path / f"data-{i}"), policy) for i in range(2)]
        )
        try:
            built, _ = run(config, network, tmp_path / f"run-{count}", own=True)
        except (WorldError, UserError) as error:
            pytest.fail(str(error))
        assert sum(built.scenario.data.sizes()[0]) == count


@pytest.mark.parametrize("word", ["../x", "/etc/passwd", "a/b", "..", "x\x00y", "~/x"])
def test_no_word_of_an_order_leaves_the_sites_folder(word: str) -> None:
    from fedfuse.config.message import from_json

    values = json.loads(as_json(compose(["strategy=fedavg", "data=npz"])))
    for name in ("train", "test", "tokenizer"):
        values["data"]["extra"] = {name: word}
        with pytest.raises(Refused, match=rf"data\.extra\.{name}"):
            from_json(json.dumps(values))


def test_a_refused_run_leaves_no_folder_and_runs_have_a_quota(tmp_path: Path) -> None:
    refused("strategy=fedavg; allowed: fedmd", Policy(strategies=("fedmd",)), tmp_path)
    assert not (tmp_path / "site-0").exists()
    network = under(Policy(max_runs=1), tmp_path)
    run(tiny("fedavg"), network, tmp_path / "one")
    with pytest.raises(WorldError, match="1 runs are kept here; allowed: at most 1"):
        run(tiny("fedavg", "seed=1"), network, tmp_path / "two", Patience(join=0.2))


def test_a_policy_file_with_limits_is_read_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(
        'max_epsilon = 8\nmax_delta = 1e-5\nmin_noise = 0.5\n[select]\nname = "npz"\nextra = {train = "t"}\n'
    )
    assert read_policy(path) == Policy(
        max_epsilon=8, max_delta=1e-5, min_noise=0.5, select={"name": "npz", "extra": {"train": "t"}}
    )
    assert policy_from(json.loads(read_policy(path).as_json()), "policy") == read_policy(path)
    for text in ("max_epsilon = 0", "min_noise = true", "max_delta = nan", "[select]\nroot = '/'", "select = 1"):
        path.write_text(text)
        with pytest.raises(UserError, match="policy"):
            read_policy(path)
