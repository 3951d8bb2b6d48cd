"""Attacks as tests, on the commit before they were answered: `python experiments/attacks/replay.py [name …]`.

Each test file is taken as it was when its hole was closed, put into a worktree of the commit before, and run there.
Where it imports what came with the answer, a line says what stands in its place: as a rule, nothing at all.
"""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]


@dataclass
class Attack:
    """One file of attacks.

    Attributes
    ----------
    before : str
        The commit on which they should succeed, so that the tests fail.
    file : str
    taken : str
        The commit whose file it is.
    tests : str
        pytest's `-k`.
    instead : dict
        Pattern → what stands in its place.
    """

    before: str
    file: str
    taken: str
    tests: str
    instead: dict[str, str] = field(default_factory=dict)


HOSTILE = {
    r"from fedfuse.network.sizes import .*": "UNKNOWN, limit_arrays = 2**31, lambda most: None",
    r"from fedfuse.errors import WorldError, one_line": "from fedfuse.errors import WorldError\none_line = str",
    r"from fedfuse.wire.records import InvalidArrays, plain_numpy": "InvalidArrays = Exception",
    r"Patience\(join=0.2, clients=2\)": "Patience(join=0.2)",
    r"\\udcff": "",  # which ends the server of then before it prints the rest
}
QUIET = {
    r"with pytest.raises\(.*match=.over the wire only registered names.\):": "with contextlib.suppress(Exception):"
}
ATTACKS = {
    "code": Attack(
        "8b09c81", "tests/deploy/test_code_execution.py", "11ae5e5", "neither_side",
        {**QUIET, r"import json\n": "import contextlib\nimport json\n", r"from fedfuse.dotted import .*": "",
         r"from fedfuse.runtime.allowed import .*": ""},
    ),
    "log": Attack("55967cc", "tests/deploy/test_hostile_node.py", "d7a827f", "begins_a_line", HOSTILE),
    "node": Attack(
        "38b0dea", "tests/deploy/test_hostile_node.py", "d7a827f",
        "KeyError or (bad_hello and False) or weight or nine_kilobytes",
        {r"from fedfuse.network.sizes import .*": HOSTILE[r"from fedfuse.network.sizes import .*"],
         r"InvalidArrays, plain_numpy": "InvalidArrays", r"Patience\(join=0.2, clients=2\)": "Patience(join=0.2)"},
    ),
    "hello": Attack(
        "38b0dea", "tests/deploy/test_own_data.py", "", "counts_that_are_none",
        {r"Patience\(join=0.1, clients=2\)": "Patience(join=0.1)", r"import digits\n": "import _pixels as digits\n"},
    ),
    "names": Attack(
        "38b0dea", "tests/deploy/test_hostile_node.py", "d7a827f", "bad_hello and False",
        {r"from fedfuse.network.sizes import .*": HOSTILE[r"from fedfuse.network.sizes import .*"],
         r"InvalidArrays, plain_numpy": "InvalidArrays", r"Patience\(join=0.2, clients=2\)": "Patience(join=0.2)",
         r'    built, said = run\(config, network, tmp_path / "run", Patience\(join=0.2\)\)': "    return"},
    ),
    "directory": Attack(
        "606432f", "tests/test_foreign_directory.py", "38b0dea", "test", {r"timeout\(60\)": "timeout(10)"}
    ),
    "power": Attack("606432f", "tests/test_power_loss.py", "38b0dea", "test"),
    "policy": Attack(
        "2ef2cfc", "tests/deploy/test_policy.py", "5932337",
        "rounds_are_those or epochs_count or layout_too or leaves_no_folder",
        {r"from fedfuse.train.ledger import .*": "",
         r"Policy\((max_epsilon|min_noise|max_delta)=[\d.e-]+\)": "Policy()"},
    ),
    "bomb": Attack(
        "9a5912b", "tests/data/test_inflate.py", "", "small_archive or gzipped or inflates_at_once or declares_more",
        {r"from fedfuse.data.inflate import .*": 'INFLATED, room = "FEDFUSE_INFLATED", lambda path: 0'},
    ),
    "watch": Attack(
        "9a5912b", "tests/results/test_watch.py", "", "token",
        {r'"0.0.0.0", TOKEN\)': '"0.0.0.0")', r"\{watch.COOKIE\}": "fedfuse-watch"},
    ),
    "quota": Attack(
        "9a5912b", "tests/deploy/test_quota.py", "", "fill or million or own_name",
        {r"from fedfuse.compat.superlink_objects import .*":
         'MESSAGES, OBJECT, holds = "/v1/fleet/push-messages", "/v1/fleet/push-object", None',
         r"from fedfuse.deploy import quota as counted": "from fedfuse.deploy.doors import Door",
         r"from fedfuse.deploy.quota import .*": 'ROW, TREE, Sites, Quota, OverQuota = 4096, 10_000, Door, None, None\n'
         'sites_door = lambda app, *more: Door(app, ("/v1/fleet/", "/health"))'},
    ),
    "chosen": Attack(
        "152c8b4", "tests/deploy/test_chosen_paths.py", "",
        "no_key or own_reads or no_hyper or round or keeps or numbers",
        {r"from fedfuse.config.allowed import MOST": 'MOST = {"clients": 1_000_000, "runtime.retries": 100}',
         r"tiny\(name\)": 'tiny(name, *(["strategy.question=what"] if name == "fednano" else []))',  # as it was taken
         r'tiny\("fednano", "model=cnn"\)': 'tiny("fednano", "model=cnn", "strategy.question=what")'},
    ),
    "table": Attack("152c8b4", "tests/data/test_inflate.py", "", "parquet or gzipped"),
}  # fmt: skip


