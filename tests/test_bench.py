"""The distillation contest: what `fedfuse bench fedmd@20` compares does the same steps on both sides."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from fedfuse import models
from fedfuse.bench import distillation, footprint, suite, texts
from fedfuse.bench.contestants import WORKLOADS, rounds, serve
from fedfuse.bench.suite import Side, sides_of
from fedfuse.config.compose import compose
from fedfuse.errors import WorldError


@pytest.mark.parametrize("name", ["fedmd", "dsfl", "knfu"])
def test_both_sides_take_the_same_steps(name: str, monkeypatch) -> None:
    monkeypatch.setattr(distillation, "ROWS", 70)
    workload, steps = WORKLOADS[name], []

    def counted(optimizer, args, options):
        group = optimizer.param_groups[0]
        steps.append((group["params"][0].shape, type(optimizer).__name__, group["lr"]))

    hook = register_optimizer_step_post_hook(counted)
    found = []
    for side in (distillation.fedfuse_side(workload, 2, "inline"), distillation.plain_side(workload, 2)):
        for _ in range(2):
            steps.clear()
            side()
            found.append(list(steps))
    hook.remove()
    assert found[:2] == found[2:]
    # 50 private examples by 10, and from round two on 70 rows by 64; the server's student distils in both rounds
    taught = 2 * (name == "dsfl")
    assert [len(rounds) for rounds in found[:2]] == [2 * 5 + taught, 2 * (5 + 2) + taught]


@pytest.mark.skipif(not texts.stories().exists(), reason="no stories260K beside the project")
def test_texts_take_the_same_steps_on_both_sides() -> None:
    workload, rates = WORKLOADS["fed-sb"], []
    hook = register_optimizer_step_post_hook(
        lambda optimizer, args, options: rates.append((type(optimizer).__name__, optimizer.param_groups[0]["lr"]))
    )
    found = []
    for side in (texts.fedfuse_side(workload, 2, "inline"), texts.plain_side(workload, 2)):
        rates.clear()
        side()
        found.append(list(rates))
    hook.remove()
    assert found[0] == found[1]
    assert len(found[0]) == 2 * 5


def test_only_our_sides_and_the_plain_loop_distil() -> None:
    assert sides_of("knfu", 20, ["fedfuse", "inline", "plain", "guest", "flower", "pfl"]) == [
        "fedfuse", "inline", "plain",
    ]  # fmt: skip


@pytest.mark.parametrize("words", [footprint.LOGISTIC, footprint.STATEFUL])
def test_commands_that_are_measured_are_commands(words) -> None:
    config = compose([*words, "runtime=inline"])
    if config.model.build is not None:
        shape = (1, 8, 8)
        model = models.build("custom", shape=shape, classes=10, config=config.model, seed=0)
        assert model(torch.zeros(2, *shape)).shape == (2, 10)


def test_rivals_take_turns_with_ours_when_others_are_done(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(
        suite, "in_turns", lambda name, clients, sides, rounds: asked.append(sides) or dict.fromkeys(sides)
    )
    suite.contest("mlp", 1000, ["fedfuse", "abreast", "plain", "flower"], 1)
    assert asked == [["fedfuse", "abreast", "plain"], ["fedfuse", "abreast", "flower"]]
    asked.clear()
    suite.contest("mlp", 1000, ["fedfuse", "flower"], 1)
    suite.contest("mlp", 1000, ["fedfuse", "plain"], 1)
    assert asked == [["fedfuse", "flower"], ["fedfuse", "plain"]]


def test_who_is_timed_from_its_start_is_asked_for_one_round() -> None:
    contestant = "from fedfuse.bench.contestants import serve; serve(lambda rounds: print('played', rounds))"
    assert footprint._until([sys.executable, "-c", contestant], "played 1\n".__eq__) > 0


def test_a_command_that_plays_no_round_has_no_seconds() -> None:
    with pytest.raises(WorldError, match="no round was played by -c pass"):
        footprint._until([sys.executable, "-c", "pass"], lambda line: True)


@pytest.mark.parametrize(("before", "asked"), [([], 1), ([0.3], 4), ([0.01, 0.5], 2), ([7.0], 1)])
def test_a_turn_is_as_many_rounds_as_fill_it(before, asked) -> None:
    side = Side.__new__(Side)
    side.seconds, side.failed = list(before), ""
    side.process = SimpleNamespace(stdin=io.StringIO(), stdout=iter(["Ray says\n", "seconds 0.25\n"]))  # type: ignore
    side.turn()
    assert side.process.stdin.getvalue() == f"{asked}\n"
    assert side.seconds == [*before, 0.25]


def test_a_side_plays_what_is_asked_and_says_what_one_round_took(monkeypatch, capsys) -> None:
    clock, played = iter([0.0, 5.0, 10.0, 16.0]), []
    monkeypatch.setattr(sys, "stdin", io.StringIO("1\n3\n"))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    serve(rounds(lambda: played.append(1)))
    assert len(played) == 4
    assert capsys.readouterr().out.split() == ["ready", "seconds", "5.000000", "seconds", "2.000000"]
