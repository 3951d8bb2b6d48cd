"""`runtime.server_device`: the server's own networks have a device of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedfuse.config.compose import compose
from fedfuse.errors import UserError
from fedfuse.runs import experiment
from tests.federations import TINY, play
from tests.pretended import HERE, THERE, Mixed, Pretended


def test_the_server_is_where_the_clients_are_unless_told() -> None:
    assert experiment.server_device_of(compose(["runtime.device=cpu"])) == "cpu"
    assert experiment.server_device_of(compose(["runtime.server_device=cpu"])) == "cpu"


@pytest.mark.parametrize("word", ["gpu", "cuda:", "cuda:x", "cpu:0", "''"])
def test_a_device_that_is_none_is_refused(word: str) -> None:
    with pytest.raises(UserError, match=r"runtime\.server_device=.*allowed is null, auto, cpu, cuda or cuda:<number>"):
        compose([f"runtime.server_device='{word}'" if word != "''" else "runtime.server_device=''"])


def test_a_gpu_that_is_not_there_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"server_device=cuda: this machine has no CUDA device; allowed here"):
        experiment.server_device_of(compose(["runtime.server_device=cuda"]))
    assert experiment.server_device_of(compose(["runtime.server_device=auto"])) == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"server_device=cuda:2: this machine has 2 CUDA devices"):
        experiment.server_device_of(compose(["runtime.server_device=cuda:2"]))
    config = compose(["runtime.server_device=cuda:1", "runtime.device=cpu"])
    assert (experiment.server_device_of(config), experiment.device_of(config)) == ("cuda:1", "cpu")


class Placed(Exception):
    """Says where the server half was put."""


def test_the_server_half_is_built_there(monkeypatch, tmp_path: Path) -> None:
    def placed(entry, scenario, device):
        raise Placed(device)

    monkeypatch.setattr(experiment, "build_strategy", placed)
    monkeypatch.setattr(experiment, "server_device_of", lambda config: config.runtime.server_device)
    config = compose([*TINY, "strategy=feddf", "runtime.server_device=cuda:3", f"out={tmp_path / 'run'}"])
    with pytest.raises(Placed, match="cuda:3"):
        experiment.run(config)


def test_it_changes_no_bit(tmp_path: Path) -> None:
    import json

    digests = set()
    for i, word in enumerate(("null", "cpu")):
        words = [*TINY, "strategy=feddf", f"runtime.server_device={word}", "runtime.device=cpu"]
        where = experiment.run(compose([*words, "rounds=1", f"out={tmp_path / str(i)}"]), quiet=True)
        digests.add(json.loads((where / "summary.json").read_text())["digest"])
    assert len(digests) == 1


# one of each way to meet knowledge or state of one's own: anchors, variates, codes and rows that are indices, attacks
@pytest.mark.parametrize(
    "words",
    [
        ("fedprox", "runtime.vectorize=auto"),
        ("scaffold",),
        ("ditto", "attack=noise", "attack.fraction=0.34"),
        ("cfd", "distil.epochs=1"),
        ("scarlet", "distil.epochs=1", "distil.optimizer=sgd"),  # Adam's last bits are of the device
        ("selectivefd", "distil.epochs=1"),
    ],
    ids=lambda words: words[0],
)
def test_clients_meet_what_they_are_given_on_their_own_device(words) -> None:
    with Pretended() as mode:
        played = play(*words, "data.limit=60", "transfer.size=8", device=THERE)
    assert not played.strategy.inbox.ever_left_out, played.strategy.inbox.left_out
    assert mode.moved > 20
    assert played.digest == play(*words, "data.limit=60", "transfer.size=8").digest


def test_the_device_that_is_not_there_refuses_what_a_device_refuses() -> None:
    with Pretended():
        here, there = torch.ones(3), torch.ones(3).to(THERE)
        assert (here.device, there.device, (there + 1).device) == (HERE, THERE, THERE)
        for mixed in (
            lambda: here + there, lambda: torch.stack([here, there]), lambda: there.index_select(0, torch.tensor([1])),
            lambda: here[there.long()], lambda: torch.rand(3, device=THERE, generator=torch.Generator()),
        ):  # fmt: skip
            with pytest.raises(Mixed):
                mixed()
        with pytest.raises(TypeError):
            there.numpy()
        assert (there[torch.tensor([0])] + there.cpu().to(there)).device == THERE
