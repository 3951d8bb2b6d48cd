"""Models and losses from outside the package, by dotted path. For one's own machine, never over the wire."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedfuse.config.dotted import resolve
from fedfuse.errors import UserError

if TYPE_CHECKING:
    from fedfuse.config.schema import ModelConfig


class Logits(nn.Module):
    """A model whose output is an object with `logits` (Hugging Face), as one that returns the tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape (B, classes)."""
        return self.model(x).logits


def model(path: str, shape: tuple[int, ...], classes: int, config: ModelConfig) -> nn.Module:
    """Build a model by `fn(shape=…, classes=…, **model.extra)`, with those of the two that `fn` takes.

    `num_classes` and `num_labels` are filled in likewise (torchvision, timm, Hugging Face), and `feature_dim`
    where `fn` takes it and the configuration sets it; `model.extra` comes before all.

    Raises
    ------
    UserError
        If `fn` fails, returns no nn.Module, or the module does not map a batch of 2 to (2, classes).
    """
    fn = resolve(path, "model.build")
    offered: dict[str, Any] = {
        "shape": shape,
        "classes": classes,
        "num_classes": classes,
        "num_labels": classes,
    }
    if config.feature_dim is not None:
        offered["feature_dim"] = config.feature_dim
    try:
        built = _call(fn, offered, dict(config.extra))
    except UserError:
        raise
    except Exception as error:
        hint = ""
        if isinstance(error, TypeError) and "missing" in str(error):
            hint = (
                f"; it was given shape={shape} and classes={classes} where it takes them, "
                f"+model.extra.<argument>=… sets others"
            )
        raise UserError(f"model.build={path} failed: {type(error).__name__}: {error}{hint}") from error
    if not isinstance(built, nn.Module):
        raise UserError(f"model.build={path} returned {type(built).__name__}, not an nn.Module")
    return _checked(built.float(), path, shape, classes)


def _call(fn: Callable[..., Any], offered: dict[str, Any], extra: dict[str, Any]) -> Any:
    try:
        parameters = inspect.signature(fn).parameters
    except (TypeError, ValueError):  # some built-in callables have none
        return fn(**extra)
    named = {key: value for key, value in offered.items() if key in parameters and key not in extra}
    if named or not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return fn(**named, **extra)
    # Only **kwargs: what is behind them shows by refusing what it does not know.
    for keys in (("shape", "classes"), ("num_classes",), ("num_labels",)):
        try:
            return fn(**{key: offered[key] for key in keys if key not in extra}, **extra)
        except TypeError as error:
            if "unexpected keyword" not in str(error):
                raise
    return fn(**extra)


def _tried(built: nn.Module, batch: Tensor) -> tuple[Any, Exception | None]:
    try:
        with torch.no_grad():
            return built(batch), None
    except Exception as error:  # a user's own code
        return None, error


def _checked(built: nn.Module, path: str, shape: tuple[int, ...], classes: int) -> nn.Module:
    training = built.training
    built.eval()
    out, failed = _tried(built, torch.zeros(2, *shape))
    if len(shape) == 1:  # what embeds takes whole numbers, perhaps nothing else
        embedded, refused = _tried(built, torch.zeros(2, *shape, dtype=torch.int64))
        object.__setattr__(built, "reads_tokens", refused is None)
        out, failed = (embedded, None) if failed and not refused else (out, failed)
    if failed is not None:
        raise UserError(f"model.build={path} cannot take a batch of shape (2, {str(shape)[1:]}: {failed}") from failed
    if not isinstance(out, Tensor) and isinstance(getattr(out, "logits", None), Tensor):
        reads, built, out = getattr(built, "reads_tokens", False), Logits(built), out.logits
        object.__setattr__(built, "reads_tokens", reads)
    if not isinstance(out, Tensor) or out.shape != (2, classes):
        got = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        wide = isinstance(out, Tensor) and out.ndim == 2 and len(out) == 2
        hint = ": set its number of classes by +model.extra.<argument>=…" if wide else ""
        raise UserError(f"model.build={path} gives {got} for a batch of 2, expected logits (2, {classes}){hint}")
    return built.train(training)
