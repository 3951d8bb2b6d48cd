"""A picture of who holds which labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

LEGIBLE = 30  # clients up to which every count is written out


def draw_partition(
    histogram_rows: Iterable[Mapping[str, Any]],
    path: str | Path,
    classes: tuple[str, ...] | None = None,
) -> None:
    """Draw the examples per label and client, over all splits, as a heat map; per client, where there is one label.

    Parameters
    ----------
    histogram_rows : iterable of mapping
        `FederatedData.histogram()`: `client, split, label, examples`.
    path : path
        Ends in `.png` or `.svg`.
    classes : tuple of str, optional
        Names of the labels.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [(row["client"], row["label"], row["examples"]) for row in histogram_rows]
    table = np.array(rows, dtype=np.int64).reshape(-1, 3)
    clients = int(table[:, 0].max(initial=0)) + 1
    labels = max(int(table[:, 1].max(initial=0)) + 1, len(classes or ()))
    counts = np.zeros((labels, clients), dtype=np.int64)
    np.add.at(counts, (table[:, 1], table[:, 0]), table[:, 2])

    written = clients <= LEGIBLE and labels <= 40
    digits = len(str(counts.max(initial=0)))
    cell = max(0.30, 0.10 * digits + 0.10)
    width = 1.9 + min(14.0, max(3.6, cell * clients if written else 0.04 * clients + 4))
    height = 1.2 + min(12.0, max(1.6, 0.30 * labels if labels <= 40 else 0.06 * labels + 2))
    # A fixed salt and no date: the same partition gives the same file.
    with matplotlib.rc_context({"svg.hashsalt": "fedfuse", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        # More clients than pixels: let it average instead of dropping columns.
        smooth = "antialiased" if clients > 1000 else "nearest"
        image = axes.imshow(counts, aspect="auto", cmap="Blues", vmin=0, interpolation=smooth)
        bar = figure.colorbar(image, ax=axes, pad=0.02)
        bar.set_label("examples")
        axes.set_xlabel("client")
        if labels == 1:  # texts to model have no labels: what is told is how many rows a client has
            axes.set_yticks([])
        else:
            axes.set_ylabel("label")
        if 1 < labels <= 40:
            axes.set_yticks(range(labels), classes or [str(label) for label in range(labels)])
        if written:
            axes.set_xticks(range(clients))
            axes.set_xticks(np.arange(clients + 1) - 0.5, minor=True)
            axes.set_yticks(np.arange(labels + 1) - 0.5, minor=True)
            axes.grid(which="minor", color="white", linewidth=1)
            axes.tick_params(which="both", length=0)
            half = counts.max(initial=0) / 2
            for label, client in zip(*np.nonzero(counts), strict=True):
                value = counts[label, client]
                colour = "white" if value > half else "#1a2a3a"
                axes.text(client, label, str(value), ha="center", va="center", fontsize=7.5, color=colour)
        for side in axes.spines.values():
            side.set_visible(False)
        # Matplotlib knows how to date only SVG and PDF.
        figure.savefig(path, dpi=150, metadata={"Date": None} if Path(path).suffix == ".svg" else None)
