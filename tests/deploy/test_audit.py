"""The log of what was asked and what left: it only grows, and any changed byte is found."""

from __future__ import annotations

import errno
import json
import os
import resource
from pathlib import Path

import pytest

from fedfuse.deploy.commands import main as command
from fedfuse.errors import WorldError
from fedfuse.network.audit import Audit
from tests.deploy.network import Network, run, seats, tiny


def written(path: Path) -> Audit:
    log = Audit(path / "audit.jsonl")
    for i in range(3):
        log.add("answered", run="ab" * 16, asked="train", round=i, records={"arrays": [100, "ff" * 32]})
    return log


def test_any_changed_byte_is_found(tmp_path: Path) -> None:
    log = written(tmp_path)
    assert len(log.verify()[0]) == 3
    for path in (log.path, log.head_path):
        content = path.read_bytes()
        for i in range(len(content)):
            changed = bytearray(content)
            changed[i] ^= 1
            path.write_bytes(changed)
            with pytest.raises(WorldError):
                log.verify()
        path.write_bytes(content)
    log.verify()


def test_dropped_inserted_and_reordered_lines_are_found(tmp_path: Path) -> None:
    log = written(tmp_path)
    one, two, three = log.path.read_bytes().splitlines(True)
    for lines in (
        (one, two),
        (two, three),
        (one, three),
        (one, three, two),
        (one, two, two, three),
        (),
        (one, two, three[:-1]),
    ):
        log.path.write_bytes(b"".join(lines))
        with pytest.raises(WorldError):
            log.verify()


def test_nothing_goes_on_over_a_changed_end(tmp_path: Path) -> None:
    log = written(tmp_path)
    log.path.write_bytes(log.path.read_bytes().replace(b'"round": 2', b'"round": 7'))
    with pytest.raises(WorldError, match="was changed"):
        log.add("answered")


@pytest.mark.parametrize("cut", [1, 20, 100])
def test_a_loss_of_power_while_writing_leaves_a_whole_log(cut: int, tmp_path: Path) -> None:
    log = written(tmp_path)
    with open(log.path, "ab") as file:
        file.write(b'{"at": 1.0, "before": "' + b"a" * cut)  # not yet told of in the head
    log.add("after")
    assert [entry["event"] for entry in log.verify()[0]] == ["answered"] * 3 + ["after"]
    whole, head = log.path.read_bytes(), log.head_path.read_bytes()
    log.add("line is there, head is not")
    log.head_path.write_bytes(head)
    log.add("again")
    assert [entry["n"] for entry in log.verify()[0]] == [1, 2, 3, 4, 5, 6]
    assert log.path.read_bytes().startswith(whole)


@pytest.mark.parametrize("what", ["line", "head", "name"])
def test_a_full_disk_leaves_a_whole_log(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen on a full disk: two lines went into the log's last page, for which no head could be written, and the log
    was taken for changed ever after."""
    log, limits = written(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    if what == "line":
        resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 30, limits[1]))
    elif what == "head":
        monkeypatch.setattr("fedfuse.network.audit.replaced", full)
    else:
        monkeypatch.setattr("fedfuse.config.files.synced", lambda path: full(path) if path.is_dir() else None)
    try:
        for _ in range(3):
            with pytest.raises(OSError, match=r"No space left on device|File too large"):
                log.add("not noted")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        monkeypatch.undo()
    noted = 3 + 3 * (what == "name")  # the head has its name, which may not have survived a loss of power
    assert len(log.verify()[0]) == noted
    log.add("after")
    assert len(log.verify()[0]) == noted + 1


def full(path: Path, durable: bool = False) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_a_site_notes_what_was_asked_and_what_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = Network(seats(tmp_path, 3))
    run(tiny("fedavg"), network, tmp_path / "run")
    log = Audit(tmp_path / "site-0" / "audit.jsonl")
    entries, head = log.verify()
    events = [(entry["event"], entry["asked"]) for entry in entries]
    assert events == [("hello", "query.hello"), *[("answered", f"{kind}") for kind in ("train", "evaluate") * 2]]
    sent = next(entry for entry in entries if entry["asked"] == "train")
    assert sent["strategy"] == "fedavg"
    ((size, hashed),) = sent["records"].values()
    assert size > 1000
    assert len(hashed) == 64
    assert command(["audit", str(tmp_path / "site-0")]) == 0
    printed = capsys.readouterr().out
    assert f"{len(entries)} entries, whole; head {head}" in printed
    assert command(["audit", str(tmp_path / "site-0"), "--head", entries[2]["before"]]) == 0
    with pytest.raises(WorldError, match="another history was written"):
        command(["audit", str(tmp_path / "site-0"), "--head", "0" * 63 + "1"])
    assert os.stat(log.path).st_mode & 0o077 == 0
    assert json.loads(log.path.read_text().splitlines()[0])["n"] == 1
