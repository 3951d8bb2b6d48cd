"""No order and no message makes a site, or a server, open a path that the asker chose, or import a name of theirs.

Every opening of a file or folder and every import of this process is watched while they are tried, at every key.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedfuse.config import registry
from fedfuse.config.allowed import MOST
from fedfuse.config.dotted import code
from fedfuse.config.message import as_json, for_sites, from_json
from fedfuse.core.build import build_strategy
from fedfuse.core.scenario import prepare_scenario
from fedfuse.core.shares import REFUSED
from fedfuse.deploy.orders import carry_out
from fedfuse.errors import Refused, UserError, WorldError
from fedfuse.network.own_data import task_of
from fedfuse.network.policy import Policy
from fedfuse.network.site import Site, SiteConfig
from tests.deploy.network import Network, run, seats, tiny
from tests.deploy.test_code_execution import all_keys, put

RUN = "ab" * 16
EVENTS = frozenset({"open", "os.listdir", "os.scandir", "glob.glob", "import", "exec", "pathlib.Path.glob"})
BAIT = ("bait", "passwd")
_seen: list[str] | None = None


def _watch(event: str, args: tuple[Any, ...]) -> None:
    if _seen is not None and event in EVENTS and any(word in str(args[0]) for word in BAIT):
        _seen.append(f"{event} {args[0]}")


sys.addaudithook(_watch)  # there is no way to take it off: it looks nowhere unless asked to


@contextmanager
def watched() -> Iterator[list[str]]:
    global _seen
    _seen = []
    try:
        yield _seen
    finally:
        _seen = None


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What an asker would say: folders, files and modules that are there, beside where the process stands."""
    (tmp_path / "bait").mkdir()
    for name in ("config.json", "tokenizer.json", "bait.csv", "bait.npz", "model.safetensors"):
        (tmp_path / "bait" / name).write_text("{}")
    for name in ("bait.csv", "bait.npz", "bait_module.py"):
        (tmp_path / name).write_text("client,gflops\n0,1\n" if name.endswith("csv") else "")
    stand = tmp_path / "stand"
    stand.mkdir()
    (stand / "bait").symlink_to(tmp_path / "bait")
    (stand / "bait.csv").symlink_to(tmp_path / "bait.csv")
    monkeypatch.chdir(stand)
    monkeypatch.syspath_prepend(str(tmp_path))
    there = str(tmp_path / "bait")
    return ["bait", "bait.csv", "bait_module", there, f"{there}/bait.csv", "../bait", "~/bait", "/etc/passwd",
            "bait_module:fn", "file:bait"]  # fmt: skip


def tried(text: str, site: SiteConfig, task: str) -> str:
    """Have a site answer a hello, and a server build its half, of one configuration."""
    setting = ConfigRecord({"config": text, "run": RUN, "attempt": 1, "task": task})
    reply = Site(site).handle(Message(RecordDict({"setting": setting}), 100, "query.hello"))
    if reply.has_error():
        return reply.error.reason
    try:
        with code(False):
            config = from_json(text)
            build_strategy(registry.entry(config.strategy.name), prepare_scenario(config))
    except (UserError, Refused) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", ["fedmd", "fednano", "fedkd", "fedet", "fedgkt", "regmean", "fed_sb"])
def test_no_key_of_an_order_chooses_a_path_or_a_module(name: str, words: list[str], tmp_path: Path) -> None:
    values = json.loads(as_json(tiny(name)))
    listed = all_keys(values) if name == "fedmd" else [key for key in all_keys(values) if key.startswith("strategy.")]
    answers, count = set[str](), 0
    with watched() as seen:
        for key in listed:
            for word in words:
                for value in (word, [word]):
                    text = put(values, key, value)
                    try:
                        with code(False):
                            from_json(text)
                    except (UserError, Refused) as error:
                        answers.add(str(error))
                        continue
                    count += 1
                    site = SiteConfig(0, tmp_path / f"site-{count}", 3)
                    answers.add(tried(text, site, ""))
    assert seen == []
    assert any("over the wire only registered names" in answer for answer in answers)


def test_what_is_watched_would_be_seen(words: list[str]) -> None:
    with watched() as seen:
        Path("bait.csv").read_text()
        sorted(Path("bait").glob("*"))
        with pytest.raises(UserError):
            build_strategy(
                registry.entry("fednano"), prepare_scenario(tiny("fednano", "strategy.language=bait", "model=cnn"))
            )
    assert sum("open" in line for line in seen) >= 2
    assert any("bait.csv" in line for line in seen)


