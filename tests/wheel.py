"""Installs a built wheel where nothing of this clone is in sight, and runs README's first command there.

`python tests/wheel.py build/wheel/fedfuse-*.whl`. Dependencies are those of the environment that runs this, without its
fedfuse, so that it takes seconds and no network.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main(wheel: Path) -> int:
    """Run it; 0 if all is well."""
    with tempfile.TemporaryDirectory() as place:
        site, empty = Path(place) / "site", Path(place) / "empty"
        empty.mkdir()
        with zipfile.ZipFile(wheel) as file:  # what pip does with a wheel of Python alone
            file.extractall(site)
        packages = sysconfig.get_path("purelib")
        # -S: no .pth file of the environment is read, so that its editable fedfuse is not in sight
        code = f"import sys; sys.path[:0] = [{str(site)!r}, {packages!r}]; import fedfuse.cli as c; sys.exit(c.main())"
        clone = {"PYTHONPATH", "PYTHONHOME"}
        environment = {name: value for name, value in os.environ.items() if name not in clone}
        environment["PYTHONPATH"] = os.pathsep.join([str(site), packages])
        where = "import fedfuse, sys; print(fedfuse.__file__)"
        told = subprocess.run([sys.executable, "-S", "-c", where], capture_output=True, text=True, cwd=empty,
                              env=environment, check=True)  # fmt: skip
        if not told.stdout.startswith(str(site)):
            print(f"the wheel is not what runs: {told.stdout}", file=sys.stderr)
            return 1
        for words in commands():
            done = subprocess.run([sys.executable, "-S", "-c", code, *words], cwd=empty, env=environment)
            if done.returncode:
                print(f"fedfuse {' '.join(words)}: exit {done.returncode}", file=sys.stderr)
                return 1
    return 0


def commands() -> list[list[str]]:
    """README's first run, cut down, and what needs files beside code: presets, a report's template."""
    found = re.search(r"^fedfuse run (strategy=\S+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    first = found.group(1) if found else "strategy=knfu"
    small = ["rounds=1", "data.limit=200", "clients=3", "runtime=inline", "out=run"]
    return [["run", first, *small], ["list", "experiments"], ["report", "run"]]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
