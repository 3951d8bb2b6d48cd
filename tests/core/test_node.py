"""A node alone: what it refuses, what it commits, what it remembers."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedfuse import AveragingStrategy, FusionClient, Metrics, Topic, arrays
from fedfuse.config import registry
from fedfuse.config.registry import NoHyper
from fedfuse.core.asked import parcels
from fedfuse.core.groups import Groups
from fedfuse.core.node import Node, place, state_sha
from fedfuse.core.shares import FAILED, FULL, INVALID, REFUSED, STALE
from fedfuse.engines.inline import InlineGrid
from fedfuse.errors import WorldError
from fedfuse.network.site_memory import SiteMemory
from fedfuse.wire.client_store import INITIAL, ClientStore
from fedfuse.wire.knowledge import Cache, Parcel
from fedfuse.wire.records import nbytes, record, sha_arrays, tensors
from fedfuse.wire.sums import Sum
from tests.federations import TINY, federation, intercept, play, scenario_of
from tests.ledger import Ledger, LedgerClient, enter


def asked(name: str, *words: str, round: int = 1) -> list[Message]:
    """The messages of a strategy's first training phase."""
    with federation(name, *words) as (built, _):
        built.strategy.phase = "train"
        return list(built.strategy.configure_train(round, ArrayRecord(), ConfigRecord(), built.grid))


def scored(name: str, *words: str) -> list[Message]:
    """The messages of an evaluation before any training."""
    with federation(name, *words) as (built, _):
        built.strategy.ensure_begun()
        built.strategy.phase = "train"
        return list(built.strategy.configure_evaluate(0, ArrayRecord(), ConfigRecord(), built.grid))


def node(name: str, directory: Path, *words: str, **options) -> Node:
    scenario = scenario_of((*TINY, f"strategy={name}", *words))[1]
    return place(registry.entry(name), scenario, ClientStore(directory), **options)


def changed(message: Message, kind: str | None = None, **records) -> Message:
    """A copy of a message with entries of its records exchanged; None takes one away."""
    content = RecordDict(dict(message.content.items()))
    for key, value in records.items():
        if isinstance(value, dict):
            entries = {k: v for k, v in {**dict(content[key]), **value}.items() if v is not None}
            content[key] = ConfigRecord(entries)
        elif value is None:
            del content[key]
        else:
            content[key] = value
    metadata = message.metadata
    return Message(content, dst_node_id=metadata.dst_node_id, message_type=kind or metadata.message_type)


def failure(reply: Message) -> tuple[int, str]:
    assert reply.has_error()
    return reply.error.code, reply.error.reason


# --- refusals ---------------------------------------------------------------------------------------------


def poisoned(content: ArrayRecord) -> ArrayRecord:
    arrays = {k: v.clone() for k, v in tensors(content).items()}
    next(iter(arrays.values())).view(-1)[0] = float("nan")
    return record(arrays)


def renamed(content: ArrayRecord) -> ArrayRecord:
    return record({f"{k}x": v for k, v in tensors(content).items()})


