"""The site's policy decides: what a server asks for beyond it is refused, by what is really done, not by its name."""

from __future__ import annotations

import errno
import json
import os
import uuid
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedfuse.compat import opacus_clipping
from fedfuse.compat.flower_identity import claim_identity
from fedfuse.config.compose import compose
from fedfuse.config.message import as_json
from fedfuse.core.shares import REFUSED
from fedfuse.errors import Refused, UserError, WorldError
from fedfuse.network.audit import NAME, Audit
from fedfuse.network.exchange import Patience
from fedfuse.network.policy import Policy, policy_from, read_policy
from fedfuse.network.site import REFUSALS, Site, SiteConfig, kept_below
from fedfuse.train import privacy
from fedfuse.train.allowance import Allowance, limited, passes
from fedfuse.train.ledger import Ledger, Limits, entered
from tests.deploy.network import Network, run, seats, tiny

DP = ("privacy.noise=4", "train.batch_size=8", "data.limit=90")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedfuse.network.exchange.POLL", 0.01)


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
    network = under(Policy(max_epsilon=1.5, max_delta=0.01, require_dp=True), tmp_path)
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
    ledger = Ledger(tmp_path / "x", ledgers[0], Limits(1.5, 0.01))
    assert ledger.spent() <= 1.5
    assert len(entered(ledgers[0])) > len(spent)


def test_a_large_delta_is_no_way_around_epsilon(tmp_path: Path) -> None:
    """The attack of an audit: three rows to train on allowed delta=0.3, at which epsilon 1 is one of 6.7."""
    words = ("privacy.epsilon=1", "privacy.delta=0.3", *DP[1:], "data.validation=0.49", "data.personal_test=0.48")
    with pytest.raises(WorldError, match=r"epsilon \S+ of this data set over all runs"):
        run(tiny("fedavg", *words), under(Policy(max_epsilon=1.0, require_dp=True), tmp_path), tmp_path / "run")


@pytest.mark.parametrize("key", ["inputs", "targets", "groups"])
def test_columns_are_the_sites_choice_where_privacy_is_required(key: str) -> None:
    config = tiny("fedavg", *DP, "data=csv", f"data.{key}=income")
    with pytest.raises(Refused, match=f"data.{key}=income; allowed: with require_dp, the columns of"):
        Policy(require_dp=True).check(config)
    Policy().check(config)
    Policy(require_dp=True, select={"name": "csv"}).check(config)


def test_a_site_that_requires_privacy_clips_plain_and_not_as_short_as_a_server_likes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def plain_sum(*given: Any) -> None:
        seen.append(len(given[2]))
        opacus_clipping.plain_sum(*given)

    monkeypatch.setattr(privacy, "plain_sum", plain_sum)
    run(tiny("fedavg", *DP), under(Policy(require_dp=True), tmp_path), tmp_path / "run")
    assert set(seen) == {1}  # each example alone: no bit of its gradient depends on another
    text = as_json(tiny("fedavg", *DP)).replace('"clip": 1.0', '"clip": 1e-6')
    setting = ConfigRecord({"config": text, "run": "0" * 32, "attempt": 1, "task": ""})
    site = Site(replace(seats(tmp_path, 3)[0], policy=Policy(require_dp=True)))
    reply = site.handle(Message(RecordDict({"setting": setting}), 100, "query.hello"))
    assert "privacy.clip=1e-06: allowed is more than 0 (privacy.level=example: at least 0.001)" in reply.error.reason


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


def test_a_run_cannot_be_scored_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedfuse.network.policy.SPARE", 0)
    many = {"trainings": 1, "evaluations": 4}  # two rounds, and one before them
    monkeypatch.setattr("fedfuse.network.site.counted", lambda path: many[path.name])
    network = under(Policy(max_rounds=2), tmp_path)
    with pytest.raises(WorldError, match="4 evaluations in this run; allowed: at most 3"):
        run(tiny("fedavg"), network, tmp_path / "run", Patience(join=0.2))


def test_a_site_says_how_many_of_its_examples_are_only_scored(tmp_path: Path) -> None:
    words = ("data.validation=0.45", "data.personal_test=0.45")
    match = r"data.validation=0.45 and data.personal_test=0.45; allowed: 0.5 together"
    refused(match, Policy(max_held_out=0.5), tmp_path, "fedavg", *words)
    Policy(max_held_out=0.3).check(compose(["strategy=fedavg", "data.validation=0.1", "data.personal_test=0.2"]))


