"""Somebody else's run directory: reading, resuming or overwriting it does to this machine what was asked, no more."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import fedfuse
from fedfuse.cli import main
from fedfuse.config.compose import compose
from fedfuse.core.loop import Callback, Federation
from fedfuse.errors import UserError
from fedfuse.results.run_data import find, load
from fedfuse.runs import experiment
from fedfuse.runs.experiment import resume, run
from fedfuse.runs.export import export
from fedfuse.runs.hand_over import to_peft
from tests.federations import TINY

TRAP = "import pathlib\npathlib.Path({mark!r}).write_text('ran')\ndef fn(*a, **k): raise SystemExit('called')\n"


def play(out: Path, *words: str) -> Path:
    return run(compose([*TINY, "strategy=fedavg", "rounds=1", "runtime=inline", f"out={out}", *words]), quiet=True)


class Stop(Callback):
    def round(self, federation: Federation) -> None:
        raise KeyboardInterrupt


def interrupted(out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    usual = experiment.callbacks
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "callbacks", lambda *args: [*usual(*args), Stop()])
        with pytest.raises(KeyboardInterrupt):
            play(out, "rounds=2")
    return out


def test_overwrite_follows_no_link(tmp_path: Path) -> None:
    kept = play(tmp_path / "precious")
    (tmp_path / "link").symlink_to(kept)
    with pytest.raises(UserError, match="is a link; links are not followed"):
        play(tmp_path / "link", "overwrite=true")
    assert (kept / "summary.json").exists()


def test_overwrite_deletes_nothing_that_a_link_inside_points_at(tmp_path: Path) -> None:
    out, mine = play(tmp_path / "run"), tmp_path / "thesis"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    for name in ("final2", "checkpoint/clients"):
        where = out / name
        if where.is_dir():
            where.rename(out / "gone")
        where.symlink_to(mine)
    play(out, "overwrite=true")
    assert (mine / "thesis.tex").read_text() == "years of work"
    assert not (out / "final2").exists()


@pytest.mark.parametrize("name", ["final", "samples", "metrics.csv"])
def test_resume_writes_through_no_link_that_a_run_would_make(name: str, tmp_path, monkeypatch) -> None:
    out = interrupted(tmp_path / "run", monkeypatch)
    target = tmp_path / "thesis.csv"
    target.write_text("years of work") if "." in name else target.mkdir()
    (out / name).symlink_to(target)
    with pytest.raises(UserError, match=f"{name}: is a link"):
        resume(out, quiet=True)
    assert target.read_text() == "years of work" if "." in name else not list(target.iterdir())


@pytest.mark.parametrize(
    ("group", "values"),
    [("runtime", {"name": "ray", "address": "127.0.0.1:9"}), ("tracking", {"uri": "sqlite:///stolen.db"})],
)
def test_resume_calls_no_address_without_consent(group, values, tmp_path, monkeypatch) -> None:
    out = interrupted(tmp_path / "run", monkeypatch)
    config = yaml.safe_load((out / "config.yaml").read_text())
    config[group] |= values
    (out / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="is an address that it would call; if you know it, say --allow-code"):
        resume(out, quiet=True)


def test_nothing_of_this_machines_environment_comes_into_a_configuration(tmp_path, monkeypatch) -> None:
    out = play(tmp_path / "run")
    monkeypatch.setenv("SECRET_TOKEN", "s3cret")
    config = yaml.safe_load((out / "config.yaml").read_text())
    config["model"]["lora_targets"] = "${oc.env:SECRET_TOKEN}"
    (out / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=r"model\.lora_targets=.* asks for what is not in it"):
        export(out)
    assert not list(out.glob("*-export.safetensors"))


@pytest.mark.parametrize("code", ["trap_module:fn", "1trap:fn", "trap module:fn"])
def test_a_model_is_built_with_no_code_without_consent(code: str, tmp_path, monkeypatch) -> None:
    """`export` and `load(…).model()` read the data set of the run, which a stranger may say is made by code."""
    out, mark = play(tmp_path / "run"), tmp_path / "mark"
    (tmp_path / f"{code.partition(':')[0]}.py").write_text(TRAP.format(mark=str(mark)))
    monkeypatch.syspath_prepend(str(tmp_path))
    config = yaml.safe_load((out / "config.yaml").read_text())
    config["data"] |= {"name": "custom", "layout": "custom", "load": code}
    (out / "config.yaml").write_text(yaml.safe_dump(config))
    found = fedfuse.load(out)
    for ask in (lambda: export(out), found.model, lambda: found.predict([[0.0]]), lambda: to_peft(out, str(tmp_path))):
        with pytest.raises(UserError, match=f"{code} is code that it would run; if you know it, say --allow-code"):
            ask()
    assert main(["export", str(out)]) == 2
    assert not mark.exists()
    with pytest.raises(SystemExit, match="called"):
        fedfuse.load(out, allow_code=True).model()
    assert mark.exists()
    sys.modules.pop(code.partition(":")[0], None)


@pytest.mark.parametrize("name", ["checkpoint", "checkpoint/rows", "checkpoint/clients"])
def test_resume_writes_through_no_link(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = interrupted(tmp_path / "run", monkeypatch)
    (out / name).rename(tmp_path / "elsewhere")
    (out / name).symlink_to(tmp_path / "elsewhere")
    before = sorted(str(p) for p in (tmp_path / "elsewhere").rglob("*"))
    with pytest.raises(UserError, match="is a link"):
        resume(out, quiet=True)
    assert sorted(str(p) for p in (tmp_path / "elsewhere").rglob("*")) == before


@pytest.mark.parametrize(
    ("group", "values"),
    [
        ("model", {"name": "trap_module:fn"}),
        ("model", {"name": "custom", "build": "trap_module:fn"}),
        ("model", {"pool": ["mlp", "trap_module:fn"]}),
        ("data", {"name": "custom", "layout": "custom", "load": "trap_module:fn"}),
        ("loss", {"name": "custom", "build": "trap_module:fn"}),
    ],
)
def test_resume_runs_no_code_without_consent(
    group: str, values: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, mark = interrupted(tmp_path / "run", monkeypatch), tmp_path / "mark"
    (tmp_path / "trap_module.py").write_text(TRAP.format(mark=str(mark)))
    monkeypatch.syspath_prepend(str(tmp_path))
    config = yaml.safe_load((out / "config.yaml").read_text())
    config[group] |= values
    (out / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="trap_module:fn is code that it would run; if you know it, say --allow-code"):
        resume(out, quiet=True)
    assert not mark.exists()
    with pytest.raises(BaseException):  # noqa: B017 - with a word of consent it runs, whatever it does
        resume(out, quiet=True, allow_code=True)
    assert mark.exists() or group == "model"  # a changed model is refused first: the run began with another
    sys.modules.pop("trap_module", None)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def link(path: Path) -> None:
    path.symlink_to("/etc/passwd")


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def huge(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(2**36)


def folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", [pipe, link, device, huge, folder])
@pytest.mark.parametrize("name", ["summary.json", "config.yaml", "metrics.parquet", "environment.json", "lock"])
def test_what_is_no_regular_file_of_ours_is_not_read(
    name: str, kind: Callable[[Path], None], finished: Path, tmp_path: Path
) -> None:
    import shutil

    out = Path(shutil.copytree(finished, tmp_path / "run"))
    (out / name).unlink(missing_ok=True)
    kind(out / name)
    if name in ("environment.json", "lock"):  # what nobody needs is left alone
        assert load(out).environment == {} or name == "lock"
        return
    with pytest.raises(UserError, match=r"\A[^\n]+\Z"):
        load(out)
    runs, skipped = find([tmp_path])
    assert (len(runs), len(skipped)) == (0, 1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return play(tmp_path_factory.mktemp("finished") / "run")
