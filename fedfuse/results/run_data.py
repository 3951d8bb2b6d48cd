"""A run directory, read back: its configuration, its summary and its rows as polars frames."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedfuse.config.clock_keys import MANY
from fedfuse.config.files import LOADER, checked, opened, read, read_text
from fedfuse.errors import UserError, one_line

if TYPE_CHECKING:
    import polars as pl

MOST = 10**7  # rounds; a directory that claims to have done more is corrupt
LARGEST = 1e300  # a larger number is refused: no axis could be laid out to it and no mean be taken
FORMAT = 1  # of summary.json and the tables beside it; a directory of another format is refused
SAMPLES = "samples"  # a folder of what a language model answered, with one file a round
STOPPED = "stopped.json"  # says why a run failed; it is not there while the run goes on, nor once it has finished
LOCK = "lock"  # held with flock by the process that writes the run; the kernel lets go of it on any death
RECENT = 60.0  # seconds; where there is no lock file, a younger checkpoint counts as a run that goes on

Status = Literal["finished", "interrupted", "running", "stopped"]

COLUMNS: dict[str, tuple[str, ...]] = {
    "metrics": ("round", "scope", "client", "split", "metric", "value"),
    "traffic": ("round", "client", "direction", "message", "record", "bytes"),
    "timing": ("round", "scope", "what", "seconds"),
    "partition": ("client", "split", "label", "examples"),
}
SCHEDULE = (
    "round", "client", "phase", "outcome", "attempt", "since", "start_ns", "received_ns", "computed_ns", "end_ns",
    "weight", "down_bytes", "up_bytes", "flops", "joules",
)  # fmt: skip
_INTEGERS = {"round", "client", "bytes", "examples", *SCHEDULE} - {"phase", "outcome", "weight", "joules"}
_FLOATS = {"value", "seconds", "weight", "joules"}


@dataclass(frozen=True)
class RunRecord:
    """One run directory.

    Parameters
    ----------
    dir
        The directory.
    config
        `config.yaml`, resolved.
    summary
        `summary.json`, or None while the run goes on or after it ended before its last round.
    status
        `finished`, `running`, `stopped` (it failed) or `interrupted` (nothing says why it ended).
    rounds_done
        Committed rounds.
    rounds
        Rounds asked for.
    failure
        Why it stopped, in one line; empty if it did not. Its directory's words, which may be a stranger's.
    """

    dir: Path
    config: dict[str, Any]
    summary: dict[str, Any] | None
    status: Status
    rounds_done: int = 0
    rounds: int = 0
    failure: str = ""

    @property
    def strategy(self) -> str:
        """Name of the strategy."""
        value = self.config.get("strategy")
        return str(value.get("name", "?")) if isinstance(value, Mapping) else str(value)

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.config.get("seed", 0))

    @property
    def metrics(self) -> pl.LazyFrame:
        """Rows (round, scope, client, split, metric, value); client is -1 for the server."""
        return self._rows("metrics")

    @property
    def traffic(self) -> pl.LazyFrame:
        """Rows (round, client, direction, message, record, bytes)."""
        return self._rows("traffic")

    @property
    def timing(self) -> pl.LazyFrame:
        """Rows (round, scope, what, seconds)."""
        return self._rows("timing")

    @property
    def partition(self) -> pl.LazyFrame:
        """Rows (client, split, label, examples)."""
        return self._rows("partition")

    @cached_property
    def environment(self) -> dict[str, Any]:
        """`environment.json`; empty where there is none that can be read."""
        return environment_in(self.dir)

    @cached_property
    def _newest(self) -> dict[str, Any]:
        """`summary.json`, else what the last committed round says; empty where neither can be read."""
        if self.summary is not None:
            return self.summary
        try:
            return _json(self.dir / "checkpoint" / "round.json")
        except UserError:
            return {}

    @cached_property
    def failures(self) -> dict[str, int] | None:
        """Counts of failed and rejected replies and of retries; None where nothing tells."""
        found = self._newest.get("failures")
        if not isinstance(found, dict):
            return None
        return {str(key): value for key, value in found.items() if isinstance(value, int)}

    @cached_property
    def virtual_s(self) -> float | None:
        """Virtual seconds until the last committed round; None where no virtual time is kept."""
        found = self._newest.get("virtual_s")
        return float(found) if isinstance(found, int | float) else None

    @property
    def until_s(self) -> float | None:
        """Virtual seconds that a run was given, where they and no number of rounds are its limit; else None."""
        until = self.config.get("until")
        seconds = until.get("seconds") if isinstance(until, Mapping) else None
        return float(seconds) if isinstance(seconds, int | float) and self.rounds == MANY else None

    @property
    def stand(self) -> str:
        """How far the run is, in words: `3 of 10` rounds, or `12, 4.5 of 60 virtual s` where time is the limit."""
        if self.until_s is None:
            return f"{self.rounds_done} of {self.rounds}"
        return f"{self.rounds_done}, {self.virtual_s or 0:.3g} of {self.until_s:g} virtual s"

    @property
    def schedule(self) -> pl.LazyFrame:
        """Rows of flights that ended, as `SCHEDULE` names them; none where no virtual time is kept."""
        return self._rows("schedule")

    @cached_property
    def final(self) -> dict[str, float]:
        """Headline values of the last committed round, NaN where there is none: `accuracy/global`, …"""
        if self.summary is not None:
            return _numbers(self.summary.get("final"))
        import polars as pl

        rows = self.metrics.filter(pl.col("scope") == "server").collect()
        last = rows.filter(pl.col("round") == pl.col("round").max().over("metric"))
        return {row["metric"]: row["value"] for row in last.iter_rows(named=True)}

    @cached_property
    def best(self) -> dict[str, float]:
        """The largest value over evaluated rounds, per metric. Never the result."""
        return _numbers((self.summary or {}).get("best"))

    def _rows(self, kind: str) -> pl.LazyFrame:
        """Scan `kind`: the merged file, else the pieces of the committed rounds, else no rows."""
        import polars as pl

        merged = self.dir / f"{kind}.parquet"
        if merged.exists():
            return pl.scan_parquet(checked(merged), glob=False)
        pieces = [checked(path) for round, path in _pieces(self.dir, kind) if round <= self.rounds_done]
        if pieces:
            return pl.scan_parquet(pieces, glob=False)
        types = {name: type_of(name) for name in COLUMNS.get(kind, SCHEDULE)}
        return pl.LazyFrame(schema=types)


def load(directory: str | os.PathLike[str]) -> RunRecord:
    """Read a run directory, finished or not.

    Raises
    ------
    UserError
        The directory is missing, is not a run directory, is corrupt or half-written, or has another format.
    """
    path = Path(directory)
    if not path.is_dir():
        raise UserError(f"{path}: no such directory")
    config = _config(path)
    summary_file = path / "summary.json"
    if not summary_file.exists():
        return _unfinished(path, config)
    summary = _json(summary_file)
    if summary.get("format") != FORMAT:
        raise UserError(f"{path}: summary.json has format {summary.get('format')!r}; this is for format {FORMAT}")
    notes = summary.get("notes") or []
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise UserError(f"{path}: corrupt: notes of summary.json is not a list of texts")
    for kind in COLUMNS:
        if kind != "partition" or (path / "partition.parquet").exists():
            _check_parquet(path / f"{kind}.parquet", kind)
    done, rounds = _count(path, summary, "rounds_done", MOST), _count(path, summary, "rounds")
    return RunRecord(path, config, summary, "finished", done, rounds)  # early stop: fewer rounds than asked for


def environment_in(path: Path) -> dict[str, Any]:
    """A run directory's `environment.json`; empty where there is none that can be read."""
    try:
        return _json(path / "environment.json")
    except UserError:
        return {}


