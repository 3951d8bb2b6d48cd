"""Audits on the report page: what attacks on privacy found (`audit.parquet`), as one table and figures."""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedfuse.config.catalogue import AUDITS
from fedfuse.config.files import checked
from fedfuse.results import svg
from fedfuse.results.curves import Series
from fedfuse.results.measures import Measures
from fedfuse.results.sections import Table, columns, number, word
from fedfuse.results.statistics import mean_interval

if TYPE_CHECKING:
    import polars as pl

COLUMNS = ("audit", "adversary", "round", "client", "metric", "at", "value", "low", "high")
EVERYONE = -1
MOST_PIXELS = 1 << 22
FIGURES: dict[str, tuple[tuple[str, float | None, str, str | float], ...]] = {
    # metric, at, in words, and what whoever sees nothing reaches: another metric, or a number
    "ldia": (("tv", None, "error of the class prior (total variation)", "tv/blind"),),
    "client_ldia": (("tv", None, "error of the others' mean class prior (total variation)", "tv/blind"),),
    "pli": (
        ("ssim", None, "SSIM of paintings with the client's mean images", "ssim/prior"),
        ("told", None, "paintings nearest to their own class", "told/chance"),
    ),
}
OF_MEMBERS: tuple[tuple[str, float | None, str, str | float], ...] = (
    ("auc", None, "area under the ROC curve", 0.5),
    ("tpr", 0.01, "members found at 1 % false alarms", 0.01),
    ("tpr", 0.001, "members found at 0.1 % false alarms", 0.001),
    ("tpr", 0.0001, "members found at 0.01 % false alarms", 0.0001),
)
CURVE = (
    "Members found over false alarms, first seed; bars: 95 % intervals over examples at the rates of the table; "
    "the thin line is guessing."
)
PAINTED = "Of the client of the first seed that holds most classes: painted, the mean of public images, its own mean."
STYLES: dict[str, Any] = {
    "coop_lira": "-",
    "distill_lira": "--",
    "fedmia": "-.",
    "fedmia_gradient": (0, (5, 1)),
    "client_lira": ":",
}


def found(run: Measures) -> pl.DataFrame | None:
    """The figures of a run's audits, each of its last round; None where none was made."""
    import polars as pl

    path = run.run.dir / "audit.parquet"
    if not path.exists():
        return None
    frame = pl.read_parquet(checked(path), glob=False)
    if tuple(frame.columns) != COLUMNS:  # of a version that knew neither intervals nor curves
        return None
    return frame.filter(client=EVERYONE).filter(pl.col("round") == pl.col("round").max().over("audit"))


def table(series: Sequence[Series]) -> Table | None:
    """What each audit found of each strategy, beside what whoever sees nothing reaches."""
    lines, named = [], list[str]()
    for one in series:
        frames = [frame for run in one.finished if (frame := found(run)) is not None]
        for name in AUDITS:
            for metric, at, said, chance in FIGURES.get(name, OF_MEMBERS):
                values = [row for frame in frames if (row := _row(frame, name, metric, at)) is not None]
                if not values:
                    continue
                named.append(name)
                over = mean_interval([row["value"] for row in values])
                over = over.within(-1.0 if metric.startswith("ssim") else 0.0, 1.0)
                alone = len(values) == 1
                low, high = (values[0]["low"], values[0]["high"]) if alone else (over.low, over.high)
                blind = chance if isinstance(chance, float) else _mean(frames, name, chance)
                lines.append(
                    (
                        word(one.label, one.index),
                        word(name),
                        word(said),
                        number(len(values), str(len(values))),
                        *(number(np.nan if v is None else v, _three(v)) for v in (over.mean, low, high, blind)),
                    )
                )
    if not lines:
        return None
    told = [f"{name}: {AUDITS[name].adversary} sees {AUDITS[name].sees}." for name in dict.fromkeys(named)]
    note = " ".join(
        [
            "After the last round. Intervals are 95 %: of one seed over examples or clients, of several over seeds.",
            *told,
            "Nothing else is seen; what is true is known in a simulation alone.",
        ]
    )
    heads = columns(":strategy", ":audit", ":figure", "n", "value", "low", "high", "seeing nothing")
    return Table("What the messages give away", heads, tuple(lines), note, "leaks")


