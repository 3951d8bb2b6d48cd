"""What strategies import: one form, names that exist, a table that editors see too, and a start that loads nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fedfuse

ROOT = Path(__file__).parent.parent
STRATEGIES = sorted((ROOT / "strategies").glob("*.py"))


def imports(path: Path) -> list[ast.Import | ast.ImportFrom]:
    """Every import of a file, wherever it stands."""
    found = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [node for node in found if isinstance(node, ast.Import | ast.ImportFrom)]


@pytest.mark.parametrize("path", STRATEGIES, ids=lambda path: path.stem)
def test_strategies_import_the_public_face_alone(path: Path) -> None:
    """`from fedfuse import name, …` once a file, and names that are public."""
    ours = []
    for node in imports(path):
        if isinstance(node, ast.Import):
            assert not [alias.name for alias in node.names if alias.name.split(".")[0] == "fedfuse"]
        elif node.level or (node.module or "").split(".")[0] in ("fedfuse", "strategies"):
            assert (node.level, node.module) == (0, "fedfuse")
            ours.append([alias.name for alias in node.names])
    assert len(ours) == (path.stem != "__init__")
    assert {name for names in ours for name in names} <= set(fedfuse.__all__)


def test_editors_and_type_checkers_see_what_there_is() -> None:
    """The imports for type checkers name the same homes as the table that is used."""
    source = Path(fedfuse.__file__)
    seen = {}
    for node in imports(source):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fedfuse"):
            for alias in node.names:
                home, inside = fedfuse._WHERE[alias.name]
                assert f"{node.module}.{alias.name}" == (f"{home}.{inside}" if inside else home)
                seen[alias.name] = home
    assert seen.keys() == fedfuse._WHERE.keys()


def test_every_public_name_is_there_and_no_other() -> None:
    assert dir(fedfuse) == sorted(fedfuse.__all__)
    for name in fedfuse.__all__:
        assert not name.startswith("_")
        assert getattr(fedfuse, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'FusionStrategie'"):
        fedfuse.FusionStrategie  # noqa: B018


def test_importing_fedfuse_loads_nothing_heavy() -> None:
    code = "import sys, fedfuse; print([m for m in ('torch', 'flwr', 'ray', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr[-500:]
