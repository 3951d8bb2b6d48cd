"""Power loss: whatever of a commit the disk lost, the run goes on from a whole one, with the undisturbed digest."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import fedfuse.config.files as files
from fedfuse.config.compose import compose
from fedfuse.core.loop import Callback, Federation
from fedfuse.errors import UserError
from fedfuse.runs import experiment
from fedfuse.runs.experiment import resume, run
from fedfuse.wire.client_store import Torn, read_tree, write_tree
from tests.federations import TINY, play
from tests.runs.test_directory import summary_of


class Unplugged(Callback):
    def round(self, federation: Federation) -> None:
        if federation.done == 2:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    usual = experiment.callbacks
    for name in ("fedavg", "ditto"):
        out = tmp_path_factory.mktemp("run") / name
        experiment.callbacks = lambda *args: [*usual(*args), Unplugged()]  # type: ignore[assignment]
        try:
            with pytest.raises(KeyboardInterrupt):
                run(compose([*TINY, f"strategy={name}", "rounds=3", "runtime=inline", f"out={out}"]), quiet=True)
        finally:
            experiment.callbacks = usual
        found[name] = out
    return found


def damaged(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "dropped":
        path.unlink()
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:  # the length was kept, a block was not
        path.write_bytes(content[:-64] + bytes(64))


@pytest.mark.parametrize("how", ["dropped", "emptied", "cut", "zeroed"])
@pytest.mark.parametrize("name", ["fedavg", "ditto"])
def test_a_torn_checkpoint_falls_back_to_the_one_before(
    name: str, how: str, interrupted: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(interrupted[name], tmp_path / "copy"))
    damaged(copy / "checkpoint" / "state.safetensors", how)
    resume(copy, quiet=True)
    assert summary_of(copy)["digest"] == play(name, "rounds=3").digest
    assert "goes on from state.before.safetensors, after round 1" in capsys.readouterr().err
    assert any("is torn" in note for note in summary_of(copy)["notes"])


def test_two_torn_checkpoints_are_refused(interrupted: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(interrupted["fedavg"], tmp_path / "copy"))
    for name in ("state.safetensors", "state.before.safetensors"):
        damaged(copy / "checkpoint" / name, "cut")
    with pytest.raises(UserError, match=r"state\.safetensors: cannot be read"):
        resume(copy, quiet=True)
    assert not (copy / "summary.json").exists()


def test_a_torn_client_state_is_named(interrupted: dict[str, Path], tmp_path: Path) -> None:
    from fedfuse.wire.client_store import ClientStore
    from fedfuse.wire.knowledge import Stale

    copy = Path(shutil.copytree(interrupted["ditto"], tmp_path / "copy"))
    store = ClientStore(copy / "checkpoint" / "clients", durable=True)
    store.save(0, "9.1", {"a": 1}, "2.1")
    for how in ("zeroed", "cut", "emptied"):
        damaged(store.path(0, "9.1"), how)
        with pytest.raises(Stale, match="is here and torn"):
            store.load(0, "9.1")


@pytest.mark.parametrize("name", ["metrics", "traffic", "timing"])
def test_rows_of_a_round_that_never_committed_are_dropped(
    name: str, interrupted: dict[str, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(interrupted["fedavg"], tmp_path / "copy"))
    (copy / "checkpoint" / "rows" / f"{name}-000003.parquet").write_bytes(b"half a ro")
    (copy / "checkpoint" / "round.json").unlink()
    resume(copy, quiet=True)
    assert summary_of(copy)["digest"] == play("fedavg", "rounds=3").digest


def test_every_prefix_of_the_writes_of_a_commit_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The power goes at each rename of the second round's commit: what was renamed is whole, the rest is not there."""
    usual, wanted = files.os.replace, play("ditto", "rounds=2").digest

    for stop in range(20):
        out, count = tmp_path / f"run-{stop}", [0]
        armed = [False]

        class Arm(Callback):
            def round(self, federation: Federation, armed: list[bool] = armed) -> None:
                armed[0] = federation.done == 1

        def cut(
            source: object, target: object, count: list[int] = count, armed: list[bool] = armed, stop: int = stop
        ) -> None:
            if armed[0]:
                count[0] += 1
                if count[0] > stop:
                    raise KeyboardInterrupt
            usual(source, target)  # type: ignore[arg-type]

        usual_callbacks = experiment.callbacks
        with monkeypatch.context() as patch:
            patch.setattr(files.os, "replace", cut)
            patch.setattr(experiment, "callbacks", lambda *args, c=usual_callbacks, a=Arm: [*c(*args), a()])
            try:
                run(compose([*TINY, "strategy=ditto", "rounds=2", "runtime=inline", f"out={out}"]), quiet=True)
                break
            except KeyboardInterrupt:
                pass
        resume(out, quiet=True)
        assert summary_of(out)["digest"] == wanted, stop
    assert stop > 8


def test_a_commit_is_on_the_disk_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, str]] = []
    sync, replace = files.synced, files.os.replace
    monkeypatch.setattr(files, "synced", lambda path: (told.append(("sync", path.name)), sync(path)))
    monkeypatch.setattr(
        files.os, "replace", lambda a, b: (told.append(("name", Path(b).name)), replace(a, b))
    )  # fmt: skip
    write_tree(tmp_path / "state", {"a": torch.arange(64)}, durable=True)
    kinds = [kind for kind, _ in told]
    assert kinds == ["sync", "name", "sync"]
    assert told[1:] == [("name", "state"), ("sync", tmp_path.name)]
    damaged(tmp_path / "state", "zeroed")
    with pytest.raises(Torn):
        read_tree(tmp_path / "state")
