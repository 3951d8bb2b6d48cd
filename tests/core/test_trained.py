"""How many examples were trained on: what a fair comparison has to tell beside bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedfuse.core import abreast_trial
from fedfuse.core.inbox import _count
from fedfuse.runs.experiment import resume
from fedfuse.train import work
from tests.federations import federation, play

WORDS = ("rounds=3", "train.epochs=2", "strategy.digest_epochs=5")
EXAMPLES, TRANSFER, CLIENTS = 128, 24, 3


@pytest.mark.parametrize(
    "words",
    [(), ("runtime.vectorize=auto",), ("evaluate.every=3",), ("clock=devices",), ("runtime.reverse=true",)],
    ids=["plain", "auto", "seldom", "clock", "reverse"],
)
def test_each_example_counts_as_often_as_it_is_trained_on(words: tuple[str, ...], monkeypatch) -> None:
    """Three rounds of two epochs; two digests of five epochs, also where an evaluation has taken them in before."""
    monkeypatch.setattr(abreast_trial, "TRIES", 0)
    played = play("fedmd", *WORDS, *words)
    own = sum(played.strategy.scenario.examples(client) for client in range(CLIENTS))
    assert played.strategy.inbox.trained == {"clients": 3 * 2 * own + 2 * 5 * CLIENTS * TRANSFER, "server": 0}


def test_a_servers_student_counts_apart() -> None:
    trained = play("feddf", "rounds=2", "strategy.distill_epochs=7").strategy.inbox.trained
    assert trained["server"] == 2 * 7 * TRANSFER
    assert trained["clients"] == play("fedavg", "rounds=2").strategy.inbox.trained["clients"] > 0


def test_a_run_that_goes_on_counts_on(tmp_path: Path) -> None:
    whole = play("fedmd", *WORDS).strategy.inbox.trained
    with federation("fedmd", *WORDS, "rounds=2", path=tmp_path / "run") as (built, _):
        built.run()
    resume(tmp_path / "run", quiet=True, rounds=3)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["trained"] == whole


@pytest.mark.parametrize("seed", [0, 1])
def test_whom_a_private_training_drew_is_not_told(seed: int) -> None:
    """Of Poisson's draws the number that was to be expected is, which depends on no draw."""
    words = ("privacy.epsilon=8", "rounds=2", "train.epochs=2", "partition.validation=0", f"seed={seed}")
    played = play("fedavg", *words[:3], words[4])
    own = [played.strategy.scenario.examples(client) for client in range(CLIENTS)]
    assert played.strategy.inbox.trained["clients"] == 2 * 2 * sum(own)


@pytest.mark.parametrize("said", [-5, 2**40, "7", 1.5, None, [3]])
def test_a_count_that_makes_no_sense_is_none(said: object) -> None:
    assert _count(said, 2**40) == 0


def test_nothing_is_counted_in_flops_unless_asked(monkeypatch) -> None:
    monkeypatch.setattr(work, "flops", lambda *_: pytest.fail("counted"))
    assert play("fedavg", "rounds=1").strategy.inbox.trained["clients"] > 0
