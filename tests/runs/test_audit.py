"""Audits of finished runs and inside sweeps: what is refused, what is kept, and that a replay is the run."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from fedfuse.cli import main
from fedfuse.config.allowed import no_attack
from fedfuse.config.compose import compose
from fedfuse.errors import UserError, WorldError
from fedfuse.runs.audit import audit
from fedfuse.runs.experiment import run
from fedfuse.runs.sweep import sweep

SMALL = (
    "data=digits", "data.limit=400", "data.test_limit=60", "partition=dirichlet", "partition.alpha=0.1", "clients=4",
    "partition.min_size=5", "rounds=2", "model=mlp_small", "transfer.size=60", "train.epochs=1",
    "train.batch_size=16", "runtime=inline",
)  # fmt: skip


def played(path: Path, *words: str) -> Path:
    return run(compose([*SMALL, *words, f"out={path}"]), quiet=True)


def figures(path: Path) -> pl.DataFrame:
    return pl.read_parquet(path / "audit.parquet")


def test_skewed_clients_are_found_out(tmp_path: Path) -> None:
    """Trained to their own labels, they give themselves away: every client nearer than by a blind guess."""
    where = played(tmp_path / "run", "strategy=knfu", "train.epochs=10")
    said = audit(where, ["ldia"])
    assert said.splitlines()[-1].endswith("4 of 4 clients")
    assert "by a curious server, which sees each client's soft labels" in said
    rows = figures(where).filter(pl.col("client") >= 0)
    last = rows.filter(pl.col("round") == 2)
    tv = {m: last.filter(pl.col("metric") == m)["value"].mean() for m in ("tv", "tv/blind")}
    assert tv["tv"] < tv["tv/blind"] / 2
    assert set(rows["adversary"]) == {"server"}
    estimates = last.filter(pl.col("metric") == "estimate").group_by("client").agg(pl.col("value").sum())
    assert estimates["value"].to_list() == pytest.approx([1.0] * 4)
    whole = figures(where).filter(client=-1, metric="tv", round=2).row(0, named=True)
    assert whole["value"] == pytest.approx(tv["tv"])
    assert whole["low"] < whole["value"] < whole["high"]


def test_weights_are_asked_and_counts_are_read(tmp_path: Path) -> None:
    """A server that is sent a model computes its soft labels itself; FedProto's counts are the prior."""
    said = audit(played(tmp_path / "weights", "strategy=fedavg", "train.epochs=10", "rounds=1"), ["ldia"])
    assert said.splitlines()[-1].endswith("4 of 4 clients")
    audit(where := played(tmp_path / "counts", "strategy=fedproto", "rounds=1"), ["ldia"])
    assert figures(where).filter(metric="tv")["value"].to_list() == [0.0] * 5


@pytest.mark.parametrize("words", [("strategy=dsfl",), ("strategy=fedmd",), ("strategy=fedavg", "secure=on")])
def test_a_client_finds_out_what_the_others_have(words, tmp_path: Path) -> None:
    """Where the others' classes are skewed together: nearer than who knows its own data alone, masks or not."""
    skewed = ("partition=prior", "partition.alpha=0.3", "partition.examples=60", "data.limit=1500", "seed=1")
    size = ("clients=3", "transfer.size=100", "train.epochs=20", "rounds=1")
    where = played(tmp_path / "run", *words, *skewed, *size)
    said = audit(where, ["client_ldia"])
    assert "by a curious client (each in turn), which sees the soft labels or the model that it was sent" in said
    whole = {row["metric"]: row["value"] for row in figures(where).filter(client=-1).iter_rows(named=True)}
    assert whole["tv"] < 0.8 * whole["tv/blind"]
    assert set(figures(where)["adversary"]) == {"client"}
    assert set(figures(where)["client"]) == {-1, 0, 1, 2}


