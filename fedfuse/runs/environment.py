"""What equal digests depend on beside the configuration: `environment.json`."""

from __future__ import annotations

import platform
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fedfuse.compat.mkl import steady
from fedfuse.config.schema import Config
from fedfuse.core.abreast_notes import computed
from fedfuse.errors import UserError
from fedfuse.results.run_data import environment_in
from fedfuse.runs.own_code import hashes_of


@cache
def _versions() -> dict[str, str]:
    packages = ("fedfuse", "flwr", "torch", "numpy", "ray", "scikit-learn", "scipy", "safetensors")
    return {name: found for name in packages if (found := _version(name))}


def environment(config: Config, content: str = "") -> dict[str, Any]:
    """The machine, the versions, how clients are computed there, the data's `content`, the code, the command typed."""
    flags = ""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                flags = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu_flags": flags,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "mkldnn": torch.backends.mkldnn.is_available(),
        "mkl_steady": steady(),
        "threads": torch.get_num_threads(),
        "versions": _versions(),
        "command": " ".join(sys.argv),
        **computed(config),
        **({"data": content} if content else {}),
        "code": hashes_of(config),
    }


def check_content(path: Path, config: Config, content: str) -> None:
    """Refuse to go on, or to stand as done, on other data of the user's own than the run began with.

    Raises
    ------
    UserError
        If `environment.json` names another content.
    """
    kept = environment_in(path).get("data")
    if kept and content and kept != content:
        raise UserError(
            f"out={path}: began with other data than data={config.data.name} holds now (sha256 {str(kept)[:12]}, now "
            f"{content[:12]}); bring those back, choose another directory, or say overwrite=true"
        )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from a folder, or without what this run does not need
        return ""
