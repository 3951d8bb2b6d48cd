"""What a run says of how its clients were computed: one by one or together, and where."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fedfuse.config.schema import Config


def computed(config: Config) -> dict[str, Any]:
    """For `environment.json`: the device of the clients, and whether they stack.

    Digests of `vectorize=off` and `auto` are equal on a CPU; on CUDA they are two kinds of run.
    """
    runtime = config.runtime
    return {"clients": {"device": _device(runtime.device), "vectorize": runtime.vectorize}}


def vectorized_notes(config: Config, apart: Mapping[str, int]) -> list[str]:
    """What is to be known of stacks: that their bits are their own on CUDA, and what failed in them."""
    found = [f"vectorize: {count} trainings were begun anew: {why}" for why, count in sorted(apart.items())]
    if config.runtime.vectorize == "auto" and _device(config.runtime.device) == "cuda":
        found.append("vectorize: clients were stacked on CUDA, which rounds otherwise than one by one does")
    return found


def _device(wanted: str) -> str:
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"
