"""The tables of a run directory: their columns, and how rows come to the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from fedfuse.config.files import replaced
from fedfuse.results.run_data import COLUMNS, SCHEDULE, type_of

SCHEMAS = {kind: {name: type_of(name) for name in names} for kind, names in {**COLUMNS, "schedule": SCHEDULE}.items()}
KINDS = ("metrics", "traffic", "timing", "schedule")


def write_rows(path: Path, kind: str, rows: list[Any], virtual_s: float | None = None) -> None:
    """Write rows as parquet, atomically; once this returns, they have survived a loss of power."""
    frame = pl.DataFrame(rows, schema=SCHEMAS[kind], orient="row", strict=False)
    if virtual_s is not None:
        frame = frame.with_columns(virtual_s=pl.lit(virtual_s))
    with replaced(path, durable=True) as partial:
        frame.write_parquet(partial)


def before_evaluation(path: Path, kind: str) -> list[Any]:
    """Rows of a round that is committed again, without those of its evaluation."""
    frame = pl.read_parquet(path, glob=False).select(list(SCHEMAS[kind]))
    return frame.filter(pl.col("split") == "train").rows() if kind == "metrics" else frame.rows()