def find(directories: Iterable[str | os.PathLike[str]]) -> tuple[list[RunRecord], list[str]]:
    """Load every run at or below `directories`, in path order.

    Returns
    -------
    runs
        What could be read.
    skipped
        One line per directory that could not be, naming it and why.
    """
    runs: list[RunRecord] = []
    skipped: list[str] = []
    seen: set[Path] = set()
    for directory in directories:
        root = Path(directory)
        candidates = list(run_directories(root)) if root.is_dir() else [root]
        if not candidates:
            skipped.append(f"{root}: no run directory in it")
        for path in candidates:
            if path.resolve() in seen:
                continue
            seen.add(path.resolve())
            try:
                runs.append(load(path))
            except UserError as error:
                skipped.append(str(error))
    return runs, skipped


def run_directories(root: Path) -> Iterator[Path]:
    """Yield directories that are run directories, or were to become one; what lies inside one is not looked at."""
    marks = {"config.yaml", "summary.json", "metrics.parquet"}
    for current, below, files in os.walk(root):
        below[:] = sorted(name for name in below if not name.startswith("."))  # .hydra has a config.yaml too
        if marks & set(files):
            below.clear()
            yield Path(current)


def not_a_run(path: Path) -> str:
    """Say that a directory is no run's, and name a run in it where a sweep made it."""
    one = next(run_directories(path), path)
    return f"{path}: not a run directory (no config.yaml)" + (f"; a run in it: {one}" if one != path else "")


