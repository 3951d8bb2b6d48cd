"""The adapter between fusion strategies and Flower's grids: same digest, patience, named refusals."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message

from fedfuse.errors import UserError, WorldError
from fedfuse.network.exchange import Exchange, Patience
from fedfuse.network.policy import Policy
from fedfuse.network.remote_grid import RemoteGrid
from fedfuse.network.site import Site
from fedfuse.results.run_data import load
from fedfuse.runs.configuration import as_yaml
from fedfuse.runs.experiment import resume
from fedfuse.wire.records import nbytes
from tests.deploy.network import Network, lost, run, seats, tiny
from tests.federations import play


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedfuse.network.exchange.POLL", 0.01)


def test_looks_for_replies_are_the_rarer_the_longer_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedfuse.network.exchange.POLL", 0.3)
    slept: list[float] = []
    monkeypatch.setattr("fedfuse.network.exchange.time.sleep", slept.append)
    exchange = Exchange(Network(seats(tmp_path, 1)), Patience(), print, lambda message, node: message, None)
    for waited in (0.0, 4.0, 60.0):
        exchange.pause(waited)
    exchange.pause()
    assert slept == pytest.approx([0.05, 0.2, 0.3, 0.3])


@pytest.mark.parametrize("strategy", ["fedavg", "fedmd", "knfu"])
def test_sites_give_the_digest_of_inline(strategy: str, tmp_path: Path) -> None:
    built, _ = run(tiny(strategy), Network(seats(tmp_path, 3)), tmp_path / "run")
    assert built.digest == play(strategy).digest


def test_where_a_rounds_time_went_is_kept(tmp_path: Path) -> None:
    run(tiny("fedavg"), Network(seats(tmp_path, 3)), tmp_path / "run")
    timing = load(tmp_path / "run").timing.collect()
    parts = [f"{phase}/{part}" for phase in ("train", "evaluate") for part in ("out", "work", "back")]
    for client in range(3):
        mine = timing.filter(scope=f"wire:{client}")
        assert sorted(mine["what"].unique()) == sorted(parts)
        assert (mine["seconds"] >= 0).all()
    for phase in ("train", "evaluate"):  # all three are inside the phase, as the server timed it
        for round in (1, 2):
            whole = timing.filter(scope="server", what=phase, round=round)["seconds"].item()
            one = timing.filter(timing["what"].str.starts_with(phase), scope="wire:1", round=round)["seconds"].sum()
            assert 0 < one < whole


def test_a_node_may_act_as_several_clients(tmp_path: Path) -> None:
    config = tiny("knfu", "clients=4")
    built, said = run(config, Network(seats(tmp_path, 3)), tmp_path / "run")
    assert built.digest == play("knfu", "clients=4").digest
    assert any("acts as client 0, 3" in line for line in said)


def test_who_no_node_acts_as_is_sent_nothing_and_charged_nothing(tmp_path: Path) -> None:
    network = Network(seats(tmp_path, 3))
    network.away.add(102)
    built, _ = run(tiny("fedavg"), network, tmp_path / "run", Patience(join=0.2, clients=2))
    size, totals = nbytes(built.strategy.model), built.strategy.outbox.traffic.summary()
    assert totals["up_bytes"] == totals["down_bytes"] == totals["down_unique_bytes"] * 2 == 2 * 2 * size
    assert totals["evaluate_down_bytes"] == 2 * size
    assert load(tmp_path / "run").traffic.collect()["client"].unique().sort().to_list() == [0, 1]


def test_a_node_that_went_away_is_waited_for_and_costs_no_tries(tmp_path: Path) -> None:
    """What was known of who is online may be a second old; three tries were over in less."""
    network, asked = Network(seats(tmp_path, 3)), list[int]()

    def gone(message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "train" and message.metadata.dst_node_id == 101 and len(asked) < 6:
            network.away.add(101)
        return lost(message) if message.metadata.dst_node_id in network.away else reply

    def nodes() -> list[Any]:
        if 101 in network.away:
            asked.append(101)
            if len(asked) == 6:
                network.away.clear()
        return Network.get_nodes(network)

    network.reply, network.get_nodes = gone, nodes  # type: ignore[method-assign]
    built, said = run(tiny("knfu"), network, tmp_path / "run")
    assert built.digest == play("knfu").digest
    assert sum("sending again" in line for line in said) == 1


def test_lost_messages_and_replies_change_no_bit(tmp_path: Path) -> None:
    network, seen = Network(seats(tmp_path, 3)), dict[str, int]()

    def first_is_lost(message: Message, reply: Message) -> Message | None:
        key = f"{message.metadata.message_type}{message.metadata.dst_node_id}"
        seen[key] = seen.get(key, 0) + 1
        return lost(message) if seen[key] == 1 else reply

    network.reply = first_is_lost
    built, said = run(tiny("knfu"), network, tmp_path / "run")
    assert built.digest == play("knfu").digest
    assert built.strategy.inbox.failures == {"replies": 0, "rejected": 0, "retried": 0}
    assert any("sending again" in line for line in said)


def test_a_node_started_again_is_asked_again(tmp_path: Path) -> None:
    network = Network(seats(tmp_path, 3))

    def dies(message: Message) -> bool:
        asked = (message.metadata.message_type, message.metadata.dst_node_id) == ("train", 101)
        if asked and network.stamps[101] == "start":  # killed with the message in hand, back at once
            network.stamps[101] = "again"
            return False
        return True

    network.before = dies
    built, said = run(tiny("knfu"), network, tmp_path / "run")
    assert built.digest == play("knfu").digest
    assert any("was started again" in line for line in said)


def forged(kind: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    name = sorted(arrays)[0]
    first = arrays[name]
    if kind == "names":
        return {f"x{key}": value for key, value in arrays.items()}
    wrong = {
        "shape": first.reshape(1, *first.shape),
        "dtype": first.astype("float64"),
        "nan": np.full_like(first, np.nan),
        "size": np.zeros((100, *first.shape), "float32"),
    }
    return {**arrays, name: wrong[kind]}


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("names", r"left out: client 2: .*head.bias"),
        ("shape", r"left out: client 2: .*shape \(1, .*expected"),
        ("dtype", r"left out: client 2: .*float64.*expected.*float32"),
        ("nan", r"left out: client 2: .*not finite"),
        ("size", r"left out: client 2: .*shape \(100, .*expected"),
    ],
)
def test_a_forged_reply_is_named_in_the_log(
    kind: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = Network(seats(tmp_path, 3))

    def forge(message: Message, reply: Message) -> Message:
        about = message.metadata
        if about.message_type == "train" and about.dst_node_id == 102 and message.content["run"]["round"] == 1:
            record = ArrayRecord()
            for key, value in forged(kind, {k: v.numpy() for k, v in reply.content["arrays"].items()}).items():
                record[key] = Array(value)
            reply.content["arrays"] = record
        return reply

    network.reply = forge
    built, _ = run(tiny("fedavg"), network, tmp_path / "run", quiet=False)
    assert built.strategy.inbox.failures == {"replies": 0, "rejected": 1, "retried": 0}
    assert re.search(reason, capsys.readouterr().out)


def test_a_full_disk_is_the_worlds_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fedfuse.runs.directory.RunDirectory.round", full)
    with pytest.raises(WorldError, match=r"No space left on device.*the run can be resumed"):
        run(tiny("fedavg"), Network(seats(tmp_path, 3)), tmp_path / "run")


@pytest.mark.parametrize("file", ["attempt", "order.json"])
def test_a_deployed_run_is_not_resumed_as_a_simulation(file: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(as_yaml(tiny("fedavg")))
    (tmp_path / file).write_text("1")
    with pytest.raises(UserError, match=r"fedfuse deploy resume .* goes on"):
        resume(tmp_path)


def test_a_straggler_is_left_out_and_counted(tmp_path: Path) -> None:
    network = Network(seats(tmp_path, 3))
    network.before = lambda message: (
        not (message.metadata.dst_node_id == 102 and message.metadata.message_type == "train")
    )
    built, said = run(tiny("fedavg"), network, tmp_path / "run", Patience(deadline=0.5))
    assert built.strategy.inbox.failures["replies"] == 2
    assert built.strategy.inbox.ever_left_out
    assert any("client 2: no reply within 0.5 s" in line for line in said)


class Refusing(Network):
    """Does not take so many messages for a node that is online all the while, as Flower does of a node it deletes."""

    refusals = 0

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        keys = []
        for message in messages:
            refused = self.refusals > 0 and (message.metadata.message_type, message.metadata.dst_node_id) == (
                "train",
                102,
            )
            self.refusals -= refused
            keys += [""] if refused else super().push_messages([message])
        return keys


@pytest.mark.parametrize(("refusals", "failures"), [(2, 0), (3, 1)])
def test_what_flower_does_not_take_is_sent_again_and_then_not_waited_for(
    refusals: int, failures: int, tmp_path: Path
) -> None:
    network = Refusing(seats(tmp_path, 3))
    network.refusals = refusals
    built, said = run(tiny("fedavg"), network, tmp_path / "run", Patience(retries=2, deadline=3.0))
    assert built.strategy.inbox.failures["replies"] == failures
    assert (built.digest == play("fedavg").digest) == (not failures)
    assert not any("no reply within" in line for line in said)


def test_too_few_replies_are_asked_again_then_the_run_stops(tmp_path: Path) -> None:
    network = Network(seats(tmp_path, 3))
    network.before = lambda message: (
        not (message.metadata.dst_node_id == 102 and message.metadata.message_type == "train")
    )
    with pytest.raises(WorldError, match="2 of 3 clients replied, at least 3 are needed"):
        run(tiny("fedavg"), network, tmp_path / "run", Patience(deadline=0.3, minimum=3))
    assert network.log.count("train>102") == 2
    assert network.log.count("train>100") == 1


def test_a_server_that_was_lost_goes_on_with_the_same_digest(tmp_path: Path) -> None:
    network = Network(seats(tmp_path, 3))

    def crashes(message: Message, reply: Message) -> Message | None:
        if message.metadata.message_type == "train" and message.content["run"]["round"] == 2:
            raise KeyboardInterrupt
        return reply

    network.reply = crashes
    with pytest.raises(KeyboardInterrupt):
        run(tiny("knfu"), network, tmp_path / "run")
    network.reply = lambda message, reply: reply
    built, _ = run(tiny("knfu"), network, tmp_path / "run", resumed=True)
    assert built.digest == play("knfu").digest


def test_a_site_knows_a_state_that_its_disk_lost_a_part_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What it answered for is kept through a loss of power, or not taken for what it was."""
    network = Network(seats(tmp_path, 3))

    def tears(message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "train":
            for path in (tmp_path / "site-1").rglob("*.state"):
                content = bytearray(path.read_bytes())
                content[-1] ^= 1
                path.write_bytes(content)
        return reply

    network.reply = tears
    run(tiny("scaffold", "train.max_steps=1"), network, tmp_path / "run")
    assert "client 1: state 1.1 is here and torn" in capsys.readouterr().out


def test_what_a_replaced_server_sends_is_refused(tmp_path: Path) -> None:
    network, old = Network(seats(tmp_path, 3)), list[Message]()

    def keeps(message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "train" and not old:
            old.append(message)
        return reply

    network.reply = keeps
    run(tiny("fedavg"), network, tmp_path / "run")
    old[0].content["setting"]["attempt"] = 0
    reply = Site(network.seats[100]).handle(old[0])
    assert reply.has_error()
    assert "was replaced by attempt" in reply.error.reason


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (Policy(strategies=("fedavg",)), "site policy: strategy=knfu; allowed: fedavg"),
        (Policy(data=("mnist",)), "site policy: data=digits; allowed: mnist"),
        (Policy(max_rounds=1), "site policy: rounds=2; allowed: at most 1"),
        (Policy(max_epochs=0), "site policy: train.epochs=1"),
        (Policy(min_examples=10_000), "training examples; at least 10000 are needed"),
        (Policy(require_dp=True), "differential privacy is required"),
    ],
)
def test_site_policy_is_named(policy: Policy, reason: str, tmp_path: Path) -> None:
    network = Network([replace(seat, policy=policy) for seat in seats(tmp_path, 3)])
    with pytest.raises(WorldError, match="turned away") as error:
        run(tiny("knfu"), network, tmp_path / "run")
    assert reason in str(error.value)
    assert not any(path.suffix == ".state" for path in tmp_path.rglob("site-*/**/*"))