def git(*words: str) -> str:
    """What git says."""
    return subprocess.run(["git", "-C", str(HERE), *words], check=True, capture_output=True, text=True).stdout


def replay(attack: Attack, place: Path) -> list[tuple[str, str]]:
    """Each test's name and how it ended there."""
    git("worktree", "add", "--quiet", "--detach", str(place), attack.before)
    try:
        for name in ("strategies", "experiments"):
            if not (place / "fedfuse" / name).exists():
                (place / "fedfuse" / name).symlink_to(f"../{name}")
        own = HERE / attack.file
        text = git("show", f"{attack.taken}:{attack.file}") if attack.taken else own.read_text(encoding="utf-8")
        for pattern, instead in attack.instead.items():
            text = re.sub(pattern, instead.replace("\\", "\\\\"), text)
        (place / attack.file).write_text(text, encoding="utf-8")
        words = [sys.executable, "-m", "pytest", attack.file, "-k", attack.tests, "-q", "--junitxml=found.xml"]
        words += ["--timeout=120", "--timeout-method=signal"]  # a test that hangs has failed, and the next one goes on
        environment = {**os.environ, "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            words, cwd=place, env=environment, capture_output=True, text=True, timeout=900, preexec_fn=limited
        )
        if not (place / "found.xml").exists():
            return [(attack.file, f"not run: {done.stdout[-300:]}{done.stderr[-300:]}")]
        return [ended(case) for case in ET.parse(place / "found.xml").iter("testcase")]
    finally:
        git("worktree", "remove", "--force", str(place))


def limited() -> None:
    """What some attacks want is all of the memory: they get 4 GiB."""
    resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))


def ended(case: ET.Element) -> tuple[str, str]:
    """A test's name, and how it ended in a line."""
    name = str(case.get("name"))
    for kind, word in (("failure", "fails"), ("error", "could not be run"), ("skipped", "skipped")):
        if (found := case.find(kind)) is not None:
            return name, f"{word}: {' '.join(str(found.get('message')).split())[:150]}"
    return name, "passes"


if __name__ == "__main__":
    for chosen in sys.argv[1:] or ATTACKS:
        told = ATTACKS[chosen]
        with tempfile.TemporaryDirectory() as folder:
            for name, how in replay(told, Path(folder) / "before"):
                print(f"{chosen} | {told.file}::{name} | {told.before} | {how}", flush=True)
