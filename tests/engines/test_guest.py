"""Unmodified Flower apps: the same arrays under `fedfuse flower` and under Flower's own simulator."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedfuse.engines import guest_run
from fedfuse.engines.guest_run import command
from fedfuse.engines.guest_words import Words
from fedfuse.errors import UserError
from tests.engines.processes import MARK, gone

APPS = Path(__file__).parent.parent / "apps"
NODES = 6

# What `flwr run` does in its simulation process, without the SuperLink around it.
SIMULATOR = """
import sys
from flwr.app import Context, RecordDict
from flwr.common.config import get_fused_config_from_dir, get_project_config, parse_config_args
from flwr.simulation.run_simulation import _run_simulation
from flwr.supercore.constant import NOOP_FEDERATION_ID
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.supercore.telemetry import EventType
from pathlib import Path

app, nodes, overrides = sys.argv[1], int(sys.argv[2]), parse_config_args([sys.argv[3]])
parts = get_project_config(app)["tool"]["flwr"]["app"]["components"]
config = get_fused_config_from_dir(Path(app), overrides)
TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 7, 7, 1
run = Run.create_empty(7)
run.override_config, run.primary_task_id, run.federation_id = overrides, 7, NOOP_FEDERATION_ID
_run_simulation(
    num_supernodes=nodes, exit_event=EventType.PYTHON_API_RUN_SIMULATION_LEAVE, is_app=True, app_dir=app, run=run,
    server_app_attr=parts["serverapp"], client_app_attr=parts["clientapp"],
    server_app_context=Context(run_id=7, node_id=0, node_config={}, state=RecordDict(), run_config=config),
    backend_config={"client_resources": {"num_cpus": 1}, "init_args": {"num_cpus": 2, "include_dashboard": False}},
)
"""


def started(words: list[str], mark: str, home: Path) -> str:
    environment = {**os.environ, MARK: mark, "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0"}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stderr


@pytest.mark.parametrize(
    ("name", "override"),
    [
        pytest.param("stateful", "rounds=4", marks=pytest.mark.deploy),
        ("custom", "method.rate=0.3 rounds=3"),
        pytest.param("older", "rounds=3", marks=pytest.mark.deploy),
    ],
)
def test_same_arrays_as_in_flowers_simulator(name: str, override: str, tmp_path: Path) -> None:
    app, mark = str(APPS / name), uuid.uuid4().hex
    ours, theirs = tmp_path / "ours.npz", tmp_path / "theirs.npz"
    override = f"{override} nodes={NODES}"
    words = ["-m", "fedfuse.cli", "flower", app, "--nodes", str(NODES), "--run-config", f"{override} out='{ours}'"]
    started(words, mark, tmp_path)
    assert not gone(mark)
    for _ in range(3):  # Flower's simulator goes on without nodes whose Ray actor is late: then it is no reference
        started(["-c", SIMULATOR, app, str(NODES), f"{override} out='{theirs}'"], mark, tmp_path)
        with np.load(theirs) as found:
            whole = all(np.isfinite(found[key]).all() for key in found.files)
            if whole and (name != "stateful" or found["asked"] == pytest.approx(4)):  # every node in every round
                break
    with np.load(ours) as a, np.load(theirs) as b:
        assert set(a.files) == set(b.files)
        for key in a.files:
            np.testing.assert_allclose(a[key], b[key], rtol=1e-6)
        if name == "stateful":
            assert a["asked"] == pytest.approx(
                4
            )  # a weighted mean, in whatever order: every node's state came back in every round


def test_a_server_that_asks_each_client_in_a_thread_of_its_own_hears_all_of_them(tmp_path: Path) -> None:
    app, out = APPS / "older", tmp_path / "out.npz"
    words = [
        "-m",
        "fedfuse.cli",
        "flower",
        str(app),
        "--nodes",
        str(NODES),
        "--run-config",
        f"nodes={NODES} out='{out}'",
    ]
    started(words, uuid.uuid4().hex, tmp_path)
    older: dict[str, Any] = runpy.run_path(str(app / "older_app.py"))
    sizes, w, expected = [len(older["examples"](i)[0]) for i in range(NODES)], np.zeros(8), []
    for _ in range(3):
        w = np.average([older["trained"](w, i, 0.1) for i in range(NODES)], axis=0, weights=sizes)
        expected.append(w)
    with np.load(out) as found:
        assert found["heard"].tolist() == [[NODES, 0]] * 6  # training and evaluation of three rounds
        np.testing.assert_allclose(found["w"], expected, rtol=1e-12)


FLAKY = """
import os, signal
import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

client, server = ClientApp(), ServerApp()

@client.train()
def train(message, context):
    count = context.state["n"]["n"] + 1 if "n" in context.state else 1
    context.state["n"] = MetricRecord({"n": count})
    mark = os.path.join(str(context.run_config["marks"]), str(context.node_config["partition-id"]))
    kind = {1: "die", 2: "raise", 3: "always"}.get(int(context.node_config["partition-id"]))
    if count == 2 and kind and (kind == "always" or not os.path.exists(mark)):
        open(mark, "w").close()
        if kind == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("no")
    return Message(RecordDict({"m": MetricRecord({"count": count})}), reply_to=message)

