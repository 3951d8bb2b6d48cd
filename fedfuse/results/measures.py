"""What a run's rows show, gathered once: curves, bytes, seconds, clients, label counts, similarities."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from fedfuse.errors import UserError
from fedfuse.results.run_data import LARGEST, RunRecord

if TYPE_CHECKING:
    import polars as pl

CURVES = ("accuracy/global", "accuracy/personal", "bits_per_byte/global", "bits_per_byte/personal", "loss/train")
MATRICES = 4  # similarity matrices that a report shows of a run, at most
CHARGED = ("setup", "train")  # messages that training needs; evaluation and re-sending are apart


@dataclass(frozen=True)
class Measures:
    """The rows of one run, reduced to what a report shows.

    Parameters
    ----------
    run
        Where it comes from.
    curves
        Per headline metric, the evaluated rounds and the values there, both of shape (k,).
    rounds
        0 (before the first) and every committed round, shape (r + 1,).
    cumulative_bytes
        Up and down payload of set-up and training until the end of each round, shape (r + 1,), bytes.
    cumulative_seconds
        Time until the end of each round, shape (r + 1,), seconds; empty where no timing was written.
    virtual_seconds
        Virtual time at the end of each round, shape (r + 1,), seconds; empty where none was kept.
    clients
        Personal accuracy by client after the last evaluated round.
    phases
        Seconds of the whole run by what they were spent on.
    partition_hash
        Equal for runs whose clients hold equally many examples of each label; None without a partition.
    """

    run: RunRecord
    curves: dict[str, tuple[np.ndarray, np.ndarray]]
    rounds: np.ndarray
    cumulative_bytes: np.ndarray
    cumulative_seconds: np.ndarray
    clients: dict[int, float]
    phases: dict[str, float]
    partition_hash: int | None
    virtual_seconds: np.ndarray = field(default_factory=lambda: np.array([]))


def gather(run: RunRecord) -> Measures:
    """Read one run's rows.

    Raises
    ------
    UserError
        A file that looked whole cannot be read to its end.
    """
    import polars as pl

    try:
        return _gather(run)
    except (pl.exceptions.PolarsError, OSError, TypeError, ValueError) as error:
        raise UserError(f"{run.dir}: corrupt: {' '.join(str(error).split())[:200]}") from error


def _gather(run: RunRecord) -> Measures:
    import polars as pl

    rows = run.metrics
    server = rows.filter((pl.col("scope") == "server") & pl.col("metric").is_in(CURVES))
    personal = rows.filter(
        (pl.col("scope") == "client") & (pl.col("split") == "personal") & (pl.col("metric") == "accuracy")
    )
    moved = run.traffic.filter(pl.col("message").is_in(CHARGED)).group_by("round").agg(pl.col("bytes").sum())
    spent = run.timing.group_by("round", "scope", "what").agg(pl.col("seconds").sum())
    headline, last, moved_rows, spent_rows, counts, *beyond = pl.collect_all(
        [
            server.select("round", "metric", "value"),
            personal.filter(pl.col("round") == pl.col("round").max()).select("client", "value"),
            moved,
            spent,
            run.partition.sort("client", "split", "label"),
            rows.select(_beyond("value")),
            run.timing.select(_beyond("seconds")),
        ]
    )
    for found in beyond:
        if found.item():
            raise ValueError(f"a number of column {found.columns[0]!r} is above {LARGEST:g}")
    rounds = np.arange(run.rounds_done + 1)
    curves = {}
    for name in CURVES:
        curve = headline.filter(pl.col("metric") == name).sort("round")
        if curve.height:
            curves[name] = (curve["round"].to_numpy(), curve["value"].cast(pl.Float64).to_numpy())
    phases, seconds = _time(spent_rows, rounds)
    total = (run.summary or {}).get("seconds")
    if phases and isinstance(total, dict):  # of the rounds, what no row was written for: checkpoints
        phases |= {"other": max(0.0, float(total.get("rounds") or 0.0) - sum(phases.values()))}
    return Measures(
        run=run,
        curves=curves,
        rounds=rounds,
        cumulative_bytes=_until(moved_rows, "bytes", rounds),
        cumulative_seconds=seconds,
        clients=dict(zip(last["client"].to_list(), last["value"].to_list(), strict=True)),
        phases=phases,
        virtual_seconds=_virtual(run, rounds),
        partition_hash=int(counts.hash_rows().sum()) if counts.height else None,
    )


def _beyond(column: str) -> pl.Expr:
    """Whether a finite number is too large to draw; a loss that diverged is infinite, and is left out there."""
    import polars as pl

    size = pl.col(column).cast(pl.Float64).abs()
    return (size.is_finite() & (size > LARGEST)).any()


def _virtual(run: RunRecord, rounds: np.ndarray) -> np.ndarray:
    """The virtual moment at which each round ended; none where no virtual time was kept."""
    import polars as pl

    if "virtual_s" not in run.metrics.collect_schema().names():
        return np.array([])
    each = run.metrics.group_by("round").agg(pl.col("virtual_s").max()).sort("round").collect()
    return np.interp(rounds, [0, *each["round"].to_list()], [0.0, *each["virtual_s"].to_list()])


def _until(rows: pl.DataFrame, column: str, rounds: np.ndarray) -> np.ndarray:
    """Add up `column` over all rows of rounds up to each of `rounds` (round 0 holds the set-up)."""
    each = rows.group_by("round").sum().sort("round")
    totals = np.concatenate([[0.0], np.cumsum(each[column].to_numpy().astype(np.float64))])
    return totals[np.searchsorted(each["round"].to_numpy(), rounds, side="right")]


def _time(rows: pl.DataFrame, rounds: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
    """Split the server's time, which is wall clock, by phase; clients' overlaps and is left out."""
    import polars as pl

    wall = rows.filter(pl.col("scope") == "server")
    phases = dict(wall.group_by("what").agg(pl.col("seconds").sum()).sort("what").iter_rows())
    seconds = _until(wall.select("round", "seconds"), "seconds", rounds) if wall.height else np.array([])
    return phases, seconds


def label_counts(run: RunRecord) -> tuple[list[int], list[Any], np.ndarray]:
    """Return clients, labels and the number of training examples, shape (clients, labels)."""
    import polars as pl

    rows = run.partition.filter(pl.col("split") == "train").collect()
    clients = sorted(rows["client"].unique().to_list())
    labels = rows["label"].unique().to_list()
    labels.sort(
        key=lambda label: (0, int(label), "") if str(label).isdecimal() and len(str(label)) < 10 else (1, 0, str(label))
    )
    table = np.zeros((len(clients), len(labels)))
    where = [{value: i for i, value in enumerate(values)} for values in (clients, labels)]
    for client, label, examples in rows.select("client", "label", "examples").iter_rows():
        table[where[0][client], where[1][label]] += examples
    return clients, labels, table


def similarities(run: RunRecord) -> list[tuple[int, np.ndarray]]:
    """Return up to `MATRICES` logged similarity matrices as (round, shape (clients, clients)), in round order.

    Notes
    -----
    They are rows of scope `matrix` whose metric is `similarity/<i>/<j>`. The first and the last logged round
    are always among those returned; clients from number 2,000 on are left out.
    """
    import polars as pl

    rows = run.metrics.filter((pl.col("scope") == "matrix") & pl.col("metric").str.starts_with("similarity/"))
    logged = rows.select(pl.col("round").unique().sort()).collect()["round"].to_list()
    if not logged:
        return []
    picked = sorted({logged[round(k * (len(logged) - 1) / (MATRICES - 1))] for k in range(MATRICES)})
    place = pl.col("metric").str.split("/")
    cells = (
        rows.filter(pl.col("round").is_in(picked))
        .select(
            "round",
            place.list.get(1, null_on_oob=True).cast(pl.Int64, strict=False).alias("i"),
            place.list.get(2, null_on_oob=True).cast(pl.Int64, strict=False).alias("j"),
            "value",
        )
        .drop_nulls(["i", "j"])
        .collect()
    )
    cells = cells.filter((pl.col("i") >= 0) & (pl.col("j") >= 0) & (pl.col("i") < 2_000) & (pl.col("j") < 2_000))
    found = []
    for (number,), part in sorted(cells.group_by("round")):
        size = 1 + max(int(part["i"].max()), int(part["j"].max()))  # type: ignore[arg-type]
        matrix = np.full((size, size), np.nan)
        matrix[part["i"].to_numpy(), part["j"].to_numpy()] = part["value"].to_numpy()
        found.append((int(number), matrix))  # type: ignore[call-overload]
    return found
