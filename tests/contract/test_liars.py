"""The contract under attack and defence: deterministic, resumable, alike on every grid; off, nothing is different."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contract.test_matrix import Crash
from tests.differences import assert_same
from tests.federations import federation, play

CASES = {
    "fedavg": ("attack=sign_flip", "defence=expguard"),
    "fedmd": ("attack=noise", "defence=geometric_median"),
    "dsfl": ("attack=hips", "defence=median"),
    "fedproto": ("attack=noise", "defence=expguard"),
    "fedit": ("attack=label_flip", "defence=cronus"),
    "fed_sb": ("attack=scale", "defence=krum", "clients=5", "strategy.init=random_orthonormal"),
    "knfu": ("attack=fdla",),
}


@pytest.fixture(scope="module")
def undisturbed():
    made: dict[str, object] = {}

    def get(name: str):
        if name not in made:
            made[name] = play(name, *CASES[name])
        return made[name]

    return get


@pytest.mark.parametrize("name", CASES)
def test_deterministic_and_order_free(name: str, undisturbed) -> None:
    assert_same(undisturbed(name), play(name, *CASES[name], reverse=True))


@pytest.mark.parametrize("name", CASES)
def test_evaluation_changes_nothing(name: str, undisturbed) -> None:
    assert_same(undisturbed(name), play(name, *CASES[name], "evaluate.every=2"))


@pytest.mark.parametrize("name", CASES)
def test_resumed_equals_undisturbed(name: str, undisturbed, tmp_path: Path) -> None:
    where = tmp_path / "run"
    crash = federation(name, *CASES[name], path=where, callbacks=(Crash(1),))
    with crash as (built, _), pytest.raises(KeyboardInterrupt):
        built.run()
    assert_same(undisturbed(name), play(name, *CASES[name], path=where))


@pytest.mark.parametrize("name", CASES)
def test_over_the_wire_as_in_one_process(name: str, undisturbed) -> None:
    assert_same(undisturbed(name), play(name, *CASES[name], grid="serial"))


@pytest.mark.parametrize("name", CASES)
def test_workers_equal_inline(name: str, undisturbed, ray_session) -> None:
    many = play(name, *CASES[name], grid="ray", workers=2)
    assert_same(undisturbed(name), many)
    assert many.totals == undisturbed(name).totals


@pytest.mark.parametrize("name", CASES)
def test_each_word_changes_the_result(name: str, undisturbed) -> None:
    size = [word for word in CASES[name] if not word.startswith(("attack", "defence"))]
    digests = {undisturbed(name).digest, play(name, *size).digest}
    digests |= {play(name, word, *size).digest for word in CASES[name] if word not in size}
    assert len(digests) == 4 if len(CASES[name]) > 1 else 2
