"""Secure sums between real processes over TLS: sites that freeze between the exchange of masks and their reply."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from fedfuse.config.compose import compose
from fedfuse.deploy.local import Federation
from fedfuse.deploy.processes import Process, members
from fedfuse.deploy.submit import order_of, submit
from fedfuse.errors import WorldError
from fedfuse.network.exchange import Patience
from tests.federations import TINY, federation

pytestmark = pytest.mark.deploy
SECURE = ("secure=on", "train.epochs=150")  # a training of seconds, to be caught in


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with Federation(3, tmp_path_factory.mktemp("federation")) as started:
        assert all(node.wait_for("SuperNode ID", 600) for node in started.processes[1:])
        yield started


def simulated(round: int | None = None, *keys: str) -> str:
    """The digest of the same quantised sums in simulation, where client 2 fails in one round's training."""
    with federation("fedavg", *SECURE, *keys) as (built, _):
        answer = built.grid.node._answer  # type: ignore[attr-defined]

        def failing(message: Message, cache: Any, who: int, lends: bool = False) -> Message:
            if who == 2 and message.metadata.message_type == "train" and message.content["run"]["round"] == round:
                raise RuntimeError("fails")
            return answer(message, cache, who, lends)

        built.grid.node._answer = failing  # type: ignore[attr-defined]
        built.run()
        assert built.digest is not None
        return built.digest


def send(nodes: list[Process], which: signal.Signals) -> None:
    for node in nodes:
        for pid in members(node.child.pid):
            os.kill(pid, which)


class Freezer:
    """Stops nodes once they have a training message in hand; `thaw` lets them go on when a line says so."""

    def __init__(self, nodes: list[Process], after: str, thaw: Callable[[str], bool]) -> None:
        self.nodes, self.after, self.thaw = nodes, after, thaw
        self.said: list[str] = []
        self.frozen = self.thawed = False

    def __call__(self, line: str) -> None:
        print(line)
        self.said.append(line)
        if not self.frozen and line.startswith(self.after):
            before = {node.name: node.text().count("Receiving: train") for node in self.nodes}
            waiting, until = list(self.nodes), time.monotonic() + 60
            while waiting and time.monotonic() < until:
                for node in [n for n in waiting if n.text().count("Receiving: train") > before[n.name]]:
                    send([node], signal.SIGSTOP)
                    waiting.remove(node)
                time.sleep(0.02)
            self.frozen = not waiting
        elif self.frozen and not self.thawed and self.thaw(line):
            send(self.nodes, signal.SIGCONT)
            self.thawed = True


def words(rounds: int) -> list[str]:
    return [*(word for word in TINY if word[:7] not in ("runtime", "rounds=")), *SECURE, "strategy=fedavg",
            f"rounds={rounds}", "evaluate.every=9"]  # fmt: skip


def test_a_site_that_drops_out_after_the_masks_were_exchanged_is_left_out_of_the_sum(
    sites: Federation, tmp_path: Path
) -> None:
    freezer = Freezer([sites.processes[3]], "round   1/3", lambda line: "client 2: no reply within" in line)
    sites.say = freezer
    order = order_of(compose(words(3)), Patience(deadline=40.0))
    try:
        summary = sites.play(order, tmp_path / "out")
    finally:
        send(freezer.nodes, signal.SIGCONT)
    assert freezer.thawed, freezer.said
    assert summary["failures"]["replies"] == 1
    assert not summary["cohort_complete"]
    assert summary["digest"] == simulated(2, "rounds=3", "evaluate.every=9")


def test_where_too_few_are_left_a_run_stops_with_one_line_and_resumes(sites: Federation, tmp_path: Path) -> None:
    freezer = Freezer(sites.processes[2:], "round   1/2", lambda line: False)
    sites.say = freezer
    order, out = order_of(compose(words(2)), Patience(deadline=25.0)), tmp_path / "out"
    try:
        with pytest.raises(WorldError) as stopped:
            sites.play(order, out)
    finally:
        send(freezer.nodes, signal.SIGCONT)
    told = "round 2, train: 1 of 3 clients sent keys, a secure sum needs 2"
    assert str(stopped.value) == told
    assert [line for line in freezer.said if told in line] == [f"fedfuse: failed: {told}"]
    assert any("a secure sum needs 2; keys are exchanged anew" in line for line in freezer.said)
    resumed = submit(sites.link, order, out, resume=True, say=print)
    assert resumed is not None
    assert resumed["digest"] == simulated(None, "rounds=2", "evaluate.every=9")
    assert resumed["cohort_complete"]
