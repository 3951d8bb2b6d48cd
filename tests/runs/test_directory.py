"""The run directory: a round commits at once, and whatever ends a process, the run goes on or never began."""

from __future__ import annotations

import json
import math
import subprocess
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import polars as pl
import pytest
import torch
import yaml

from fedfuse.config.compose import compose
from fedfuse.config.schema import Config
from fedfuse.core.loop import Callback, Federation
from fedfuse.errors import UserError, WorldError
from fedfuse.results.run_data import load
from fedfuse.results.table import notes
from fedfuse.runs.checkpoint import NEWEST, commit, recover
from fedfuse.runs.configuration import as_yaml, load_config
from fedfuse.runs.directory import RunDirectory
from fedfuse.runs.experiment import resume, run
from fedfuse.wire.client_store import read_tree, write_tree
from fedfuse.wire.records import sha_arrays
from tests.federations import TINY, federation, play
from tests.ledger import Ledger, LedgerClient, LedgerHyper, enter


@cache
def composed(name: str, *words: str) -> Config:
    return compose([*TINY, f"strategy={name}", *words])


def configured(name: str, out: Path, *words: str) -> Config:
    return replace(composed(name, *words), out=str(out))


def summary_of(path: Path) -> dict:
    return json.loads((path / "summary.json").read_text())


def whole(path: Path) -> None:
    """No row twice, none missing, no litter."""
    metrics = pl.read_parquet(path / "metrics.parquet")
    keys = metrics.select("round", "scope", "client", "split", "metric")
    assert keys.is_duplicated().sum() == 0
    assert sorted(metrics["round"].unique()) == list(range(1, summary_of(path)["rounds_done"] + 1))
    traffic = pl.read_parquet(path / "traffic.parquet")
    assert traffic.height == 0 or sorted(traffic["round"].unique()) == sorted(metrics["round"].unique())
    assert [p.name for p in path.rglob(".*")] == []
    assert not (path / "checkpoint" / "rows").exists()


def same_rows(a: Path, b: Path) -> None:
    """Equal results and bytes; only times may differ."""
    for kind in ("metrics", "traffic"):
        one, two = (pl.read_parquet(p / f"{kind}.parquet") for p in (a, b))
        order = one.columns[:-1]
        assert one.sort(order).equals(two.sort(order), null_equal=True), kind


class Ends(Callback):
    """Raises after a round, before or after its commit."""

    def __init__(self, after: int, error: BaseException) -> None:
        self.after, self.error = after, error

    def round(self, built) -> None:
        if built.done == self.after:
            self.after = -1
            raise self.error


# --- what a finished run leaves ---------------------------------------------------------------------------


def test_a_finished_run_is_whole(tmp_path: Path) -> None:
    out = run(configured("fedavg", tmp_path / "deep" / "run"), quiet=True)
    whole(out)
    assert {p.name for p in out.iterdir()} >= {
        "config.yaml",
        "environment.json",
        "summary.json",
        "metrics.parquet",
        "traffic.parquet",
        "timing.parquet",
        "partition.parquet",
        "final",
        "checkpoint",
    }
    summary = summary_of(out)
    assert summary["format"] == 1
    assert (summary["strategy"], summary["data"], summary["clients"]) == ("fedavg", "digits", 3)
    assert (summary["rounds"], summary["rounds_done"]) == (2, 2)
    assert summary["failures"] == {"replies": 0, "rejected": 0, "retried": 0}
    assert summary["cohort_complete"] is True
    assert len(summary["digest"]) == 64
    assert summary["digest_missing"] == []
    assert set(summary["final"]) >= {"accuracy/global", "accuracy/personal", "accuracy/personal_worst10", "loss/train"}
    assert summary["best"]["accuracy/global"] >= summary["final"]["accuracy/global"]
    assert summary["digest"] == play("fedavg").digest
    assert as_yaml(load_config(out)) == (out / "config.yaml").read_text()


