"""Secure sums over a network: the digest of the same sums in simulation, and nothing but sums at the server."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from fedfuse import AveragingStrategy, FusionClient, arrays
from fedfuse.config import registry
from fedfuse.config.registry import NoHyper
from fedfuse.core.secure import secure_notes
from fedfuse.errors import Refused, UserError, WorldError
from fedfuse.network.exchange import Patience
from fedfuse.network.policy import Policy, policy_from
from fedfuse.network.site import SiteConfig
from fedfuse.results.run_data import load
from fedfuse.wire.fixed_point import FixedPoint
from fedfuse.wire.records import record
from tests.deploy.network import Network, lost, run, seats, tiny
from tests.federations import federation, play
from tests.ledger import enter

SECURE = ("secure=on", "clients=4")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedfuse.network.exchange.POLL", 0.01)


@pytest.mark.parametrize("words", [
    ("fedavg", *SECURE, "partition=dirichlet"), ("scaffold", *SECURE), ("fedmd", *SECURE),
    ("fedavg", "secure=on", "clients=7", "secure.num_shares=3", "secure.reconstruction_threshold=2"),
])  # fmt: skip
def test_sites_give_the_digest_of_the_same_sums_in_simulation(words: tuple[str, ...], tmp_path: Path) -> None:
    built, _ = run(tiny(*words), Network(seats(tmp_path, int(words[2][-1]))), tmp_path / "run")
    plain = [word for word in words if not word.startswith("secure")]
    assert built.digest == play(*words).digest != play(*plain).digest


def test_the_sums_of_a_phase_of_its_own_are_secure_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Counts(FusionClient):
        def probe(self) -> dict[str, Any]:
            return {"count": {"n": torch.tensor([1.0 + self.client])}}

    class Counted(AveragingStrategy):
        setup = ("probe",)
        records_probe = {"count": arrays(n=(1,))}
        sums = {"model": "num-examples", "count": None}  # type: ignore[assignment]

        def fuse_probe(self, shares: Any) -> None:
            self.state["mean"] = shares.mean("count")["n"]

    words = (enter(monkeypatch, Counted, Counts, NoHyper, "counted"), *SECURE, "rounds=1")
    network = Network(seats(tmp_path, 4))
    built, _ = run(tiny(*words), network, tmp_path / "run")
    assert built.strategy.state["mean"].item() == pytest.approx(2.5, abs=1e-3)
    assert built.digest == play(*words).digest


def test_the_quantised_sum_is_the_same_beside_workers_and_in_any_order() -> None:
    words = ("fedavg", "secure=on", "clients=10", "partition=dirichlet")
    assert (
        len({play(*words, **how).digest for how in ({}, {"reverse": True}, {"grid": "serial"}, {"grid": "ray"})}) == 1
    )


@pytest.mark.parametrize(("most", "refused"), [(4.0, False), (None, True), (math.inf, True)])
def test_a_declared_metric_may_weigh_secure_sums(most: float | None, refused: bool, monkeypatch) -> None:
    entry = registry.entry("fedavg")

    class Weighed(entry.client):  # type: ignore[misc, name-defined]
        def fit(self) -> Any:
            return {**super().fit(), "weight": 1.0 + self.client}

    class Server(entry.server):  # type: ignore[misc, name-defined]
        sums = {"model": "weight"}
        metrics = {} if most is None else {"weight": (0, most)}

    monkeypatch.setitem(registry.registered, "fedavg", entry._replace(client=Weighed, server=Server))
    if refused:
        with pytest.raises(UserError, match="model is weighed by weight, whose largest value `metrics` does not say"):
            play("fedavg", *SECURE)
        return
    with (
        federation("fedavg", *SECURE, "rounds=1") as (secure, _),
        federation("fedavg", *SECURE[1:], "rounds=1") as (plain, _),
    ):
        secure.run()
        plain.run()
        for name, value in plain.strategy.published("model").items():
            torch.testing.assert_close(secure.strategy.published("model")[name], value, rtol=0, atol=1e-3)
        assert not secure.strategy.inbox.ever_left_out


def reached(*roots: Any) -> Iterator[Any]:
    """Every object that can be reached: what a process holds, with what its functions hold; not the sites' side."""
    seen: dict[int, Any] = {}
    left = list(roots)
    while left:
        value = left.pop()
        if id(value) in seen or isinstance(value, type | ModuleType | Network | str | int | float):
            continue
        seen[id(value)] = value
        yield value
        left += value.__closure__ or () if isinstance(value, FunctionType) else gc.get_referents(value)


