"""A log that only grows and tells when it was changed: who asked what of this machine, and what left it.

Every line is JSON and holds the hash of the line before it; a file beside the log holds the number of lines and the
hash of the last. Any changed, dropped, inserted or reordered byte breaks the chain. Whoever may write both files can
write another history: note the printed head somewhere else, and `audit --head` compares.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedfuse.config.files import replaced
from fedfuse.errors import UserError, WorldError

if TYPE_CHECKING:
    from flwr.app import RecordDict

START = "0" * 64
NAME = "audit.jsonl"


class Audit:
    """The log in one file.

    Parameters
    ----------
    path : Path
        Made with the first entry.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.head_path = Path(path), Path(path).with_suffix(".head")

    def add(self, event: str, **what: Any) -> None:
        """Append an entry; it is on the disk before this returns.

        Raises
        ------
        WorldError
            If the log ends otherwise than it did: nothing goes on over a log that was changed.
        OSError
            If the disk does not take it; the log then ends as it did.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        with open(handle, "rb+", buffering=0) as file:  # what a full disk did not take is tried once, not at closing
            fcntl.flock(file, fcntl.LOCK_EX)
            count, head = self._head()
            file.seek(0)
            content = file.read() if not count else _tail(file)
            if count and content.endswith(b"\n") and _sha(content.splitlines(True)[-1]) != head:
                following = json.loads(content.splitlines()[-1])
                if (
                    following.get("n") != count + 1 or following.get("before") != head
                ):  # else: power lost before the head
                    raise WorldError(f"{self.path}: was changed; fedfuse deploy audit says where")
                count, head = count + 1, _sha(content.splitlines(True)[-1])
            entry = {"n": count + 1, "at": round(time.time(), 3), "event": event, **what, "before": head}
            line = json.dumps(entry, sort_keys=True, default=str).encode() + b"\n"
            if content and not content.endswith(b"\n"):  # cut short by a loss of power
                file.truncate(file.seek(0, 2) - len(content.splitlines(True)[-1]))
            end = file.seek(0, 2)
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
                os.fsync(file.fileno())
                with replaced(self.head_path, durable=True) as partial:
                    partial.write_text(f"{count + 1} {_sha(line)}\n")
            except BaseException:
                if self._head() == (count, head):  # two lines beyond the head would be another's writing
                    file.truncate(end)
                raise

    def _head(self) -> tuple[int, str]:
        if not self.head_path.exists():
            return 0, START
        text = self.head_path.read_text(encoding="utf-8")
        count, head = text.split()
        if text != f"{int(count)} {head}\n":
            raise ValueError(text)
        return int(count), head

    def verify(self) -> tuple[list[dict[str, Any]], str]:
        """Every entry, and the head.

        Raises
        ------
        WorldError
            Naming the first line that is not what was written.
        """
        entries: list[dict[str, Any]] = []
        before = START
        lines = self.path.read_bytes().splitlines(True) if self.path.exists() else []
        for i, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                good = entry["n"] == i and entry["before"] == before and line.endswith(b"\n")
                good = good and line == json.dumps(entry, sort_keys=True).encode() + b"\n"
            except (ValueError, KeyError, TypeError):
                good = False
            if not good:
                raise WorldError(f"{self.path}: line {i} is not what was written")
            entries.append(entry)
            before = _sha(line)
        try:
            count, head = self._head()
        except ValueError as error:
            raise WorldError(f"{self.head_path}: is not what was written") from error
        if (count, head) != (len(lines), before):
            raise WorldError(f"{self.path}: {len(lines)} lines, {count} were written, or the last is another")
        return entries, before


def left(sent: RecordDict, content: RecordDict) -> dict[str, Any]:
    """What leaves a site with a reply: each record's bytes and hash as it travels, and what was spent of privacy."""
    records = {}
    for name, value in sent.array_records.items():
        parts = [array.data for array in value.values()]
        records[name] = [sum(map(len, parts)), hashlib.sha256(b"".join(parts)).hexdigest()]
    metrics: Any = dict(content.metric_records.get("metrics", {}))
    spent = {key: metrics[key] for key in ("epsilon", "delta", "noise") if key in metrics}
    return {"records": records, "metrics": sorted(metrics), **({"privacy": spent} if spent else {})}


def show(state: Path, head: str | None) -> int:
    """Verify and print the log below a `--state-dir`; 0 if it is whole.

    Raises
    ------
    UserError
        If there is none.
    WorldError
        If it was changed, or does not hold a head that was noted.
    """
    found = [path for path in (state / NAME, state / "post" / NAME) if path.exists()]
    if not found:
        raise UserError(f"{state}: has no {NAME}")
    for path in found:
        entries, now = Audit(path).verify()
        for entry in entries:
            about = {key: value for key, value in entry.items() if key not in ("n", "at", "event", "before")}
            stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(entry["at"]))
            print(f"{entry['n']:>6}  {stamp}  {entry['event']}  {json.dumps(about, sort_keys=True)}")
        if head is not None and head not in (now, *(entry["before"] for entry in entries)):
            raise WorldError(f"{path}: does not hold {head[:16]}…; another history was written")
        print(f"{path}: {len(entries)} entries, whole; head {now}")
    return 0


def _sha(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def _tail(file: Any, most: int = 2**20) -> bytes:
    """The end of a file, from the start of some line."""
    size = file.seek(0, 2)
    file.seek(max(0, size - most))
    content: bytes = file.read()
    return content
