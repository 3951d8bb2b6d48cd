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
from fedfuse.results.page import Page, build
from fedfuse.results.run_data import RunRecord, find
from fedfuse.results.table import to_csv, to_latex, to_markdown

if TYPE_CHECKING:
    from jinja2 import Environment

_TEMPLATES = Path(__file__).parent / "template"


@dataclass(frozen=True)
class Written:
    """What `report` made: the page, the runs in it, and a line per directory it had to skip."""

    path: Path
    runs: tuple[RunRecord, ...]
    skipped: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.path}" + (f" ({len(self.skipped)} directories skipped)" if self.skipped else "")


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
    target = Path(out)
    files = {
        "report.html": document(page.title, render(page)),
        "table.csv": to_csv(page.rows),
        "table.md": to_markdown(page.rows),
        "table.tex": to_latex(page.rows),
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


def render(page: Page) -> str:
    """Return the body of the page as HTML."""
    return fragment("body.html", page=page)


def document(title: str, body: str, live: str | None = None, script: str = "") -> str:
    """Return a whole page that needs nothing from outside.

    Parameters
    ----------
    body
        Markup made by `render`.
    live
        Markup that `fedfuse watch` puts above it and renews; None for a file.
    script
        Name of a script of this package, run after the page's own.
    """
    from markupsafe import Markup

    code = "".join(_file(name) for name in ("page.js", script) if name)
    # Only this very script may run: even a name that became markup by mistake could not.
    allowed = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    policy += "; base-uri 'none'; form-action 'none'" + ("" if live is None else "; connect-src 'self'")
    markup = {"body": body, "css": _file("page.css"), "script": code, "live": live}
    shown = {name: None if text is None else Markup(text) for name, text in markup.items()}
    return fragment("report.html", title=title, policy=policy, **shown)


def fragment(template: str, **values: object) -> str:
    """Fill in one of this package's templates; every value that is not markup is escaped."""
    return _templates().get_template(template).render(**values)


def _file(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


@cache
def _templates() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
