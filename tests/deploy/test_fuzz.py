"""Orders and replies that nobody would write: none runs code, none crashes a site or the server, none is averaged in.

In CI a few hundred of each; ten thousand of each with FEDFUSE_FUZZ=10000 (make fuzz).
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedfuse.config.dotted import code
from fedfuse.config.message import as_json, from_json
from fedfuse.core.shares import FAILED, INVALID, REFUSED, STALE
from fedfuse.errors import Refused, UserError
from fedfuse.network.site import Site
from tests.deploy.network import seats, tiny
from tests.deploy.test_malformed import Table

COUNT = int(os.environ.get("FEDFUSE_FUZZ", "150"))
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**400, 0.0, -0.0, 1e-300, 1e300, float("nan"), float("inf"),
    "",
    "os:system", "trap_module:fn", "../../etc/passwd", "/etc/passwd", "x" * 10_000, "\x00", "a\nb", "\x1b[2J",
    "\ud800", "é" * 99,
    [], {}, [[]], [None], ["os:system"], {"a": {"b": {"c": "os:system"}}}, [1] * 10_001, {"": ""}, {"__class__": "x"},
)  # fmt: skip


def spots(values: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    if isinstance(values, dict):
        for key, value in values.items():
            found += spots(value, (*path, key))
    return found


def changed(values: Any, draw: random.Random) -> str:
    values = json.loads(json.dumps(values))
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        *path, last = draw.choice(spots(values))
        node = values
        for part in path:
            node = node[part]
        how = draw.random()
        if how < 0.7:
            node[last] = draw.choice(ODD)
        elif how < 0.85:
            node[draw.choice(("build", "load", "x", "", "__init__", "a.b", "root"))] = draw.choice(ODD)
        else:
            del node[last]
    text = json.dumps(values)
    if draw.random() < 0.05:
        cut = draw.randrange(len(text))
        text = text[:cut] + draw.choice(("", "}", '"', "\x00", "[[[[" * 500)) + text[cut + 1 :]
    return text


@pytest.mark.timeout(1800)
def test_no_fuzzed_order_runs_code_or_crashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "mark"
    (tmp_path / "trap_module.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).write_text('ran')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    draw = random.Random(0)
    orders = [json.loads(as_json(tiny(name))) for name in ("fedavg", "fedmd", "knfu", "fed_sb", "fedkd")]
    refused = 0
    for _ in range(COUNT):
        try:
            with code(False):
                from_json(changed(draw.choice(orders), draw))
        except (UserError, Refused) as error:
            refused += bool(str(error))
    assert refused > COUNT / 3
    assert not mark.exists()
    assert "trap_module" not in sys.modules
    print(f"{COUNT} orders, {refused} refused")


@pytest.mark.timeout(1800)
def test_no_fuzzed_message_crashes_a_site(tmp_path: Path) -> None:
    """Every message has an answer, and it is a refusal, an error or what was asked."""
    draw, seat, plain = random.Random(1), seats(tmp_path, 3)[0], as_json(tiny("fedavg"))
    values = json.loads(plain)
    site, run = Site(seat), "ab" * 16
    words = (0, -1, 2**62, 1.5, "", "x", "../x", "1.1", "a" * 5000, b"\x00", True, [1], ["x"], [], "[]", "{", '{"a":')
    asked = answered = 0
    for i in range(max(60, COUNT // 5)):
        setting = {"config": plain, "run": run, "attempt": 1, "task": ""}
        about = {"run": run, "round": 1, "phase": "train", "strategy": "fedavg", "sums": "{}"}
        told: dict[str, Any] = {"client": 0, "tag": "0", "new-tag": "1.1"}
        record = draw.choice((setting, about, about, told, told))
        for _ in range(draw.choice((1, 2, 3))):
            name = draw.choice(
                [*record, "parcel.record", "needs.topic", "hyper.unset", "hyper.x", "server.final", "splits"]
            )
            record[name] = draw.choice(words)
        if draw.random() < 0.2:
            setting["config"] = changed(values, draw).encode("utf-8", "replace").decode("utf-8", "replace")
        content = RecordDict()
        for name, entries in (("setting", setting), ("run", about), ("config", told)):
            if draw.random() < 0.95:
                content[name] = ConfigRecord(entries)
        kind = draw.choice(("train", "evaluate", "train.x", "query.hello", "query", "train.fuse"))
        try:
            message = Message(content, 100, kind)
        except ValueError:
            continue
        reply = site.handle(message)
        asked, answered = asked + 1, answered + reply.has_content()
        assert reply.has_content() or reply.error.code in (REFUSED, FAILED, INVALID, STALE), i
        if reply.has_error():
            assert "\n" not in reply.error.reason
    print(f"{asked} messages, {asked - answered} refused")


@pytest.mark.timeout(1800)
def test_no_fuzzed_reply_crashes_the_server_or_is_averaged_in() -> None:
    table, draw = Table(), random.Random(2)
    metrics = (-1, 2**60, float("nan"), float("inf"), [1, 2], [])
    for i in range(COUNT):
        content = RecordDict()
        if draw.random() < 0.8:
            record = ArrayRecord()
            for name in draw.sample([*table.start, "x\ny", "é" * 300, "safetensors"], draw.randrange(1, 4)):
                data = draw.randbytes(draw.randrange(300))
                shape = draw.choice(((), (0,), (3,), (-1,), (2**40,), (1,) * 70))
                record[name] = Array(
                    draw.choice(("float32", "x", "object", "")), shape, draw.choice(("numpy.ndarray", "y")), data
                )
            content[draw.choice(("arrays", "sum:model", "a\nb", "model"))] = record
        if draw.random() < 0.8:
            content["metrics"] = MetricRecord({draw.choice(("num-examples", "loss", "\x1b[2J")): draw.choice(metrics)})
        if draw.random() < 0.8:
            content["config"] = ConfigRecord(
                {draw.choice(("client", "phase", "tag", "\n")): draw.choice((0, "x", b"y", [1]))}
            )
        strategy = table.ask(content)
        for value in strategy.model.values():
            assert float(value.min()) == float(value.max()) == 0.5, i
        assert all("\n" not in line for line in strategy.inbox.left_out)
    print(f"{COUNT} replies, {strategy.inbox.failures['rejected']} rejected by form, none averaged in")
