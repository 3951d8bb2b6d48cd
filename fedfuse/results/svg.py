"""Matplotlib figures as SVG that lives inside a page: the page's colours, no outside names, unique ids.

Matplotlib rather than plotly: its SVG prints as vectors at any size and a figure weighs tens of kilobytes,
where plotly's script alone is several megabytes in a page that must be mailed and opened without a network.
"""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colours that stand for the page's CSS variables: matplotlib needs some colour, the page decides which.
INK, MUTED, LINE, PAPER = "#010203", "#010204", "#010205", "#010206"
SERIES = 10  # hues; beyond, the dash pattern changes
PHASES = 6  # tones, for what is not a strategy
_VARIABLES = {INK: "currentColor", MUTED: "var(--muted)", LINE: "var(--line)", PAPER: "var(--paper)"}
_VARIABLES |= {f"#0102{16 + k:02x}": f"var(--s{k})" for k in range(SERIES)}
_VARIABLES |= {f"#0103{16 + k:02x}": f"var(--p{k})" for k in range(PHASES)}
_COLOUR = re.compile("|".join(_VARIABLES))
_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
WIDTH = 3.7  # inches of a figure
_DRAWING = threading.Lock()  # matplotlib's rcParams are global, and `watch` draws in a thread

STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: selectable, and small
    "svg.hashsalt": "fedfuse",  # equal figures give equal bytes
    "text.parse_math": False,  # names may hold dollar signs
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # metrics for the layout; the page sets the font
    "font.size": 8,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "figure.facecolor": "none",
    "text.color": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}


def series_colour(k: int) -> str:
    """Return the stand-in for the page's k-th series colour."""
    return f"#0102{16 + k % SERIES:02x}"


def phase_colour(k: int) -> str:
    """Return the stand-in for the page's k-th tone."""
    return f"#0103{16 + k % PHASES:02x}"


def series_dash(k: int) -> str | tuple[int, tuple[float, ...]]:
    """Return the k-th series' line style; it changes every `SERIES` series, so that no two look alike."""
    styles: list[str | tuple[int, tuple[float, ...]]] = ["-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1, 1, 1))]
    return styles[k // SERIES % len(styles)]


@contextmanager
def figure(height: float = 2.7) -> Iterator[Figure]:
    """Give an empty figure to draw into, `WIDTH` × `height` inches, in the page's style.

    Notes
    -----
    Figures are small on purpose: a phone shows one across its full width, so 8 pt text stays legible there.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with _DRAWING, matplotlib.rc_context(STYLE):
        yield Figure(figsize=(WIDTH, height), layout="constrained")


def to_svg(drawn: Figure, prefix: str) -> str:
    """Return `drawn` as an `<svg>` element.

    Parameters
    ----------
    drawn
        A figure from `figure`, while inside its block.
    prefix
        Put before every id; letters and digits. Two figures of one page need different ones.
    """
    out = io.StringIO()
    drawn.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    root = ElementTree.fromstring(out.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if not str(child.tag).startswith(f"{{{_SVG}}}") or child.tag == f"{{{_SVG}}}metadata":
                parent.remove(child)
    for element in root.iter():
        _adopt(element, prefix)
    for size in ("width", "height"):
        root.attrib.pop(size, None)  # the page sizes it by its viewBox
    root.set("role", "img")
    root.set("focusable", "false")
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    return ElementTree.tostring(root, encoding="unicode")


def _adopt(element: ElementTree.Element, prefix: str) -> None:
    """Give one element the page's colours, classes and ids."""
    name = element.attrib.pop("id", None)
    if name is not None and name.startswith("series-"):
        element.set("class", f"series {name.split('.')[0]}")
    elif name is not None:
        element.set("id", f"{prefix}-{name}")
    for key, value in list(element.attrib.items()):
        value = _REFERENCE.sub(lambda found: f"url(#{prefix}-{found[1]})", value)
        if key == f"{{{_XLINK}}}href" and value.startswith("#"):
            del element.attrib[key]
            key, value = "href", f"#{prefix}-{value[1:]}"
        element.set(key, _COLOUR.sub(lambda found: _VARIABLES[found[0]], value))
    if element.tag == f"{{{_SVG}}}text":  # the page's font, at matplotlib's size
        style = element.get("style", "")
        element.set("style", re.sub(r"font: (?:[a-z]+ )*([\d.]+px) [^;]*", r"font-size: \1", style))
    if element.tag == f"{{{_SVG}}}image":
        element.set("style", "image-rendering: pixelated; " + element.get("style", ""))