def test_final_models_are_those_that_were_scored(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    with federation("fedavg", path=tmp_path / "a") as (built, _):
        built.run()
    server = load_file(tmp_path / "a" / "final" / "server-model.safetensors")
    assert sha_arrays(server) == sha_arrays(built.strategy.model)
    assert [p.name for p in (tmp_path / "a" / "final").iterdir()] == ["server-model.safetensors"]
    with federation("knfu", path=tmp_path / "b") as (built, _):
        built.run()
    assert len(list((tmp_path / "b" / "final").glob("client-*.safetensors"))) == 3
    assert [summary_of(tmp_path / name)["global_of"] for name in "ab"] == ["server", "clients"]


def test_missing_scores_are_null_not_nan(tmp_path: Path) -> None:
    with federation("local", path=tmp_path / "run") as (built, directory):
        built.run()
        built.headline["accuracy/global"] = math.nan
        text = json.dumps(directory.summary(built), allow_nan=False)
    assert json.loads(text)["final"]["accuracy/global"] is None


# --- interrupted runs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("before_commit", [True, False])
@pytest.mark.parametrize("name", ["fedavg", "knfu"])
def test_ctrl_c_leaves_a_resumable_run(name: str, before_commit: bool, tmp_path: Path) -> None:
    words = ("rounds=3",)
    there = tmp_path / "there"
    with federation(name, *words, path=there) as (built, _):
        built.run()
        digest = built.digest
    where = tmp_path / "run"
    end = Ends(2, KeyboardInterrupt())
    with federation(name, *words, path=where, callbacks=(end,)) as (built, _):
        if before_commit:
            built.callbacks.insert(1, built.callbacks.pop())
        with pytest.raises(KeyboardInterrupt):
            built.run()
    assert not (where / "summary.json").exists()
    assert json.loads((where / "checkpoint" / "round.json").read_text())["round"] == (1 if before_commit else 2)
    assert play(name, *words, path=where).digest == digest
    whole(where)
    same_rows(where, there)
    assert summary_of(where)["traffic"] == summary_of(there)["traffic"]
    assert summary_of(where)["best"] == summary_of(there)["best"]


def test_a_commit_that_was_cut_short_does_not_count(monkeypatch, tmp_path: Path) -> None:
    """Killed after the rows, before the checkpoint: the rows are dropped and written again."""
    from fedfuse.runs import checkpoint as module

    where, there = tmp_path / "run", tmp_path / "there"
    with federation("fedavg", "rounds=3", path=there) as (built, _):
        built.run()
    keep = module.write_tree

    def cut(path, tree, durable):
        if json.loads(tree["plain"])["done"] == 2:
            raise KeyboardInterrupt
        keep(path, tree, durable)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_tree", cut)
        with federation("fedavg", "rounds=3", path=where) as (built, _), pytest.raises(KeyboardInterrupt):
            built.run()
    rows = where / "checkpoint" / "rows"
    assert (rows / "metrics-000002.parquet").exists()
    assert play("fedavg", "rounds=3", path=where).digest == summary_of(there)["digest"]
    whole(where)
    same_rows(where, there)


@pytest.mark.parametrize("step", ["write_final_models", "summary"])
def test_a_run_killed_at_its_very_end_only_ends_again(monkeypatch, tmp_path: Path, step: str) -> None:
    where = tmp_path / "run"

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, step, killed)
        with federation("knfu", path=where) as (built, _), pytest.raises(KeyboardInterrupt):
            built.run()
    resumed = play("knfu", path=where)
    assert resumed.digest == play("knfu").digest
    whole(where)
    assert len(list((where / "final").iterdir())) == 3


def test_a_run_killed_before_its_first_commit_starts_over(tmp_path: Path) -> None:
    where = tmp_path / "run"
    config = configured("knfu", where)
    with federation("knfu", path=where, callbacks=(Ends(1, KeyboardInterrupt()),)) as (built, _):
        built.callbacks.insert(1, built.callbacks.pop())
        with pytest.raises(KeyboardInterrupt):
            built.run()
    (where / "config.yaml").write_text(as_yaml(config))
    resume(where, quiet=True)
    assert summary_of(where)["digest"] == play("knfu").digest