def test_the_server_holds_and_receives_no_clients_own_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own: dict[tuple[int, str], np.ndarray] = {}
    steps = FixedPoint.quantised

    def quantised(point: FixedPoint, value: torch.Tensor, weight: float) -> torch.Tensor:
        out = steps(point, value, weight)
        own[len(own), "float"] = value.numpy().copy()
        own[len(own), "steps"] = out.numpy().copy()
        return out

    monkeypatch.setattr(FixedPoint, "quantised", quantised)  # only sites quantise here
    network, received = Network(seats(tmp_path, 4)), list[Any]()
    network.reply = lambda message, reply: (
        received.append(reply.content if reply.has_content() else reply.error) or reply
    )
    built, _ = run(tiny("fedavg", *SECURE, "rounds=1", "evaluate.every=9"), network, tmp_path / "run")
    assert len(own) == 2 * 4 * 4  # four clients' four arrays, each as floats and as steps
    held, blobs = list[np.ndarray](), list[bytes]()
    for value in reached(received, built):
        if isinstance(value, torch.Tensor | np.ndarray):
            held.append(value.detach().numpy() if isinstance(value, torch.Tensor) else value)
        elif isinstance(value, bytes) and len(value) > 100:
            blobs.append(value)
    assert sum(array.dtype == np.int32 for array in held) >= 4 * 4  # what they sent is among them
    as_text = [array.ravel().astype(np.float64).tobytes() for array in held]
    for mine in own.values():
        assert mine.ravel().astype(np.float64).tobytes() not in as_text
        assert not any(mine.tobytes() in blob for blob in blobs)
        for array in held:  # nor anything like it
            if array.shape == mine.shape and array.size > 50 and array.dtype == np.int32:
                assert abs(np.corrcoef(array.ravel(), mine.ravel())[0, 1]) < 0.5
    secrets = {
        bytes(v) for m in network.memories.values() for r in m.values() for v in _bytes_in(r, ("mask", "seal", "seed"))
    }
    assert len(secrets) == 3 * 4
    heard = b"".join(b for record in received if isinstance(record, RecordDict) for b in _all_bytes(record))
    assert not any(secret in heard for secret in secrets)


def _bytes_in(record: Any, names: tuple[str, ...]) -> list[bytes]:
    return [record[name] for name in names]


def _all_bytes(content: RecordDict) -> Iterator[bytes]:
    for told in content.config_records.values():
        for value in told.values():
            yield from [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, bytes)]


@pytest.fixture(scope="module")
def without_2() -> str:
    """The server's sha where client 2 fails in simulation, and so is in no sum."""
    with federation("fedavg", *SECURE) as (built, _):
        answer = built.grid.node._answer  # type: ignore[attr-defined]

        def failing(message: Message, cache: Any, who: int, lends: bool = False) -> Message:
            if who == 2 and message.metadata.message_type == "train":
                raise RuntimeError("fails")
            return answer(message, cache, who, lends)

        built.grid.node._answer = failing  # type: ignore[attr-defined]
        built.run()
        return built.strategy.sha()


def lose(network: Network, kind: str, node: int) -> None:
    """A node never answers a kind of message."""
    network.before = lambda message: (message.metadata.message_type, message.metadata.dst_node_id) != (kind, node)


