"""Resident memory of 20 clients that fine-tune SmolLM2-135M on two workers: is there one frozen base a machine?

    python experiments/adapters/prepare.py
    python experiments/adapters/memory.py      # samples /proc while a run of one round goes on

PSS counts a page shared by n processes as 1/n in each, so that the sum over processes is what the machine holds.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from prepare import SMOLLM2

WORDS = [
    "strategy=fed_sb", "strategy.rank=16", "strategy.targets='q_proj,v_proj'", "data=tiny_shakespeare",
    f"data.extra.tokenizer={SMOLLM2}", "data.extra.length=16", "data.extra.roles=20", "partition=natural",
    "data.limit=44", "data.test_limit=4", "data.personal_test=0", "data.validation=0", "transfer.size=4",
    "model=causal_lm", f"model.path={SMOLLM2}", "runtime=ray", "runtime.workers=2", "rounds=1", "train.batch_size=2",
    "train.epochs=1", "train.lr=0.01", "out=runs/adapters/memory", "overwrite=true",
]  # fmt: skip


def descendants(root: int) -> list[int]:
    """A process and all that it started."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def held(pid: int) -> tuple[str, float, float, float]:
    """Name, PSS, PSS and RSS of the mapped base, in MB."""
    name = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
    pss = base_pss = base_rss = 0.0
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = "/bases/" in line
        elif line.startswith(("Pss:", "Rss:")):
            size = int(line.split()[1]) / 1e3
            pss += size if line.startswith("Pss") else 0
            base_pss += size if inside and line.startswith("Pss") else 0
            base_rss += size if inside and line.startswith("Rss") else 0
    return name, pss, base_pss, base_rss


def main() -> int:
    process = subprocess.Popen([sys.executable, "-m", "fedfuse.cli", "run", *WORDS], stdout=sys.stderr)
    most: list[tuple[str, float, float, float]] = []
    while process.poll() is None:
        now = []
        for pid in descendants(process.pid):
            try:
                now.append(held(pid))
            except OSError:
                continue
        now = [one for one in now if one[3] or "cli" in one[0] or "ray::" in one[0] or one[1] > 100]
        holding = sum(one[3] > 0 for one in now)
        if (holding, sum(p for _, p, *_ in now)) > (sum(one[3] > 0 for one in most), sum(p for _, p, *_ in most)):
            most = now
        time.sleep(0.5)
    print(f"{'process':40} {'PSS':>8} {'base PSS':>9} {'base RSS':>9}  MB, when most processes held the base")
    for name, *sizes in sorted(most, key=lambda one: -one[1]):
        print(f"{os.path.basename(name)[:40]:40} {sizes[0]:8.0f} {sizes[1]:9.0f} {sizes[2]:9.0f}")
    print(f"{'sum':40} {sum(o[1] for o in most):8.0f} {sum(o[2] for o in most):9.0f} {sum(o[3] for o in most):9.0f}")
    return process.returncode


if __name__ == "__main__":
    sys.exit(main())