def asked(policy: Policy, path: Path, config: dict[str, Any], kind: str, **about: Any) -> Any:
    """What a site answers a server that checks nothing itself."""
    claim_identity()
    content = RecordDict()
    content["setting"] = ConfigRecord({"config": json.dumps(config), "run": "ab" * 16, "attempt": 1, "task": ""})
    phase = {"run": "ab" * 16, "round": 1, "phase": "train", "sums": "{}", "strategy": config["strategy"]["name"]}
    content["run"] = ConfigRecord({**phase, **about})
    content["config"] = ConfigRecord({"client": 0, "tag": "0", "new-tag": "1.1"})
    reply = Site(replace(seats(path, 3)[0], policy=policy)).handle(Message(content, 100, kind))
    return reply.error.reason if reply.has_error() else reply


@pytest.mark.parametrize("kind", ["train", "evaluate"])
@pytest.mark.parametrize(
    ("strategy", "group", "value", "match"),
    [
        ("fedgkt", "privacy", {"epsilon": 1.0}, "lets labels, features of private examples leave the clients"),
        ("regmean", "privacy", {"epsilon": 1.0}, "second moments of features of private examples leave"),
        ("fedgkt", "secure", {"name": "on"}, "secure=on: strategy=fedgkt sums no records"),
        ("ties", "secure", {"name": "on"}, "secure=on: strategy=ties sums no records"),
    ],
)
def test_a_site_asks_itself_whether_a_promise_can_be_kept(strategy, group, value, match, kind, tmp_path) -> None:
    """A server of one's own need not refuse what an honest one refuses before it sends anything."""
    config = json.loads(as_json(tiny(strategy)))
    config[group] |= value
    policy = Policy(require_dp=group == "privacy", require_secure=group == "secure")
    assert match in asked(policy, tmp_path, config, kind)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("splits", [["train"], ["personal", "personal"], ["personal"] * 20000, "personal", [1], []])
def test_only_what_evaluations_score_is_scored(splits, tmp_path: Path) -> None:
    config = json.loads(as_json(tiny("fedavg")))
    found = asked(Policy(), tmp_path, config, "evaluate", splits=splits)
    if splits == []:
        assert not isinstance(found, str)
    else:
        assert "are not known; allowed: global, personal, validation, each once" in found


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


@pytest.mark.parametrize("strategy", ["local", "fedavg"])
def test_a_server_fills_no_more_than_a_sites_share_of_its_disk(strategy: str, tmp_path: Path) -> None:
    """The attack: few runs within `max_runs`, each of a model as large as the server likes."""
    words = (strategy, "model=mlp_wide", "model.width=4", "clients=1", "rounds=1", "train.max_steps=1")
    seat = replace(seats(tmp_path, 1)[0], policy=Policy(max_disk=20))
    network, said, most = Network([seat]), list[str](), 0
    for i in range(6):
        try:
            run(tiny(*words, f"seed={i}"), network, tmp_path / f"run-{i}", Patience(join=0.2))
        except WorldError as error:
            said.append(str(error))
        most = max(most, kept_below(seat.state))
    assert len(said) >= 3
    assert all("max_disk" in line for line in said), said
    assert 2**20 < most < 21 * 2**20
    (seat.state / "of-another-run").write_bytes(bytes(21 * 2**20))
    before = kept_below(seat.state)
    with pytest.raises(WorldError, match="no room for more than is kept here; allowed: at most 20 MB"):
        run(tiny(*words, "seed=9"), network, tmp_path / "run-9", Patience(join=0.2))
    assert kept_below(seat.state) < before + 5000


def test_refusals_do_not_fill_a_sites_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server asks without end for what is refused: a hundred a day are told, then how many there were."""
    seat, days = seats(tmp_path, 1)[0], 20_000
    seat.state.mkdir()
    monkeypatch.setattr("fedfuse.network.site.time", SimpleNamespace(time=lambda: days * 86400.0))
    for _ in range(REFUSALS + 50):
        setting = ConfigRecord({"config": "{", "run": "ab" * 16, "attempt": 1, "task": ""})
        assert Site(seat).handle(Message(RecordDict({"setting": setting}), 100, "query.hello")).has_error()
    assert len(Audit(seat.state / NAME).verify()[0]) == REFUSALS
    days += 1
    Site(seat).handle(Message(RecordDict(), 100, "query.hello"))
    last = Audit(seat.state / NAME).verify()[0][-1]
    assert (last["event"], last["not_noted_before"]) == ("refused", 50)


def test_a_refusal_that_cannot_be_noted_stays_a_refusal_without_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The attack: on a full disk the site's code raised, which Flower tells the server with the name of the file."""
    seat = seats(tmp_path, 1)[0]
    seat.state.mkdir()

    def full(path: Path, durable: bool = False) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("fedfuse.network.site.replaced", full)
    reply = Site(seat).handle(Message(RecordDict(), 100, "query.hello"))
    said = "refused: a message without a setting: not from a FedFuse server"
    assert (reply.error.code, reply.error.reason) == (REFUSED, said)
    assert "a refusal could not be noted: [Errno 28] No space left on device" in capsys.readouterr().out


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