@pytest.mark.parametrize("kind", ["query.secure_keys", "query.secure_shares", "train"])
def test_who_drops_out_is_left_out_of_the_sum(kind: str, tmp_path: Path, without_2: str) -> None:
    network = Network(seats(tmp_path, 4))
    lose(network, kind, 102)
    built, _ = run(tiny("fedavg", *SECURE), network, tmp_path / "run", Patience(deadline=0.1))
    assert built.strategy.inbox.failures["replies"] == 2
    assert built.digest != play("fedavg", *SECURE).digest
    assert built.strategy.sha() == without_2


@pytest.mark.parametrize("kind", ["none", "twice", "of another curve", "twice, written otherwise"])
def test_keys_that_nobody_can_use_leave_out_their_sender_alone(kind: str, tmp_path: Path, without_2: str) -> None:
    """The attack: everybody was handed one site's bad keys, failed by them, was named, and the run was over."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    spki = PublicFormat.SubjectPublicKeyInfo
    small = ec.generate_private_key(ec.SECP256R1()).public_key().public_bytes(Encoding.PEM, spki)
    network = Network(seats(tmp_path, 4))

    def forge(message: Message, reply: Message) -> Message:
        if _is(message, "query.secure_keys", 102):
            first = reply.content["secure"]["public"][0]
            bad = {"none": b"x", "twice": first, "of another curve": small, "twice, written otherwise": first + b"\n"}
            reply.content["secure"]["public"] = [first, bad[kind]]
        return reply

    network.reply = forge
    built, said = run(tiny("fedavg", *SECURE), network, tmp_path / "run")
    why = f"a key that {'is not its own alone' if 'twice' in kind else 'cannot be read'}"
    assert built.strategy.sha() == without_2
    assert said.count(f"fedfuse: client 2: secure sum, keys: {why}") == 2  # rounds
    assert built.strategy.inbox.left_out == [f"client 2: dropped out before the secure sum: keys: {why}"]


def test_too_few_sealed_shares_leave_out_their_sender_alone(tmp_path: Path, without_2: str) -> None:
    network = Network(seats(tmp_path, 4))

    def forge(message: Message, reply: Message) -> Message:
        if _is(message, "query.secure_shares", 102):
            reply.content["secure"]["sealed"] = [b"z"]
        return reply

    network.reply = forge
    built, said = run(tiny("fedavg", *SECURE), network, tmp_path / "run")
    assert built.strategy.sha() == without_2
    assert said.count("fedfuse: client 2: secure sum, shares: not 3 keys or shares") == 2


def _is(message: Message, kind: str, node: int) -> bool:
    return (message.metadata.message_type, message.metadata.dst_node_id) == (kind, node)


def test_who_is_gone_when_the_sum_is_unmasked_is_still_in_it(tmp_path: Path) -> None:
    network = Network(seats(tmp_path, 4))
    lose(network, "query.secure_unmask", 101)
    built, _ = run(tiny("fedavg", *SECURE), network, tmp_path / "run", Patience(deadline=0.1))
    assert built.digest == play("fedavg", *SECURE).digest
    assert built.strategy.inbox.failures["replies"] == 0


def test_a_site_started_again_in_a_phase_drops_out_of_it_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = Network(seats(tmp_path, 4))

    def restarts(message: Message) -> bool:
        if _is(message, "train", 103) and message.content["run"]["round"] == 1:
            network.memories[103] = RecordDict()
        return True

    network.before = restarts
    built, _ = run(tiny("fedavg", *SECURE), network, tmp_path / "run")
    assert built.done == 2
    assert built.strategy.inbox.failures["replies"] == 1
    assert capsys.readouterr().out.count("refused: secure: this client's keys of this phase are gone") == 1


def test_a_site_that_lost_what_it_held_is_sent_it_anew_and_stays_in_its_phases_sum(tmp_path: Path) -> None:
    network, words = Network(seats(tmp_path, 4)), ("fedavg", *SECURE, "evaluate.every=1")
    gone = list[Path]()

    def forgets(message: Message) -> bool:
        if _is(message, "train", 103) and message.content["run"]["round"] == 2 and not gone:
            gone.extend((tmp_path / "site-3").rglob("cache"))
            gone[0].unlink()
        return True

    network.before = forgets
    built, _ = run(tiny(*words), network, tmp_path / "run")
    assert built.digest == play(*words).digest
    assert built.strategy.outbox.traffic.summary()["resent_bytes"] > 0


def test_lost_messages_and_replies_change_no_bit(tmp_path: Path) -> None:
    network, seen = Network(seats(tmp_path, 4)), dict[str, int]()

    def first_is_lost(message: Message, reply: Message) -> Message | None:
        key = f"{message.metadata.message_type}{message.metadata.dst_node_id}"
        seen[key] = seen.get(key, 0) + 1
        return lost(message) if seen[key] == 1 else reply

    network.reply = first_is_lost
    built, _ = run(tiny("fedavg", *SECURE), network, tmp_path / "run")
    assert built.digest == play("fedavg", *SECURE).digest


@pytest.mark.parametrize(
    ("words", "least"),
    [((), 3), (("secure.reconstruction_threshold=1",), 4), (("secure.num_shares=3",), 2)],
)
def test_a_simulation_needs_as_many_for_a_sum_as_a_deployment(words: tuple[str, ...], least: int) -> None:
    """Of four clients two fail: enough for shares among three, too few for the others."""

    def lost(message: Any, reply: Any) -> bool:
        return reply.metadata.src_node_id in (2, 3) and message.metadata.message_type == "train"

    said = f"round 1, train: 2 clients answered, a secure sum needs {least}"
    with federation("fedavg", *SECURE, "rounds=1", *words, grid="serial", drop=lost) as (built, _):
        if least > 2:
            with pytest.raises(WorldError, match=said):
                built.run()
        else:
            built.run()
        assert f"of {least} clients at least" in secure_notes(built.strategy, False)[0]


def test_below_the_threshold_there_is_no_sum_and_one_line(tmp_path: Path) -> None:
    network = Network(seats(tmp_path, 4))
    network.before = lambda message: not (_is(message, "train", 102) or _is(message, "train", 103))
    with pytest.raises(
        WorldError, match=r"round 1, train: 2 clients answered, a secure sum needs 3: client 3: did not"
    ):
        run(tiny("fedavg", *SECURE), network, tmp_path / "run", Patience(deadline=0.1))
    assert not any("unmask" in line for line in network.log)  # nobody was asked for a share
    network.before = lambda message: True  # they are back: the run goes on, and ends as if nothing had been
    built, _ = run(tiny("fedavg", *SECURE), network, tmp_path / "run", resumed=True)
    assert built.digest == play("fedavg", *SECURE).digest


@pytest.mark.parametrize(("kind", "away", "did"), [
    ("query.secure_keys", (102, 103), "2 of 4 clients sent keys"),
    ("query.secure_shares", (102, 103), "2 of 4 clients shared their secrets"),
    ("train", (102, 103), "2 of 4 clients answered"),
    ("train", (100, 101, 102, 103), "0 of 4 clients answered"),
])  # fmt: skip
def test_a_phase_that_too_few_answer_is_tried_once_more(
    kind: str, away: tuple[int, ...], did: str, tmp_path: Path
) -> None:
    """Sites were started again at once: keys are exchanged anew, and nobody trains a second time."""
    network, hit = Network(seats(tmp_path, 4)), list[int]()

    def restarts(message: Message) -> bool:
        node = message.metadata.dst_node_id
        if message.metadata.message_type != kind or node not in away or node in hit:
            return True
        hit.append(node)
        network.memories[node] = RecordDict()
        return False

    network.before = restarts
    built, said = run(tiny("fedavg", *SECURE), network, tmp_path / "run", Patience(deadline=0.1))
    assert built.digest == play("fedavg", *SECURE).digest
    assert built.strategy.inbox.failures == {"replies": 0, "rejected": 0, "retried": 0}
    again = "; keys are exchanged anew and all are asked once more"
    assert [line for line in said if again in line] == [f"fedfuse: round 1, train: {did}, a secure sum needs 3{again}"]
    assert sorted(hit) == list(away)
    trained = [path.read_text() for i in range(4) for path in (tmp_path / f"site-{i}").rglob("trainings")]
    assert trained == ["2"] * 4  # once a round


def test_a_rejected_reply_leaves_the_sum_and_its_masks_are_taken_off(tmp_path: Path, without_2: str) -> None:
    network = Network(seats(tmp_path, 4))

    def forge(message: Message, reply: Message) -> Message:
        if _is(message, "train", 102):
            sent: Any = reply.content["masked:model"]
            reply.content["masked:model"] = ArrayRecord({k: v for k, v in sent.items() if k != min(sent)})
        return reply

    network.reply = forge
    built, _ = run(tiny("fedavg", *SECURE), network, tmp_path / "run")
    assert built.strategy.inbox.failures == {"replies": 0, "rejected": 2, "retried": 0}
    assert built.strategy.sha() == without_2


def test_masks_that_do_not_cancel_are_noticed(tmp_path: Path) -> None:
    network = Network(seats(tmp_path, 4))

    def forge(message: Message, reply: Message) -> Message:
        if _is(message, "train", 102):
            sent: Any = reply.content["masked:model"]
            changed = {k: torch.from_numpy(np.array(v.numpy())) for k, v in sent.items()}
            first = sorted(changed)[0]
            changed[first] = changed[first] + 2**30
            reply.content["masked:model"] = record(changed)
        return reply

    network.reply = forge
    with pytest.raises(WorldError, match="model: the masks of 4 clients do not cancel"):
        run(tiny("fedavg", *SECURE), network, tmp_path / "run")


def test_a_server_that_asks_for_the_record_itself_gets_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, left = Network(seats(tmp_path, 4)), list[Message]()
    network.reply = lambda message, reply: left.append(reply) or reply
    monkeypatch.setattr("fedfuse.core.strategy.plan_of", lambda strategy, clients: {})  # what the messages say
    with pytest.raises(WorldError, match="secure: model was asked for unmasked, in a run with secure=on"):
        run(tiny("fedavg", *SECURE), network, tmp_path / "run")
    assert not any(reply.has_content() and len(reply.content.array_records) for reply in left)


@pytest.mark.parametrize(("lie", "kinds"), [
    ("heaviest", ("train",)), ("heaviest", ("train", "query.secure")), ("sums", ("train", "query.secure")),
    ("hyper.weighting", ("train",)), ("hyper.weighting", ("train", "query.secure")), ("config", ("train", "query")),
])  # fmt: skip
def test_a_server_that_tells_one_client_another_plan_gets_no_sum(
    lie: str, kinds: tuple[str, ...], tmp_path: Path
) -> None:
    """The attack: the others are told a weight beside which theirs round to 0, and the sum is one client's record."""
    network, left = Network(seats(tmp_path, 4)), list[Message]()
    network.reply = lambda message, reply: left.append(reply) or reply

    def forge(message: Message) -> bool:
        if message.metadata.dst_node_id == 101 or not message.metadata.message_type.startswith(kinds):
            return True
        setting, about = dict(message.content["setting"]), dict(message.content.config_records.get("run", {}))
        if lie == "config":
            setting["config"] = setting["config"].replace('"lr": 0.05', '"lr": 1e-9')
            assert setting != dict(message.content["setting"])
        elif lie == "heaviest":
            about["secure"] = json.dumps({**json.loads(about["secure"]), "heaviest": {"model": 2.0**60}})
        else:
            about[lie] = {"sums": "{}", "hyper.weighting": "uniform"}[lie]
        message.content["setting"] = ConfigRecord(setting)
        if about:
            message.content["run"] = ConfigRecord(about)
        return True

    network.before = forge
    with pytest.raises(WorldError) as caught:
        run(tiny("fedavg", *SECURE), network, tmp_path / "run")
    late = kinds == ("train",)
    assert ("told otherwise than when" if late else "the server told the two clients") in str(caught.value)
    assert not any("unmask" in line for line in network.log)
    whose = {reply.metadata.src_node_id for reply in left if reply.has_content() and reply.content.array_records}
    assert whose <= ({101} if late else set())  # masked, and nobody else's