def test_resume_by_command_equals_undisturbed(monkeypatch, tmp_path: Path) -> None:
    """Through experiment.run and resume, as a user does it; the strategy's own state comes back too."""

    class Interrupted(Ledger):
        at = 3

        def fuse(self, shares) -> None:
            super().fuse(shares)
            if self.round == self.at:
                raise KeyboardInterrupt

    name = enter(monkeypatch, Interrupted, LedgerClient, LedgerHyper, "interrupted")
    where = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(configured(name, where, "rounds=5"), quiet=True)
    monkeypatch.setattr(Interrupted, "at", 0)
    resume(where, quiet=True)
    undisturbed = run(configured(name, tmp_path / "there", "rounds=5"), quiet=True)
    assert summary_of(where)["digest"] == summary_of(undisturbed)["digest"]
    whole(where)
    same_rows(where, undisturbed)


def test_a_commit_of_a_long_run_stays_cheap_and_whole(tmp_path: Path) -> None:
    """A round commits all evaluations so far: as text they took longer than the round (0.2 s after 2,500)."""
    with federation("fedavg", path=tmp_path / "run", callbacks=(Ends(1, KeyboardInterrupt()),)) as (built, directory):
        with pytest.raises(KeyboardInterrupt):
            built.run()
        newest, text = directory.checkpoint / NEWEST, as_yaml(directory.config)
        short = newest.stat().st_size
        keys = ("accuracy/global", "accuracy/personal", "accuracy/personal_worst10", "accuracy/validation")
        many = [{"round": float(i), **dict.fromkeys(keys, i / 7)} for i in range(3000)]
        many[5] |= {"accuracy/global": math.nan}
        del many[6]["accuracy/validation"]
        built.history = list(many)
        commit(built, directory.checkpoint, text, directory.seconds)
        built.history = []
        recover(built, directory.checkpoint, text)
        assert repr(built.history) == repr(many)
        assert newest.stat().st_size - short < len(many) * (len(keys) + 1) * 13


# --- what resume refuses ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Path:
    """A run that was ended after round 1, by its real configuration."""
    where = tmp_path_factory.mktemp("interrupted") / "run"
    config = configured("fedavg", where, "rounds=3")
    with federation("fedavg", "rounds=3", path=where, callbacks=(Ends(1, KeyboardInterrupt()),)) as (built, directory):
        directory.config = config
        with pytest.raises(KeyboardInterrupt):
            built.run()
    (where / "config.yaml").write_text(as_yaml(config))
    return where


@pytest.fixture
def run_copy(interrupted: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(interrupted, tmp_path / "copy"))


def edited(path: Path, key: str, value) -> None:
    config = yaml.safe_load((path / "config.yaml").read_text())
    *parents, leaf = key.split(".")
    node = config
    for part in parents:
        node = node[part]
    node[leaf] = value
    (path / "config.yaml").write_text(yaml.safe_dump(config))


def one_line(path: Path, words: str) -> None:
    with pytest.raises(UserError) as caught:
        resume(path, quiet=True)
    assert words in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (path / "summary.json").exists()


def test_a_moved_run_goes_on(run_copy: Path) -> None:
    edited(run_copy, "runtime.workers", 2)
    edited(run_copy, "out", "elsewhere")
    resume(run_copy, quiet=True)
    assert summary_of(run_copy)["digest"] == play("fedavg", "rounds=3").digest


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("clients", 4, "says clients=4, the run began with clients=3"),
        ("seed", 5, "says seed=5, the run began with seed=0"),
        ("train.lr", 0.5, "says train.lr=0.5, the run began with train.lr=0.05"),
        ("strategy.weighting", "uniform", "says strategy.weighting=uniform, the run began with"),
        ("rounds", 7, "says rounds=7, the run began with rounds=3"),
        ("clients", 0, "clients=0"),
        ("strategy.name", "fedavgg", "strategy=fedavgg: unknown"),
        ("strategy.name", "knfu", "not a configuration of this fedfuse"),
        ("strategy.weighting", "mine", "strategy.weighting=mine: fedavg allows examples, uniform"),
        ("colour", "red", "not a configuration of this fedfuse"),
        ("train", 3, "not a configuration of this fedfuse"),
    ],
)
def test_another_configuration_is_refused(run_copy: Path, key: str, value, words: str) -> None:
    edited(run_copy, key, value)
    before = (run_copy / "checkpoint" / "state.safetensors").read_bytes()
    one_line(run_copy, words)
    assert (run_copy / "checkpoint" / "state.safetensors").read_bytes() == before


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    one_line(tmp_path / "nowhere", "not a run directory (no config.yaml)")
    (tmp_path / "file").write_text("x")
    one_line(tmp_path / "file", "not a run directory")
    (tmp_path / "config.yaml").write_text("hydra: yes\n")
    one_line(tmp_path, "not a configuration of this fedfuse")
    (tmp_path / "config.yaml").write_text("{[\n")
    one_line(tmp_path, "not a configuration of this fedfuse")
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00")
    one_line(tmp_path, "not a configuration of this fedfuse")
    (tmp_path / "config.yaml").write_text("")
    one_line(tmp_path, "not a configuration of this fedfuse")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "file"]