def test_every_limit_allows_what_it_names_and_refuses_the_next() -> None:
    words = ("rounds=7", "train.epochs=3", "privacy.noise=4", "privacy.delta=1e-3", "privacy.epsilon=null")
    config = compose(["strategy=fedavg", *words])
    Policy(max_rounds=7, max_epochs=3, max_delta=1e-3, min_noise=4.0, require_dp=True).check(config)
    for policy, said in (
        (Policy(max_rounds=6), "rounds=7; allowed: at most 6"),
        (Policy(max_epochs=2), "train.epochs=3; allowed: at most 2"),
        (Policy(max_delta=9e-4), "privacy.delta=0.001; allowed: at most 0.0009"),
        (Policy(min_noise=4.1), "privacy.noise=4; allowed: at least 4.1"),
        (Policy(max_epsilon=8.0), "privacy.epsilon=None; allowed: at most 8"),
        (Policy(require_secure=True), "secure aggregation is required"),
        (Policy(strategies=("fedmd", "knfu")), "strategy=fedavg; allowed: fedmd, knfu"),
        (Policy(strategies=()), "strategy=fedavg; allowed: none"),
        (Policy(data=("mnist",)), "data=digits; allowed: mnist"),
        (Policy(data=()), "data=digits; allowed: none"),
    ):
        with pytest.raises(Refused, match=said):
            policy.check(config)
    config.privacy.noise, config.privacy.delta, config.privacy.epsilon = None, None, 8.0
    Policy(max_epsilon=8.0, max_delta=1e-9, min_noise=50.0).check(config)  # what is planned is checked as it is spent
    config.privacy.epsilon = None
    Policy(max_epsilon=1.0, max_delta=1e-9, min_noise=50.0).check(config)  # limits of what is private, not a demand
    with pytest.raises(Refused, match="the run has none"):
        Policy(require_dp=True).check(config)
    Policy(data=("digits",)).check(config)


def test_rounds_answers_and_examples_to_the_last_one() -> None:
    policy = Policy(max_rounds=2, min_examples=5)
    for good in (0, 1, 2):
        policy.check_round(good)
    for bad in (-1, 3):
        with pytest.raises(Refused, match=f"round {bad}; allowed: at most 2"):
            policy.check_round(bad)
    policy.check_answers((2 + 1) * 3 + 50, phases=3)  # every phase of rounds 0, 1, 2, and 50 that are asked again
    with pytest.raises(Refused, match="60 trainings in this run; allowed: at most 59"):
        policy.check_answers(60, phases=3)
    policy.check_examples(5)
    with pytest.raises(Refused, match="4 training examples; at least 5"):
        policy.check_examples(4)


def test_a_site_that_says_nothing_runs_no_code_and_joins_everything_else() -> None:
    plain = Policy()
    assert plain == Policy(
        None, None, None, None, None, max_runs=1000, max_disk=20480, min_examples=1, max_held_out=None,
        require_dp=False, require_secure=False, max_epsilon=None, max_delta=None, min_noise=None, select=None,
        allow_code=False,
    )  # fmt: skip
    plain.check(compose(["strategy=fedavg"]))
    plain.check_round(10**9)
    plain.check_answers(10**9, 1)
    assert plain.limits == Limits(None, None, None)
    assert Policy(max_epsilon=3.0, max_delta=1e-5, min_noise=0.7).limits == Limits(3.0, 1e-5, 0.7)
    for frozen in (plain, plain.limits):
        with pytest.raises(FrozenInstanceError):
            frozen.epsilon = frozen.max_epsilon = 9.0