def test_a_policy_may_require_secure_sums(tmp_path: Path) -> None:
    policy = policy_from({"require_secure": True}, "policy")
    with pytest.raises(Refused, match="secure aggregation is required, the run has none"):
        policy.check(tiny("fedavg"))
    policy.check(tiny("fedavg", *SECURE))
    with pytest.raises(UserError, match="require_secure='yes'; allowed is true or false"):
        policy_from({"require_secure": "yes"}, "policy")
    strict = [SiteConfig(i, tmp_path / f"s{i}", 3, policy=Policy(require_secure=True)) for i in range(3)]
    with pytest.raises(WorldError, match="secure aggregation is required"):
        run(tiny("fedavg"), Network(strict), tmp_path / "run")


@pytest.mark.parametrize(("words", "why"), [
    (("knfu", "secure=on"), "secure=on does nothing here: it goes with a strategy that sums records"),
    (("centralized", "secure=on"), "secure=on does nothing here"),
    (("fedavg", "secure=on", "privacy.level=client", "privacy.noise=1"), "secure=on: privacy.level=client bounds each"),
    (("fedavg", "secure.clipping_range=1"), "secure.clipping_range=1.0 does nothing here: it goes with secure=on"),
    (("fedavg", "secure=on", "clients=1"), "reconstruction_threshold=0.6: 2 of 1 clients"),
    (("fedavg", "secure=on", "participation=0.3"), "reconstruction_threshold=0.6: 2 of 1 clients"),
    (("fedavg", "secure=on", "secure.reconstruction_threshold=0.5"), "allowed is above 0.5 up to 1, or a whole"),
    (("fedavg", "secure=on", "secure.reconstruction_threshold=2.5"), "allowed is above 0.5 up to 1, or a whole"),
    (("fedavg", "secure=on", "clients=6", "secure.reconstruction_threshold=3"), "3 of 6 clients; allowed is more than"),
    (("fedavg", "secure=on", "secure.quantization_range=4294967295"), "with 3 clients allowed is at most 1431655765"),
])  # fmt: skip
def test_what_would_do_nothing_or_hide_nothing_is_refused(words: tuple[str, ...], why: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=why.replace("(", r"\(")):
        run(tiny(*words), Network(seats(tmp_path, 3)), tmp_path / "run")


