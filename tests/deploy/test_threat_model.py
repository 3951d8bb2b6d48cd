"""Each promise of docs/deployment.md names the test that tries to break it, and that test is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMED = re.compile(r"`([\w/.]*\.py)?(?:::(\w+))?`")


def rows(page: str) -> list[tuple[str, str]]:
    """Promise and tests, of the table in the threat model."""
    told = (ROOT / page).read_text(encoding="utf-8").partition("## Threat model")[2].partition("\n## ")[0]
    cells = [line.strip("|").split("|") for line in told.splitlines() if line.startswith("|")]
    return [(" ".join(row[:-1]).strip(), row[-1]) for row in cells[2:]]


def known_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name[:5] == "test_"}


PROMISES = rows("docs/deployment.md")


@pytest.mark.parametrize(("promise", "named"), PROMISES, ids=[promise[:60] for promise, _ in PROMISES])
def test_a_promise_names_tests_that_exist(promise: str, named: str) -> None:
    found, file = 0, ""
    for path, test in NAMED.findall(named):
        if not path and not test:
            continue
        file = path or file
        where = ROOT / file if "/" in file else ROOT / "tests" / "deploy" / file
        assert where.is_file(), f"{promise}: {file}"
        known = known_in(where)
        assert known, f"{promise}: {file} has no test"
        assert not test or test in known, f"{promise}: {file}::{test}"
        found += 1
    assert found, promise


def test_the_table_is_read() -> None:
    assert len(PROMISES) > 30
    assert PROMISES[0][0].startswith("No key of an order or message runs code")
    assert NAMED.findall("`test_a.py::test_b`, `::test_c`, `make fuzz`") == [("test_a.py", "test_b"), ("", "test_c")]