REFUSALS = {
    "a stranger": (lambda m: changed(m, config={"client": 99}), REFUSED, "client 99 does not live here"),
    "a client below zero": (lambda m: changed(m, config={"client": -1}), REFUSED, "client -1 does not live here"),
    "another verb": (lambda m: changed(m, "query.secrets"), REFUSED, "message type 'query.secrets' is not known"),
    "another strategy": (lambda m: changed(m, run={"strategy": "knfu"}), REFUSED, "strategy 'knfu' does not run here"),
    "another hyper-parameter": (lambda m: changed(m, run={"hyper.evil": 1}), REFUSED, "hyper-parameter 'evil' is not"),
    "a wrong hyper-parameter": (
        lambda m: changed(m, run={"hyper.weighting": "mine"}),
        REFUSED,
        "strategy.weighting=mine: fedavg allows",
    ),
    "another topic": (lambda m: changed(m, config={"parcel.topic": ["secret"]}), REFUSED, "topic 'secret' is not one"),
    "a parcel that is not there": (
        lambda m: changed(m, config={"parcel.record": ["nothing"]}),
        INVALID,
        "record 'nothing' is announced but not there",
    ),
    "poison": (lambda m: changed(m, arrays=poisoned(m.content["arrays"])), INVALID, "not finite"),
    "other names": (lambda m: changed(m, arrays=renamed(m.content["arrays"])), INVALID, "received model: missing"),
    "an unknown state": (lambda m: changed(m, config={"tag": "9.1"}), STALE, "state 9.1 is not here"),
    "a state elsewhere": (
        lambda m: changed(m, config={"tag": "../../../../etc/passwd"}),
        REFUSED,
        "tag '../../../../etc/passwd' is not",
    ),
    "a new state elsewhere": (
        lambda m: changed(m, config={"new-tag": "../../evil"}),
        REFUSED,
        "tag '../../evil' is not",
    ),
    "a phase that is none": (lambda m: changed(m, "train.load"), REFUSED, "phase 'load' is not one of fedavg's"),
    "a hidden phase": (lambda m: changed(m, "train.__init__"), REFUSED, "phase '__init__' is not one of fedavg's"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_refusals_are_named_and_change_nothing(what: str, tmp_path: Path) -> None:
    spoil, code, words = REFUSALS[what]
    message = asked("fedavg")[0]
    cache, here = Cache(), node("fedavg", tmp_path / "store")
    got, reason = failure(here.handle(spoil(message), cache))
    assert (got, words in reason) == (code, True), (got, reason)
    assert "\n" not in reason
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    assert here.handle(message, Cache()).has_content()


def test_a_node_without_the_knowledge_is_stale(tmp_path: Path) -> None:
    message = asked("fedavg")[0]
    bare = changed(message, arrays=None, config={k: None for k in message.content["config"] if k.startswith("parcel.")})
    code, reason = failure(node("fedavg", tmp_path).handle(bare, Cache()))
    assert (code, reason) == (STALE, "model: holds nothing, the server counts on version 0")


def test_a_client_that_raises_is_named_with_the_place(tmp_path: Path, monkeypatch) -> None:
    class Falls(LedgerClient):
        def fit(self):
            raise ValueError("first line\nsecond")

    name = enter(monkeypatch, Ledger, Falls)
    code, reason = failure(node(name, tmp_path).handle(asked(name)[0], Cache()))
    assert code == FAILED
    assert reason.startswith("ValueError: first line second (fit, test_node.py:")


def test_a_full_disk_is_not_the_clients_fault(tmp_path: Path, monkeypatch) -> None:
    import errno

    name = enter(monkeypatch)
    here = node(name, tmp_path, retries=2)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(here.store, "save", full)
    code, reason = failure(here.handle(asked(name)[0], Cache()))
    assert code == FULL
    assert "No space left on device" in reason


# --- what is committed ------------------------------------------------------------------------------------


def test_evaluation_commits_nothing(tmp_path: Path) -> None:
    here, store = node("local", tmp_path), ClientStore(tmp_path)
    trained = here.handle(asked("local")[0], Cache())
    tag = trained.content["config"]["tag"]
    before = state_sha(store.load(0, tag))
    message = changed(scored("local")[0], config={"tag": tag})
    first, second = (here.handle(message, Cache()) for _ in range(2))
    assert first.content["config"]["sha"] == second.content["config"]["sha"] == before
    assert state_sha(store.load(0, tag)) == before
    assert [p.name for p in (tmp_path / "00" / "0").iterdir()] == [f"{tag}.state"]


def test_an_empty_state_hashes_the_empty_record(tmp_path: Path) -> None:
    reply = node("fedavg", tmp_path).handle(scored("fedavg")[0], Cache())
    assert reply.content["config"]["sha"] == state_sha({})
    trained = node("fedavg", tmp_path).handle(asked("fedavg")[0], Cache())
    assert trained.content["config"]["tag"] == INITIAL
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_a_state_says_more_than_its_tensors() -> None:
    zero = torch.zeros(1)
    states = [{}, {"a": 1}, {"a": 1.0}, {"a": True}, {"a": "1"}, {"a=": zero}, {"a": zero}, {"a": 1, "a=": zero}]
    assert len({state_sha(state) for state in states}) == len(states)


def test_clients_of_one_process_do_not_leak_into_each_other(tmp_path: Path) -> None:
    """Reversed order, other neighbours: the same replies."""
    messages = asked("local")
    forth, back = node("local", tmp_path / "a"), node("local", tmp_path / "b")
    for message in messages:
        forth.handle(message, Cache())
    for message in reversed(messages):
        back.handle(message, Cache())
    for client in range(3):
        a, b = (ClientStore(tmp_path / side).load(client, "1.1") for side in "ab")
        assert state_sha(a) == state_sha(b)


def test_a_lesson_is_taken_in_once(tmp_path: Path, monkeypatch) -> None:
    taken: list[tuple[int, int]] = []

    class Counts(LedgerClient):
        def receive(self, knowledge):
            super().receive(knowledge)
            if "advice" in knowledge:
                taken.append((self.client, knowledge["advice"].version))

    name = enter(monkeypatch, Ledger, Counts)
    with federation(name, "rounds=4", "strategy.every=9") as (built, _):
        built.run()
    last = [(c, 4) for c in range(3)]  # the last evaluation shows it, and commits nothing
    assert sorted(v for v in taken if v[1] < 4) == sorted([(c, v) for c in range(3) for v in (1, 2, 3)] * 2)
    assert sorted(v for v in taken if v[1] == 4) == last
    taken.clear()
    with federation(name, "rounds=4", "evaluate.every=4", "strategy.every=9") as (built, _):
        built.run()
    assert sorted(taken) == sorted((c, v) for c in range(3) for v in (1, 2, 3, 4))


def test_of_several_lessons_the_newest_tells_the_version(monkeypatch) -> None:
    told: list[tuple[int, list[int]]] = []

    class Hears(LedgerClient):
        def receive(self, knowledge):
            super().receive(knowledge)
            told.append((self.version, [knowledge[name].version for name in ("advice", "news") if name in knowledge]))

    class Both(Ledger):
        topics = {**Ledger.topics, "news": Topic("lesson", arrays(v=(1,)))}

        def begin(self):
            super().begin()
            self.publish("news", {"v": torch.zeros(1)})

        def fuse(self, shares):
            list(shares)
            self.publish("advice", {"v": torch.ones(1)})

    play(enter(monkeypatch, Both, Hears), "rounds=3", "evaluate.every=9")
    play("ledger", "rounds=3", "participation=0.34", "evaluate.every=9")
    assert all(version == max(versions, default=-1) for version, versions in told)
    assert any(len(set(versions)) > 1 for _, versions in told)


def test_what_is_distilled_for_an_evaluation_is_not_distilled_again(monkeypatch) -> None:
    """A personal client's memo: knfu's step (d) runs once a lesson although each round is evaluated."""
    from fedfuse.strategies.knfu import KnFuClient

    taken = []
    receive = KnFuClient.receive
    monkeypatch.setattr(KnFuClient, "receive", lambda self, k: (taken.append(self.client), receive(self, k)))
    with federation("knfu", "rounds=3") as (built, _):
        built.run()
    assert len(taken) == 3 * 3


@pytest.mark.parametrize("words", [("runtime.vectorize='off'",), ("runtime.vectorize=auto",)])
def test_what_a_client_freezes_the_next_one_trains(words: tuple[str, ...], monkeypatch) -> None:
    """On Ray the next client sits elsewhere; a replica made of a model that is partly frozen trains all of it too."""

    found: list[tuple[int, bool, bool]] = []

    class Freezes(FusionClient):
        def fit(self):
            first, whole = next(iter(self.model.parameters())), all(p.requires_grad for p in self.model.parameters())
            before = first.detach().clone()
            first.requires_grad_(self.client != 0)
            metrics = self.train()
            found.append((self.client, whole, not torch.equal(before, first)))
            return metrics

    with federation(
        enter(monkeypatch, AveragingStrategy, Freezes, NoHyper, "freezes"), "rounds=3", "clients=4", *words
    ) as (
        built,
        _,
    ):
        built.run()
    assert sorted(found) == sorted([(client, True, client != 0) for client in range(4)] * 3)


@pytest.mark.parametrize("how", ["attribute", "in place", "model"])
def test_what_receive_leaves_on_the_client_is_there_after_an_evaluation(how: str, monkeypatch) -> None:
    """The memo of an evaluation holds state and model: whoever remembers more receives once more."""

    class Remembers(LedgerClient):
        personal = True

        def __init__(self, **given):
            super().__init__(**given)
            if how == "in place":
                self.notes = {}

        def receive(self, knowledge):
            if how == "attribute":
                self.advised = knowledge["advice"].arrays["v"]
            elif how == "in place":
                self.notes["v"] = knowledge["advice"].arrays["v"]
            else:
                self.model = torch.nn.Linear(1, 1)

        def fit(self):
            there = {
                "attribute": "advised" in vars(self),
                "in place": bool(vars(self).get("notes")),
                "model": isinstance(self.model, torch.nn.Linear),
            }
            self.state["there"] = [*self.state.get("there", []), int(there[how])]
            self.amount = torch.zeros(1, dtype=torch.float64)
            return {"num-examples": len(self.x)}

        def weights(self):
            return {}

        def load(self, arrays, strict=True):
            pass

    class Advises(Ledger):
        topics = {"advice": Ledger.topics["advice"]}

        def begin(self):
            pass

        def fuse(self, shares):
            for share in shares:
                self.publish("advice", {"v": torch.zeros(1)}, to=share.client)

    name = enter(monkeypatch, Advises, Remembers)
    for every in (1, 9):
        with federation(name, "rounds=3", f"evaluate.every={every}") as (built, directory):
            built.run()
            state = directory.clients.load(0, built.strategy.outbox.tags[0])
        assert state["there"] == [0, 1, 1]


def test_waiting_for_others_is_no_time_of_ones_own(tmp_path: Path) -> None:
    here, message = node("local", tmp_path), asked("local")[0]
    waited = iter([50.0, 80.0])  # seconds, before this message and after it
    here.desk.away = lambda: next(waited)  # type: ignore[method-assign]
    started = time.perf_counter()
    reply = here.handle(message, Cache())
    elapsed = time.perf_counter() - started
    assert -30 < float(reply.content["metrics"]["seconds"]) < elapsed - 30


def test_who_may_be_stopped_or_keeps_a_ledger_trains_alone(tmp_path: Path) -> None:
    asked_for = ("runtime=ray", "runtime.vectorize=auto")
    assert node("local", tmp_path, *asked_for).vectorized
    assert not node("local", tmp_path, "runtime=ray", "runtime.vectorize='off'").vectorized
    assert not node("local", tmp_path, *asked_for, "runtime.client_timeout=5").vectorized
    assert not node("local", tmp_path, *asked_for, ledger=object()).vectorized


# --- groups -----------------------------------------------------------------------------------------------


def test_a_group_is_summed_beside_its_clients(tmp_path: Path) -> None:
    """One message carries Σ n·w of the valid members; every reply says the bytes of its own arrays."""
    messages = asked("fedavg")
    plain = [node("fedavg", tmp_path).handle(m, Cache()) for m in messages]
    expected = Sum()
    for reply in plain:
        expected.add(0, tensors(reply.content["arrays"]), float(reply.content["metrics"]["num-examples"]))
    replies = Groups(node("fedavg", tmp_path)).one(messages, [Cache() for _ in messages])
    size = nbytes(tensors(plain[0].content["arrays"]))
    for reply in replies:
        assert "arrays" not in reply.content
        assert list(reply.content["config"]["summed.record"]) == ["model"]
        assert list(reply.content["config"]["summed.bytes"]) == [size]
    assert [("sum:model" in r.content) for r in replies] == [False, False, True]
    value, weight = expected.group()
    assert sha_arrays(tensors(replies[-1].content["sum:model"])) == sha_arrays(value)
    assert replies[-1].content["config"]["weight:model"] == weight


def test_a_groups_last_valid_member_carries_the_sum(tmp_path: Path) -> None:
    messages = asked("fedavg")
    messages[2] = changed(messages[2], config={"tag": "7.1"})
    replies = Groups(node("fedavg", tmp_path)).one(messages, [Cache() for _ in messages])
    assert replies[2].has_error()
    assert "sum:model" in replies[1].content


@pytest.mark.parametrize("words", [(), ("runtime.vectorize=auto",)])
def test_inline_sums_as_ray_does_unless_single_replies_are_asked_for(tmp_path: Path, words: tuple[str, ...]) -> None:
    grid = InlineGrid(node("fedavg", tmp_path, *words))
    summed = list(grid.send_and_receive(asked("fedavg")))
    assert ["arrays" in reply.content for reply in summed] == [False, False, False]
    grid.whole = True
    whole, expected = list(grid.send_and_receive(asked("fedavg"))), Sum()
    for reply in whole:
        expected.add(0, tensors(reply.content["arrays"]), float(reply.content["metrics"]["num-examples"]))
    assert sha_arrays(tensors(summed[-1].content["sum:model"])) == sha_arrays(expected.group()[0])


def test_parcels_are_taken_once_into_each_cache(tmp_path: Path) -> None:
    """Messages of a phase share the list that names them; a cache that lacks them is not passed over."""
    first, second, _ = asked("fedavg")
    assert first.content["config"]["parcel.version"] is second.content["config"]["parcel.version"]
    here, cache, other = node("fedavg", tmp_path), Cache(), Cache()
    assert here.handle(first, cache).has_content()
    assert here.handle(second, cache).has_content()
    assert here.handle(second, other).has_content()
    assert cache.keys() == other.keys() == {("model", "")}


def test_a_phase_is_read_anew_where_its_messages_say_something_else(tmp_path: Path) -> None:
    here = node("fedavg", tmp_path)
    first, second, third = asked("fedavg")
    assert here.handle(first, Cache()).has_content()
    assert failure(here.handle(changed(second, run={"strategy": "local"}), Cache()))[0] == REFUSED
    assert failure(here.handle(changed(second, kind="train.nonsense"), Cache()))[0] == REFUSED
    assert here.handle(changed(third, kind="evaluate"), Cache()).content["config"]["phase"] == "train"


def test_what_is_refused_once_is_refused_again(tmp_path: Path) -> None:
    """Messages of a phase share the record that names hyper-parameters; the last good ones do not stand in for it."""
    here = node("fedprox", tmp_path)
    first, second, _ = asked("fedprox")
    assert here.handle(first, Cache()).has_content()
    bad = changed(second, run={"hyper.nonsense": 1})
    assert [failure(here.handle(bad, Cache()))[0] for _ in range(2)] == [REFUSED] * 2
    assert here.handle(second, Cache()).has_content()


def test_an_invalid_member_is_left_out_before_it_is_summed(tmp_path: Path, monkeypatch) -> None:
    from fedfuse.core.client import FusionClient

    class Poisons(FusionClient):
        def share(self):
            weights = self.weights()
            if self.client == 1:
                next(iter(weights.values())).fill_(float("inf"))
            return {"model": weights}

    entry = registry.entry("fedavg")
    enter(monkeypatch, entry.server, Poisons, entry.hyper, "fedavg")
    replies = Groups(node("fedavg", tmp_path)).one(asked("fedavg"), [Cache() for _ in range(3)])
    assert failure(replies[1])[0] == INVALID
    assert all(bool(torch.isfinite(v).all()) for v in tensors(replies[2].content["sum:model"]).values())


# --- a site's memory --------------------------------------------------------------------------------------


def test_a_site_answers_a_repeated_message_from_its_disk(tmp_path: Path, monkeypatch) -> None:
    message = asked("local")[0]
    first = SiteMemory(tmp_path, node("local", tmp_path)).handle(message)
    monkeypatch.setattr(Node, "handle", lambda *a, **k: pytest.fail("computed a second time"))
    again = SiteMemory(tmp_path, node("local", tmp_path)).handle(message)
    assert dict(again.content["config"]) == dict(first.content["config"])
    assert dict(again.content["metrics"]) == dict(first.content["metrics"])


def test_a_cached_reply_keeps_every_bit(tmp_path: Path) -> None:
    message = asked("knfu")[1]
    first = SiteMemory(tmp_path, node("knfu", tmp_path)).handle(message)
    again = SiteMemory(tmp_path, node("knfu", tmp_path)).handle(message)
    for name, content in first.content.array_records.items():
        a, b = content, again.content.array_records[name]
        assert {k: (v.dtype, v.shape, v.data) for k, v in a.items()} == {
            k: (v.dtype, v.shape, v.data) for k, v in b.items()
        }
    assert json.dumps(dict(first.content["metrics"])) == json.dumps(dict(again.content["metrics"]))


def test_another_start_is_another_message(tmp_path: Path) -> None:
    """After a lost commit the server names another state: the cached reply is not it."""
    message = asked("local")[0]
    site = SiteMemory(tmp_path, node("local", tmp_path))
    site.handle(message)
    other = changed(message, run={"round": 2}, config={"new-tag": "2.1"})
    assert site.handle(other).content["config"]["tag"] == "2.1"
    assert site.handle(changed(other, run={"run": "another"})).content["metrics"] is not None


def test_what_a_message_announces_is_what_it_carries() -> None:
    message = asked("fedavg")[0]
    (parcel,) = parcels(message.content, message.content["config"])
    assert isinstance(parcel, Parcel)
    assert (parcel.topic, parcel.to, parcel.version, parcel.since) == ("model", "", 0, -1)


def test_a_message_of_flowers_own_strategies_is_answered(tmp_path: Path) -> None:
    arrays = asked("fedavg")[0].content["arrays"]
    content = RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": 3})})
    reply = node("fedavg", tmp_path).handle(Message(content, dst_node_id=2, message_type="train"), Cache())
    assert set(reply.content) == {"arrays", "metrics"}
    assert isinstance(reply.content["metrics"], MetricRecord)


class Keeping(FusionClient):
    """Keeps something of its own under a name that it is told."""

    name, found = "model", list[Any]()

    def fit(self) -> Metrics:
        self.found.append(self.state.get(self.name))
        self.state[self.name] = {"mine": torch.ones(1)}
        return self.train()


def test_a_client_without_a_model_of_its_own_may_keep_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Keeping, "found", [])
    enter(monkeypatch, AveragingStrategy, Keeping)
    states = play("ledger", "clients=1", path=tmp_path / "run").directory.clients
    assert [found and list(found) for found in Keeping.found] == [None, ["mine"]]
    assert list(states.load(0, "2.1")) == ["model"]


@pytest.mark.parametrize(
    ("name", "words"),
    [("seen", r"Keeping.state\['seen'\]"), ("spent", "Keeping.state"), ("optimizer", "train.optimizer_state=keep")],
)
def test_names_of_the_platform_are_told(name: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Keeping, "name", name)
    monkeypatch.setattr(Keeping, "personal", name == "optimizer")
    enter(monkeypatch, AveragingStrategy, Keeping)
    with pytest.raises(WorldError, match=words):
        play("ledger", "clients=1", f"train.optimizer_state={'keep' if Keeping.personal else 'fresh'}")


class Measuring(FusionClient):
    """Returns a metric that it is told, and notes in which mode it was handed its model."""

    value: Any = 0.0
    modes = list[bool]()

    def fit(self) -> Metrics:
        self.modes.append(self.model.training)
        self.model.eval()  # and leaves it so to whoever comes next
        return {"mine": self.value}


@pytest.mark.parametrize("grid", ["inline", "serial"])
@pytest.mark.parametrize(
    ("value", "told"),
    [
        (torch.tensor(0.5, requires_grad=True), 0.5),
        (np.float32(0.1), float(np.float32(0.1))),
        (np.int64(3), 3),
        (torch.tensor([2])[0], 2),
        (True, 1),
        ([np.float32(0.5), 1.0], None),
    ],
    ids=str,
)
def test_a_number_of_any_library_is_a_metric(value: Any, told: Any, grid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Measuring, "value", value)
    monkeypatch.setattr(Measuring, "modes", [])
    enter(monkeypatch, AveragingStrategy, Measuring)
    got = []
    play("ledger", "rounds=1", beforehand=lambda built: intercept(
        built, lambda reply: got.append(dict(reply.content["metrics"])), kind="train"), grid=grid)  # fmt: skip
    assert [metrics["mine"] for metrics in got] == [[0.5, 1.0] if told is None else told] * 3
    assert {type(metrics["mine"]) for metrics in got} == {list if told is None else type(told)}
    assert all(metrics["num-examples"] > 0 for metrics in got)
    assert Measuring.modes == [True] * 3


@pytest.mark.parametrize(
    ("value", "kind"),
    [("high", "str"), (torch.ones(2), "Tensor"), (None, "NoneType"), ([1, 0.5], "list"), (1j, "complex")],
)
def test_a_metric_that_is_no_number_is_named(value: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Measuring, "value", value)
    enter(monkeypatch, AveragingStrategy, Measuring)
    with pytest.raises(WorldError, match=rf"fit\(\) of Measuring: metric 'mine' is .*, a {kind}; allowed: .*a float"):
        play("ledger", "rounds=1")


def test_freed_memory_goes_back_between_many_clients(monkeypatch):
    """3,000 clients' evaluations left 600 MB of holes; giving them back changes no bit."""
    given, undisturbed = [], play("fedavg").digest
    monkeypatch.setattr("fedfuse.core.node.TRIMMED", 3)
    monkeypatch.setattr("fedfuse.core.node.give_back", lambda: given.append(1))
    assert play("fedavg").digest == undisturbed
    assert len(given) == 4  # three clients train and are scored twice
