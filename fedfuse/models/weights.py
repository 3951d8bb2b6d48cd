"""Weights to start from: torch checkpoints without pickled objects, and safetensors."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedfuse.errors import UserError, first_line


def read(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict; `state_dict` or `model` inside a checkpoint and a `module.` prefix are taken off.

    Raises
    ------
    UserError
        If the file is missing, damaged, holds more than tensors and plain values, or holds no state dict.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"model.checkpoint={path} is not a file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"model.checkpoint={path} holds more than weights and is not loaded") from error
    except Exception as error:
        raise UserError(f"model.checkpoint={path} cannot be read: {first_line(error)}") from error
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"model.checkpoint={path} holds no state dict (names to tensors)")
    return {str(key).removeprefix("module."): value for key, value in found.items()}


def load(model: nn.Module, path: str | Path, *, head: bool = True) -> None:
    """Overwrite a model's parameters and buffers by those of a checkpoint.

    Parameters
    ----------
    model
        The model; its `translate(key)`, if any, maps a published name to its own.
    path
        A torch checkpoint or a `.safetensors` file.
    head
        False leaves `head.*` at its initial weights, for data with other classes.

    Raises
    ------
    UserError
        If a weight is missing, unknown, or of another shape.
    """
    translate = getattr(model, "translate", str)
    found = {translate(key): value for key, value in read(path).items()}
    own = model.state_dict()
    if not head:
        found = {key: value for key, value in found.items() if not key.startswith("head.")}
        own = {key: value for key, value in own.items() if not key.startswith("head.")}
    # Checkpoints older than torch 1.0 do not count BatchNorm's batches.
    missing = [key for key in own if key not in found and not key.endswith("num_batches_tracked")]
    unknown = [key for key in found if key not in own]
    if missing or unknown:
        what = f"no weight {missing[0]!r}" if missing else f"a weight {unknown[0]!r} the model does not have"
        raise UserError(f"model.checkpoint={path} does not fit the model: it has {what}")
    for key, value in found.items():
        if value.shape != own[key].shape:
            raise UserError(
                f"model.checkpoint={path} does not fit the model: {key} is {tuple(value.shape)}, "
                f"the model's is {tuple(own[key].shape)}"
            )
    model.load_state_dict({**model.state_dict(), **found})