def test_nodes_must_agree_on_the_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedfuse.network import site
    from fedfuse.network.handshake import identity

    monkeypatch.setattr(site, "identity", lambda *words: {**identity(*words), "transfer": "0" * 64})
    with pytest.raises(WorldError, match="transfer: the node has 000000000000, the server"):
        run(tiny("fedmd"), Network(seats(tmp_path, 3)), tmp_path / "run")


def test_a_client_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(WorldError, match=r"no node acts as client \[2\]"):
        run(tiny("fedavg"), Network(seats(tmp_path, 3)[:2]), tmp_path / "run", Patience(join=0.2))


@pytest.mark.parametrize(("there", "least", "begins"), [(1, 1, True), (2, 2, True), (1, 2, False), (0, 0, False)])
def test_a_run_begins_with_as_many_clients_as_it_was_told_and_with_one_at_least(
    there: int, least: int, begins: bool
) -> None:
    class Present(RemoteGrid):
        def _greeted(self, answered: Any, *about: Any) -> Any:
            return [(item.node, [item.node - 100], None) for item, _ in answered]

    network = Network([SimpleNamespace(data=None, state="here")] * there)  # type: ignore[list-item]
    grid = Present(network, {}, Patience(join=0.05, clients=least), say=lambda line: None)
    if begins:
        assert len(grid.join(3, lambda hello: [])) == there
        return
    with pytest.raises(WorldError, match="no node acts as client"):
        grid.join(3, lambda hello: [])


def test_foreign_code_is_refused(tmp_path: Path) -> None:
    config = tiny("fedavg")
    config = replace(config, loss=replace(config.loss, build="os:system"))
    network = Network(seats(tmp_path, 3))
    with pytest.raises((WorldError, UserError), match=r"loss.build=os:system|os:system"):
        run(config, network, tmp_path / "run")
