"""The strip above the live page: where each run stands, and its clients."""

from __future__ import annotations

import math
from typing import Any

from fedfuse.errors import printable
from fedfuse.results.run_data import RunRecord
from fedfuse.results.table import amount

MOST_CLIENTS = 100  # shown per run


def line(run: RunRecord, name: str) -> dict[str, Any]:
    """Return what the strip shows of one run; clients only while it is not finished.

    Parameters
    ----------
    run
        Read just now; its files may change while this reads them, which raises whatever polars then raises.
    name
        What it is called on the page.
    """
    import polars as pl

    moved = run.traffic.filter(pl.col("message").is_in(["setup", "train"]))
    by_client = moved.group_by("client", "direction").agg(pl.col("bytes").sum() / 1e6).collect()
    totals = dict(by_client.group_by("direction").agg(pl.col("bytes").sum()).iter_rows())
    failures = run.failures
    shown: dict[str, Any] = {
        "name": printable(name),
        "status": run.status,
        "done": run.rounds_done if run.until_s is None else run.virtual_s or 0.0,
        "most": run.rounds if run.until_s is None else run.until_s,
        "stand": run.stand if run.until_s is None else str(run.rounds_done),
        "virtual": _virtual(run),
        "score": _percent(run.final.get("accuracy/global")),
        "personal": _percent(run.final.get("accuracy/personal")),
        "up": amount(totals.get("up", 0.0)),
        "down": amount(totals.get("down", 0.0)),
        "failed": "–" if failures is None else str(failures.get("replies", 0) + failures.get("rejected", 0)),
        "clients": [],
        "more": 0,
    }
    if run.status == "finished":
        return shown
    newest = (
        run.metrics.filter(pl.col("scope") == "client")
        .sort("round")
        .group_by("client", "split", "metric")
        .agg(pl.col("round").last(), pl.col("value").last())
        .collect()
    )
    last = {(c, s, m): (r, v) for c, s, m, r, v in newest.iter_rows()}
    bytes_of = {(c, d): value for c, d, value in by_client.iter_rows()}
    spent = run.timing.filter(pl.col("scope").str.starts_with("client:")).group_by("scope").agg(pl.col("seconds").sum())
    seconds = dict(spent.collect().iter_rows())
    clients = sorted(
        {client for client, _, _ in last},
        key=lambda client: (last.get((client, "train", "loss"), (-1, 0))[0], client),
    )
    for client in clients[:MOST_CLIENTS]:
        trained, loss = last.get((client, "train", "loss"), (None, math.nan))
        shown["clients"].append(
            [
                str(client),
                "–" if trained is None else str(trained),
                "–" if loss is None or math.isnan(loss) else f"{loss:.4f}",
                _percent(last.get((client, "personal", "accuracy"), (0, None))[1]),
                amount(bytes_of.get((client, "up"), 0.0)),
                amount(bytes_of.get((client, "down"), 0.0)),
                amount(seconds.get(f"client:{client}", math.nan)),
            ]
        )
    shown["more"] = max(0, len(clients) - MOST_CLIENTS)
    return shown


def _virtual(run: RunRecord) -> str:
    if run.virtual_s is None:
        return ""
    return amount(run.virtual_s) + ("" if run.until_s is None else f" of {run.until_s:g}")


def _percent(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{100 * value:.2f}"
