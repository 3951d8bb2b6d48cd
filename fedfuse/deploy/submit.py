"""The operator's side: submit a run, follow its log, fetch its directory, look at and change the federation."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedfuse.config.allowed import no_attack
from fedfuse.config.files import read_text, replaced
from fedfuse.config.message import as_json, from_json
from fedfuse.config.schema import Config
from fedfuse.deploy.bundle import write_bundle
from fedfuse.deploy.link import WIDE, Link, Lost, plain
from fedfuse.deploy.orders import LARGEST, unpack, write_patience
from fedfuse.deploy.processes import surroundings
from fedfuse.errors import TRACEBACK, UserError, WorldError, one_line, printable
from fedfuse.network.exchange import Patience

ENDED = ("fedfuse: failed: ", "fedfuse: refused: ")  # lines of ours that a run ends with
NOISE = (
    "INFO :", "WARNING :", "DEBUG :", "🎊", "Using SuperLink", "Successfully started", "Successfully installed",
    "View SuperLink",
)  # fmt: skip


@dataclass(frozen=True)
class Order:
    """One run as it is asked for; kept beside its results, so that it can be asked for again."""

    config: Config
    name: str
    patience: Patience
    own: bool = False

    def write(self, path: Path) -> None:
        """Keep the order in a directory."""
        if path.is_symlink():
            raise UserError(f"out={path}: is a link; links are not followed here")
        path.mkdir(parents=True, exist_ok=True)
        with replaced(path / "order.json", durable=True) as partial:
            partial.touch(0o600)  # a tracker's password may be in it
            partial.write_text(json.dumps(self.values, indent=1), encoding="utf-8")

    @property
    def values(self) -> dict[str, Any]:
        """The order as it travels."""
        return {
            "config": as_json(self.config),
            "name": self.name,
            "patience": write_patience(self.patience),
            "own": self.own,
        }

    @staticmethod
    def read(path: Path) -> Order:
        """Read an order back, from what `write` kept or from a server's own run directory.

        Raises
        ------
        UserError
            If there is none.
        """
        from fedfuse.deploy.orders import read_patience

        kept = path / "order.json"
        if kept.exists():
            values = json.loads(read_text(kept))
            return Order(
                from_json(values["config"], code=True), values["name"], read_patience(values["patience"]), values["own"]
            )
        if (path / "config.yaml").exists():
            from fedfuse.runs.configuration import load_config

            return Order(load_config(path), path.resolve().name, Patience())
        raise UserError(f"{path}: neither order.json nor config.yaml is there: not the directory of a run")


def order_of(config: Config, patience: Patience, own: bool = False) -> Order:
    """Give a run a name, and leave out what only concerns the asker's machine."""
    no_attack(config)
    plain = replace(config, out=None, overwrite=False)
    return Order(
        plain, f"{config.strategy.name}-{config.data.name}-s{config.seed}-{uuid.uuid4().hex[:8]}", patience, own
    )


def submit(
    link: Link, order: Order, out: Path, resume: bool = False, say: Callable[[str], None] = print
) -> dict[str, Any] | None:
    """Submit a run, stream its log and fetch its directory.

    Returns
    -------
    dict or None
        The run's summary; None if the stream ended before the run did (the server was lost; resume it).

    Raises
    ------
    WorldError
        If the run failed, with the reason it gave.
    UserError
        If the server refused the order.
    """
    nonce = secrets.token_hex(16)
    content = json.dumps({**order.values, "resume": resume, "nonce": nonce}).encode()
    link.leave(f"orders/{order.name}", content)
    order.write(out)  # not before it was taken: of an order that nobody has, nothing is to be resumed
    with link.home() as home:
        toml = home / "orders.toml"
        told = {"name": order.name, "order": hashlib.sha256(content).hexdigest()}  # nodes are shown this
        toml.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in told.items()), encoding="utf-8")
        words = [*link.words, "run", str(write_bundle(home / "fedfuse-thin")), "fedfuse", "-c", str(toml), "--stream"]
        with subprocess.Popen(
            words,
            env=surroundings(home, COLUMNS=WIDE),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
        ) as stream:
            assert stream.stdout is not None
            over = False
            try:
                for raw in stream.stdout:
                    line = printable(plain(raw))  # the server's words, on the operator's terminal
                    if line and not line.lstrip().startswith(NOISE) and not over:
                        say(line)
                    # what follows is the same once more, in Flower's words and with a traceback
                    over = over or (line.startswith(ENDED) and not os.environ.get(TRACEBACK))
            except BaseException:
                ended(stream)  # Flower's command hears nothing before the server's next line
                raise
    return fetched(link, order.name, nonce, out)


def ended(process: subprocess.Popen[Any], seconds: float = 1.0) -> None:
    """End a process of ours, one that does not listen too."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()


def fetched(link: Link, name: str, nonce: str, out: Path) -> dict[str, Any] | None:
    """Fetch how a run ended, and its directory: by the operators' door, and only what belongs to this order.

    Returns
    -------
    dict or None
        The run's summary; None if the run has not ended.

    Raises
    ------
    WorldError
        If the run failed, with the reason it gave, or what came is not what the server said.
    UserError
        If the server refused the order.
    """
    try:
        answer = link.request("GET", f"results/{name}.json")
    except Lost:
        return None
    said = _read(answer, name) if answer is not None else {}
    if said.get("nonce") != nonce or said.get("name") != name:
        return None  # of another order, or of an earlier attempt
    if said.get("outcome") == "refused":
        raise UserError(one_line(said.get("reason"), 2000))
    if said.get("outcome") != "done":
        raise WorldError(one_line(said.get("reason"), 2000))
    size, room = said.get("bytes"), shutil.disk_usage(tempfile.gettempdir()).free
    if type(size) is not int or not 0 <= size <= min(room, LARGEST):
        raise WorldError(f"{name}: the archive has {one_line(size, 30)} bytes; there is room for {min(room, LARGEST)}")
    with tempfile.TemporaryDirectory(prefix="fedfuse-") as folder:
        archive = Path(folder) / f"{name}.tar.gz"
        link.request("GET", f"results/{name}.tar.gz", into=archive, most=size)
        with open(archive, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != said.get("sha256"):
                raise WorldError(f"{name}: what came is not the run directory that the server told of")
        unpack(archive, out)
    return _read(read_text(out / "summary.json") if (out / "summary.json").is_file() else "", name)


def _read(text: str | bytes, name: str) -> dict[str, Any]:
    """An object that the server wrote.

    Raises
    ------
    WorldError
        If it is none.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WorldError(f"{name}: the server's answer is not JSON ({one_line(error)})") from error
    if not isinstance(found, dict):
        raise WorldError(f"{name}: the server's answer is no JSON object")
    return found
