"""A configuration on the wire: what is written is read back, and nothing else is."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fedfuse.config.compose import compose
from fedfuse.config.message import as_json, from_json
from fedfuse.errors import UserError

LARGEST = 2**63 - 1


def changed(key: str, value: Any) -> str:
    """A configuration as JSON, with one value exchanged."""
    values = json.loads(as_json(compose(["strategy=knfu"])))
    *groups, last = key.split(".")
    node = values
    for group in groups:
        node = node[group]
    node[last] = value
    return json.dumps(values)


def test_what_is_written_is_read_back() -> None:
    config = compose(
        ["strategy=knfu", f"seed={LARGEST}", "model.pool=[mlp,cnn]", "train.optimizer=adam", "stop.patience=3"]
    )
    assert from_json(as_json(config)) == config
    given = from_json(changed("train.lr", 1))
    assert (given.train.lr, type(given.train.lr)) == (1.0, float)


@pytest.mark.parametrize(
    ("key", "value", "needed"),
    [
        ("seed", True, "int"),
        ("seed", 1.0, "int"),
        ("train.lr", True, "float"),
        ("train.lr", "fast", "float"),
        ("overwrite", 1, "bool"),
        ("data.name", 3, "str"),
        ("data.name", True, "str"),
        ("model.pool", ["mlp", 3], "list"),
        ("model.pool", "mlp", "list"),
        ("clients", "ten", "int"),
        ("strategy.beta", "much", "float"),
    ],
)
def test_a_value_of_another_type_is_named(key: str, value: Any, needed: str) -> None:
    with pytest.raises(UserError, match=rf"{key}.*: .*{needed}.* is needed"):
        from_json(changed(key, value), code=True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[]", "an object with a strategy is needed"),
        ("{}", "an object with a strategy is needed"),
        ('{"strategy": "knfu"}', "an object with a strategy is needed"),
        ('{"strategy": {}}', "a name is needed"),
        ('{"strategy": {"name": "knfu"}, "seed": ' + "9" * 20 + "}", "a whole number of 20 digits"),
        ('{"strategy": {"name": "knfu"}, "train": 3}', "train: an object is needed, got int"),
        ('{"strategy": {"name": "knfu"}, "rouns": 3}', "rouns: no such key"),
        (" " * 65537, "65537 characters; allowed are 65536"),
    ],
)
def test_what_is_no_configuration_is_told(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        from_json(text)