def test_bytes_are_counted_and_notes_say_what_is_still_seen(tmp_path: Path) -> None:
    built, _ = run(tiny("fedavg", *SECURE), Network(seats(tmp_path, 4)), tmp_path / "run")
    simulated, found = play("fedavg", *SECURE), load(tmp_path / "run")
    rows = found.traffic.collect().filter(message="train")
    beside = rows.filter(rows["record"].str.starts_with("secure:"))
    for way in ("up", "down"):
        total = rows.filter(direction=way)["bytes"].sum()
        assert total == built.strategy.outbox.traffic.summary()[f"{way}_bytes"]
        assert total - beside.filter(direction=way)["bytes"].sum() == simulated.totals[f"{way}_bytes"]
    assert (
        beside.group_by("record", "direction").len().height == 7
    )  # keys, shares and unmask both ways; shares that come with the training
    moved = beside.filter(beside["record"].is_in(["secure:shares", "secure:train"]))
    sealed = moved.filter((moved["direction"] == "up") | (moved["record"] == "secure:train"))
    up, down = (sealed.filter(direction=way)["bytes"].sum() for way in ("up", "down"))
    assert down == up + 2 * 4 * (32 + 8 + 3 * 8)  # what was sealed, and the session, the threshold, three senders
    notes = found.summary["notes"]  # type: ignore[index]
    assert not any("still seen" in note for note in notes)
    run(tiny("fedhkd", "secure=on"), Network(seats(tmp_path / "b", 3)), tmp_path / "b" / "run")
    notes = load(tmp_path / "b" / "run").summary["notes"]  # type: ignore[index]
    assert any("these records are still seen by the server: " in note and "model" not in note for note in notes), notes
