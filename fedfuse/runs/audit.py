"""`fedfuse audit RUN --audit ldia`: what a finished simulation's messages leak, measured against what is true.

The run is played once more from its configuration, and every reply is looked at where the server gets it. The adversary
(`fedfuse.core.leaks`) is handed these messages alone; the truth comes in where it is scored. A replay that ends with
another digest than the run is refused: it would measure something else.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import torch
from flwr.app import Message

from fedfuse.compat.flower_identity import claim_identity
from fedfuse.config import registry
from fedfuse.config.dotted import code
from fedfuse.config.files import replaced
from fedfuse.config.schema import Config
from fedfuse.core.attacks import soft_labels
from fedfuse.core.build import build_strategy
from fedfuse.core.callbacks import Evaluation
from fedfuse.core.leaks import Seen, label_distributions, scored
from fedfuse.core.loop import Federation
from fedfuse.core.scenario import Scenario, prepare_scenario
from fedfuse.core.strategy import FusionStrategy
from fedfuse.core.threads import single_thread
from fedfuse.engines.grid import LocalGrid
from fedfuse.errors import UserError, WorldError, nearest
from fedfuse.runs.configuration import as_yaml, code_of, load_config
from fedfuse.runs.directory import RunDirectory
from fedfuse.runs.experiment import build_grid
from fedfuse.wire.records import arrays_in, layout_of, tensors

AUDITS = {"ldia": "class priors of clients, from their soft labels, by a curious server"}


class Listening:
    """A grid whose replies are noted as the server gets them."""

    def __init__(self, grid: LocalGrid, strategy: FusionStrategy) -> None:
        self.grid, self.strategy, self.seen = grid, strategy, list[Seen]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.grid, name)

    def send_and_receive(self, messages: Iterable[Message], **options: Any) -> Iterator[Message]:
        """Pass on, and note soft labels that come with training."""
        train = self.strategy.outbox.request.kind == "train"
        for reply in self.grid.send_and_receive(messages, **options):
            if train and reply.has_content():
                self._note(reply)
            yield reply

    def _note(self, reply: Message) -> None:
        strategy, client = self.strategy, self.strategy.outbox.client_of(reply)
        model = strategy.workspace.layout(strategy.scenario.architectures[client])
        for content in arrays_in(reply.content).values():
            arrays = tensors(content)
            for name in soft_labels(layout_of(arrays), model, strategy.classes):
                self.seen.append(Seen(strategy.round, client, arrays[name].clone()))


def audit(path: Path, names: list[str], allow_code: bool = False) -> str:
    """Replay a run, attack what its server saw, write `audit.parquet`, and say what was found.

    Raises
    ------
    UserError
        If the audit or the run is none that can be made.
    WorldError
        If the replay is another run than was played.
    """
    for name in names or [""]:
        if name not in AUDITS:
            raise UserError(f"--audit {name}: {nearest(name, AUDITS)}")
    config = load_config(path)
    if not (path / "summary.json").exists():
        raise UserError(f"{path}: not a finished run; `fedfuse resume {path}` ends it")
    if (path / "attempt").exists() or (path / "order.json").exists():
        raise UserError(
            f"{path}: was played by a deployment, whose clients' labels are theirs alone; allowed are simulations"
        )
    if not allow_code and (asked := code_of(config)):
        raise UserError(f"{path}/config.yaml: {asked} is code that it would run; if you know it, say --allow-code")
    if config.clock.on:
        raise UserError(f"{path}: clock={config.clock.name}: virtual time is not replayed yet; allowed is off")
    if config.secure.on:
        raise UserError(f"{path}: secure=on: the server saw sums, and no client's share")
    summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    digest, rounds = summary["digest"], int(summary["rounds_done"])  # of fewer than planned, if it stopped early
    config.runtime.name, config.overwrite, config.evaluate.every = "inline", False, config.rounds
    with code(allow_code):
        scenario, seen, again = _replayed(config, rounds)
    if not seen:
        raise UserError(f"{path}: --audit ldia reads soft labels, and strategy={config.strategy.name} shares none")
    if again != digest:
        raise WorldError(
            f"{path}: played again it ends with another digest ({again} for {digest}): nothing was measured"
        )
    priors = {client: _prior(scenario, client) for client in range(scenario.clients)}
    rows = scored(label_distributions(seen), priors)
    with replaced(path / "audit.parquet", durable=True) as partial:
        frame = pl.DataFrame(
            [("ldia", "server", *row) for row in rows],
            schema=["audit", "adversary", "round", "client", "metric", "value"],
            orient="row",
        )
        frame.write_parquet(partial)
    return _told(rows, scenario.clients)


def _replayed(config: Config, rounds: int) -> tuple[Scenario, list[Seen], str | None]:
    single_thread()
    claim_identity()
    scenario, entry = prepare_scenario(config), registry.entry(config.strategy.name)
    strategy = build_strategy(entry, scenario)
    with tempfile.TemporaryDirectory() as folder:
        directory = RunDirectory(Path(folder) / "replay", as_yaml(config), time.time())
        directory.create(False)
        grid = Listening(build_grid(entry, scenario, directory), strategy)
        try:
            federation = Federation(strategy, grid, rounds, [Evaluation(rounds), directory])  # type: ignore[arg-type]
            federation.run()
        finally:
            grid.close()
            directory.close()
    return scenario, grid.seen, federation.digest


def _prior(scenario: Scenario, client: int) -> torch.Tensor:
    """A client's true class prior, of its training examples."""
    counts = torch.bincount(scenario.data.tensors(client, "train")[1], minlength=scenario.classes).double()
    return counts / counts.sum().clamp_min(1)


def _told(rows: list[tuple[int, int, str, float]], clients: int) -> str:
    """The means over clients by round, beside those of whoever has seen nothing."""
    lines = [
        "ldia, by a server that sees each client's soft labels, nothing else (in a simulation the truth is known)",
        "round   KL      TV      Chebyshev   TV of a blind guess   nearer than blind",
    ]
    for round in sorted({row[0] for row in rows}):
        found = {(client, metric): value for r, client, metric, value in rows if r == round}
        who = sorted({client for client, _ in found})
        mean = {m: sum(found[c, m] for c in who) / len(who) for m in ("kl", "tv", "chebyshev", "tv/blind")}
        nearer = sum(found[c, "tv"] < found[c, "tv/blind"] for c in who)
        lines.append(
            f"{round:5d}   {mean['kl']:.3f}   {mean['tv']:.3f}   {mean['chebyshev']:.3f}       "
            f"{mean['tv/blind']:.3f}                 {nearer} of {len(who)} clients"
        )
    return "\n".join(lines)
