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


@cache
def _versions() -> dict[str, str]:
    packages = ("fedfuse", "flwr", "torch", "numpy", "ray", "scikit-learn", "scipy", "safetensors")
    return {name: found for name in packages if (found := _version(name))}


def environment(config: Config) -> dict[str, Any]:
    """The machine, the versions, how clients are computed there, and the command that was typed."""
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
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from a folder, or without what this run does not need
        return ""