def test_a_site_with_data_of_its_own_reads_inside_its_folder_alone(words: list[str], tmp_path: Path) -> None:
    own = tmp_path / "cohort"
    own.mkdir()
    rows = np.random.default_rng(0).random((60, 64), dtype=np.float32)
    np.savez(own / "train.npz", x=rows, y=np.arange(60) % 10)
    reference = tmp_path / "reference"
    reference.mkdir()
    np.savez(reference / "train.npz", x=rows, y=np.arange(60) % 10)
    told = tiny("fedavg")
    config = replace(
        told, data=replace(told.data, name="npz", layout="builtin", root=str(reference), limit=None, test_limit=None)
    )
    task, values = task_of(prepare_scenario(config)), json.loads(as_json(for_sites(config)))
    keys = [key for key in all_keys(values) if key.startswith("data.")]
    keys += ["data.extra.sources", "data.extra.test", "data.extra.text", "data.extra.size"]
    site = SiteConfig(0, tmp_path / "site", None, str(own))
    setting = ConfigRecord({"config": json.dumps(values), "run": RUN, "attempt": 1, "task": task})
    assert Site(site).handle(Message(RecordDict({"setting": setting}), 100, "query.hello")).has_content()
    with watched() as seen:
        for count, (key, word) in enumerate((key, word) for key in keys for word in [*words, "**", "*", "../*"]):
            text = put(values, key, word)
            setting = ConfigRecord({"config": text, "run": RUN, "attempt": 1, "task": task})
            site = replace(site, state=tmp_path / f"site-{count}")
            reply = Site(site).handle(Message(RecordDict({"setting": setting}), 100, "query.hello"))
            if reply.has_error():  # and where things lie there is told to nobody
                assert str(own) not in reply.error.reason, reply.error.reason
    assert seen == []


def test_no_hyper_parameter_of_a_message_chooses_a_path(words: list[str], tmp_path: Path) -> None:
    config = tiny("fednano", "model=cnn")
    setting = ConfigRecord({"config": as_json(config), "run": RUN, "attempt": 1, "task": ""})
    site = Site(SiteConfig(0, tmp_path / "site", 3))
    with watched() as seen:
        for word in words:
            about = ConfigRecord({"run": RUN, "round": 1, "phase": "train", "hyper.language": word})
            told = ConfigRecord({"client": 0, "tag": "0", "new-tag": "1.1"})
            content = RecordDict({"setting": setting, "run": about, "config": told})
            reply = site.handle(Message(content, 100, "train"))
            assert reply.has_error()
            assert reply.error.code == REFUSED
            assert "over the wire" in reply.error.reason
    assert seen == []


def test_a_path_of_the_servers_is_its_operators_and_no_client_is_told_it() -> None:
    config = tiny("fednano", "strategy.language=bait")
    absolute = put(json.loads(as_json(config)), "strategy.language", "/bait")
    for text, why in ((as_json(config), "no file or folder is named"), (absolute, "only registered names")):
        with pytest.raises(Refused, match=why):
            from_json(text, folders=[Path("/")])
    assert from_json(as_json(config), code=True, folders=()).strategy.language == "bait"
    assert "bait" not in as_json(for_sites(config))
    assert from_json(as_json(for_sites(config))).strategy.question == "What is it?"
    assert registry.told(config.strategy)["language"] is None