def test_another_format_is_refused(run_copy: Path) -> None:
    path = run_copy / "checkpoint" / "state.safetensors"
    tree, _ = read_tree(path)
    write_tree(path, {**tree, "plain": json.dumps({**json.loads(tree["plain"]), "format": 2})})
    one_line(run_copy, "has format 2, this fedfuse resumes format 1")


@pytest.mark.parametrize("damage", [b"", b"not safetensors at all", None])
def test_a_damaged_checkpoint_is_refused(run_copy: Path, damage: bytes | None) -> None:
    path = run_copy / "checkpoint" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if damage is None else damage)
    one_line(run_copy, "cannot be read")


def test_a_foreign_checkpoint_is_refused(run_copy: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(3)}, run_copy / "checkpoint" / "state.safetensors")
    one_line(run_copy, "cannot be read")


def test_a_run_that_goes_on_elsewhere_is_refused(run_copy: Path) -> None:
    holder = RunDirectory(run_copy, Config(), 0.0)
    holder.reopen()
    try:
        one_line(run_copy, "another process is writing this run")
    finally:
        holder.close()
    resume(run_copy, quiet=True)


# --- where a run may begin --------------------------------------------------------------------------------


def refused(config, words: str) -> None:
    with pytest.raises(UserError) as caught:
        run(config, quiet=True)
    assert words in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)


def test_out_in_use_is_refused_unless_overwritten(tmp_path: Path) -> None:
    out = run(configured("local", tmp_path / "run", "rounds=1"), quiet=True)
    before = (out / "summary.json").read_bytes()
    refused(configured("fedavg", out, "rounds=1"), "holds something already; choose another or say overwrite=true")
    assert (out / "summary.json").read_bytes() == before
    run(configured("fedavg", out, "rounds=1", "overwrite=true"), quiet=True)
    assert summary_of(out)["strategy"] == "fedavg"
    assert not list(out.rglob("*.state"))


def test_what_is_no_run_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    refused(configured("local", tmp_path), "holds something already")
    refused(configured("local", tmp_path, "overwrite=true"), "holds something that is not a run; it is not overwritten")
    refused(configured("local", tmp_path / "thesis.tex"), "is a file; a directory is needed")
    refused(configured("local", tmp_path / "thesis.tex" / "run"), "cannot be written")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_running_run_is_not_overwritten(run_copy: Path) -> None:
    holder = RunDirectory(run_copy, Config(), 0.0)
    holder.reopen()
    try:
        refused(configured("local", run_copy, "overwrite=true"), "another process is writing this run")
    finally:
        holder.close()
    assert (run_copy / "checkpoint" / "state.safetensors").exists()


def test_unwritable_places_are_refused() -> None:
    refused(configured("local", Path("/proc/fedfuse/run")), "out=/proc/fedfuse/run: cannot be written")
    refused(configured("local", Path("/sys/fedfuse")), "out=/sys/fedfuse: cannot be written")


def test_a_run_that_cannot_begin_leaves_nothing(monkeypatch, tmp_path: Path) -> None:
    class Refuses(Ledger):
        def begin(self) -> None:
            raise UserError("strategy.every=2: not today")

    name = enter(monkeypatch, Refuses)
    refused(configured(name, tmp_path / "deep" / "down" / "run"), "not today")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").mkdir()
    refused(configured(name, tmp_path / "empty"), "not today")
    assert list((tmp_path / "empty").iterdir()) == []


