"""The contracts of imports hold, and a forbidden import breaks one: in a copy of the package as it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHECK = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources, with strategies where setuptools installs them."""
    folder = tmp_path_factory.mktemp("arrows")
    only = shutil.ignore_patterns("strategies", "experiments", "__pycache__", "conf", "template")
    shutil.copytree(ROOT / "fedfuse", folder / "fedfuse", ignore=only)
    shutil.copytree(ROOT / "strategies", folder / "fedfuse" / "strategies", ignore=only)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def checked(folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    return subprocess.run(
        [sys.executable, "-c", CHECK], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_every_room_is_packaged_and_says_what_it_is_for() -> None:
    listed = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for room in sorted(
        path for path in (ROOT / "fedfuse").iterdir() if path.is_dir() and not path.name.startswith("__")
    ):
        if room.is_symlink():
            continue
        assert f'"fedfuse.{room.name}"' in listed
        assert (room / "__init__.py").read_text(encoding="utf-8").startswith('"""')


def test_the_arrows_go_one_way(copy: Path) -> None:
    found = checked(copy)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "0 broken" in found.stdout


@pytest.mark.parametrize(
    ("module", "line", "broken"),
    [
        ("wire/sums.py", "def late():\n    from fedfuse.core import node\n", "The house"),
        ("results/table.py", "import fedfuse.wire.sums\n", "Results read run directories"),
        ("core/node.py", "import fedfuse.strategies.fedavg\n", "Nothing in fedfuse imports a strategy"),
        ("strategies/fedavg.py", "from fedfuse.core.node import Node\n", "Strategies import only the public face"),
        ("engines/cluster.py", "def late():\n    from fedfuse.engines import ray\n", "No circle"),
    ],
)
def test_a_forbidden_import_is_seen(copy: Path, module: str, line: str, broken: str) -> None:
    path = copy / "fedfuse" / module
    before = path.read_text(encoding="utf-8")
    path.write_text(f"{before}\n{line}", encoding="utf-8")
    try:
        found = checked(copy)
    finally:
        path.write_text(before, encoding="utf-8")
    assert found.returncode == 1
    assert any(text.startswith(broken) and "BROKEN" in text for text in found.stdout.splitlines()), found.stdout
