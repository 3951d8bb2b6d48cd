"""Sweeps: runs share the machine, none is repeated, and tuning never looks at a test set."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedfuse.config.compose import compose
from fedfuse.config.schema import Config
from fedfuse.errors import UserError, WorldError
from fedfuse.results.run_data import RunRecord, find, load
from fedfuse.results.setting import differences, group
from fedfuse.results.table import notes
from fedfuse.runs import parallel, search
from fedfuse.runs.checkpoint import changed
from fedfuse.runs.combinations import composed
from fedfuse.runs.configuration import as_yaml
from fedfuse.runs.sweep import sweep
from tests.federations import TINY, scenario_of

SMALL = [*TINY, "rounds=1"]


def digests(root: Path) -> dict[str, str]:
    return {str(one.dir.relative_to(root)): (one.summary or {})["digest"] for one in find([root])[0]}


def mtimes(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in root.rglob("summary.json")}


# --- side by side ------------------------------------------------------------------------------------------


def cores(monkeypatch, count: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(count)))


@pytest.mark.parametrize(
    ("words", "runs", "on", "expected"),
    [
        ([], 8, 4, ("inline", None, 4)),  # a core each
        ([], 2, 4, ("ray", 2, 2)),  # cores left over go to the runs' workers
        ([], 2, 8, ("ray", 3, 2)),  # of which there are no more than clients
        ([], 1, 8, ("ray", None, 1)),
        (["runtime.workers=2"], 8, 4, ("ray", 2, 2)),
        (["runtime.workers=8"], 8, 4, ("ray", 8, 1)),
        (["runtime=inline"], 8, 4, ("inline", None, None)),  # in this process, unless asked
        (["runtime=inline", "runtime.parallel=3"], 8, 4, ("inline", None, 3)),
        (["runtime=inline", "runtime.parallel=9"], 8, 4, ("inline", None, 4)),  # no more than there are cores
        (["runtime.memory=2000"], 8, 4, ("ray", None, None)),
        (["runtime.parallel=1"], 8, 4, ("ray", None, 1)),
    ],
)
def test_cores_are_shared_out(words, runs, on, expected, monkeypatch) -> None:
    cores(monkeypatch, on)
    config, _ = scenario_of((*TINY, "runtime=ray", "strategy=local", *words))
    found = parallel.shared_out(config, runs)
    assert (found.name, found.workers, found.parallel) == expected
    assert (found.parallel or 1) * (found.workers or 1) <= max(on, config.runtime.workers or 0)


@pytest.mark.parametrize("words", [["runtime=flower"], ["runtime.address=auto"]])
def test_what_takes_the_whole_machine_has_no_neighbour(words, monkeypatch) -> None:
    config, _ = scenario_of((*TINY, "runtime=ray", "strategy=local", *words, "runtime.parallel=2"))
    with pytest.raises(UserError, match=r"runtime.parallel=2: allowed is 1 with runtime"):
        parallel.shared_out(config, 4)


def test_lanes_are_processes_that_may_die_and_change_no_bit(tmp_path: Path, monkeypatch, capsys) -> None:
    """A lane that is killed costs its run only; the same command resumes it, here without lanes, to the same bits."""
    cores(monkeypatch, 2)
    words = [*SMALL, "strategy=local,fedavg"]
    sweep([*words, f"out={tmp_path / 'one'}"])

    class Doomed(parallel.Lane):
        def play(self, config: Config) -> tuple[str, str]:
            Path(f"{config.out}.pid").parent.mkdir(parents=True, exist_ok=True)
            Path(f"{config.out}.pid").write_text(str(os.getpid()))
            if config.strategy.name == "fedavg":
                os.kill(os.getpid(), signal.SIGKILL)
            return super().play(config)

    monkeypatch.setattr(parallel, "Lane", Doomed)
    with pytest.raises(WorldError, match="1 of 2 runs failed"):
        sweep([*words, "runtime.parallel=2", f"out={tmp_path / 'two'}"])
    assert "the process of this run died" in capsys.readouterr().out
    pids = {path.read_text() for path in (tmp_path / "two").rglob("*.pid")}
    assert len(pids - {str(os.getpid())}) == 2
    before = mtimes(tmp_path / "two")
    assert len(before) == 1
    sweep([*words, f"out={tmp_path / 'two'}"])
    assert before.items() <= mtimes(tmp_path / "two").items()
    assert digests(tmp_path / "two") == digests(tmp_path / "one")


def test_a_ray_that_does_not_start_is_the_worlds_failure(tmp_path: Path, monkeypatch) -> None:
    import ray

    def late(**options) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", late)
    cores(monkeypatch, 2)
    with pytest.raises(WorldError, match="Ray did not start on this machine: The current node timed out"):
        sweep([*SMALL, "strategy=local", "seed=0,1", "runtime.parallel=2", f"out={tmp_path / 'c'}"])


def test_seeds_share_one_composition() -> None:
    jobs = [[*SMALL, "strategy=local", f"seed={seed}"] for seed in (0, 3)]
    known: dict = {}
    found = [composed(job, known) for job in jobs]
    assert len(known) == 1
    assert [one.seed for one in found] == [0, 3]
    assert asdict(found[1]) == asdict(compose(jobs[1]))
    found[0].train.lr = 9.0
    assert found[1].train.lr != 9.0


# --- search ------------------------------------------------------------------------------------------------


SPACE = ["train.lr=tag(log,interval(0.001,1))", "train.epochs=choice(1,2)", "strategy.mu=interval(0.0,1.0)"]


def test_words_and_space_part() -> None:
    words, space = search.space(["strategy=a,b", "seed=0,1", *SPACE, "search.trials=3"])
    assert words == ["strategy=a,b", "seed=0,1", "search.trials=3"]
    assert list(space) == ["train.lr", "train.epochs", "strategy.mu"]
    assert search.space(["strategy=a,b", "train.epochs=choice(1,2)"])[1] == {}  # a sweep, as ever


def test_a_search_needs_both_trials_and_space(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"search.trials: nothing to search"):
        sweep([*SMALL, "search.trials=2", f"out={tmp_path / 'c'}"])
    with pytest.raises(UserError, match=r"train.lr=interval\(0.1,1\): .* search.trials"):
        sweep([*SMALL, "train.lr=interval(0.1,1)", f"out={tmp_path / 'c'}"])
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["strategy.betta=interval(1,2)"], "strategy.betta: no compared strategy has this key"),
        (["train.lrr=interval(1,2)"], "train.lrr: no such key"),
        (["train.lr=interval(-1,1)"], "train.lr=-1.0: allowed is more than 0"),
        (["train.lr=interval(1,0.1)"], "train.lr=interval(1,0.1): "),
        (["train.lr=interval(0.1,1)", "data.validation=0"], "data.validation=0"),
    ],
)
def test_a_space_that_cannot_be_is_refused(words, says, tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="optuna is not installed (pip install 'fedfuse[search]')")
    with pytest.raises(UserError) as caught:
        sweep([*SMALL, "strategy=fedprox", "search.trials=2", *words, f"out={tmp_path / 'c'}"])
    assert says in str(caught.value)


def test_search_is_fair_resumable_and_blind_to_tests(tmp_path: Path, monkeypatch) -> None:
    """Killed in the middle and gone on with, it ends as one that was not; the test scores could be anything."""
    pytest.importorskip("optuna", reason="optuna is not installed (pip install 'fedfuse[search]')")
    words = [*SMALL, "strategy=local,fedprox", "seed=1", *SPACE, "search.trials=2"]
    straight = sweep([*words, f"out={tmp_path / 'straight'}"])

    with monkeypatch.context() as patch:
        patch.setattr(search, "hashes_of", lambda config: {"strategy": "0" * 12})
        with pytest.raises(UserError, match="holds a search by other code of the strategy"):
            sweep([*words, f"out={tmp_path / 'straight'}"])

    begin, calls = parallel.begin, []

    def stops(config, started=None, quiet=False):
        calls.append(config.out)
        if len(calls) == 2:
            raise KeyboardInterrupt
        begin(config, started, quiet)

    with monkeypatch.context() as patch:
        patch.setattr(parallel, "begin", stops)
        with pytest.raises(KeyboardInterrupt, match=r"the same command with out=.*broken goes on"):
            sweep([*words, f"out={tmp_path / 'broken'}"])
    done = mtimes(tmp_path / "broken")
    assert len(done) == 1

    def lies(path):  # what only the tests say must not matter
        run = load(path)
        summary = json.loads((Path(path) / "summary.json").read_text())
        for key in ("accuracy/global", "accuracy/personal", "accuracy/personal_worst10"):
            summary["final"][key] = time.time() % 1
        return replace(run, summary=summary)

    monkeypatch.setattr(search, "load", lies)
    broken = sweep([*words, f"out={tmp_path / 'broken'}"])
    assert done.items() <= mtimes(tmp_path / "broken").items()
    assert (broken / "search.csv").read_text() == (straight / "search.csv").read_text()
    assert digests(broken) == digests(straight)

    rows = list(csv.DictReader((straight / "search.csv").open()))
    assert [row["strategy"] for row in rows] == ["local"] * 2 + ["fedprox"] * 2  # the same budget
    assert "strategy.mu" not in rows[0]["values"]
    assert "strategy.mu" in rows[2]["values"]
    runs, skipped = find([straight])
    assert len(runs) == 2  # trials are no results
    assert skipped == []
    best = max(rows[2:], key=lambda row: float(row["accuracy/validation"]))
    chosen = next(run.config for run in runs if run.strategy == "fedprox")
    assert f"train.lr={chosen['train']['lr']}" in best["values"]
    assert [one.label for one in group(runs)[0]] == ["fedprox", "local"]  # in one table, though lr differs
    assert not any("train.lr" in line for line in differences(runs))
    assert any(line.startswith("Tuned") and "train.lr" in line for line in notes(runs))
    with pytest.raises(UserError, match="holds a search over"):
        sweep([*words, "train.lr=interval(0.1,0.2)", f"out={straight}"])


def test_a_short_list_is_tried_each_once_and_in_order(tmp_path: Path, monkeypatch) -> None:
    """Independent draws would miss one of three values in three trials in seven cases of nine."""
    pytest.importorskip("optuna", reason="optuna is not installed (pip install 'fedfuse[search]')")
    from rich.console import Console

    tried: list[tuple[float, int]] = []

    def drive(tracks, runtime, share) -> None:
        for track in tracks:
            for config in track:
                tried.append((config.train.lr, config.train.epochs))
                if tried == killed_after:
                    raise KeyboardInterrupt

    rates = {0.1: 0.5, 0.01: 0.9, 0.3: 0.7}
    monkeypatch.setattr(search, "drive", drive)
    monkeypatch.setattr(search, "load", lambda path: SimpleNamespace(final={search.SCORE: rates[tried[-1][0]]}))
    job, quiet = [*SMALL, "strategy=local"], Console(quiet=True)
    killed_after = [(0.1, 1), (0.01, 1)]
    lists = {"train.lr": "choice(0.1,0.01,0.3)", "train.epochs": "choice(1)"}
    with pytest.raises(KeyboardInterrupt):
        search.tune([[*job, "search.trials=5"]], lists, tmp_path, quiet)
    tried.clear()
    (best,) = search.tune([[*job, "search.trials=5"]], lists, tmp_path, quiet).values()
    assert tried == [(0.01, 1), (0.3, 1)]  # what had begun, then the rest, and no fourth
    assert best[:2] == ["train.lr=0.01", "train.epochs=1"]
    found = {name: search.distribution(name, text) for name, text in lists.items()}
    assert search.grid(found, 2) == []  # more values than trials: drawn
    wide = {**found, "train.momentum": search.distribution("train.momentum", "interval(0,0.9)")}
    assert search.grid(wide, 100) == []
    assert search.grid({}, 100) == []


def test_trials_say_of_which_setting_they_are(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("optuna", reason="optuna is not installed (pip install 'fedfuse[search]')")
    from rich.console import Console

    monkeypatch.setattr(search, "drive", lambda tracks, *more: [list(track) for track in tracks])
    monkeypatch.setattr(search, "load", lambda path: SimpleNamespace(final={search.SCORE: 0.5}))
    out = io.StringIO()
    jobs = [
        [*SMALL, "search.trials=2", f"strategy={name}", f"partition.alpha={alpha}"]
        for name in ("local", "fedavg")
        for alpha in (0.1, 1)
    ]
    search.tune(jobs, {"train.lr": "choice(0.1,0.2)"}, tmp_path, Console(file=out, width=200))
    told = [line.partition(" trial 0:")[0] for line in out.getvalue().splitlines() if " trial 0:" in line]
    assert told == [f"{name} partition.alpha={alpha}" for name in ("local", "fedavg") for alpha in (0.1, 1)]
    out.truncate(0)
    search.tune(jobs[:1], {"train.lr": "choice(0.1,0.3)"}, tmp_path / "one", Console(file=out, width=200))
    assert "\nlocal trial 0: train.lr=0.1" in out.getvalue()


@pytest.mark.parametrize(
    ("rates", "space", "edges"),
    [
        ({0.1: 0.5, 0.01: 0.9, 0.3: 0.7}, "choice(0.1,0.01,0.3)", ["train.lr"]),  # the least, though in the middle
        ({0.1: 0.5, 0.01: 0.4, 0.3: 0.7}, "choice(0.1,0.3,0.01)", ["train.lr"]),
        ({0.1: 0.9, 0.01: 0.4, 0.3: 0.7}, "choice(0.1,0.01,0.3)", []),
        ({0.1: 0.9, 0.3: 0.7}, "choice(0.1,0.3)", []),  # both are ends
        ({0.1: 0.9}, "choice(0.1)", []),  # nothing to choose from
    ],
)
def test_a_value_at_an_end_of_its_choices_is_told(rates, space, edges, tmp_path: Path, monkeypatch) -> None:
    """Whatever is best there, a wider search may find better: a strategy may look worse for its space."""
    pytest.importorskip("optuna", reason="optuna is not installed (pip install 'fedfuse[search]')")
    from rich.console import Console

    tried: list[float] = []
    monkeypatch.setattr(search, "drive", lambda tracks, *more: [tried.append(c.train.lr) for t in tracks for c in t])
    monkeypatch.setattr(search, "load", lambda path: SimpleNamespace(final={search.SCORE: rates[tried[-1]]}))
    out, job = io.StringIO(), [*SMALL, "strategy=local", "search.trials=3"]
    spaces = {"train.lr": space, "train.optimizer": "choice(sgd,adam)" if len(rates) == 1 else "choice(sgd)"}
    (best,) = search.tune([job], spaces, tmp_path, Console(file=out, width=200)).values()
    config = compose([*job, *best])
    assert config.search.edges == edges
    lr = max(rates, key=rates.__getitem__)
    told = f"note: local: train.lr={lr} (an end of what was searched: a better value may lie beyond)"
    assert (told in out.getvalue()) == bool(edges)
    record = RunRecord(tmp_path, asdict(config), {}, "finished")
    (line,) = (line for line in notes([record]) if line.startswith("Tuned") and ": train.lr: " in line)
    assert ("an end of what was searched" in line) == bool(edges)
    before = as_yaml(compose([*job, *best[:3]]))
    assert changed(before, as_yaml(config)) == ""  # a sweep that was begun before this was kept goes on
    other = replace(record, config=asdict(config) | {"seed": 1, "search": {**asdict(config.search), "edges": []}})
    assert len(group([record, other])[0]) == 1


@pytest.mark.parametrize("words", [["loss=kl", "loss.options.weight=2"], ["data=jsonl", "data.extra.length=32"]])
def test_a_setting_in_a_mapping_that_was_empty_makes_another_run(words: list[str]) -> None:
    """A run that began without it does not stand for one that has it."""
    began, now = (as_yaml(compose(["strategy=knfu", *said])) for said in (words[:1], words))
    key, _, value = words[1].partition("=")
    assert key in changed(began, now)
    assert value in changed(began, now)
    assert key in changed(now, began)


def test_a_sweep_with_more_rounds_goes_on(tmp_path: Path) -> None:
    from rich.console import Console

    words = [*SMALL[:-1], "strategy=local,fedavg", f"out={tmp_path / 'more'}"]
    quiet = Console(quiet=True)
    sweep([*words, "rounds=1"], console=quiet)
    sweep([*words, "rounds=2"], console=quiet)
    sweep([*words[:-1], f"out={tmp_path / 'once'}", "rounds=2"], console=quiet)
    assert digests(tmp_path / "more") == digests(tmp_path / "once")
    with pytest.raises(UserError, match="rounds=1"):
        sweep([*words, "rounds=1"], console=quiet)