def test_client_state_in_a_shared_directory(tmp_path: Path) -> None:
    """`runtime.state_dir`: the state lies there, and a run that is overwritten takes its own away."""
    shared, where = tmp_path / "shared", tmp_path / "run"
    words = (f"runtime.state_dir={shared}", "rounds=3")
    done = run(configured("knfu", where, *words), quiet=True)
    (place,) = shared.iterdir()
    assert list(place.rglob("*.state"))
    assert (where / "checkpoint" / "clients").resolve() == place
    plain = run(configured("knfu", tmp_path / "plain", "rounds=3"), quiet=True)
    assert summary_of(done)["digest"] == summary_of(plain)["digest"]
    run(configured("knfu", where, *words, "overwrite=true"), quiet=True)
    (other,) = shared.iterdir()
    assert other != place
    refused(configured("knfu", tmp_path / "none", "runtime.state_dir=/proc/fedfuse"), "runtime.state_dir=/proc/fedfuse")
    assert not (tmp_path / "none").exists()


# --- small and read-only disks ----------------------------------------------------------------------------


@contextmanager
def mounted(path: Path, options: str):
    """A tmpfs; skips where mounting is not permitted."""
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted here ({done.stderr.strip()})")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=False)


def test_a_read_only_disk_is_refused(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "ro,size=1m") as disk:
        refused(configured("local", disk / "run"), "cannot be written (Read-only file system)")


def test_a_disk_that_is_full_before_the_start_leaves_nothing(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=16k") as disk:
        (disk / "junk").write_bytes(b"x" * 12000)
        refused(configured("local", disk / "deep" / "run"), "cannot be written (No space left on device)")
        assert [p.name for p in disk.iterdir()] == ["junk"]


FILLS = [("fedavg", 60), ("fedavg", 100), ("local", 90), ("local", 140), ("local", 300)]


@pytest.mark.parametrize(("name", "room"), FILLS)
def test_a_disk_that_fills_ends_the_run_and_lets_it_go_on(name: str, room: int, tmp_path: Path) -> None:
    """Wherever it fills: client state, rows, checkpoint or final models."""
    with mounted(tmp_path / "disk", "size=1m") as disk:
        junk = disk / "junk"
        junk.write_bytes(b"x" * ((1024 - room) * 1024))
        where = disk / "run"
        words = ("clients=6", "rounds=4")
        with pytest.raises((WorldError, UserError), match="No space left on device") as caught:
            run(configured(name, where, *words), quiet=True)
        assert "\n" not in str(caught.value)
        assert not (where / "summary.json").exists()
        assert where.exists() == isinstance(caught.value, WorldError)
        junk.unlink()
        if where.exists():
            resume(where, quiet=True)
            assert summary_of(where)["digest"] == play(name, *words).digest
            assert summary_of(where)["failures"] == {"replies": 0, "rejected": 0, "retried": 0}
            whole(where)


# --- runs that fail ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 2])
def test_a_run_that_fails_says_why_until_it_goes_on(at: int, monkeypatch, tmp_path: Path) -> None:
    """Before any commit too: whoever compares has to know of the seeds that are not there."""
    where, play_phase = tmp_path / "run", Federation.play

    def diverges(self: Federation, round: int, *more) -> None:
        if round == at:
            raise WorldError(f"round {round}, train: no client succeeded: client 0: weight: not finite")
        play_phase(self, round, *more)

    with monkeypatch.context() as patch:
        patch.setattr(Federation, "play", diverges)
        with pytest.raises(WorldError):
            run(configured("fedavg", where), quiet=True)
    found = load(where)
    assert (found.status, found.rounds_done, found.rounds) == ("stopped", at - 1, 2)
    assert found.failure == f"round {at}, train: no client succeeded: client 0: weight: not finite"
    assert f"{where} left out: stopped after round {at - 1} of 2: {found.failure}" in notes([found])
    assert resume(where, quiet=True) == where
    assert (load(where).status, load(where).failure) == ("finished", "")
    assert not (where / "stopped.json").exists()
    assert summary_of(where)["digest"] == play("fedavg").digest


def test_a_run_that_went_on_and_was_killed_is_no_failure(monkeypatch, tmp_path: Path) -> None:
    where = tmp_path / "run"
    with pytest.raises(WorldError):
        run(configured("fedavg", where, "train.lr=1e30"), quiet=True)
    assert load(where).status == "stopped"

    def killed(self: Federation, *more) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Federation, "play", killed)
    with pytest.raises(KeyboardInterrupt):
        resume(where, quiet=True)
    assert not (where / "stopped.json").exists()