@server.main()
def main(grid, context):
    for round in (1, 2):
        out = {}
        asked = [Message(RecordDict(), dst_node_id=n, message_type="train") for n in grid.get_node_ids()]
        for reply in grid.send_and_receive(asked):
            out[reply.metadata.src_node_id] = -1 if reply.has_error() else reply.content["m"]["count"]
        expected = {n: round for n in out} | ({4: -1} if round == 2 else {})
        assert out == expected, out
"""


def test_failed_nodes_are_tried_again_and_named(tmp_path: Path) -> None:
    app = tmp_path / "flaky"
    app.mkdir()
    table = (APPS / "stateful" / "pyproject.toml").read_text().replace("stateful_app", "flaky_app")
    (app / "pyproject.toml").write_text(table + 'marks = ""\n')
    (app / "flaky_app.py").write_text(FLAKY)
    words = ["-m", "fedfuse.cli", "flower", str(app), "--nodes", "5", "--run-config", f"marks='{tmp_path}'"]
    said = started(words, uuid.uuid4().hex, tmp_path)
    assert "partition 3" in said
    assert "1 message was left out" in said


HALF = """
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client, server = ClientApp(), ServerApp()

@client.query("known")
def known(message, context):
    return Message(RecordDict(), reply_to=message)

@server.main()
def main(grid, context):
    for kind in context.run_config["kinds"].split():
        asked = [Message(RecordDict(), n, kind) for n in grid.get_node_ids()]
        print(kind, sum(reply.has_error() for reply in grid.send_and_receive(asked)))
"""


@pytest.mark.parametrize(
    ("kinds", "code", "said"),
    [("query.known evaluate query.known", 0, "query.known 0\nevaluate 2\nquery.known 0"), ("evaluate", 1, "")],
)
def test_an_app_goes_on_where_all_nodes_fail_unless_none_ever_answered(kinds, code, said, tmp_path: Path) -> None:
    """As in Flower, a ClientApp may lack what it is asked for; one that never answers does not end as if it had."""
    table = (APPS / "stateful" / "pyproject.toml").read_text().replace("stateful_app", "half_app")
    (tmp_path / "pyproject.toml").write_text(table + 'kinds = ""\n')
    (tmp_path / "half_app.py").write_text(HALF)
    words = ["flower", str(tmp_path), "--nodes", "2", "--retries", "0", "--run-config", f"kinds='{kinds}'"]
    done = subprocess.run([sys.executable, "-m", "fedfuse.cli", *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    assert done.stdout.strip() == said
    assert ("fedfuse: no node succeeded: ValueError: No evaluate function" in done.stderr) == bool(code)


HAND = """
import logging, os, sqlite3, time
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client, server = ClientApp(), ServerApp()
kept = sqlite3.connect(":memory:")

@client.query("count")
def count(message, context):
    kept.execute("select 1")
    state = context.state["own"]["n"] if "own" in context.state else 0
    context.state["own"] = ConfigRecord({"n": state + 1})
    return Message(RecordDict({"m": MetricRecord({"n": state + 1})}), reply_to=message)

@client.query("say")
def say(message, context):
    if context.node_config["partition-id"] == 0:
        MetricRecord({"n": "no number"})
    elif context.node_config["partition-id"] == 1:
        print("one line\\nand half a line", end="")
        logging.getLogger("flwr").warning("a warning")
    elif context.node_config["partition-id"] == 2:
        os.system("echo not by Python")
        os.kill(os.getpid(), 9)
    return Message(RecordDict(), reply_to=message)

@client.query("sleep")
def sleep(message, context):
    time.sleep(3)
    return Message(RecordDict(), reply_to=message)

def counted(replies):
    return sorted((r.metadata.src_node_id, r.content["m"]["n"]) for r in replies)

@server.main()
def main(grid, context):
    def asked(kind, nodes=(1, 2, 3), ttl=None):
        return [Message(RecordDict(), n, f"query.{kind}", ttl=ttl) for n in nodes]

    each = [(n, k) for n in (1, 2, 3) for k in (1, 2, 3)]
    assert counted(grid.send_and_receive(asked("count") + asked("count") + asked("count"))) == each
    keys = [*grid.push_messages(asked("count")), *grid.push_messages(asked("count"))]
    time.sleep(3)
    assert counted(grid.pull_messages(keys)) == [(n, k) for n in (1, 2, 3) for k in (4, 5)]
    again = asked("count", [1])
    assert counted(grid.send_and_receive(again + again)) == [(1, 6), (1, 7)]
    assert counted(grid.send_and_receive(asked("count", [9, 1]))) == [(1, 8)]
    begun = time.monotonic()
    late, = grid.send_and_receive(asked("sleep", [1], ttl=1.0))
    assert late.has_error() and late.error.code == 3 and time.monotonic() - begun < 2.5
    replies = list(grid.send_and_receive(asked("say")))
    assert [reply.has_error() for reply in replies] == [True, False, True]
    print("the server goes on")
