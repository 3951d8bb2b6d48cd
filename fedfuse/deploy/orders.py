"""Inside the ServerApp: from a run's orders to its run directory, and the directory back to whoever asked."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
import tarfile
import time
import zlib
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, cast

from flwr.serverapp import Grid

from fedfuse.config.allowed import no_attack
from fedfuse.config.dotted import code
from fedfuse.config.files import replaced
from fedfuse.config.message import from_json
from fedfuse.config.schema import Config
from fedfuse.deploy.processes import ALLOW_CODE, FOLDERS, KEYED, POST, RUNS
from fedfuse.errors import Refused, UserError, WorldError, one_line
from fedfuse.network.audit import Audit
from fedfuse.network.exchange import Patience
from fedfuse.network.roster import Roster
from fedfuse.results.wording import digest_line
from fedfuse.runs.configuration import as_yaml
from fedfuse.runs.directory import Held, RunDirectory
from fedfuse.runs.own_code import go_on_with
from fedfuse.runs.remote import serve

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
LARGEST = 64 * 2**30  # bytes of a run directory that travels home
FILES = 100_000  # of it
ENDING = 60  # looks, half a second apart, whether a server app that is being ended has let go of its run


def deployed(grid: Grid, orders: Mapping[str, Any]) -> None:
    """Carry out one run: `name` and `order`, the hash of what the operator left at the server's other door.

    What an order says is not in Flower's run configuration, which every node is shown.

    Raises
    ------
    UserError
        If the orders are refused; nothing is sent to any node then.
    WorldError
        If the run failed; it can be resumed.
    """
    try:
        _by_order(grid, orders)
    except OSError as error:  # what is told of a run, and its log, could not be written
        why = f"the server's disk: {one_line(error.strerror or error)}; once there is room, the run can be resumed"
        say(f"fedfuse: failed: {why}")
        raise WorldError(why) from error


def _by_order(grid: Grid, orders: Mapping[str, Any]) -> None:
    name, post = str(orders.get("name", "")), Path(os.environ.get(POST, "post"))
    if not NAME.fullmatch(name):
        raise UserError(f"name={name[:100]!r}: letters, digits, '.', '_' and '-' are allowed")
    path = post / "orders" / name
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != orders.get("order"):
        raise UserError(f"{name}: no such order was left here")
    path.unlink(missing_ok=True)  # an order is carried out once; who resumes a run leaves another
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: the order is not JSON ({one_line(error)})") from error
    if not isinstance(values, dict):
        raise UserError(f"{name}: the order is no JSON object")
    outcome = Outcome(post / "results", name, str(values.get("nonce", "")))
    audit = Audit(post / "audit.jsonl")
    audit.add("run begins", run=name, order=orders["order"], resume=bool(values.get("resume")))
    try:
        carry_out(grid, {**values, "name": name}, audit)
        outcome.done(Path(os.environ.get(RUNS, "runs")) / name)
    except (Refused, UserError) as error:
        outcome.ended("refused", error)
        raise
    except BaseException as error:
        outcome.ended("failed", error)
        raise
    finally:
        audit.add("run ends", run=name, **outcome.said)


def carry_out(grid: Grid, orders: Mapping[str, Any], audit: Audit | None = None) -> None:
    """Carry out one run: `config` (JSON), `name`, `resume`, `own` and `patience` as `fedfuse deploy run` wrote them.

    Raises
    ------
    UserError, WorldError
        See `deployed`.
    """
    say("fedfuse: server app starts")
    try:
        _deployed(grid, orders, audit)
    except Refused as error:
        say(f"fedfuse: refused: {error}")
        raise UserError(str(error)) from error
    except (UserError, WorldError) as error:
        say(f"fedfuse: {'refused' if isinstance(error, UserError) else 'failed'}: {error}")
        raise
    except Exception as error:
        say(f"fedfuse: failed: {type(error).__name__}: {error}")
        raise


def _deployed(grid: Grid, orders: Mapping[str, Any], audit: Audit | None) -> None:
    started = time.time()
    name = str(orders.get("name", ""))
    if not NAME.fullmatch(name):
        raise UserError(f"name={name[:100]!r}: letters, digits, '.', '_' and '-' are allowed")
    allowed = os.environ.get(ALLOW_CODE) == "1"
    with code(allowed):
        config = from_json(str(orders.get("config", "")), allowed, _folders())
        no_attack(config)
        if not allowed:
            _own_tracker(config)
        _carried_out(grid, orders, name, config, started, audit)


def _carried_out(
    grid: Grid, orders: Mapping[str, Any], name: str, config: Config, started: float, audit: Audit | None
) -> None:
    patience = read_patience(str(orders.get("patience", "{}")))
    path = Path(os.environ.get(RUNS, "runs")) / name
    directory = RunDirectory(path, config, started)
    directory.deployed = True
    resumed = bool(orders.get("resume", False))
    if resumed and (path / "config.yaml").exists():
        if (path / "config.yaml").read_text(encoding="utf-8") != as_yaml(config):
            raise UserError(f"{name}: was started with another configuration")
        _patiently(directory, name)
        if (path / "summary.json").exists():  # looked for under the lock: it may have ended while we waited
            directory.close()
            say(f"fedfuse: {name}: has ended; its directory is sent once more")
            return
        go_on_with(path, config, directory.clients)
    else:
        resumed = False
        directory.create(config.overwrite)
    try:
        federation = serve(
            grid, config, directory, patience, resumed=resumed, quiet=False, own=bool(orders.get("own")), say=say,
            roster=_roster(), audit=audit,
        )  # fmt: skip
    finally:
        directory.close()
    say(f"fedfuse: {digest_line({'digest': federation.digest, 'digest_missing': federation.digest_missing})}")


def _own_tracker(config: Config) -> None:
    """Refuse a tracker of the order's choice where the server has one of its own, whose password MLflow would send it.

    Raises
    ------
    Refused
    """
    held = any(name.startswith("MLFLOW_TRACKING_") for name in os.environ) or Path("~/.mlflow").expanduser().exists()
    if held and config.tracking.uri not in (None, os.environ.get("MLFLOW_TRACKING_URI")):
        raise Refused(
            f"tracking.uri={config.tracking.uri[:80]!r}: this server has a tracker of its own, "
            "and MLflow would tell its password to another; leave tracking.uri out"
        )


def _folders() -> list[Path]:
    """Below which an order's data may lie, as the server was told."""
    return [Path(folder) for folder in json.loads(os.environ.get(FOLDERS, "[]"))]


