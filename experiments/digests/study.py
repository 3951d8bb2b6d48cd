"""The digest of every registered strategy on digits, in two runtimes: made before a change of the platform, and after.

    python experiments/digests/study.py after.json            # writes
    python experiments/digests/study.py after.json before.json  # and says which differ; exit code 1 if one does

Digests hold on one kind of CPU and one set of versions: compare files that one machine made.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import fedfuse
from fedfuse.config.registry import listed

SETTING = {"data": "digits", "data.limit": 600, "clients": 3, "rounds": 2}


def digests(runtimes: tuple[str, ...] = ("inline", "ray")) -> dict[str, str]:
    """Play every strategy in every runtime; return `name/runtime` to digest."""
    found = {}
    for name in listed():
        for runtime in runtimes:
            with tempfile.TemporaryDirectory() as folder:
                where = {"runtime": runtime, **({"runtime.workers": 2} if runtime == "ray" else {})}
                run = fedfuse.run({**SETTING, **where, "strategy": name, "out": f"{folder}/run"})
                found[f"{name}/{runtime}"] = str(run.summary["digest"])
    return found


def main(words: list[str]) -> int:
    """Write the digests, and compare them with an older file if one is given."""
    found = digests()
    Path(words[0]).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if len(words) < 2:
        return 0
    before = json.loads(Path(words[1]).read_text(encoding="utf-8"))
    differ = [key for key, value in found.items() if before.get(key, value) != value]
    new = sorted(set(found) - set(before))
    print(
        f"{len(found)} digests, {len(differ)} differ{': ' + ', '.join(differ) if differ else ''}; new: {new or 'none'}"
    )
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