"""


def test_an_app_that_pushes_and_pulls_by_hand(tmp_path: Path) -> None:
    """All as in Flower's simulator; and what clients print is told with their partition, last words included."""
    table = (APPS / "stateful" / "pyproject.toml").read_text().replace("stateful_app", "hand_app")
    (tmp_path / "pyproject.toml").write_text(table)
    (tmp_path / "hand_app.py").write_text(HAND)
    words = ["flower", str(tmp_path), "--nodes", "3", "--workers", "2", "--retries", "0"]
    done = subprocess.run([sys.executable, "-m", "fedfuse.cli", *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    *said, last = done.stdout.splitlines()
    assert last == "the server goes on"
    # what shared a process with node 3 is asked, and heard, once more
    assert set(said) == {"(partition 1) and half a line", "(partition 1) one line", "(partition 2) not by Python"}
    heard = {line for line in done.stderr.splitlines() if line.startswith("(")}
    assert heard == {"(partition 1) \x1b[93mWARNING \x1b[0m:   a warning"}
    assert "there is no node 9" in done.stderr
    assert re.search(r"node 1 \(partition 0\) failed: TypeError: .*\(hand_app.py:\d+\)", done.stderr)
    assert "node 3 (partition 2) failed: its worker died" in done.stderr


@pytest.mark.parametrize(
    ("source", "code", "said"),
    [
        ("import nowhere", 2, "half_app:client: cannot be loaded (ModuleNotFoundError: No module named 'nowhere'"),
        ("client = 3", 2, "half_app:client: is a int; a ClientApp is needed"),
        ("import os; os._exit(1)", 1, "half_app:client: 3 processes died as they loaded it"),
    ],
)
def test_a_client_app_that_cannot_be_loaded_ends_the_run(source: str, code: int, said: str, tmp_path: Path) -> None:
    table = (APPS / "stateful" / "pyproject.toml").read_text().replace("stateful_app:client", "half_app:client")
    (tmp_path / "pyproject.toml").write_text(table.replace("stateful_app:server", "server_app:server"))
    (tmp_path / "server_app.py").write_text(HALF.replace('@client.query("known")', "").replace('["kinds"]', '["out"]'))
    (tmp_path / "half_app.py").write_text(source + "\n")
    words = ["flower", str(tmp_path), "--nodes", "2", "--run-config", "out='query'"]
    done = subprocess.run([sys.executable, "-m", "fedfuse.cli", *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    assert not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"fedfuse: {said}")


def test_an_app_without_torch_waits_for_no_torch() -> None:
    """Its import takes a process 1.5 s of a processor; Flower has none."""
    code = "import sys, fedfuse.engines.guest, fedfuse.engines.guest_run; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


def test_words_are_passed_on_in_lines_with_their_partition(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = Words(tmp_path)
    one, other = words.of_another(), words.of_another()
    with open(f"{one}.out", "ab", buffering=0) as out, open(f"{other}.err", "ab", buffering=0) as err:
        out.write(b"at import\n\x1e3\nof three, ")
        words.pass_on()
        assert capsys.readouterr().out == "(ClientApp) at import\n"
        out.write(b"whole\n\nunfinished\x1e\n\x1e12\nof twelve")
        err.write(b"\x1e4\n\xff\n")
        words.pass_on()
        told = capsys.readouterr()
        assert told.out == "(partition 3) of three, whole\n(partition 3) \n(partition 3) unfinished\n"
        assert told.err == "(partition 4) \ufffd\n"
    words.close()
    assert capsys.readouterr().out == "(partition 12) of twelve\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "no such directory"),
        ([str(APPS)], "is not a Flower app"),
        ([str(APPS / "custom"), "--nodes", "none"], "--nodes=none"),
        ([str(APPS / "custom"), "--run-config", "nothing=1"], "method.clip"),
        ([str(APPS / "custom"), "--run-config", "rounds"], "a key and its value are needed"),
        ([str(APPS / "custom"), "--speed", "1"], "no such option"),
    ],
)
def test_mistakes_are_one_line(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        command(words)
    assert "\n" not in str(caught.value)


def test_who_reads_no_more_is_told_apart_from_a_pipe_of_the_apps(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as screen:
        monkeypatch.setattr(sys, "stdout", screen)
        assert not guest_run._unread()
        os.close(reader)
        assert guest_run._unread()


def test_a_node_that_sleeps_holds_back_nobody(tmp_path: Path) -> None:
    """Secure aggregation on two processes: round 1 lacks the sleeper alone, and round 2 has it again."""
    out, mark = tmp_path / "means.npz", uuid.uuid4().hex
    override = f"woken='{tmp_path / 'woken'}' out='{out}'"
    words = ["flower", str(APPS / "secret"), "--nodes", "5", "--workers", "2", "--run-config", override]
    started(["-m", "fedfuse.cli", *words], mark, tmp_path)
    assert not gone(mark)
    with np.load(out) as found:  # node i's number is i + 1; the sleeper is node 0
        np.testing.assert_allclose(found["means"][0], (2 + 3 + 4 + 5) / 4, atol=1e-4)
        np.testing.assert_allclose(found["means"][1], (1 + 2 + 3 + 4 + 5) / 5, atol=1e-4)
