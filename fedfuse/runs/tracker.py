"""What a tracker is: told of a round after it was committed, and catching up where it was killed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from fedfuse.core.evaluation import Row
from fedfuse.core.loop import Callback, Federation
from fedfuse.errors import UserError, WorldError, first_line
from fedfuse.results.measures import CHARGED
from fedfuse.results.run_data import COLUMNS


def label(row: Row) -> str:
    """Name of a row's series: `accuracy/global` of the server, `personal_accuracy/client_3` of a client."""
    _, scope, client, split, metric, _ = row
    return metric if scope == "server" else f"{split}_{metric}/client_{client}"


class Tracker(Callback):
    """Keeps a tracker even with a run directory.

    Parameters
    ----------
    path : Path
        The run directory. This callback comes after the one that commits rounds to it.

    Attributes
    ----------
    told : int
        The last round that the tracker has; -1 before any.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.told, self._silent = path, -1, False

    def start(self, federation: Federation) -> None:
        """Open the tracker.

        Raises
        ------
        UserError
            If it cannot be opened: before the first round is the time to say so.
        """
        try:
            self.told = self.open(federation.strategy.run_id)
            self._catch_up(federation.done)
        except UserError:
            raise
        except Exception as error:  # each tracker raises types of its own
            raise UserError(f"tracking={type(self).__name__.lower()}: {first_line(error)}") from error

    def round(self, federation: Federation) -> None:
        """Tell of the rounds it does not have yet; one that fails is told again later, and the run goes on."""
        try:
            self._catch_up(federation.done)
            self._silent = False
        except Exception as error:
            if not self._silent:
                name = type(self).__name__.lower()
                print(f"tracking={name}: {first_line(error)}; the run goes on, tried again each round", file=sys.stderr)
            self._silent = True

    def end(self, federation: Federation) -> None:
        """Close the tracker.

        Raises
        ------
        WorldError
            If it does not have the whole run; the run directory has.
        """
        try:
            self._catch_up(federation.done)
            self.close()
        except Exception as error:
            name = type(self).__name__.lower()
            raise WorldError(f"tracking={name}: {first_line(error)}; {self.path} is complete, {name} is not") from error

    def _catch_up(self, done: int) -> None:
        while self.told < done:
            self.tell(self.told + 1, self._committed(self.told + 1))
            self.told += 1

    def _committed(self, round: int) -> list[Row]:
        """A round's rows, and the bytes it moved as rows of the server."""

        def read(kind: str) -> pl.DataFrame:
            merged, piece = self.path / f"{kind}.parquet", self.path / f"checkpoint/rows/{kind}-{round:06d}.parquet"
            file = piece if piece.exists() else merged
            if not file.exists():  # there is no round 0 where nothing has to be set up
                return pl.DataFrame(schema=dict.fromkeys(COLUMNS[kind]))
            return pl.scan_parquet(file, glob=False).filter(pl.col("round") == round).collect()

        moved = read("traffic").filter(pl.col("message").is_in(CHARGED)).group_by("direction").agg(pl.sum("bytes"))
        rows: list[Row] = read("metrics").rows()
        return rows + [(round, "server", -1, "train", f"bytes/{way}", float(n)) for way, n in sorted(moved.rows())]

    # -- what a tracker is -----------------------------------------------------------------------------------

    def open(self, run_id: str) -> int:
        """Open it for a run, and return the last round it has of that."""
        raise NotImplementedError

    def tell(self, round: int, rows: Sequence[Row]) -> None:
        """Record a round."""
        raise NotImplementedError

    def close(self) -> None:
        """Record that the run is finished."""
