"""The report: one self-contained page, and the comparison as CSV, Markdown and LaTeX beside it."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from fedfuse.errors import UserError
from fedfuse.results.assemble import Page, build
from fedfuse.results.run import Run, find
from fedfuse.results.setting import group
from fedfuse.results.table import row, to_csv, to_latex, to_markdown

if TYPE_CHECKING:
    from jinja2 import Environment

MOST_SETTINGS = (
    6  # that get figures; a sweep over hundreds of settings would otherwise make a page nobody opens
)
MOST_MAPS = 6
_PAGE = Path(__file__).parent / "template"


@dataclass(frozen=True)
class Written:
    """What `report` made: the page, the runs in it, and a line per directory it had to skip."""

    path: Path
    runs: tuple[Run, ...]
    skipped: tuple[str, ...]


def report(directories: Iterable[str | os.PathLike[str]], out: str | os.PathLike[str]) -> Written:
    """Write `report.html`, `table.csv`, `table.md` and `table.tex` into `out`.

    Parameters
    ----------
    directories
        Run directories, or directories that hold some, finished or not.
    out
        Directory; made where it is missing.

    Raises
    ------
    UserError
        None of `directories` holds a readable run, or `out` cannot be written.
    """
    runs, skipped = find(directories)
    page, runs, skipped = build(runs, skipped)
    rows = [row(one) for one in group(runs)[0]]
    target = Path(out)
    files = {
        "report.html": render(page),
        "table.csv": to_csv(rows),
        "table.md": to_markdown(rows),
        "table.tex": to_latex(rows),
    }
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            part = target / f".{name}.part"
            part.write_text(text, encoding="utf-8")
            part.replace(target / name)
    except OSError as error:
        raise UserError(f"{target}: the report cannot be written: {error.strerror or error}") from error
    return Written(target / "report.html", tuple(runs), tuple(skipped))


def render(page: Page, live: str | None = None, script: str = "") -> str:
    """Return the page as HTML.

    Parameters
    ----------
    live
        Markup that `fedfuse watch` puts above the page and renews; None for a file.
    script
        Its script, added to the page's own.
    """
    from markupsafe import Markup

    code = (_PAGE / "page.js").read_text(encoding="utf-8") + script
    # Only this very script may run: even a name that became markup by mistake could not.
    allowed = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'; "
        "base-uri 'none'; form-action 'none'"
    )
    if live is not None:
        policy += "; connect-src 'self'"
    css = (_PAGE / "page.css").read_text(encoding="utf-8")
    return (
        templates()
        .get_template("report.html")
        .render(
            page=page,
            css=Markup(css),
            script=Markup(code),
            policy=policy,
            live=None if live is None else Markup(live),
        )
    )


@cache
def templates() -> Environment:
    """Return the page's templates; whatever they are given is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(_PAGE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
