"""No key is ignored: changing any hyper-parameter of any strategy changes the digest, or is refused, or says why not."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

import pytest

from fedfuse.config import registry
from fedfuse.errors import UserError
from tests.federations import play

# three clients of quite different sizes and classes, 40 transfer rows, two batches of them a pass
BASE = (
    "data=digits", "data.limit=240", "data.test_limit=20", "partition=dirichlet", "partition.alpha=0.5",
    "partition.min_size=5", "clients=3", "rounds=2", "model=mlp_small", "transfer.size=40", "train.batch_size=16",
    "evaluate.every=2", "runtime=inline",
)  # fmt: skip

# values where neither the choices nor twice the default will do
OTHER: dict[str, Any] = {
    "subset": 20, "ranks": "[2,4,8]", "rank": 3, "targets": "[body.0]", "alpha": 3, "dropout": 0.5, "top_k": 1,
    "min_weight": 0.4, "large": "mlp", "tail": "mlp", "student": "mlp", "meme": "mlp", "patience": 1,
    "coefficient_lr": 0.5, "server_threshold": 0.4, "refresh": 1, "personal_epochs": 2, "body_epochs": 2,
    "client_learning_rate": 0.2, "min_train_nodes": 3, "generator_lr": 0.1, "generator_lr_decay": 0.5,
    "generator_decay": 0.5, "energy_start": 0.2, "energy_end": 0.2, "lam": 2.0, "finetune_batch": 20,
    "digest_batch": 20, "distill_batch": 20, "server_batch": 20, "distill_epochs": 2, "digest_epochs": 2,
    "regularised_steps": 1, "clip": 0.01, "period": 2, "vote_round": 2, "validation": 0.3, "prune": 0.1, "gamma": 0.1,
    "num_malicious_nodes": 1, "num_nodes_to_select": 1, "margin": 0.9, "threshold": 0.9, "server_lr": 0.5,
    "client_quantile": 0.9, "beta_2": 0.5, "clusters": 3, "duration": 0, "head_epochs": 2, "projection": 16,
}  # fmt: skip
VALUES: dict[tuple[str, str], Any] = {("fml", "alpha"): 0.9, ("feddyn", "alpha"): 0.5}

# what a key needs in order to say anything, said in the key's own help too
BESIDE: dict[tuple[str, str], tuple[str, ...]] = {}

# (strategy, key) or (strategy, key, value): why nothing can differ
SILENT: dict[tuple[str, ...], str] = {}


def values(name: str, field: Any) -> list[Any]:
    """What a key is set to in its turn: each other choice, or one other number."""
    default = None if field.default is MISSING else field.default
    if (name, field.name) in VALUES:
        return [VALUES[name, field.name]]
    if field.metadata.get("choices"):
        return [choice for choice in field.metadata["choices"] if choice != default]
    if isinstance(default, bool):
        return [not default]
    if field.name in OTHER:
        return [OTHER[field.name]]
    assert isinstance(default, int | float), f"{name}.{field.name}: say in OTHER what else it can be"
    high = field.metadata.get("high")
    twice = 2 * default if default else 1
    return [default / 2 if high is not None and twice > high else twice]


KEYS = [(name, field.name) for name in sorted(registry.listed()) for field in fields(registry.entry(name).hyper)]


@pytest.mark.parametrize(("name", "key"), KEYS)
def test_a_key_is_heard(name: str, key: str) -> None:
    (field,) = (f for f in fields(registry.entry(name).hyper) if f.name == key)
    beside = BESIDE.get((name, key), ())
    plain = _digest(name, beside)
    for value in values(name, field):
        if (name, key) in SILENT or (name, key, str(value)) in SILENT:
            continue
        try:
            changed = play(name, f"strategy.{key}={value}", *beside, base=BASE).digest
        except UserError as error:
            assert key in str(error), error  # refused, and named
            continue
        assert changed != plain, f"{name}: {key}={value} changes nothing"


_made: dict[tuple[str, tuple[str, ...]], str] = {}


def _digest(name: str, beside: tuple[str, ...]) -> str:
    if (name, beside) not in _made:
        _made[name, beside] = play(name, *beside, base=BASE).digest
    return _made[name, beside]


def test_the_lists_name_what_there_is() -> None:
    known = set(KEYS)
    assert {entry[:2] for entry in SILENT} <= known
    assert set(BESIDE) <= known
    assert all(SILENT.values())
