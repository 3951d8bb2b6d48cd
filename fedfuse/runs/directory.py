"""The run directory: a round commits at once, by one atomic rename; a killed run goes on from there."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import polars as pl
import torch

from fedfuse.config.files import opened, replaced, synced, write_text
from fedfuse.config.schema import Config
from fedfuse.core.loop import Callback, Federation
from fedfuse.errors import UserError, WorldError, in_words, one_line
from fedfuse.results.run_data import SAMPLES, STOPPED
from fedfuse.runs.checkpoint import BEFORE, NEWEST, commit, recover
from fedfuse.runs.configuration import as_yaml
from fedfuse.runs.environment import environment
from fedfuse.runs.further import ended_at
from fedfuse.runs.summary import summary
from fedfuse.runs.tables import KINDS, before_evaluation, write_rows
from fedfuse.wire.client_store import INITIAL, ClientStore, write_arrays

PASSWORD = re.compile(r"://[^\s/@]*@")
OWNED = "fedfuse-client-state"  # a file in a folder of `runtime.state_dir` that a run made for itself


class Held(UserError):
    """Another process is writing the run."""


class RunDirectory(Callback):
    """Keeps a run: rows and checkpoint every round, summary and final models at the end.

    Parameters
    ----------
    path : Path
    config : Config
        What is played.
    started : float
        `time.time()` when the command started, for `seconds.startup`.

    Attributes
    ----------
    clients : ClientStore
        Committed client state, below the checkpoint.
    """

    def __init__(self, path: Path, config: Config, started: float, state_dir: str | None = None) -> None:
        self.path, self.config, self.started, self.state_dir = Path(path), config, started, state_dir
        self.seconds = {"startup": 0.0, "rounds": 0.0, "before": 0.0}
        self._lock: IO[str] | None = None
        self.clients: ClientStore
        self._made: list[Path] = []  # directories that `create` made, the innermost first
        self._ours = False  # whether all that the directory holds is this run's
        self._kept: dict[tuple[str, int], str] = {}  # states of clients that are on the disk for good
        self.fallen_back = ""  # what was wrong with the newest checkpoint, if the one before it was used
        self.deployed = False  # whether clients are real sites, whose noise comes from their own entropy

    @property
    def config(self) -> Config:
        """What is played; its text is that of `config.yaml` and of every commit."""
        return self._config

    @config.setter
    def config(self, config: Config) -> None:
        self._config, self._text = config, as_yaml(config)

    @property
    def checkpoint(self) -> Path:
        """Where the last complete round lies."""
        return self.path / "checkpoint"

    # -- opening -------------------------------------------------------------------------------------------

    def create(self, overwrite: bool, content: str = "") -> None:
        """Make the directory and take its lock; `content` is that of the user's own data.

        Raises
        ------
        UserError
            If it holds another run, or cannot be written.
        """
        try:
            self._made = [p for p in (self.path, *self.path.parents) if not p.exists()]
            if self.path.is_symlink():  # what it points at is not this run's to empty, or to fill
                raise UserError(f"out={self.path}: is a link; links are not followed here")
            if self.path.exists() and not self.path.is_dir():
                raise UserError(f"out={self.path}: is a file; a directory is needed")
            if self.path.exists() and any(self.path.iterdir()):
                if not overwrite:
                    raise UserError(f"out={self.path}: holds something already; choose another or say overwrite=true")
                if not (self.path / "config.yaml").exists():
                    raise UserError(f"out={self.path}: holds something that is not a run; it is not overwritten")
                self._hold()
                self._drop_linked_state()
                for child in self.path.iterdir():
                    if child.name != "lock":
                        shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()
            self.path.mkdir(parents=True, exist_ok=True)
            self._hold()
            self._ours = True
            (self.checkpoint / "rows").mkdir(parents=True, exist_ok=True)
            write_text(self.path / "config.yaml", self._text)
            if PASSWORD.search(self._text):  # of a tracker's address: nobody else's to read
                (self.path / "config.yaml").chmod(0o600)
            write_text(self.path / "environment.json", json.dumps(environment(self.config, content), indent=1))
            if self.state_dir is not None:
                self._link_state(self.state_dir)
            self.clients = ClientStore((self.checkpoint / "clients").resolve())
        except OSError as error:
            self.discard()
            raise UserError(f"out={self.path}: cannot be written ({error.strerror or error})") from error

    def keep_samples(self, round: int, rows: list[dict[str, str]]) -> None:
        """Write what a round's model answered; a round that is played again writes the same again."""
        folder = self.path / SAMPLES
        folder.mkdir(exist_ok=True)
        write_text(folder / f"round-{round:06d}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def discard(self) -> None:
        """Take back what `create` made, if no round was committed: a run that could not begin leaves nothing."""
        self.close()
        if (self.checkpoint / NEWEST).exists() or (self.checkpoint / BEFORE).exists():
            return
        if self._ours:
            self._drop_linked_state()
            for child in self.path.iterdir():
                real = child.is_dir() and not child.is_symlink()
                shutil.rmtree(child, ignore_errors=True) if real else child.unlink(missing_ok=True)
        for folder in self._made:
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _link_state(self, state_dir: str) -> None:
        """Put client state into `runtime.state_dir`, which every node of a cluster sees."""
        place = Path(state_dir).resolve() / f"{self.path.name}-{uuid.uuid4().hex[:12]}"
        try:
            place.mkdir(parents=True)
            write_text(place / OWNED, str(self.path.resolve()))
        except OSError as error:
            self.discard()
            told = error.strerror or error
            raise UserError(f"runtime.state_dir={state_dir}: cannot be written ({told})") from error
        (self.checkpoint / "clients").symlink_to(place)

    def _drop_linked_state(self) -> None:
        if self._linked():
            shutil.rmtree((self.checkpoint / "clients").resolve(), ignore_errors=True)

    def _linked(self) -> bool:
        """Whether client state lies elsewhere, in a folder that a run made for it; no other is touched."""
        link = self.checkpoint / "clients"
        return link.is_symlink() and (link.resolve() / OWNED).is_file()

    def reopen(self) -> None:
        """Take the lock of a run that shall go on.

        Raises
        ------
        UserError
            If another process has it, or the directory cannot be written.
        """
        try:
            for place in (self.path, *self.path.iterdir(), self.checkpoint / "rows"):  # whatever is written to
                if place.is_symlink():
                    raise UserError(f"{place}: is a link; links are not followed here")
            if (self.checkpoint / "clients").is_symlink() and not self._linked():
                raise UserError(f"{self.checkpoint / 'clients'}: is a link to a folder that is no run's")
            self._hold()
            self.clients = ClientStore((self.checkpoint / "clients").resolve())
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror or error})") from error

    def _hold(self) -> None:
        if self._lock is not None:
            return
        lock = os.fdopen(opened(self.path / "lock", os.O_RDWR | os.O_CREAT), "r+")  # held until the process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise Held(f"out={self.path}: another process is writing this run") from error
        self._lock = lock

    def close(self) -> None:
        """Let go of the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @contextlib.contextmanager
    def keeping_why(self, onwards: str) -> Iterator[None]:
        """Keep why a run stops, for whoever reads the results: a comparison without it would favour survivors.

        Parameters
        ----------
        onwards : str
            How the run goes on, for whoever has to make room on the disk.

        Raises
        ------
        WorldError
            What stopped it; a failing disk in words.
        """
        try:
            yield
        except (OSError, WorldError) as error:
            why = in_words(error) if isinstance(error, OSError) else str(error)
            with contextlib.suppress(OSError):  # the disk may be why
                write_text(self.path / STOPPED, json.dumps({"why": one_line(why)}))
            if isinstance(error, OSError):
                raise WorldError(f"{self.path}: {why}; {onwards}") from error
            raise

    # -- the loop's hooks ----------------------------------------------------------------------------------

    def start(self, federation: Federation) -> None:
        """Write what is known before the first round; a run that goes on has not failed."""
        (self.path / STOPPED).unlink(missing_ok=True)
        if not (self.path / "partition.parquet").exists():
            rows = federation.scenario.data.histogram()
            write_rows(
                self.path / "partition.parquet",
                "partition",
                [(r["client"], r["split"], str(r["label"]), r["examples"]) for r in rows],
            )
        self.seconds["startup"] += time.time() - self.started
        self._clock = time.perf_counter()

    def round(self, federation: Federation) -> None:
        """Commit: rows first, then the checkpoint that makes them count."""
        strategy = federation.strategy
        round = federation.done
        rows: dict[str, list[Any]] = {
            "metrics": federation.rows,
            "traffic": strategy.outbox.traffic.take_rows(),
            "timing": federation.timing,
        }
        clock = federation.clock
        if clock is not None:
            rows["schedule"], clock.book.rows = clock.book.rows, []
        for kind, values in rows.items():
            path = self.checkpoint / "rows" / f"{kind}-{round:06d}.parquet"
            if federation.again and path.exists():
                values = [*before_evaluation(path, kind), *values]
            virtual = clock.seconds if clock is not None and kind == "metrics" else None
            write_rows(path, kind, values, virtual)
        federation.rows, federation.timing = [], []
        self.seconds["rounds"] = self.seconds["before"] + time.perf_counter() - self._clock
        self._keep_clients(strategy.outbox.tags)
        if clock is not None:
            self._keep_clients({client: one.made for client, one in clock.waiting.items() if one.made}, "flight")
        commit(federation, self.checkpoint, self._text, self.seconds)
        progress = {"round": round, "rounds": federation.rounds, "run_id": strategy.run_id}
        progress["failures"] = dict(strategy.inbox.failures)
        if clock is not None:
            progress["virtual_s"] = clock.seconds
        write_text(self.checkpoint / "round.json", json.dumps(progress))

    def _keep_clients(self, tags: dict[int, str], of: str = "tag") -> None:
        """Bring to the disk what a commit names: the states of clients that have new ones. Sites keep their own."""
        for client, tag in tags.items():
            path = self.clients.path(client, tag)
            if self._kept.get((of, client)) != tag and tag != INITIAL and path.exists():
                synced(path)
                synced(path.parent)
            self._kept[of, client] = tag

    def undo(self, federation: Federation) -> None:
        """Put the federation back to the last commit: a phase of the round that was begun may have been fused."""
        recover(federation, self.checkpoint, self._text, ("rounds",))

    def end(self, federation: Federation) -> None:
        """Merge the rows, draw the partition, write the final models, and last the summary."""
        from fedfuse.data.picture import draw_partition  # not before the first round, which would wait for it

        rows = pl.read_parquet(self.path / "partition.parquet", glob=False).to_dicts()
        if all(row["label"] for row in rows):  # sites with data of their own tell no labels
            draw_partition([{**row, "label": int(row["label"])} for row in rows], self.path / "partition.svg")
        self.write_final_models(federation)
        traffic = federation.strategy.outbox.traffic
        traffic.settle()
        settled = self.checkpoint / "rows" / f"traffic-settled-{federation.done:06d}.parquet"
        write_rows(settled, "traffic", traffic.take_rows())
        kinds = ("metrics", "traffic", "timing") if federation.clock is None else KINDS
        for kind in kinds:
            pieces = sorted((self.checkpoint / "rows").glob(f"{kind}-*.parquet"))
            with replaced(self.path / f"{kind}.parquet", durable=True) as partial:
                pl.concat([pl.scan_parquet(p, glob=False) for p in pieces]).sink_parquet(partial)
        write_text(self.path / "summary.json", json.dumps(self.summary(federation), indent=1))
        shutil.rmtree(self.checkpoint / "rows", ignore_errors=True)
        for client in range(federation.scenario.clients):
            self.clients.settle(client, federation.strategy.outbox.tags.get(client, INITIAL))

    def summary(self, federation: Federation) -> dict[str, Any]:
        """The content of `summary.json`."""
        return summary(federation, self.path, self.seconds, self.fallen_back, self.deployed)

    def write_final_models(self, federation: Federation) -> None:
        """Keep the server's models, and those of the clients that the last evaluation scored."""
        final = self.path / "final"
        final.mkdir(exist_ok=True)
        for name, (architecture, arrays) in federation.strategy.server_models().items():
            about = {"architecture": architecture, "server": name}
            about |= {"bare": "true"} if federation.strategy.bare else {}
            write_arrays(final / f"server-{name}.safetensors", arrays, notes=about)
        for name, (architecture, arrays, shape) in federation.strategy.server_halves().items():
            about = {"architecture": architecture, "server": name, "shape": json.dumps(shape)}
            write_arrays(final / f"server-{name}.safetensors", arrays, notes=about)
        for client in range(federation.scenario.clients):
            kept = self.clients.staged(client, "final")
            if kept is not None:
                about = {"architecture": federation.scenario.architectures[client], "client": str(client)}
                write_arrays(final / f"client-{client}.safetensors", named(kept["model"]), notes=about)

    def restore(self, federation: Federation) -> None:
        """Put a federation back to the last complete round, and drop rows of rounds that were not completed.

        Raises
        ------
        UserError
            If the checkpoint is of another format or configuration, or neither it nor the one before can be read.
        """
        done = -1
        free = ("rounds",) if ended_at(self.checkpoint) else ()
        seconds, self.fallen_back = recover(federation, self.checkpoint, self._text, free)
        if seconds is not None:
            self.seconds = seconds
            self.seconds["before"] = self.seconds["rounds"]
            done = federation.done
        if self.fallen_back:
            print(f"fedfuse: {self.fallen_back}", file=sys.stderr, flush=True)
        rows = self.checkpoint / "rows"
        rows.mkdir(parents=True, exist_ok=True)
        for piece in rows.glob("*.parquet"):
            if int(piece.stem.rsplit("-", 1)[1]) > done:
                piece.unlink()


def named(tree: dict[str, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    """Undo the nesting of names that hold a slash."""
    out: dict[str, torch.Tensor] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            out |= named(value, f"{prefix}{key}/")
        else:
            out[prefix + key] = value.contiguous().clone()
    return out
