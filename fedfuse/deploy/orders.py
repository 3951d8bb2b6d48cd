"""Inside the ServerApp: from a run's orders to its run directory, and the directory back to whoever asked."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import tarfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from fedfuse.config.dotted import code
from fedfuse.config.message import from_json
from fedfuse.config.schema import Config
from fedfuse.deploy.processes import ALLOW_CODE, RUNS
from fedfuse.errors import Refused, UserError, WorldError, one_line
from fedfuse.network.remote_grid import Patience
from fedfuse.runs.directory import RunDirectory
from fedfuse.runs.experiment import as_yaml
from fedfuse.runs.remote import serve

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
PIECE = 3000  # bytes of a packed run directory in a line of log
LARGEST = 8 * 2**20  # bytes of run directory that travel in the log; larger ones stay at the server
MARK = "fedfuse-run-directory: "


def deployed(grid: Grid, orders: Mapping[str, Any]) -> None:
    """Carry out one run: `config` (JSON), `name`, `resume`, `own` and `patience` as `fedfuse deploy run` wrote them.

    Raises
    ------
    UserError
        If the orders are refused; nothing is sent to any node then.
    WorldError
        If the run failed; it can be resumed.
    """
    say("fedfuse: server app starts")
    try:
        _deployed(grid, orders)
    except Refused as error:
        say(f"fedfuse: refused: {error}")
        raise UserError(str(error)) from error
    except (UserError, WorldError) as error:
        say(f"fedfuse: {'refused' if isinstance(error, UserError) else 'failed'}: {error}")
        raise
    except Exception as error:
        say(f"fedfuse: failed: {type(error).__name__}: {error}")
        raise


def _deployed(grid: Grid, orders: Mapping[str, Any]) -> None:
    started = time.time()
    name = str(orders.get("name", ""))
    if not NAME.fullmatch(name):
        raise UserError(f"name={name[:100]!r}: letters, digits, '.', '_' and '-' are allowed")
    allowed = os.environ.get(ALLOW_CODE) == "1"
    with code(allowed):
        _carried_out(grid, orders, name, from_json(str(orders.get("config", "")), allowed, at_server=True), started)


def _carried_out(grid: Grid, orders: Mapping[str, Any], name: str, config: Config, started: float) -> None:
    patience = read_patience(str(orders.get("patience", "{}")))
    path = Path(os.environ.get(RUNS, "runs")) / name
    directory = RunDirectory(path, as_yaml(config), started)
    directory.deployed = True
    resumed = bool(orders.get("resume", False))
    if resumed and (path / "config.yaml").exists():
        if (path / "summary.json").exists():
            raise UserError(f"{name}: has ended; nothing is left to resume")
        if (path / "config.yaml").read_text(encoding="utf-8") != as_yaml(config):
            raise UserError(f"{name}: was started with another configuration")
        _patiently(directory)
    else:
        resumed = False
        directory.create(config.overwrite)
    try:
        federation = serve(
            grid, config, directory, patience, resumed=resumed, quiet=False, own=bool(orders.get("own")), say=say
        )
    finally:
        directory.close()
    say(f"fedfuse: digest {federation.digest}")
    for line in packed(path):
        say(MARK + line)


def _patiently(directory: RunDirectory) -> None:
    """Take the run's lock, waiting for a server app that is just being ended."""
    for attempt in range(60):
        try:
            directory.reopen()
            return
        except UserError:
            if attempt == 59:
                raise
            time.sleep(0.5)


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


# --- the run directory in the log: the one channel back that Flower authenticates and encrypts -------------


def packed(path: Path) -> Iterator[str]:
    """Lines that hold a run directory's results (not its checkpoint); none if they are too large."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for file in sorted(path.rglob("*")):
            inside = file.relative_to(path)
            if file.is_file() and inside.parts[0] not in ("checkpoint", "lock"):
                archive.add(file, arcname=str(inside), recursive=False)
    content = buffer.getvalue()
    if len(content) > LARGEST:
        yield f"too large ({len(content)} bytes); it is at the server"
        return
    for start in range(0, len(content), PIECE):
        yield base64.b64encode(content[start : start + PIECE]).decode()


def unpack(lines: list[str], path: Path) -> None:
    """Write what `packed` packed; only plain files inside `path` are taken."""
    content = b"".join(map(base64.b64decode, lines))
    path.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
        archive.extractall(path, filter="data")
