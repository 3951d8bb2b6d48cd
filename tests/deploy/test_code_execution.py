"""Orders that ask a site or the server to run code: the attack of the audit, at every key and every way in."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from fedfuse.config.allowed import NEVER, TEXTS, check_texts, leaves
from fedfuse.config.dotted import code, resolve
from fedfuse.config.message import as_json, from_json
from fedfuse.config.schema import Config, known
from fedfuse.deploy.orders import carry_out
from fedfuse.errors import Refused, UserError, WorldError
from fedfuse.network.policy import Policy
from fedfuse.network.site import Site
from tests.deploy.network import Network, run, seats, tiny

TRAP = """
import pathlib
pathlib.Path({mark!r}).write_text("ran")
def fn(*args, **kwargs):
    pathlib.Path({mark!r}).write_text("called")
"""
CODE = ("trap_module:fn", "os:system", "trap_module", "../x", "/etc/passwd", "a/b", "builtins:eval", "x\ny", "\x00", "")


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module that leaves a mark when it is imported."""
    found = tmp_path / "mark"
    (tmp_path / "trap_module.py").write_text(TRAP.format(mark=str(found)))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield found
    sys.modules.pop("trap_module", None)


def all_keys(values: dict[str, Any]) -> list[str]:
    strategy = [f"strategy.{name}" for name in values["strategy"]]
    opened = [f"{name}.word" for name in ("data.extra", "model.extra", "loss.options", "model.checkpoints")]
    return [*known(), *strategy, *opened, "data.extra.tokenizer", "data.extra.train"]


def put(values: dict[str, Any], key: str, value: Any) -> str:
    changed = json.loads(json.dumps(values))
    node = changed
    *path, last = key.split(".")
    for part in path:
        if not isinstance(node.get(part), dict):
            node[part] = {}
        node = node[part]
    node[last] = value
    return json.dumps(changed)


@pytest.mark.parametrize("name", ["fedavg", "fedkd", "fml", "fedgkt", "fedet", "fed_sb", "flwr_fedadam"])
def test_no_key_of_an_order_runs_code_at_a_site_or_the_server(name: str, mark: Path, tmp_path: Path) -> None:
    values = json.loads(as_json(tiny(name)))
    tried = 0
    keys = all_keys(values)
    for key in keys if name == "fedavg" else [key for key in keys if key.startswith("strategy.")]:
        for word in CODE:
            for value in (word, [word], {"a": word}, {word: 1}):
                tried += 1
                try:
                    with code(False):
                        config = from_json(put(values, key, value))
                except (UserError, Refused):
                    continue
                told = [v for _, v in leaves(asdict(config)) if isinstance(v, str)]
                assert not any(set(":/\n\x00") & set(v) for v in told), (key, value)
    assert tried > (1000 if name == "fedavg" else 50)
    assert not mark.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"name": "trap_module:fn"}},
        {"model": {"pool": ["mlp", "trap_module:fn"]}},
        {"model": {"name": "custom", "build": "trap_module:fn"}},
        {"loss": {"name": "trap_module:fn"}},
        {"loss": {"name": "custom", "build": "trap_module:fn"}},
        {"data": {"name": "custom", "load": "trap_module:fn", "layout": "custom"}},
    ],
)
def test_neither_side_of_a_network_runs_what_an_order_names(changes: Any, mark: Path, tmp_path: Path) -> None:
    config = tiny("fedmd")
    bad = replace(config, **{group: replace(getattr(config, group), **values) for group, values in changes.items()})
    with pytest.raises((UserError, Refused), match="over the wire only registered names"):
        carry_out(None, {"config": as_json(bad), "name": "a"})  # type: ignore[arg-type]
    network = Network(seats(tmp_path, 3))
    asked = []

    def forge(message: Any) -> bool:  # the server is the enemy: a good run, other orders
        if "setting" in message.content:
            setting = message.content["setting"]
            setting["config"] = as_json(bad)
            asked.append(message)
        return True

    network.before = forge
    with pytest.raises(WorldError, match="over the wire only registered names"):
        run(config, network, tmp_path / "run")
    assert asked
    assert not mark.exists()


@pytest.mark.parametrize(("strategy", "hyper"), [("fedkd", "student"), ("fml", "meme"), ("fedgkt", "tail")])
def test_a_hyper_parameter_of_a_message_names_no_code(strategy: str, hyper: str, mark: Path, tmp_path: Path) -> None:
    network = Network(seats(tmp_path, 3))

    def forge(message: Any) -> bool:
        if "run" in message.content:
            message.content["run"][f"hyper.{hyper}"] = "trap_module:fn"
        return True

    network.before = forge
    with pytest.raises(WorldError, match=f"strategy.{hyper}='trap_module:fn'"):
        run(tiny(strategy), network, tmp_path / "run")
    assert not mark.exists()


def test_the_second_lock_holds_alone(mark: Path) -> None:
    with code(False), pytest.raises(Refused, match="over the wire nothing is imported"):
        resolve("trap_module:fn", "model.build")
    assert not mark.exists()
    assert resolve("trap_module:fn", "model.build").__name__ == "fn"
    assert mark.exists()


def test_a_site_whose_operator_allows_code_takes_it(mark: Path, tmp_path: Path) -> None:
    config = tiny("fedavg")
    bad = replace(config, model=replace(config.model, name="trap_module:fn"))
    seat = seats(tmp_path, 3)[0]
    for allowed in (False, True):
        host = Site(replace(seat, policy=Policy(allow_code=allowed)))
        if allowed:
            assert from_json(as_json(bad), code=host.seat.policy.allow_code).model.name == "trap_module:fn"
        else:
            with pytest.raises(Refused, match=r"model\.name='trap_module:fn'"):
                from_json(as_json(bad), code=host.seat.policy.allow_code)


def test_every_key_that_holds_text_is_listed() -> None:
    held = {key for key, value in leaves(asdict(tiny("fedavg"))) if isinstance(value, str | None) or value == {}}
    numbers = {key for key in known() if _number(key)}
    strategies = {key for key in held if key.startswith("strategy.")}
    opened = {"data.extra", "loss.options"} | set(NEVER)
    assert held - strategies - numbers - opened == {k for k in TEXTS if k in held}


def _number(key: str) -> bool:
    import typing

    node: Any = Config
    *path, last = key.split(".")
    for part in path:
        node = typing.get_type_hints(node)[part]
    return "str" not in str(typing.get_type_hints(node)[last]) and typing.get_type_hints(node)[last] is not typing.Any


def test_text_of_another_type_is_refused() -> None:
    for value in (b"x", object(), "x" * 200):
        with pytest.raises(Refused):
            check_texts({"model": {"name": value}})
