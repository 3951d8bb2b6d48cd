"""The command as a user types it: in a process of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedfuse import cli

SMALL = (
    "data.limit=200",
    "train.epochs=1",
    "data.test_limit=50",
    "partition=iid",
    "clients=2",
    "rounds=2",
    "model=mlp_small",
    "runtime=inline",
)


def command(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": ""}
    line = [sys.executable, "-m", "fedfuse.cli", *words]
    return subprocess.run(line, capture_output=True, text=True, cwd=cwd, env=environment, timeout=120)


def test_a_terminal_without_the_signs_of_a_table_gets_the_result_all_the_same(tmp_path: Path) -> None:
    words = ["strategy=local", "data=digits", "clients=2", "rounds=1", "train.epochs=1", "runtime=inline"]
    line = [sys.executable, "-m", "fedfuse", "run", *words, f"out={tmp_path / 'run'}"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "?N/10?" in done.stdout
    assert "digest" in done.stdout


@pytest.mark.parametrize(
    "words",
    [
        "--help",
        "watch --help",
        "list",
        "list strategies",
        "run rundz=3",
        "run strategy=knfuu",
        "run data=digitz",
        "nonsense",
    ],
)
def test_quick_answers_import_nothing_heavy(words: str) -> None:
    """What must answer at once does not import torch, flwr, ray, polars or scikit-learn."""
    code = (
        "import sys; from fedfuse.cli import main; code = main(sys.argv[1:]); "
        "heavy = [m for m in ('torch', 'flwr', 'ray', 'polars', 'sklearn', 'datasets') if m in sys.modules]; "
        "print('HEAVY', heavy); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words.split()], capture_output=True, text=True, timeout=60)
    assert "HEAVY []" in done.stdout, done.stdout[-300:] + done.stderr[-500:]
    assert done.returncode == (0 if words.endswith("--help") or words.startswith("list") else 2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("run rundz=3", "did you mean 'rounds'"),
        ("run strategy=knfuu", "did you mean 'knfu'"),
        ("run data=digitz", "did you mean 'digits'"),
        ("run strategy=knfu strategy.bta=1", "did you mean 'strategy.beta'"),
        ("run strategy=knfu strategy.beta=-1", "strategy.beta=-1.0: knfu needs at least 0"),
        ("run strategy=knfu strategy.distance=far", "strategy.distance=far: knfu allows kl_nm"),
        ("run rounds=many", "rounds=many: allowed is a whole number, at least 1"),
        ("run train.lr=abc", "train.lr=abc: allowed is a number, more than 0"),
        ("run train.betas=3", "train.betas=3: allowed is a list, two, each at least 0 and below 1"),
        ("run quiet=true", "quiet: no such key; fedfuse help run lists all keys"),
        ("run strategy=zzz", "(all: fedfuse list strategies)"),
        ("audit nowhere", "say which by --audit <name>,…; allowed: ldia"),
        ("run clients=0", "clients=0: allowed is at least 1"),
        ("run train.lr=0", "train.lr=0.0: allowed is more than 0"),
        ("run train.optimizer=sdg", "train.optimizer=sdg: did you mean 'sgd'"),
        ("run participation=1.5", "participation=1.5: allowed is more than 0 and at most 1"),
        ("run seed=9223372036854775808", "seed=9223372036854775808: allowed is a whole number of at most 63 bits"),
        ("run stop.patience=2 data.validation=0", "stop.patience=2: allowed is null with data.validation=0"),
        ("run clock=devices until.seconds=1e300", "until.seconds=1e+300: allowed is at most 9,000,000,000"),
        ("run search.trials=3", "one run tunes nothing; use fedfuse compare"),
        ("run hydra.run.dir=here", "hydra.run.dir: no such key; did you mean 'out'?"),
        ("run --dry-run strategy=local audit=ldia", "strategy=local has clients send nothing"),
        ("run --dry-run clock=devices clock.spread=1e9", "clock.spread=1000000000.0: allowed is"),
        ("run rounds", "not of the form key=value"),
        ("run seed=0,1", "2 runs are asked for"),
        ("resume nowhere", "nowhere"),
        ("resume nowhere train.lr=3", "train.lr=3: a run goes on with what it began with; only rounds=<more> may be"),
        ("deploy status", "--ca is needed unless --insecure is given"),
        ("deploy status --ca nowhere.pem", "--ca nowhere.pem: no such file; it is needed unless"),
        ("list strategies knfuu", "did you mean 'knfu'"),
        ("report", "needs at least one"),
        ("export nowhere", "not a run directory (no config.yaml)"),
        ("run clok=devices", "did you mean 'clock'"),
        ("run clock=device", "did you mean 'devices'"),
        ("run clock=devices schedule=fedbuf", "did you mean 'fedbuff'"),
        ("run clock=devices schedule=fedbuff schedule.bufer=2", "did you mean 'schedule.buffer'"),
        ("run until.second=60", "did you mean 'until.seconds'"),
        ("run attack=fdlaa", "did you mean 'fdla'"),
        ("run attack=fdla attack.fractoin=0.2", "did you mean 'attack.fraction'"),
        ("run defense=median", "did you mean 'defence'"),
        ("run defence=medain", "did you mean 'median'"),
        ("run strategy=fedmd audit=ldai", "audit=ldai: did you mean 'ldia'"),
        ("run runtime.vectorise=auto", "did you mean 'runtime.vectorize'"),
        ("run runtime.vectorize=on", "runtime.vectorize=on: Allowed: auto, off"),
        ("run train.schedule=cosin", "train.schedule=cosin: did you mean 'cosine'"),
        ("run train.max_step=3", "did you mean 'train.max_steps'"),
        ("run data=instuct", "did you mean 'instruct'"),
        ("run evaluate.momnt=trained", "did you mean 'evaluate.moment'"),
        ("run privacy.levl=client", "did you mean 'privacy.level'"),
        ("run tracking=wandbb", "did you mean 'wandb'"),
        ("run model=mine.nets:net", "model=mine.nets:net: code of your own is said as model=custom model.build=mine."),
        ("run secure=yes", "secure=yes: unknown; Allowed: off, on"),
        ("audit nowhere --audit ldia", "nowhere: not a run directory"),
        ("diff nowhere elsewhere", "nowhere: no such directory"),
        ("list flavours", "unknown"),
        ("list label_skwe", "did you mean 'label_skew'"),
        ("run --dry", "no such option"),
        ("run --rounds 5", "--rounds: no such option; a key is written rounds=…"),
        ("run --strategy fedavg", "a key is written strategy=…"),
    ],
)
def test_wrong_words_get_one_line_and_exit_2(words: str, said: str, tmp_path: Path) -> None:
    from fedfuse.cli import main

    here = Path.cwd()
    os.chdir(tmp_path)
    try:
        import contextlib
        import io

        errors = io.StringIO()
        with contextlib.redirect_stderr(errors):
            code = main(words.split())
    finally:
        os.chdir(here)
    assert code == 2
    lines = errors.getvalue().strip().splitlines()
    assert len(lines) == 1
    assert said in lines[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["report", "diff", "watch", "resume", "list", "export", "audit", "deploy", "bench"])
def test_a_commands_help_is_its_own(name: str, capsys) -> None:
    from fedfuse.cli import main

    assert main(["help", name]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"fedfuse {name} ")
    assert told.count("fedfuse ") <= 2
    assert ("--allow-code" in told) == (name == "resume")
    assert ("--host" in told) == (name == "watch")


@pytest.mark.parametrize("name", ["run", "compare"])
def test_help_of_a_sweep_has_its_keys_and_groups_and_no_other_command(name: str, capsys) -> None:
    from fedfuse.cli import main
    from fedfuse.config.hydra_words import GROUPS

    assert main([name, "--help"]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"fedfuse {name} ")
    assert "fedfuse export" not in told
    assert "train.lr=0.05" in told
    groups = told.partition("Groups, ")[2].partition("Keys: ")[0]
    assert [group for group in ("strategy", *GROUPS) if f" {group}=" not in groups.replace("\n", " ")] == []


def test_a_note_is_not_told_on_both_streams(tmp_path: Path, capsys) -> None:
    from fedfuse.cli import main

    words = ["data.limit=100", "clients=1", "partition=iid", "partition.alpha=0.1", "--dry-run"]
    assert main(["run", *words]) == 0
    told = capsys.readouterr()
    assert "partition.alpha=0.1 does nothing here" in told.out
    assert "does nothing here" not in told.err
    assert ", 1 client, " in told.out


def test_resuming_a_sweep_says_what_does(tmp_path: Path, capsys) -> None:
    from fedfuse.cli import main

    one = tmp_path / "knfu" / "seed=0"
    one.mkdir(parents=True)
    (one / "config.yaml").touch()
    assert main(["resume", str(tmp_path)]) == 2
    assert f"with out={tmp_path} resumes; one of them: fedfuse resume {one}" in capsys.readouterr().err


def test_run_resume_export_and_python(tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = command("run", "strategy=knfu", *SMALL, f"out={out}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "round   2/2" in done.stdout
    summary = json.loads((out / "summary.json").read_text())
    assert summary["format"] == 1
    assert summary["rounds_done"] == 2
    assert set(summary["final"]) >= {"accuracy/global", "accuracy/personal", "accuracy/personal_worst10", "loss/train"}
    for name in ("config.yaml", "environment.json", "metrics.parquet", "traffic.parquet", "timing.parquet"):
        assert (out / name).exists(), name
    assert (out / "partition.parquet").exists()
    assert "<svg" in (out / "partition.svg").read_text()

    from fedfuse.cli import main

    assert main(["resume", str(out)]) == 0  # finished: prints its table
    assert main(["run", "strategy=knfu", *SMALL, f"out={out}"]) == 2  # in use
    assert main(["export", str(out), "--client", "1", "--out", str(tmp_path / "m.safetensors")]) == 0
    assert main(["export", str(out)]) == 2  # no server model

    import fedfuse

    run = fedfuse.load(out)
    assert run.digest == summary["digest"]
    assert set(run.metrics["split"].unique()) >= {"train", "personal", "global"}
    model = run.model(client=1)
    assert model.training is False

    from safetensors import safe_open

    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        about = file.metadata()
        exported = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    assert about["architecture"] == "mlp_small"
    assert about["digest"] == summary["digest"]
    for name, value in model.state_dict().items():
        assert bool((exported[name] == value).all())


def test_the_exported_model_scores_what_the_summary_says(tmp_path: Path) -> None:
    import fedfuse
    from fedfuse.train.scores import scores

    run = fedfuse.run({"strategy": "fedavg", **dict(w.split("=") for w in SMALL), "out": tmp_path / "run"})
    from fedfuse.runs.export import rebuild

    _, scenario = rebuild(run.dir)
    test = scenario.data.dataset.test
    logits = run.predict(test.inputs)
    _, y = scenario.data.test_tensors()
    found = scores(logits, y, scenario.classes)
    assert found["accuracy_macro"] == pytest.approx(run.summary["final"]["accuracy/global"], abs=1e-12)


def test_dry_run_writes_nothing(tmp_path: Path, monkeypatch, capsys) -> None:
    from fedfuse.cli import main

    monkeypatch.chdir(tmp_path)
    assert main(["run", "--dry-run", "strategy=fedavg", *SMALL]) == 0
    told = capsys.readouterr().out
    assert "parameters" in told
    assert "bytes" in told
    assert list(tmp_path.iterdir()) == []


def test_compare_goes_on_where_it_stopped(tmp_path: Path, monkeypatch, capsys) -> None:
    from fedfuse.cli import main

    words = ["compare", "strategy=local,fedavg", "seed=0,1", *SMALL, "rounds=1", f"out={tmp_path / 'c'}"]
    monkeypatch.chdir(tmp_path)
    assert main(words) == 0
    assert (tmp_path / "c" / "report.html").exists()
    assert "fedavg" in capsys.readouterr().out
    assert main(words) == 0
    assert capsys.readouterr().out.count("finished already") == 4
    assert main([*words, "train.lr=0.01"]) == 2
    assert "another configuration" in capsys.readouterr().err
    one = tmp_path / "c" / "local" / "seed=0"
    assert main([*words[:-1], f"out={one}"]) == 2
    assert f"out={one}: is a run itself" in capsys.readouterr().err
    summary, arrays = one / "summary.json", one / "final" / "client-0.safetensors"
    summary.write_text(summary.read_text()[:50])
    assert main(words) == 1
    told = capsys.readouterr()
    assert f"{summary}: cannot be read" in told.out
    assert "1 of 4 runs failed" in told.err
    other = tmp_path / "c" / "local" / "seed=1"
    arrays = other / "final" / "client-0.safetensors"
    arrays.write_bytes(arrays.read_bytes()[:20])
    assert main(["export", str(other), "--client", "0"]) == 2
    assert f"{arrays}: cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["table.csv", "a.csv"])
def test_compare_writes_beside_nothing_of_yours(what: str, tmp_path: Path, capsys) -> None:
    from fedfuse.cli import main

    (tmp_path / "d" / "empty").mkdir(parents=True)
    (tmp_path / "d" / what).write_text("x,y\n1,2\n")
    code = main(["compare", "strategy=local,fedavg", *SMALL, "rounds=1", f"out={tmp_path / 'd'}", "--dry-run"])
    assert code == (0 if what == "table.csv" else 2)  # a sweep's own, whose runs all failed
    if code:
        assert f"out={tmp_path / 'd'}: holds a.csv, which is no run" in capsys.readouterr().err


def test_a_strategy_is_listed_under_its_kind_too(capsys) -> None:
    from fedfuse.cli import main

    assert main(["list", "strategies", "knfu"]) == main(["list", "knfu"]) == 0
    told = capsys.readouterr().out
    assert told[: len(told) // 2] == told[len(told) // 2 :]


def test_the_last_of_virtual_time_is_told_once(tmp_path: Path, capsys) -> None:
    from fedfuse.cli import main

    words = ["strategy=fedavg", *(word for word in SMALL if not word.startswith("rounds=")), "clock=devices"]
    words += ["schedule=fedbuff", "schedule.buffer=1", "until.seconds=1"]
    assert main(["run", *words, f"out={tmp_path / 'v'}"]) == 0
    told = capsys.readouterr().out
    done = json.loads((tmp_path / "v" / "summary.json").read_text())["rounds_done"]
    assert told.count(f"round {done:>3} ") == 1
    assert f"until.seconds=1 is over after round {done} " in told


def test_nobody_with_a_test_of_ones_own_is_said(tmp_path: Path, capsys) -> None:
    from fedfuse.cli import main

    words = ["strategy=fedavg", *SMALL, "rounds=1", "data.limit=60", "clients=20", "partition=iid"]
    assert main(["run", *words, f"out={tmp_path / 'few'}"]) == 0
    said = "no client has 2 examples for a personal test, the least: data.personal_test=0.2 of at most 3 is 1; fewer"
    assert said in capsys.readouterr().out


def test_a_name_in_a_file_does_not_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fedfuse.cli import main

    (tmp_path / "all.csv").write_text("te\033]0;PWNED\007xt,la\033[2Jbel\n1,2\n")
    assert main(["run", "strategy=fedavg", "data=csv", f"data.root={tmp_path}", "data.targets=x", "clients=2"]) == 2
    said = capsys.readouterr().err
    assert "PWNED" in said
    assert said[:-1].isprintable()


def test_the_defaults_that_help_names_are_the_defaults() -> None:
    from omegaconf import OmegaConf

    from fedfuse.cli import USAGE
    from fedfuse.config.compose import compose

    composed = OmegaConf.structured(compose([]))
    told = re.findall(r"([a-z._]+)=([\d.]+)\b", USAGE[USAGE.index("Keys: ") : USAGE.index("For example")])
    assert len(told) == 8
    found = {key: str(OmegaConf.select(composed, key)) for key, _ in told}
    assert found == {**dict(told), "clients": "None"}  # which the data may decide: 10 where they do not


@pytest.mark.parametrize(
    ("which", "code", "said"), [(signal.SIGTERM, 143, "ended by SIGTERM"), (signal.SIGINT, 130, "interrupted")]
)
def test_what_ended_a_command_is_told_whoever_raises_it(which, code, said, monkeypatch, capsys) -> None:
    """Ray's calls raise an interrupt of their own in the place of the one that the signal raised."""

    def command(words: list[str], started: float) -> int:
        try:
            signal.raise_signal(which)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("fedfuse resume run goes on") from None
        return 0

    monkeypatch.setitem(cli.COMMANDS, "list", command)
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Ray's, if a test has started it in this process
    try:
        assert cli.main(["list"]) == code
        assert capsys.readouterr().err == f"fedfuse: {said}: fedfuse resume run goes on\n"
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
