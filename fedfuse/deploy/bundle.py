"""The thin app: all that a Flower bundle of ours holds is a pyproject that points at the installed fedfuse."""

from __future__ import annotations

import hashlib
import tempfile
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from fedfuse.errors import Refused

PYPROJECT = """\
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "fedfuse-thin"
version = "{version}"
description = "FedFuse's thin app: nodes and server have fedfuse {version} installed"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedfuse"

[tool.flwr.app.components]
serverapp = "fedfuse.apps:server"
clientapp = "fedfuse.apps:client"

[tool.flwr.app.config]
name = ""
order = ""
"""


def write_bundle(directory: Path) -> Path:
    """Write the thin app's directory, for `flwr run`."""
    directory.mkdir(parents=True, exist_ok=True)
    text = PYPROJECT.format(version=metadata.version("fedfuse"))
    (directory / "pyproject.toml").write_text(text, encoding="utf-8")
    return directory


@cache
def bundle_hash() -> str:
    """Return sha256 of the thin app's bundle as the installed fedfuse and Flower build it."""
    from fedfuse.compat.flower_apps import build_bundle

    with tempfile.TemporaryDirectory() as folder:
        return hashlib.sha256(build_bundle(write_bundle(Path(folder) / "fedfuse-thin"))).hexdigest()


def guarded(install: Any) -> Any:
    """Wrap Flower's `install_from_fab`: what is not the thin app is refused before it is even unpacked."""

    def only_ours(bundle: Any, *args: Any, **kwargs: Any) -> Any:
        content = bundle if isinstance(bundle, bytes) else Path(bundle).read_bytes()
        found = hashlib.sha256(content).hexdigest()
        if found != bundle_hash():
            raise Refused(
                f"bundle {found[:16]} is not the thin app {bundle_hash()[:16]} of fedfuse "
                f"{metadata.version('fedfuse')}; nothing of it was unpacked or run"
            )
        return install(bundle, *args, **kwargs)

    return only_ours