def _roster() -> Roster | None:
    """Who may be whom; None where keys are not asked for."""
    return Roster(Path(os.environ[POST]) / "roster.json") if os.environ.get(KEYED) == "1" else None


def _patiently(directory: RunDirectory, name: str) -> None:
    """Take the run's lock, waiting for a server app that is just being ended."""
    for _ in range(ENDING):
        try:
            directory.reopen()
            return
        except Held:
            time.sleep(0.5)
    raise UserError(f"{name}: still goes on here; resume it once it has ended, or end it (fedfuse deploy stop RUN_ID)")


def say(line: str) -> None:
    """Write a line to the run's log; one line, whoever's words it quotes."""
    print(one_line(line, 100_000), flush=True)


def read_patience(text: str) -> Patience:
    """Read how long to wait, as `deploy run` was told.

    Raises
    ------
    UserError
        For an unknown word or an impossible number.
    """
    try:
        values = json.loads(text)
        known = {field.name for field in fields(Patience)}
        if not isinstance(values, dict) or set(values) - known:
            raise UserError(f"patience={text[:200]}: allowed are {', '.join(sorted(known))}")
        for key, value in values.items():
            good = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e9
            if not (good or (key in ("deadline", "clients") and value is None)):
                raise UserError(f"patience: {key}={value!r}; a number, at least 0, is needed")
        return Patience(**values)
    except ValueError as error:
        raise UserError(f"patience={text[:200]}: {error}") from error


