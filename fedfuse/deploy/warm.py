"""Imported once by the process that tasks are forked from: strategies, data and the bundle's hash."""

from __future__ import annotations

import contextlib

import fedfuse.data.federated
import fedfuse.models.feedforward  # noqa: F401
from fedfuse.config import registry
from fedfuse.deploy.bundle import bundle_hash

for _name in registry.listed():
    with contextlib.suppress(Exception):  # a broken strategy fails when it is asked for, by name
        registry.entry(_name)

bundle_hash()