# --- more rounds for a run that has ended -----------------------------------------------------------------


@pytest.mark.parametrize("words", [(), ("evaluate.every=2", "participation=0.7")], ids=["plain", "sparse"])
@pytest.mark.parametrize("name", ["fedavg", "knfu", "scaffold"])
def test_a_run_that_goes_on_is_the_run_of_more_rounds(name: str, words: tuple[str, ...], tmp_path: Path) -> None:
    """Bits, bytes and rows; only the evaluation at the first end is there besides."""
    whole_run = run(configured(name, tmp_path / "whole", "rounds=5", *words), quiet=True)
    begun = time.time()
    out = run(configured(name, tmp_path / "more", "rounds=3", *words), quiet=True)
    first = summary_of(out)["seconds"]
    resume(out, quiet=True, rounds=5)
    seconds = summary_of(out)["seconds"]
    assert 0 < first["rounds"] < seconds["rounds"] < seconds["total"] < time.time() - begun
    assert 0 < first["startup"] < seconds["startup"]
    whole(out) if not words else None
    one, two = summary_of(whole_run), summary_of(out)
    assert "went on after round 3" in two["notes"]
    for key in ("digest", "final", "traffic") if not words else ("digest", "final"):
        assert one[key] == two[key], key
    training = ("up_bytes", "down_bytes", "down_unique_bytes", "setup_bytes", "resent_bytes")
    assert [one["traffic"][key] for key in training] == [two["traffic"][key] for key in training]
    if not words:
        same_rows(whole_run, out)


def test_a_schedule_over_the_rounds_is_said(tmp_path: Path) -> None:
    out = run(configured("fedkd", tmp_path / "run", "rounds=1"), quiet=True)
    resume(out, quiet=True, rounds=2)
    assert [n for n in summary_of(out)["notes"] if n.startswith("went on")] == [
        "went on after round 1; the energy kept grows over the rounds, so that this is not the run that 2 rounds at "
        "once give"
    ]


def test_who_reads_the_number_of_rounds_says_so() -> None:
    import inspect

    from fedfuse.config import registry
    from fedfuse.core.strategy import FusionStrategy

    for entry in map(registry.entry, registry.listed()):
        text = inspect.getsource(inspect.getmodule(entry.server))
        if "config.rounds" in text or ".span(" in text:
            assert entry.server.planned is not FusionStrategy.planned, entry.name


def test_killed_while_it_is_given_more_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its configuration says so it is the run that it was, and then it is the longer one."""
    from fedfuse.runs import further

    out = run(configured("fedavg", tmp_path / "run"), quiet=True)
    before = summary_of(out)
    with monkeypatch.context() as patch:
        patch.setattr(further, "replace", lambda *args, **kw: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            resume(out, quiet=True, rounds=4)
    assert not (out / "summary.json").exists()
    resume(out, quiet=True)
    whole(out)
    after = summary_of(out)
    assert {**before, "seconds": 0} == {**after, "seconds": 0}
    resume(out, quiet=True, rounds=4)
    assert summary_of(out)["digest"] == play("fedavg", "rounds=4").digest


@pytest.mark.parametrize(
    ("words", "rounds", "said"),
    [
        ((), 1, "was to have 2; allowed is that or more"),
        ((), 0, "rounds=0: .* was to have 2"),
        (("privacy.epsilon=50", "privacy.delta=0.01"), 4, "privacy.trainings or privacy.noise"),
    ],
)
def test_more_rounds_are_refused_in_words(words: tuple[str, ...], rounds: int, said: str, tmp_path: Path) -> None:
    out = run(configured("fedavg", tmp_path / "run", *words), quiet=True)
    with pytest.raises(UserError, match=said):
        resume(out, quiet=True, rounds=rounds)
    assert (out / "summary.json").exists()
