"""Processes of a test, found and ended by id: only those that the test itself started."""

from __future__ import annotations

import os
import time
from pathlib import Path

MARK = "FEDFUSE_TEST_MARK"


def below(root: int, name: str = "") -> list[int]:
    """Living descendants of a process whose title starts with `name`."""
    children: dict[int, list[int]] = {}
    titles: dict[int, str] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                stat = (folder / "stat").read_text()
                titles[int(folder.name)] = (
                    (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
            except OSError:
                continue
            state, parent = stat.rsplit(")", 1)[1].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(folder.name))
    found, stack = [], [root]
    while stack:
        for child in children.get(stack.pop(), []):
            stack.append(child)
            if titles.get(child, "").startswith(name):
                found.append(child)
    return found


def workers() -> list[int]:
    """Ray workers of this process."""
    return below(os.getpid(), "ray::Worker")


def marked(mark: str) -> list[str]:
    """Living processes that inherited a mark in their environment."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                    found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:120])
            except OSError:
                continue
    return found


def gone(mark: str, seconds: float = 90, pause: float = 0.2) -> list[str]:
    """Wait until no marked process lives; return those that still do."""
    end = time.monotonic() + seconds
    while (left := marked(mark)) and time.monotonic() < end:
        time.sleep(pause)
    return left


def shared_blocks() -> set[str]:
    """Blocks in shared memory that no living process maps: leaked ones."""
    names = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    if names:
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    maps = (folder / "maps").read_text()
                except OSError:
                    continue
                names = {name for name in names if f"/dev/shm/{name}" not in maps}
    return names
