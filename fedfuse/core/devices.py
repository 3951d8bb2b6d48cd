"""Where a run computes: the device that its clients are told, and the server's own."""

from __future__ import annotations

import torch

from fedfuse.config.schema import Config
from fedfuse.errors import UserError


def device_of(config: Config) -> str:
    """`cpu` or `cuda`; `auto` takes a GPU where there is one.

    Raises
    ------
    UserError
        If a GPU is asked for and there is none.
    """
    wanted = config.runtime.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("runtime.device=cuda: this machine has no CUDA device; allowed here: auto, cpu")
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def server_device_of(config: Config) -> str:
    """Where the server's networks live and train: `runtime.server_device`, else the clients' device.

    Raises
    ------
    UserError
        If a GPU is asked for that is not there.
    """
    wanted = config.runtime.server_device
    if wanted is None:
        return device_of(config)
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted.startswith("cuda") and there <= int(wanted.partition(":")[2] or 0):
        gpus = f"{there} CUDA device{'s' if there > 1 else ''}" if there else "no CUDA device"
        raise UserError(f"runtime.server_device={wanted}: this machine has {gpus}; allowed here: auto, cpu")
    return ("cuda" if there else "cpu") if wanted == "auto" else wanted
