"""A picture of who holds which labels, as SVG: written in milliseconds, where a drawing library takes a second."""

from __future__ import annotations

import base64
import html
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

LEGIBLE = 30  # clients up to which every count is written out
NAMED = 40  # labels up to which each has a row of its own
COLUMNS = 1000  # of pixels: more clients are averaged
RAMP = np.array([[247, 251, 255], [171, 207, 229], [55, 135, 192], [8, 48, 107]])  # colours from none to most
INK, PAPER = "#1a2a3a", "#ffffff"


def draw_partition(
    histogram_rows: Iterable[Mapping[str, Any]],
    path: str | Path,
    classes: tuple[str, ...] | None = None,
    title: str | None = None,
) -> None:
    """Draw the examples per label and client, over all splits, as a heat map.

    Parameters
    ----------
    histogram_rows : iterable of mapping
        `FederatedData.histogram()`: `client, split, label, examples`.
    path : path
        Of an SVG file.
    classes : tuple of str, optional
        Names of the labels.
    """
    rows = [(row["client"], row["label"], row["examples"]) for row in histogram_rows]
    table = np.array(rows, dtype=np.int64).reshape(-1, 3)
    clients = int(table[:, 0].max(initial=0)) + 1
    labels = max(int(table[:, 1].max(initial=0)) + 1, len(classes or ()))
    counts = np.zeros((labels, clients), dtype=np.int64)
    np.add.at(counts, (table[:, 1], table[:, 0]), table[:, 2])
    Path(path).write_text("\n".join(_drawn(counts, classes, title)) + "\n", encoding="utf-8")


def _drawn(counts: np.ndarray, classes: tuple[str, ...] | None, title: str | None) -> Iterator[str]:
    (labels, clients), most = counts.shape, int(counts.max(initial=0))
    written = clients <= LEGIBLE and labels <= NAMED
    each = max(24, 7 * len(str(most)) + 8) if written else 0  # pixels of a client's column
    width = max(260, each * clients) if written else min(1000, 300 + 3 * clients)
    height = 22 * labels if labels <= NAMED else min(900, 200 + 4 * labels)
    names = dict(enumerate(classes or map(str, range(labels)))) if labels <= NAMED else _ticks(labels)
    left = 34 + 7 * max(map(len, names.values()))
    top = 30 if title else 10
    across, down = width / clients, height / labels
    size = f'width="{left + width + 110}" height="{top + height + 44}"'
    yield f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12" fill="{INK}">'
    yield f'<rect width="100%" height="100%" fill="{PAPER}"/>'
    if title:
        yield _text(left, 20, title, "start")
    if written:
        for (label, client), value in np.ndenumerate(counts):
            x, y = left + client * across, top + label * down
            place = f'x="{x:.1f}" y="{y:.1f}" width="{across - 1:.1f}" height="{down - 1:.1f}"'
            yield f'<rect {place} fill="{_hex(value, most)}"/>'
            if value:
                colour = PAPER if value > most / 2 else INK
                yield _text(x + across / 2, y + down / 2 + 4, str(value), "middle", f' fill="{colour}" font-size="10"')
    else:
        yield _image(_averaged(counts), most, left, top, width, height)
    for label, name in names.items():
        yield _text(left - 6, top + (label + 0.5) * down + 4, name, "end")
    for client, name in (dict(enumerate(map(str, range(clients)))) if written else _ticks(clients)).items():
        yield _text(left + (client + 0.5) * across, top + height + 16, name, "middle")
    yield _text(left + width / 2, top + height + 36, "client", "middle")
    yield _text(14, top + height / 2, "label", "middle", f' transform="rotate(-90 14 {top + height / 2:.1f})"')
    scale = np.linspace(most, 0, 64).reshape(-1, 1)
    yield _image(scale, most, left + width + 12, top, 12, height)
    yield _text(left + width + 30, top + 10, str(most), "start")
    yield _text(left + width + 30, top + height, "0 examples" if height > 30 else "0", "start")
    yield "</svg>"


def _text(x: float, y: float, words: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{html.escape(words)}</text>'


def _ticks(count: int) -> dict[int, str]:
    """Round numbers below a count, five to ten of them."""
    step = next(10**k * unit for k in range(20) for unit in (1, 2, 5) if count <= 10 * 10**k * unit)
    return {tick: str(tick) for tick in range(0, count, step)}


def _averaged(counts: np.ndarray) -> np.ndarray:
    """As many columns as are to be seen."""
    clients = counts.shape[1]
    if clients <= COLUMNS:
        return counts
    first = np.arange(COLUMNS) * clients // COLUMNS
    return np.add.reduceat(counts, first, axis=1) / np.diff([*first, clients])


def _colours(values: np.ndarray, most: int) -> np.ndarray:
    at = np.asarray(values) / max(1, most) * (len(RAMP) - 1)
    parts = [np.interp(at, range(len(RAMP)), RAMP[:, channel]) for channel in range(3)]
    return np.stack(parts, axis=-1).round().astype(np.uint8)


def _hex(value: int, most: int) -> str:
    return f"#{_colours(np.array(value), most).tobytes().hex()}"


def _image(values: np.ndarray, most: int, x: float, y: float, width: float, height: float) -> str:
    """A pixel for each value, stretched."""
    pixels = _colours(values, most)
    rows, columns = values.shape
    head = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)  # eight bits of red, green, blue
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels))
    chunks = ((b"IHDR", head), (b"IDAT", body), (b"IEND", b""))
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" preserveAspectRatio="none"'
    address = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return f'<image {place} style="image-rendering:pixelated" href="{address}"/>'