def test_an_order_reads_below_the_servers_data_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The attack: `data.root=/etc data.extra.train=shadow`, and the refusal quoted the file's first line."""
    for folder in ("data/reference", "data-2", "secret"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "bait.csv").write_text("root:$6$hash\n")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "secret")
    config, folder = tiny("fedavg"), tmp_path / "data"
    monkeypatch.setenv("FEDFUSE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("FEDFUSE_SERVER_DATA", json.dumps([str(folder)]))
    monkeypatch.chdir(folder)

    def tried_at_the_server(root: str) -> str:
        data = replace(config.data, name="csv", layout="builtin", root=root, extra={"train": "bait.csv"})
        with pytest.raises(UserError) as error:
            carry_out(None, {"config": as_json(replace(config, data=data)), "name": "a"})  # type: ignore[arg-type]
        return str(error.value)

    outside = [str(tmp_path / "secret"), str(folder / "link"), "link", f"{folder}/../secret", str(tmp_path / "data-2")]
    with watched() as seen:
        for root in (*outside, "/", "/etc", "~nobody-here", "..", "a\0b"):
            assert "orders' data lie below the server's --data alone" in tried_at_the_server(root), root
    assert seen == []
    for root in (str(folder / "reference"), "reference", "reference/bait.csv"):
        assert "orders' data lie below" not in tried_at_the_server(root), root
    monkeypatch.delenv("FEDFUSE_SERVER_DATA")
    assert "alone (none is given)" in tried_at_the_server("reference")


@pytest.mark.parametrize("uri", ["sqlite:////etc/x.db", "file:///tmp/x", "/tmp/x", "mlruns", "databricks", "http:///x"])
def test_an_orders_tracker_is_no_file_of_the_servers(uri: str) -> None:
    values = json.loads(as_json(tiny("fedavg")))
    with pytest.raises(Refused, match=r"tracking\.uri=.* over the wire only http:// and https:// are taken"):
        from_json(put(values, "tracking.uri", uri), folders=())
    from_json(put(values, "tracking.uri", "https://mlflow.example:5000/x"), folders=())
    with pytest.raises(Refused, match="only registered names"):
        from_json(put(values, "out", "runs/x"), folders=())


def test_every_text_of_a_strategy_is_a_choice_or_known_here() -> None:
    """Another one that is a path must say so (`hyper(…, path=True)`), or this list is no longer true."""
    architectures = {"fedet.large", "fedgkt.tail", "fedkd.student", "fedmkt.server", "fml.meme", "proxy_tuning.large"}
    patterns = {"regmean.layers"} | {
        f"{name}.targets" for name in registry.listed() if "targets" in _fields(name)
    }  # names of layers
    others = {"fednano.question", "fednano.optimizer"}  # read by a tokenizer; an optimiser's name
    paths, found = set[str](), set[str]()
    for name in registry.listed():
        for field in dataclasses.fields(registry.entry(name).hyper):
            text = isinstance(field.default, str) or "str" in str(field.type)
            if text and field.metadata.get("path"):
                paths.add(f"{name}.{field.name}")
            elif text and not field.metadata.get("choices"):
                found.add(f"{name}.{field.name}")
    assert found == architectures | patterns | others
    assert paths == {"fednano.language"}


def _fields(name: str) -> set[str]:
    return {field.name for field in dataclasses.fields(registry.entry(name).hyper)}


# --- what else a server may try with a site ----------------------------------------------------------------


def asked(config: str, kind: str = "query.hello", **about: Any) -> Message:
    content = RecordDict({"setting": ConfigRecord({"config": config, "run": RUN, "attempt": 1, "task": ""})})
    if kind != "query.hello":
        content["run"] = ConfigRecord({"run": RUN, "round": 1, "phase": "train", **about})
        content["config"] = ConfigRecord({"client": 0, "tag": "0", "new-tag": "1.1"})
    return Message(content, 100, kind)


@pytest.mark.parametrize("round", [1.5, "1", True, [1] * 1000, b"1"])
def test_a_round_is_a_whole_number(round: Any, tmp_path: Path) -> None:
    """It goes into the site's audit log, which a list of a million would fill."""
    reply = Site(SiteConfig(0, tmp_path, 3)).handle(asked(as_json(tiny("fedavg")), "train", round=round))
    assert reply.error.code == REFUSED
    assert len(reply.error.reason) < 100


def test_a_run_keeps_the_configuration_that_it_began_with(tmp_path: Path) -> None:
    """The attack: what left masked lies at its site as it was, and the run's id with secure=off asks for it again."""
    network, bare = Network(seats(tmp_path, 3)), list[Message]()
    plain = as_json(tiny("fedavg"))

    def again(message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "train" and message.metadata.dst_node_id == 100:
            setting: Any = message.content["setting"]
            message.content["setting"] = ConfigRecord({**setting, "config": plain})
            told: Any = message.content["run"]
            message.content["run"] = ConfigRecord({k: v for k, v in told.items() if k != "secure"})
            bare.append(Site(network.seats[100]).handle(message, network.memories[100]))
        return reply

    network.reply = again
    run(tiny("fedavg", "secure=on"), network, tmp_path / "run")
    assert len(bare) == 2
    for answer in bare:
        assert answer.error.code == REFUSED
        assert answer.error.reason == "refused: this run began with another configuration"


@pytest.mark.parametrize("key", sorted(MOST))
def test_numbers_that_something_is_done_so_often_for_have_a_limit(key: str) -> None:
    """A client that fails would be trained anew 2⁶² times."""
    values = json.loads(as_json(tiny("fedavg")))
    with pytest.raises(Refused, match=f"{key}=4611686018427387904: over the wire at most {MOST[key]} is taken"):
        from_json(put(values, key, 2**62))
    from_json(put(values, key, 3))


def test_a_site_keeps_no_knowledge_that_is_for_others(tmp_path: Path) -> None:
    """It would fill its disk with what nobody here reads."""
    network = Network(seats(tmp_path, 3))

    def elsewhere(message: Message) -> bool:
        told: Any = message.content.config_records.get("config", {})
        if told.get("parcel.to"):
            told["parcel.to"] = ["client:77"]
        return True

    network.before = elsewhere
    with pytest.raises(WorldError, match="topic 'model' for 'client:77' is not for client 0"):
        run(tiny("fedavg"), network, tmp_path / "run")
    assert not list(tmp_path.rglob("cache"))


def test_a_site_that_allows_code_takes_paths(tmp_path: Path) -> None:
    text = as_json(tiny("fednano", "strategy.language=bait"))
    assert Site(SiteConfig(0, tmp_path, 3)).handle(asked(text)).error.code == REFUSED
    allowed = SiteConfig(0, tmp_path / "b", 3, policy=Policy(allow_code=True))
    assert Site(allowed).handle(asked(text)).has_content()
