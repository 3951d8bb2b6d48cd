"""The operator's side: submit a run, follow its log, fetch its directory, look at and change the federation."""

from __future__ import annotations

import json
import subprocess
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedfuse.config.message import as_json, from_json
from fedfuse.config.schema import Config
from fedfuse.deploy.bundle import write_bundle
from fedfuse.deploy.link import Link
from fedfuse.deploy.orders import MARK, unpack, write_patience
from fedfuse.deploy.processes import flower, surroundings
from fedfuse.errors import UserError, WorldError
from fedfuse.network.remote_grid import Patience

NOISE = ("INFO :", "WARNING :", "🎊", "Successfully started", "View SuperLink", "DEBUG :")


@dataclass(frozen=True)
class Order:
    """One run as it is asked for; kept beside its results, so that it can be asked for again."""

    config: Config
    name: str
    patience: Patience
    own: bool = False

    def write(self, path: Path) -> None:
        """Keep the order in a directory."""
        path.mkdir(parents=True, exist_ok=True)
        values = {
            "config": as_json(self.config),
            "name": self.name,
            "patience": write_patience(self.patience),
            "own": self.own,
        }
        (path / "order.json").write_text(json.dumps(values, indent=1), encoding="utf-8")

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
            values = json.loads(kept.read_text(encoding="utf-8"))
            return Order(
                from_json(values["config"], code=True), values["name"], read_patience(values["patience"]), values["own"]
            )
        if (path / "config.yaml").exists():
            from fedfuse.runs.experiment import load_config

            return Order(load_config(path), path.resolve().name, Patience())
        raise UserError(f"{path}: neither order.json nor config.yaml is there: not the directory of a run")


def order_of(config: Config, patience: Patience, own: bool = False) -> Order:
    """Give a run a name, and leave out what only concerns the asker's machine."""
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
    order.write(out)
    lines: list[str] = []
    reason = ""
    with link.home() as home:
        values = {
            "config": as_json(order.config),
            "name": order.name,
            "resume": resume,
            "patience": write_patience(order.patience),
            "own": order.own,
        }
        toml = home / "orders.toml"
        toml.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()), encoding="utf-8")
        words = [
            flower("flwr"),
            "run",
            str(write_bundle(home / "fedfuse-thin")),
            "fedfuse",
            "-c",
            str(toml),
            "--stream",
        ]
        with subprocess.Popen(
            words,
            env=surroundings(home),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
        ) as stream:
            assert stream.stdout is not None
            try:
                for raw in stream.stdout:
                    line = raw.rstrip()
                    if line.startswith(MARK):
                        lines.append(line.removeprefix(MARK))
                    elif line.startswith(("fedfuse: failed: ", "fedfuse: refused: ")):
                        reason = line.removeprefix("fedfuse: ")
                    elif line and not line.lstrip().startswith(NOISE):
                        say(line)
            except BaseException:
                stream.terminate()
                raise
    if reason.startswith("refused: "):
        raise UserError(reason.removeprefix("refused: "))
    if reason:
        raise WorldError(reason.removeprefix("failed: "))
    if not lines:
        return None
    if lines[0].startswith("too large"):
        raise WorldError(f"the run directory is {lines[0]}, under the name {order.name}")
    unpack(lines, out)
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return summary