def _row(frame: pl.DataFrame, audit: str, metric: str, at: float | None) -> dict[str, Any] | None:
    import polars as pl

    place = pl.col("at").is_null() if at is None else pl.col("at") == at
    rows = frame.filter(pl.col("audit") == audit, pl.col("metric") == metric, place, pl.col("value").is_not_null())
    return rows.row(0, named=True) if len(rows) else None


def _mean(frames: Sequence[pl.DataFrame], audit: str, metric: str) -> float | None:
    values = [row["value"] for frame in frames if (row := _row(frame, audit, metric, None)) is not None]
    return float(np.mean(values)) if values else None


def _three(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}".replace("-", "−")


def curves(series: Sequence[Series], prefix: str) -> str | None:
    """Draw ROC curves of the attacks on membership, both axes logarithmic."""
    shown = []
    for one in series:
        frame = next((f for run in one.finished if (f := found(run)) is not None), None)
        if frame is not None and len(frame.filter(metric="roc")):
            shown.append((one, frame))
    if not shown:
        return None
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, NullFormatter

    with svg.figure(height=3.2) as drawn:
        axes = drawn.add_subplot()
        least = min(1 / float(row) for _, frame in shown for row in frame.filter(metric="others")["value"])
        axes.plot([least, 1], [least, 1], color=svg.MUTED, lw=0.6)
        for one, frame in shown:
            for name, style in STYLES.items():
                curve = frame.filter(audit=name, metric="roc").sort("at", "value")
                if not len(curve):
                    continue
                look: dict[str, Any] = {"color": one.colour, "gid": f"series-{one.index}.{name}"}
                axes.plot(np.maximum(curve["at"], least), np.maximum(curve["value"], least), style, lw=1.2, **look)
                for row in frame.filter(audit=name, metric="tpr").drop_nulls("low").iter_rows(named=True):
                    ends = [[row["value"] - row["low"]], [row["high"] - row["value"]]]
                    axes.errorbar(
                        [row["at"]], [max(row["value"], least)], yerr=ends, color=one.colour, lw=0.8, capsize=2
                    )
        for axis, scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
            scale("log")
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
            axis.set_minor_formatter(NullFormatter())
        axes.set_xlim(least, 1)
        axes.set_ylim(least, 1.1)
        kinds = [name for name in STYLES if any(len(frame.filter(audit=name, metric="roc")) for _, frame in shown)]
        lines = [Line2D([], [], ls=STYLES[name], color=svg.MUTED, lw=1.2, label=name) for name in kinds]
        axes.legend(handles=lines, loc="lower right", handlelength=2.6, frameon=False)
        axes.set_xlabel("false alarms")
        axes.set_ylabel("members found")
        return svg.to_svg(drawn, prefix)


def paintings(one: Series, prefix: str) -> str | None:
    """Draw what `pli` painted of one client; None where it painted nothing."""
    path = next((p for run in one.finished if (p := run.run.dir / "audit_pli.npz").exists()), None)
    if path is None:
        return None
    try:
        with np.load(checked(path), allow_pickle=False) as kept:
            held = Counter(name.partition("/")[0] for name in kept.files)
            client = held.most_common(1)[0][0]
            classes = [name for name in kept.files if name.partition("/")[0] == client]
            images = [np.asarray(kept[name], dtype=np.float32) for name in classes]
    except (OSError, ValueError, IndexError, zipfile.BadZipFile):
        return None
    if not images or any(i.ndim != 4 or i.shape != images[0].shape or i.shape[0] != 3 for i in images):
        return None
    if sum(i.size for i in images) > MOST_PIXELS:
        return None
    rows = [np.concatenate([image[k] for image in images], axis=-1) for k in range(3)]
    whole = np.concatenate(rows, axis=-2).transpose(1, 2, 0).clip(0, 1)
    with svg.figure(height=min(3.2, 0.6 + 3.5 * whole.shape[0] / whole.shape[1])) as drawn:
        axes = drawn.add_subplot()
        axes.imshow(whole[..., 0] if whole.shape[-1] != 3 else whole, cmap="gray", vmin=0, vmax=1)
        axes.grid(False)
        side = images[0].shape[-1]
        axes.set_xticks([side * (k + 0.5) for k in range(len(classes))], [name.partition("/")[2] for name in classes])
        axes.set_yticks([images[0].shape[-2] * (k + 0.5) for k in range(3)], ["painted", "public", "its own"])
        axes.set_xlabel(f"class, client {client}")
        return svg.to_svg(drawn, prefix)
