"""Gathers the pages of the site, and writes those that are generated: `python docs/site.py build/pages`.

Links to a strategy's file lead to its entry in the reference, those to other sources become plain text; links between
pages are checked by mkdocs (`strict`).
"""

from __future__ import annotations

import inspect
import os
import re
import shutil
import sys
from pathlib import Path

from fedfuse.config import catalogue, registry
from fedfuse.config.hydra_words import GROUPS
from fedfuse.config.keys import Key, said
from fedfuse.config.reference import asks, listing
from fedfuse.config.schema import known

ROOT = Path(__file__).parent.parent
STUDIES = (
    "sanity", "when_to_fuse", "adapters", "virtual_clock", "leaks", "tokenisers", "visual_questions", "one_shot",
    "domains", "fedd2s", "active",
)  # fmt: skip
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#]+)(#[^)]*)?\)")


def pages(target: Path) -> list[Path]:
    """Write every page below `target`.

    Returns
    -------
    list of Path
        The Markdown files.
    """
    shutil.rmtree(target, ignore_errors=True)
    places = {ROOT / "README.md": target / "index.md"}
    places |= {path: target / path.name for path in sorted((ROOT / "docs").glob("*.md"))}
    places |= {ROOT / f"experiments/{name}/README.md": target / f"studies/{name}/index.md" for name in STUDIES}
    places |= {ROOT / "CONTRIBUTING.md": target / "contributing.md", ROOT / "CHANGELOG.md": target / "changelog.md"}
    for source, page in places.items():
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(linked(source, page, places, target), encoding="utf-8")
    for name, text in {"keys": keys(), "strategies": strategies(), "python": python()}.items():
        page = target / f"reference/{name}.md"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(text, encoding="utf-8")
    shutil.copyfile(ROOT / "docs/site.css", target / "site.css")
    return sorted(target.rglob("*.md"))


def linked(source: Path, page: Path, places: dict[Path, Path], target: Path) -> str:
    """A page's text with its links as they are in the site; pictures are copied beside it."""

    def moved(match: re.Match[str]) -> str:
        picture, words, where, anchor = match.groups()
        if re.match(r"[a-z]+:", where):
            return match.group(0)
        meant = (source.parent / where).resolve()
        if meant in places:
            return f"[{words}]({os.path.relpath(places[meant], page.parent)}{anchor or ''})"
        if meant.parent == ROOT / "strategies" and (named := strategy_named(words.strip("`"), meant.stem)):
            return f"[{words}]({os.path.relpath(target / 'reference/strategies.md', page.parent)}#{named})"
        if not meant.exists():
            raise SystemExit(f"{source}: links to {where}, which is not there")
        if meant.suffix in (".png", ".svg"):
            kept = page.parent / "pictures" / meant.name
            kept.parent.mkdir(exist_ok=True)
            shutil.copyfile(meant, kept)
            return f"{picture}[{words}](pictures/{meant.name})"
        return words if words.startswith("`") else f"{words} (`{meant.relative_to(ROOT)}`)"

    text = source.read_text(encoding="utf-8").replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")
    return LINK.sub(moved, text)


def strategy_named(words: str, stem: str) -> str | None:
    """The strategy that a link to a file means: a file may hold several, then the link's words say which."""
    listed = registry.listed()
    return next((name for name in (words, stem) if name in listed), None)


def keys() -> str:
    """The reference of keys."""
    parts = ["# Keys", "Every key of a run: `fedfuse run key=value …`; `fedfuse help KEY` says the same."]
    found = known()
    for group in ("", *dict.fromkeys(name.partition(".")[0] for name in found if "." in name)):
        title = f"`{group}`" if group else "Outside of groups"
        parts.append(f"## {title}")
        if group in GROUPS:
            words = ", ".join(f"`{word}`" for word in catalogue.GROUPS[group])
            parts.append(f"`{group}=<word>` chooses: {words}.")
        own = [key for name, key in found.items() if name.startswith(f"{group}.") or (not group and "." not in name)]
        parts.append(table(own))
    for kind in ("datasets", "partitions", "models", "losses", "experiments"):
        rows = [f"| `{name}` | {cell(line)} |" for name, line in listing(kind)]
        parts.append("\n".join([f"## {kind.capitalize()}", "", "| name | what |", "|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def table(rows: list[Key]) -> str:
    """Keys as a Markdown table."""
    lines = ["| key | default | what | may be | only with |", "|---|---|---|---|---|"]
    for key in rows:
        parts = [f"`{key.name}`", f"`{said(key.default)}`", *map(cell, (key.meaning, key.kind, key.only))]
        lines.append(f"| {' | '.join(parts)} |")
    return "\n".join(lines)


def cell(text: str) -> str:
    """Text that neither ends a cell nor begins a tag."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def strategies() -> str:
    """Every strategy: its box, what it asks for and its hyper-parameters."""
    parts = ["# Strategies", "Generated from the files of `strategies/`; `fedfuse list NAME` says the same."]
    for name, line in listing("strategies"):
        entry = registry.entry(name)
        box = inspect.getdoc(sys.modules[entry.server.__module__]) or ""
        told = "\n".join(f"- {cell(one)}" for one in asks(name))
        parts += [f"## `{name}`", cell(line), f"```text\n{box}\n```", told]
        if own := registry.hypers(name):
            parts.append(table(own))
    return "\n\n".join(parts) + "\n"


def python() -> str:
    """What a program calls."""
    called = ("run", "compare", "load", "Run", "Runs")
    halves = ("core.strategy.FusionStrategy", "core.client.FusionClient", "wire.knowledge.Topic")
    parts = ["# Python", "See also [notebooks](../notebooks.md) and [your own strategy](../strategy.md)."]
    parts += [f"::: fedfuse.api.{name}" for name in called]
    return "\n\n".join([*parts, *(f"::: fedfuse.{name}" for name in halves)]) + "\n"


if __name__ == "__main__":
    print(f"{len(pages(Path(sys.argv[1]).resolve()))} pages")