def test_what_a_site_selects_takes_the_place_of_all_that_an_order_says() -> None:
    said = compose(["strategy=fedavg", "data=npz", "+data.extra.train=secret"]).data
    said.inputs, said.targets, said.groups, said.load, said.hub = "a", "b", "c", "m:f", "x/y"
    assert Policy().selected(said) is said
    found = Policy(select={"name": "csv", "targets": "label", "classes": ["a"]}).selected(said)
    assert (found.name, found.layout) == ("csv", "builtin")
    assert (found.inputs, found.targets, found.groups) == (None, "label", None)
    assert (found.extra, found.load, found.hub, found.root) == ({}, None, None, said.root)


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("strategies", [None, [], ["fedavg", "fedmd"]], ["fedavg", ["fedavg", 1], 1]),
        ("data", [None, ["npz"]], ["npz", [1, "npz"]]),
        ("max_rounds", [None, 0, 3], [-1, 1.0, True, "3"]),
        ("max_runs", [None, 0], [False, -2]),
        ("max_disk", [None, 5], [False, -2, 0.5]),
        ("max_epsilon", [None, 8, 0.5], [0, -1, float("inf"), True, "8"]),
        ("max_held_out", [None, 0.3], [0, -0.1, True, "0.3"]),
        ("require_dp", [True, False], [None, 1, "true"]),
        ("require_secure", [True], [0]),
        ("allow_code", [False], [None, "no"]),
        (
            "select",
            [
                None,
                {},
                {"name": "npz", "extra": {"a": 1}},
                {**dict.fromkeys(("name", "layout", "inputs", "groups", "targets"), ""), "extra": {}, "classes": ["a"]},
            ],
            [
                {"root": "/"},
                {"classes": "a"},
                {"classes": [1]},
                {"name": "npz", "load": "m:f"},
                {"extra": "t"},
                ["name"],
            ],
        ),
    ],
)
def test_a_key_takes_what_it_is_for(key: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        kept = getattr(policy_from({key: value}, "here"), key)
        assert kept == (tuple(value) if isinstance(value, list) else value)
    for value in bad:
        with pytest.raises(UserError, match=f"here: {key}=.*; allowed is "):
            policy_from({key: value}, "here")


def test_an_unknown_key_is_named_with_its_nearest() -> None:
    with pytest.raises(UserError, match=r"here: max_round: no such key; .*max_rounds"):
        policy_from({"max_round": 1}, "here")


def test_passes_and_steps_to_the_last_one() -> None:
    epochs = Allowance(epochs=3)
    for asked in (1, 1.5, 0.5, 1e-9):  # what rounding leaves over is nobody's pass
        epochs.take(asked)
    with pytest.raises(Refused, match="3 epochs in one message; allowed: at most 3"):
        epochs.take(5e-10)
    steps = Allowance(steps=2)
    steps.take(10**9)
    steps.step()
    steps.step()
    with pytest.raises(Refused, match="more than 2 steps"):
        steps.step()
    assert steps.stepped == 3
    free = Allowance()
    free.take(10**9)
    free.step()
    passes(10**9)  # nobody counts
    with limited(again := Allowance(epochs=2)):
        passes(1.5)
        with pytest.raises(Refused):
            passes(1)
    passes(1)
    assert again.passed == 2.5


def test_a_ledger_allows_its_limits_and_enters_nothing_beyond(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def steps_over(history: Any, delta: float) -> float:
        return sum(steps / noise for noise, _, steps in history) / delta

    monkeypatch.setattr("fedfuse.train.ledger.epsilon", steps_over)
    release, most = (4.0, 0.5, 2), 50.0
    ledger = Ledger(tmp_path / "run", tmp_path / "all" / "runs" / "data", Limits(most, 0.01, 4.0))
    assert ledger.spent() == ledger.spent(delta=0.01) == 0.0
    with pytest.raises(Refused, match=r"noise multiplier 3.9; allowed: at least 4"):
        ledger.enter((3.9, 0.5, 2), 0.01)
    with pytest.raises(Refused, match=r"delta 0.011; allowed: at most 0.01"):
        ledger.enter(release, 0.011)
    ledger.enter(release, 0.001)  # at the ledger's own delta, not at the run's
    assert ledger.spent() == most
    with pytest.raises(Refused, match="of this data set over all runs"):
        ledger.enter((4.0, 0.5, 1), 0.01)
    assert ledger.history == (release,) == entered(tmp_path / "all" / "runs" / "data")
    alone = Ledger(tmp_path / "alone")
    alone.enter(release, 0.5)
    assert (alone.history, alone.spent(delta=0.01)) == ((release,), 0.0)  # it keeps no ledger of the data set
    free = Ledger(tmp_path / "free", tmp_path / "all" / "free", Limits(epsilon=100.0))
    free.enter((4000.0, 0.5, 2), 5e-6)  # at the run's delta, where the ledger has none of its own
    with pytest.raises(Refused, match="epsilon 150 of"):
        free.enter((4000.0, 0.5, 1), 5e-6)
    with pytest.raises(Refused, match="epsilon 150 of"):  # but not at 0.3, with which every epsilon is kept
        free.enter((1000.0, 0.5, 1), 0.3)
