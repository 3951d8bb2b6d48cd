"""`fedfuse deploy bench`: what a round costs beside a plain Flower app's, and what the wire carries beside arrays."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fedfuse.config.compose import compose
from fedfuse.deploy.certs import write_certificates
from fedfuse.deploy.link import Link
from fedfuse.deploy.local import Federation
from fedfuse.deploy.plain_app import WORD
from fedfuse.deploy.processes import Process, flower, free_port, surroundings
from fedfuse.deploy.relay import Relay
from fedfuse.deploy.submit import order_of
from fedfuse.errors import WorldError
from fedfuse.network.exchange import Patience

NODES = 3
KEYS = ("strategy=fedavg", "data=digits", "seed=0", "train.epochs=1")
APP = """\
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "plain"
version = "1.0.0"
description = ""
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "plain"
[tool.flwr.app.components]
serverapp = "fedfuse.deploy.plain_app:server"
clientapp = "fedfuse.deploy.plain_app:client"
[tool.flwr.app.config]
rounds = {rounds}
nodes = {nodes}
"""


class Plain(Federation):
    """The same over Flower's own commands as they come: TLS, node authentication, its own executor."""

    def _start(self) -> None:
        names = [f"node-{i}" for i in range(self.count)]
        certs, home = self.work / "certs", self.work / "home"
        home.mkdir(parents=True)
        self.link = Link(f"127.0.0.1:{self.port}", certs / "ca.crt")  # Flower's one port, open to everyone
        write_certificates(certs, [], names)
        beside = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # Flower looks for its executor there
        tls = ["--ssl-ca-certfile", "ca.crt", "--ssl-certfile", "server.pem", "--ssl-keyfile", "server.key"]
        link = ["--enable-supernode-auth", "--host", "127.0.0.1", "--port", str(self.port)]
        tls = [word if word.startswith("--") else str(certs / word) for word in tls]
        database = ["--database", str(self.work / "link.db"), "--disable-runtime-dependency-installation"]

        def start(name: str, *words: str) -> Process:
            process = Process(name, words, surroundings(home, PATH=beside), self.work / f"{name}.log")
            self.processes.append(process)
            return process

        if not start("server", flower("flower-superlink"), *tls, *link, *database).wait_for("Uvicorn running", 120):
            raise WorldError(f"flower-superlink did not start: {self.server.text()[-300:]}")
        for i, name in enumerate(names):
            self.link.flwr("supernode", "register", str(certs / f"{name}.pub"), "fedfuse")
            words = ["--root-certificates", str(self.link.ca), "--superlink", self.link.address]
            words += ["--port", str(free_port()), "--auth-supernode-private-key", str(certs / f"{name}.key")]
            start(name, flower("flower-supernode"), *words, "--node-config", f"partition-id={i}")

    def rounds(self, count: int) -> list[float]:
        """Play rounds; seconds of each.

        Raises
        ------
        WorldError
            If the app failed.
        """
        app = self.work / "plain"
        app.mkdir(exist_ok=True)
        (app / "pyproject.toml").write_text(APP.format(rounds=count, nodes=self.count), encoding="utf-8")
        with self.link.home() as home:
            words = [flower("flwr"), "run", str(app), "fedfuse", "--stream"]
            done = subprocess.run(
                words, env=surroundings(home), capture_output=True, text=True, timeout=300 * (count + 1)
            )
        found = [line for line in done.stdout.splitlines() if line.startswith(WORD)]
        if not found:
            raise WorldError(f"the plain app failed: {(done.stdout + done.stderr)[-500:]}")
        return list(map(float, json.loads(found[0].removeprefix(WORD))))


def ours(federation: Federation, rounds: int, out: Path, *keys: str) -> tuple[list[float], dict[str, Any]]:
    """Play rounds of FedAvg on digits, evaluated each; seconds of each round, and the run's summary."""
    import polars as pl

    config = compose([*KEYS, f"clients={federation.count}", f"rounds={rounds}", *keys])
    summary = federation.play(order_of(config, Patience()), out)
    timing = pl.read_parquet(out / "timing.parquet", glob=False).filter(pl.col("scope") == "server")
    each = timing.filter(pl.col("what").is_in(["train", "evaluate"]) & (pl.col("round") > 0))
    return each.group_by("round").agg(pl.col("seconds").sum()).sort("round")["seconds"].to_list(), summary


def in_turns(rounds: int, blocks: int) -> dict[str, Any]:
    """Rounds of both sides, block by block in turns; each block's first round warms up and is left out."""
    found: dict[str, list[float]] = {"fedfuse": [], "plain": []}
    for _ in range(blocks):
        for side in found:
            with tempfile.TemporaryDirectory(prefix="fedfuse-bench-") as folder:
                work = Path(folder)
                there: Federation = (Federation if side == "fedfuse" else Plain)(NODES, work / "w")
                there.poll = "1.0"  # as `deploy node` comes
                with there as federation:
                    if side == "fedfuse":
                        seconds, _ = ours(federation, rounds + 1, work / "out", "model=mlp_small")
                    else:
                        assert isinstance(federation, Plain)
                        seconds = federation.rounds(rounds + 1)
                found[side] += seconds[1:]
                print(f"{side}: " + " ".join(f"{value:.2f}" for value in seconds[1:]), flush=True)
    medians = {side: statistics.median(values) for side, values in found.items()}
    return {"seconds": found, "medians": medians, "ratio": medians["fedfuse"] / medians["plain"]}


def framing(rounds: int) -> list[dict[str, Any]]:
    """Payload bytes of TCP between nodes and server against the array bytes that runs report, per model size."""
    out = []
    with tempfile.TemporaryDirectory(prefix="fedfuse-bench-") as folder:
        work = Path(folder)
        federation = Federation(NODES, work / "w")
        relay = Relay(federation.port)
        federation.door = relay.address
        with federation:
            for i, keys in enumerate((("model=mlp_small",), ("model=mlp",), ("model=mlp_wide", "model.width=2"))):
                before = relay.up, relay.down
                seconds, summary = ours(federation, rounds, work / f"out-{i}", *keys)
                traffic = summary["traffic"]
                shared = traffic["setup_bytes"] + traffic["resent_bytes"]
                row = {"model": keys[0], "rounds": rounds, "messages": NODES * (2 * rounds + 1)}
                row |= {"seconds": sum(seconds), "summary_down": traffic["down_bytes"] + shared}
                row |= {"summary_up": traffic["up_bytes"]}
                row["summary_down"] += traffic["evaluate_down_bytes"]
                row["summary_up"] += traffic["evaluate_up_bytes"]
                row |= {"wire_up": relay.up - before[0], "wire_down": relay.down - before[1]}
                out.append(row)
                print(row, flush=True)
        relay.close()
    return out


def bench(rounds: int, blocks: int, out: Path) -> int:
    """Measure both, print and write `deploy.json` below `out`; 0 if a round costs at most 1.15 times the plain one."""
    load = os.getloadavg()[0]
    result = {"load_before": load, "cores": len(os.sched_getaffinity(0)), **in_turns(rounds, blocks)}
    print(f"median round: fedfuse {result['medians']['fedfuse']:.2f} s, plain {result['medians']['plain']:.2f} s")
    print(f"ratio {result['ratio']:.2f} (at most 1.15 is promised); load before {load:.1f}")
    result["framing"] = framing(rounds)
    out.mkdir(parents=True, exist_ok=True)
    (out / "deploy.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    return int(result["ratio"] > 1.15)
