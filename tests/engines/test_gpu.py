"""On a GPU: the same bits twice, with one or two actors, close to what the CPU computes; and clients in stacks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fedfuse.config.compose import compose
from fedfuse.core import abreast, abreast_room
from fedfuse.runs.experiment import run
from tests.federations import TINY, play

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device on this machine"),
]


def summary(path: Path, *words: str) -> dict:
    run(compose([*TINY, *words, f"out={path}"]), quiet=True)
    return json.loads((path / "summary.json").read_text())


@pytest.mark.parametrize("strategy", ["fedavg", "knfu", "feddf"])
def test_actors_share_a_gpu(strategy: str, tmp_path: Path) -> None:
    words = (f"strategy={strategy}", "runtime=ray", "runtime.device=cuda", "rounds=3")
    two = summary(tmp_path / "two", *words, "runtime.workers=2", "runtime.gpu_fraction=0.5")
    one = summary(tmp_path / "one", *words, "runtime.workers=1", "runtime.gpu_fraction=1")
    cpu = summary(tmp_path / "cpu", f"strategy={strategy}", "runtime=inline", "runtime.device=cpu", "rounds=3")
    assert two["digest"] == one["digest"]
    assert two["traffic"] == cpu["traffic"]
    assert two["failures"] == cpu["failures"]
    assert abs(two["final"]["loss/train"] - cpu["final"]["loss/train"]) < 0.05


def test_mixed_precision_on_a_gpu(tmp_path: Path) -> None:
    words = ("strategy=fedavg", "model=cnn", "runtime=inline", "runtime.device=cuda", "train.precision=bf16")
    first, second = (summary(tmp_path / name, *words) for name in ("a", "b"))
    assert first["digest"] == second["digest"]
    assert first["final"]["loss/train"] < 3


AUTO, MORE = "runtime.vectorize=auto", ("clients=9", "partition=dirichlet", "train.batch_size=7")


def distance(one, other) -> float:
    """Largest difference of the server's models, over their largest number."""
    first, second = (next(iter(run.strategy.server_models().values()))[1] for run in (one, other))
    most = max(float(value.abs().max()) for value in second.values())
    return max(float((first[key].cpu() - second[key].cpu()).abs().max()) for key in second) / most


@pytest.mark.parametrize("model", ["mlp_small", "cnn"])
@pytest.mark.parametrize("strategy", ["fedavg", "fedprox", "scaffold", "ditto"])
def test_stacks_on_a_gpu_are_close_to_clients_one_by_one_and_twice_the_same(strategy, model, made):
    words = (*MORE, f"model={model}")
    together, again = (play(strategy, *words, AUTO, device="cuda") for _ in range(2))
    assert max(made) == 9
    assert together.digest == again.digest
    assert any("stacked on CUDA" in note for note in together.notes)
    alone, cpu = play(strategy, *words, device="cuda"), play(strategy, *words)
    assert distance(together, alone) < 1e-3
    assert distance(together, cpu) < 1e-3


@pytest.mark.parametrize("strategy", ["fedmd", "knfu"])
def test_models_of_their_own_are_stacked_on_a_gpu(strategy, made):
    words = ("clients=6", "model.pool=[mlp_small,mlp,cnn]")
    together, again = (play(strategy, *words, AUTO, device="cuda") for _ in range(2))
    alone = play(strategy, *words, device="cuda")
    assert max(made) == 2
    assert together.digest == again.digest
    assert together.totals == alone.totals


def test_what_a_stack_holds_is_measured(monkeypatch):
    sizes: list[int] = []
    real = abreast_room.Room.stack

    def stack(self, *asked):
        sizes.append(real(self, *asked))
        return sizes[-1]

    monkeypatch.setattr(abreast_room.Room, "stack", stack)
    play("fedavg", *MORE, AUTO, device="cuda")
    assert set(sizes) == {abreast_room.DEVICE_AWAKE}
    monkeypatch.setattr(abreast_room, "SHARE", 1e-4)  # some megabytes
    play("fedavg", *MORE, "model=cnn", "rounds=1", AUTO, device="cuda")
    assert 1 <= sizes[-1] < abreast_room.DEVICE_AWAKE


def test_stacks_without_memory_are_halved_on_a_gpu(monkeypatch):
    sizes: list[int] = []
    real = abreast.together

    def together(asked, replicas, forward):
        sizes.append(len(asked))
        if len(asked) > 3:
            torch.empty(2**50, dtype=torch.uint8, device="cuda")  # the device's own answer
        return real(asked, replicas, forward)

    alone = play("fedavg", *MORE, device="cuda")
    monkeypatch.setattr(abreast, "together", together)
    crowded = play("fedavg", *MORE, AUTO, device="cuda")
    assert sizes[0] == 9
    assert set(sizes[1:]) == {3}
    assert crowded.strategy.inbox.left_out == []
    assert distance(crowded, alone) < 1e-3
    assert any("OutOfMemoryError" in note for note in crowded.notes)


def test_dp_sgd_on_a_gpu():
    pytest.importorskip("opacus")
    words = ("privacy.noise=1.0", "privacy.clip=1.0", "rounds=1")
    once, twice = (play("fedavg", *words, AUTO, device="cuda") for _ in range(2))
    assert once.digest == twice.digest
    assert once.strategy.inbox.left_out == []
    assert distance(once, play("fedavg", "rounds=1", device="cuda")) > 1e-2  # the noise is there