def _config(path: Path) -> dict[str, Any]:
    import yaml

    file = path / "config.yaml"
    if not file.exists():
        raise UserError(not_a_run(path))
    try:
        config = yaml.load(read(file, 1 << 20), Loader=LOADER)
    except (OSError, yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(config, dict) or "strategy" not in config:
        raise UserError(f"{path}: not a run of fedfuse, its config.yaml names no strategy")
    seed = config.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise UserError(f"{file}: seed is {seed!r}, not a whole number")
    if abs(seed) >= 2**63:  # which Python may refuse to write out
        raise UserError(f"{file}: seed is a number of {seed.bit_length()} bits; 63 at most are read")
    entries = _entries(config, 10_000)
    if len(entries) > 10_000:  # aliases of YAML can hide billions of entries in a few lines
        raise UserError(f"{file}: more than 10000 entries, not a configuration of fedfuse")
    words = (part for one in entries for part in (one if isinstance(one, dict) else [one]))  # keys, too
    if any(isinstance(one, int) and abs(one) > LARGEST for one in words):
        raise UserError(f"{file}: a number above {LARGEST:g}, not a configuration of fedfuse")
    return config


def _entries(value: object, most: int) -> list[object]:
    """List what nested containers hold, giving up beyond `most`."""
    found = [value]
    for one in found:  # grows while it is walked
        if len(found) > most:
            break
        found += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
    return found


def _unfinished(path: Path, config: dict[str, Any]) -> RunRecord:
    """Read a run that goes on, failed or was interrupted, up to its last committed round."""
    file = path / "checkpoint" / "round.json"
    locked = _locked(path)
    failure = "" if locked else _failure(path)
    if not file.exists():
        if locked or failure:
            rounds = _count(path, config, "rounds")
            return RunRecord(path, config, None, "stopped" if failure else "running", 0, rounds, failure)
        raise UserError(f"{path}: half-written, it has neither summary.json nor checkpoint/round.json")
    state = _json(file)
    done, rounds = _count(path, state, "round", MOST), _count(path, state, "rounds")
    for kind in COLUMNS:
        for round, piece in _pieces(path, kind):
            if round <= done:
                _check_parquet(piece, kind)
    running = locked if locked is not None else time.time() - file.stat().st_mtime < RECENT
    status: Status = "stopped" if failure else "running" if running else "interrupted"
    return RunRecord(path, config, None, status, done, rounds, failure)


def _failure(path: Path) -> str:
    """Return why a run stopped; empty where nothing says so."""
    try:
        return one_line(_json(path / STOPPED).get("why") or "")
    except UserError:
        return ""


def _locked(path: Path) -> bool | None:
    """Return whether a living process holds the run's lock; None where there is no lock file."""
    import fcntl

    try:
        descriptor = opened(path / LOCK)
    except (OSError, UserError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _pieces(path: Path, kind: str) -> list[tuple[int, Path]]:
    found = []
    for piece in sorted((path / "checkpoint" / "rows").glob(f"{kind}-*.parquet")):
        number = piece.stem.rpartition("-")[2]
        if number.isdecimal():
            found.append((int(number), piece))
    return found


def _check_parquet(file: Path, kind: str) -> None:
    import polars as pl

    if not file.exists():
        raise UserError(f"{file.parent}: half-written, it has no {file.name}")
    checked(file)
    try:
        schema = pl.scan_parquet(file, glob=False).collect_schema()
    except Exception as error:  # polars raises several unrelated types for a damaged file
        raise UserError(f"{file}: corrupt: {' '.join(str(error).split())[:200]}") from error
    for name in COLUMNS[kind]:
        if name not in schema:
            raise UserError(f"{file}: corrupt: it has no column {name!r}")
        dtype = schema[name]
        if dtype.is_nested():
            raise UserError(f"{file}: corrupt: column {name!r} is {dtype}")
        if name == "label":  # classes may be numbers or names
            continue
        numeric = name in _INTEGERS | _FLOATS
        if numeric != dtype.is_numeric() or (name in _INTEGERS and not dtype.is_integer()):
            raise UserError(f"{file}: corrupt: column {name!r} is {dtype}, expected {type_of(name)}")


def type_of(name: str) -> Any:
    """The type of a column of a run's tables."""
    import polars as pl

    return pl.Int64 if name in _INTEGERS else pl.Float64 if name in _FLOATS else pl.String


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(read_text(file), parse_int=_int, parse_float=_float)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: corrupt: not a JSON object")
    return value


def _int(digits: str) -> int:
    _float(digits)
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if abs(value) > LARGEST:
        raise ValueError(f"a number above {LARGEST:g}")
    return value


def _count(path: Path, values: Mapping[str, Any], key: str, most: float = math.inf) -> int:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise UserError(f"{path}: corrupt: {key} is {value!r}, not a number of rounds")
    return value


def _numbers(values: object) -> dict[str, float]:
    """Keep what is a number; null (a metric the data cannot give) becomes NaN."""
    if not isinstance(values, Mapping):
        return {}
    found = {}
    for key, value in values.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        found[str(key)] = float(value) if number else math.nan
    return found