def write_patience(patience: Patience) -> str:
    """Write how long to wait, for the run's orders."""
    return json.dumps(asdict(patience))


# --- the run directory on its way home: by the operators' door, in a file of its own -----------------------


class Outcome:
    """How a run ended, bound to its order by the order's nonce, and to the directory by its hash.

    Parameters
    ----------
    folder : Path
        Where the operators' door looks.
    name, nonce : str
        Of the order.
    """

    def __init__(self, folder: Path, name: str, nonce: str) -> None:
        self.folder, self.name, self.nonce = folder, name, nonce
        self.said: dict[str, Any] = {"outcome": "failed"}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").unlink(missing_ok=True)

    def done(self, path: Path) -> None:
        """The run is over: pack its directory."""
        archive = self.folder / f"{self.name}.tar.gz"
        with replaced(archive, durable=True) as partial:
            pack(path, partial)
        with open(archive, "rb") as file:
            found = {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": archive.stat().st_size}
        self._tell({"outcome": "done", **found})

    def ended(self, how: str, error: BaseException) -> None:
        """The run is over without a result."""
        self._tell({"outcome": how, "reason": one_line(error, 2000)})

    def _tell(self, said: dict[str, Any]) -> None:
        self.said = said
        with replaced(self.folder / f"{self.name}.json", durable=True) as partial:
            partial.write_text(json.dumps({**said, "name": self.name, "nonce": self.nonce}), encoding="utf-8")


def pack(path: Path, archive: Path) -> None:
    """Write a run directory's results (not its checkpoint) as an archive; only regular files are taken."""
    with tarfile.open(archive, mode="w:gz") as content:
        for file in sorted(path.rglob("*")):
            inside = file.relative_to(path)
            if file.is_file() and not file.is_symlink() and inside.parts[0] not in ("checkpoint", "lock"):
                content.add(file, arcname=str(inside), recursive=False)


class _Sparing(gzip.GzipFile):
    """Reads little at once: tarfile takes the longest header, which compresses to nothing, into memory."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= 2**20:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def unpack(archive: Path, path: Path) -> None:
    """Write what `pack` packed; only plain files inside `path` are taken.

    Raises
    ------
    UserError
        If it would write elsewhere, or more than `FILES` files or `LARGEST` bytes.
    WorldError
        If the disk has no room for it, or it cannot be read or written: the disk's fault, or of names that no directory
        can have.
    """
    if path.is_symlink():
        raise UserError(f"out={path}: is a link; links are not followed here")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with _Sparing(archive) as plain, tarfile.open(fileobj=plain, mode="r:") as content:
            _unpack(content, archive.name, path)
    except (OSError, EOFError, ValueError, zlib.error, tarfile.TarError) as error:
        raise WorldError(f"{archive.name}: cannot be unpacked into {path} ({one_line(error)})") from error


def _unpack(content: tarfile.TarFile, name: str, path: Path) -> None:
    members: list[tarfile.TarInfo] = []
    total, room = 0, shutil.disk_usage(path).free
    for member in content:
        members.append(member)
        total += member.size
        if len(members) > FILES or total > LARGEST or not member.isreg():
            raise UserError(f"{name}: is not the archive of a run directory")
        if total > room:
            raise WorldError(
                f"{path}: the disk has room for {room} bytes, the run directory has more; it can be resumed"
            )
    inside = path.resolve()
    places = [(inside / member.name).resolve() for member in members]
    if not all(inside in place.parents for place in places):
        raise UserError(f"{name}: would write outside {path}")
    if inside / "order.json" in places:  # the operator's own, which a resume believes
        raise UserError(f"{name}: is not the archive of a run directory")
    for member, file in zip(members, places, strict=True):  # tarfile's own filter of names came with Python 3.11.4
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "wb") as out:
            shutil.copyfileobj(cast(Any, content.extractfile(member)), out)