def test_clients_that_learned_nothing_say_nothing(tmp_path: Path) -> None:
    """All models are the initial one: one estimate for everybody, whatever they hold."""
    where = played(tmp_path / "run", "strategy=fedmd", "train.epochs=0", "rounds=1")
    audit(where, ["ldia", "client_ldia"])
    rows = figures(where).filter(metric="estimate")
    assert rows["audit"].n_unique() == 2
    assert rows.group_by("at", "audit").agg(pl.col("value").n_unique())["value"].to_list() == [1] * 20


def test_what_cannot_be_audited_is_refused(tmp_path: Path) -> None:
    local = played(tmp_path / "local", "strategy=local", "rounds=1")
    with pytest.raises(
        UserError, match="strategy=local has clients send nothing after training; audits of this run: none"
    ):
        audit(local, ["ldia"])
    with pytest.raises(UserError, match="did you mean 'ldia'"):
        audit(local, ["ldja"])
    with pytest.raises(UserError, match="each once"):
        audit(local, ["ldia", "ldia"])
    with pytest.raises(UserError, match="not a run directory"):
        audit(tmp_path, ["ldia"])
    where = played(tmp_path / "run", "strategy=fedavg", "rounds=1", "transfer.size=0")
    said = "ldia reads soft labels, and strategy=fedavg shares none; with transfer.size above 0"
    with pytest.raises(UserError, match=said):
        audit(where, ["ldia"])
    for name in ("coop_lira", "distill_lira", "pli"):
        with pytest.raises(UserError, match=f"{name} reads soft labels, and strategy=fedavg shares none.*: fedmia"):
            audit(where, ["fedmia", name])
    assert main(["audit", str(where), "--audit", "pli"]) == 2
    assert not (where / "audit.parquet").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("strategy=fedmd", "audit=fedmia"), "fedmia reads weights or adapters, and strategy=fedmd shares none"),
        (("strategy=fedmd", "audit=fedmia_gradient"), "fedmia_gradient reads weights or adapters"),
        (("strategy=fedproto", "audit=fedmia"), "fedmia reads weights or adapters, and strategy=fedproto shares none"),
        (("strategy=fedavg", "audit=fedmia", "clients=2"), "compares with the other clients, and a round has 2"),
        (("strategy=fedavg", "audit=fedmia", "secure=on"), "secure=on: the server sees sums"),
        (("strategy=fedavg", "audit=fedmia", "clock=devices", "schedule=fedasync"), "shares of several versions meet"),
        (("strategy=fedavg", "audit=fedmia", "runtime=flower"), "runtime=flower: its messages are not replayed"),
        (("strategy=fedmd", "audit=coop_lira", "attack=fdla"), "with attack=fdla some lie"),
        (("strategy=centralized", "audit=ldia"), "send nothing"),
        (("strategy=local", "audit=client_ldia"), "strategy=local sends clients nothing that others made"),
        (("strategy=fedproto", "audit=client_lira"), "predict with, and strategy=fedproto sends neither"),
        (("strategy=cfd", "audit=ldia"), "ldia reads soft labels, and strategy=cfd shares none"),
        (("strategy=cfd", "audit=fedmia"), "reads weights or adapters, and strategy=cfd shares none"),
        (("strategy=fml", "audit=fedmia"), "strategy=fml shares none that make a client's model"),
        (("strategy=fml", "audit=client_lira"), "predict with, and strategy=fml sends neither"),
        (("strategy=fd", "audit=coop_lira"), "strategy=fd shares those of others or of some; audits of this run: ldia"),
        (("strategy=scarlet", "audit=distill_lira"), "strategy=scarlet shares those of others or of some"),
        (("strategy=selectivefd", "audit=coop_lira"), "strategy=selectivefd shares those of others or of some"),
        (("strategy=fedhkd", "audit=pli"), "strategy=fedhkd shares those of others or of some"),
        (("strategy=fd", "audit=client_ldia"), "strategy=fd sends neither"),
        (("strategy=fedavg", "transfer.size=0", "audit=client_ldia"), "allowed is transfer.size above 0"),
        (("strategy=fedavg", "clients=1", "audit=client_lira"), "a round has 1; allowed is 2 or more"),
        (("strategy=fedavg", "audit=client_lira", "clock=devices", "schedule=fedasync"), "shares of several"),
        (("strategy=fedavg", "audit=client_lira", "runtime=flower"), "its messages are not replayed"),
        (("strategy=fedmd", "audit=client_ldia", "secure=on"), "soft labels, which secure=on masks in a replay"),
        (("strategy=fedmd", "audit=ldia,ldia"), "each once"),
        (("strategy=fedmd", "audit=[ldia,coop]"), "audit=coop: .*did you mean"),
    ],
)  # fmt: skip
def test_a_run_that_could_not_be_audited_does_not_begin(words, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        played(tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()


def test_a_replay_that_is_another_run_is_no_measurement(tmp_path: Path) -> None:
    where = played(tmp_path / "run", "strategy=fedmd", "rounds=1")
    summary = json.loads((where / "summary.json").read_text())
    (where / "summary.json").write_text(json.dumps({**summary, "digest": "0" * 64}))
    with pytest.raises(WorldError, match="another digest"):
        audit(where, ["ldia"])
    assert not (where / "audit.parquet").exists()


@pytest.mark.parametrize("name", ["fedmd", "fedavg"])
def test_virtual_time_is_played_again(name: str, tmp_path: Path) -> None:
    """Whoever comes too late, or is lost, is not seen: neither its share nor its answers; the digest is the run's."""
    late = (
        "clock=devices",
        "schedule=overcommit",
        "participation=0.5",
        "rounds=1",
        "clients=6",
        "seed=1",
        "data.limit=220",
    )
    where = played(
        tmp_path / "run", f"strategy={name}", "partition=iid", "data.personal_test=0.3", "transfer.size=20", *late
    )
    flights = json.loads((where / "summary.json").read_text())["clock"]["flights"]
    assert flights["arrived"] == 3
    assert flights["late"] > 0
    audits = {"fedmd": ["ldia", "coop_lira", "client_ldia"], "fedavg": ["fedmia", "client_ldia"]}[name]
    audit(where, audits)
    for one in audits[:-1]:
        found = figures(where).filter(pl.col("audit") == one, pl.col("client") >= 0)
        assert found["client"].n_unique() == 3, one
    assert figures(where).filter(audit="client_ldia", metric="tv")["client"].n_unique() == 7


def test_in_a_sweep_each_run_gets_what_means_something_for_it(tmp_path: Path, capsys) -> None:
    """At the end of each run, in words where it is left out; asked for later, it is made without another run."""
    words = ["strategy=local,fedavg,fedmd", *SMALL, "rounds=1", f"out={tmp_path / 'all'}"]
    sweep([*words, "audit=ldia"])
    said = capsys.readouterr().out
    assert "note: audit=ldia: left out of 1 of 3 runs (strategy=local has clients send nothing after training)" in said
    kept = {path.parts[-3]: set(pl.read_parquet(path)["audit"]) for path in tmp_path.glob("all/*/*/audit.parquet")}
    assert kept == {"fedavg": {"ldia"}, "fedmd": {"ldia"}}
    sweep([*words, "audit=ldia,pli"])
    assert "finished already" in capsys.readouterr().out
    kept = {path.parts[-3]: set(pl.read_parquet(path)["audit"]) for path in tmp_path.glob("all/*/*/audit.parquet")}
    assert kept == {"fedavg": {"ldia"}, "fedmd": {"ldia", "pli"}}
    with pytest.raises(UserError, match="audit=pli means nothing in any of these runs"):
        sweep(["strategy=local,fedavg", *SMALL, "audit=pli", f"out={tmp_path / 'none'}"])


def test_sites_are_not_spied_upon() -> None:
    with pytest.raises(UserError, match="audit=ldia: what is true of sites is theirs alone"):
        no_attack(compose([*SMALL, "strategy=fedmd", "audit=ldia"]))
