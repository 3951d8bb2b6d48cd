"""Local training and prediction: plain loops over rows named by index; what can wait is not done per step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedfuse.compat.torch_optimizers import bare
from fedfuse.config.schema import TrainConfig
from fedfuse.errors import UserError, nearest
from fedfuse.models.in_place import evaluating
from fedfuse.seeding import generator, seed_of
from fedfuse.train import abreast, work
from fedfuse.train.allowance import passes
from fedfuse.train.batch import backward, only, rates, sizes_of

_OPTIMIZERS = {
    "sgd": bare(torch.optim.SGD),
    "adam": bare(torch.optim.Adam),
    "adamw": bare(torch.optim.AdamW),
}


def optimizer(params: Iterable[Tensor], config: TrainConfig) -> torch.optim.Optimizer:
    """Return a fresh optimiser of `params` by `train.optimizer`, its rate, moments and weight decay.

    Raises
    ------
    UserError
        If the optimiser is unknown, a value is out of range, or there is nothing to train.
    """
    if config.optimizer not in _OPTIMIZERS:
        raise UserError(f"train.optimizer={config.optimizer!r} is not known: {nearest(config.optimizer, _OPTIMIZERS)}")
    for key in ("lr", "momentum", "weight_decay"):
        value = getattr(config, key)
        if not 0 <= value < float("inf"):
            raise UserError(f"train.{key}={value} must be non-negative and finite")
    chosen = list(params)
    if not chosen:
        raise UserError("there is no parameter to train: the model has none, or all are frozen")
    # One kernel per step in place of several per parameter; same rule.
    fused = all(p.dtype in (torch.float32, torch.float64) and p.device.type in ("cpu", "cuda") for p in chosen)
    options: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": fused}
    if config.optimizer == "sgd":
        options["momentum"] = config.momentum
    else:
        options["betas"] = tuple(config.betas)
    return _OPTIMIZERS[config.optimizer](chosen, **options)


def batches(n: int, size: int, epochs: int, *seed_parts: object, least: int = 2) -> Iterator[Tensor]:
    """Yield the row indices of each step, (B,) int64: every row once per epoch, in an order drawn per epoch.

    Parameters
    ----------
    n
        Number of rows.
    size
        Rows per batch; the last batch of an epoch may be shorter.
    epochs
        Passes over the rows.
    *seed_parts
        What the order depends on, besides the epoch.
    least
        A shorter last batch joins the one before: BatchNorm cannot train on one row, RKD needs three.

    Raises
    ------
    UserError
        If `size` is below 1 or `epochs` is negative.
    """
    if size < 1:
        raise UserError(f"train.batch_size={size} must be at least 1")
    if epochs < 0:
        raise UserError(f"train.epochs={epochs} must not be negative")
    if n == 0:
        return
    sizes = sizes_of(n, size, least)
    for epoch in range(epochs):
        yield from torch.randperm(n, generator=generator(*seed_parts, epoch)).split(sizes)


def train(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None,
    loss: Callable[[Any, Any, Tensor], Tensor],
    config: TrainConfig,
    seed_parts: tuple[object, ...],
    *,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    params: Iterable[nn.Parameter] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    after_backward: Callable[[nn.Module], None] | None = None,
    after_step: Callable[[int, int], object] | None = None,
    forward: Callable[[Tensor], Any] | None = None,
    least: int = 2,
    max_steps: int | None = None,
    rate: Callable[[int, int], float] | None = None,
    clip: float | None = None,
    micro_batch: int | None = None,
    trim: bool = False,
    pack: bool = False,
) -> dict[str, Any]:
    """Minimise a loss by mini-batches. The result depends on the arguments alone, also with dropout.

    Parameters
    ----------
    model
        Trained in place, in training mode, where it stays.
    x
        Examples of shape (n, *shape), on the model's device.
    y
        Labels of shape (n,), or None.
    loss
        `loss(logits, y_batch, rows)` of a batch; `rows` are indices into `x`, (B,) int64, on its device, so
        that soft labels are found by row and never by batch order. `y_batch` is None without labels.
    config
        Optimiser, and the defaults of `epochs`, `batch_size` and `lr`.
    seed_parts
        What batches and dropout are drawn from.
    params
        What to train; the model's other parameters are frozen meanwhile. Default: all not frozen already.
    optimizer
        One to go on with; default a fresh one. `lr`, if given, replaces its rate.
    after_backward
        Called with the model between `backward` and the step (gradient corrections, clipping).
    after_step
        Called with the number of steps done and of steps there are; whatever is true ends the training.
    forward
        `forward(x_batch)` in place of `model(x_batch)`; its value is what `loss` gets.
    least
        Least rows in the last batch of an epoch (see `batches`).
    max_steps
        Steps in place of passes: exactly so many, over as many passes as they take.
    rate
        `rate(k, K)`: factor on the learning rate in step k of K, from 0.
    clip
        Largest norm of a step's gradient, as the optimiser gets it.
    micro_batch
        Rows that pass through the network at once (see `batch.backward`).
    trim, pack
        As in `batch.backward`: leave out places of texts that count in none of the batch; put texts together in rows.

    Returns
    -------
    dict
        `steps`, and `loss`, the mean over steps; NaN without steps.

    Raises
    ------
    UserError
        If an option is out of range, labels are not as many as examples, or the loss has no gradients.
    """
    count = x.shape[0]  # torch's `len` is a function in Python
    if y is not None and y.shape[0] != count:
        raise UserError(f"{count} examples and {len(y)} labels to train on: as many labels as examples are needed")
    if count == 0:
        return {"steps": 0, "loss": float("nan")}
    epochs = config.epochs if epochs is None else epochs
    batch_size = config.batch_size if batch_size is None else batch_size
    each = len(sizes_of(count, batch_size, least)) if batch_size > 0 else 1
    if max_steps is not None:
        epochs = -(-max_steps // each)
    passes(epochs if max_steps is None else max_steps / each)
    plain = all(word is None for word in (params, optimizer, forward, rate, clip, micro_batch))
    if abreast.desk is not None and plain and (not pack or y is None or y.ndim == 1):  # classes have no places
        own = config if lr is None else dataclasses.replace(config, lr=lr)
        asked = abreast.Training(
            model, x, y, loss, own, seed_parts, epochs, batch_size, least, after_backward, after_step, max_steps, trim
        )
        if (made := abreast.desk.train(asked)) is not None:
            work.note(model, x, made.pop("rows"), True)
            return made
    chosen = list(model.parameters() if params is None else params)
    trained = [p for p in chosen if p.requires_grad]
    if optimizer is None:
        optimizer = _fresh(trained, config if lr is None else dataclasses.replace(config, lr=lr))
    elif lr is not None:
        for group in optimizer.param_groups:
            group["lr"] = lr
    call: Callable[[Tensor], Any] = model if forward is None else forward
    if config.precision == "bf16":
        call = _mixed(call, x.device.type)
    planned = epochs * each if max_steps is None else max_steps
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    steps = passed = 0
    training_mode(model)
    fork = torch.random.fork_rng(devices=[x.device] if x.is_cuda else [])
    try:
        with only(model, chosen), rates(optimizer, rate) as put, fork:
            seed(x.device, *seed_parts, "layers")
            for rows in batches(count, batch_size, epochs, *seed_parts, least=least):
                rows = rows.to(x.device)
                optimizer.zero_grad()
                put(steps, planned)
                batch = x.index_select(0, rows), None if y is None else y.index_select(0, rows), rows
                value = backward(call, loss, batch, micro_batch, trim, pack)
                if after_backward is not None:
                    after_backward(model)
                if clip is not None:
                    nn.utils.clip_grad_norm_(trained, clip)
                optimizer.step()
                total += value
                steps += 1
                passed += len(rows)
                if steps == max_steps or (after_step is not None and after_step(steps, planned)):
                    break
        work.note(model, x, passed, True, forward)
    finally:
        optimizer.zero_grad()
    return {"steps": steps, "loss": total.item() / steps if steps else float("nan")}


def training_mode(model: nn.Module) -> None:
    """Enter training mode, but for layers that are `still`: an adapted model's BatchNorm keeps its statistics."""
    model.train()
    for module in model.modules():
        if module.__dict__.get("still"):
            module.training = False


@torch.no_grad()
def predict(model: nn.Module, x: Tensor, batch_size: int = 512, *, features: bool = False) -> Tensor:
    """Return logits (n, C) or features (n, feature_dim) in evaluation mode; each module's mode is restored.

    Raises
    ------
    UserError
        If `features` are wanted of a model that has none, or `batch_size` is below 1.
    """
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1")
    if features and not hasattr(model, "features"):
        raise UserError(f"{type(model).__name__} has no features(x): use a built-in model or add the method")
    call = cast(Callable[[Tensor], Tensor], model.features if features else model)
    work.note(model, x, len(x), False)
    with evaluating(model):
        parts = [call(batch) for batch in x.split(batch_size)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def proximal(anchor: Mapping[str, Tensor], weight: float) -> Callable[[nn.Module], None]:
    """Return the `after_backward` of a proximal term (weight/2)·‖w − anchor‖² over trained parameters."""

    def pull(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - anchor[name], alpha=weight)

    return pull


def seed(device: torch.device, *parts: object) -> None:
    """Seed torch's global generator of the CPU, and of the device, by `parts`."""
    number = seed_of(*parts)
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(number)


def _mixed(call: Callable[[Tensor], Any], device: str) -> Callable[[Tensor], Any]:
    """`train.precision=bf16`: matrix products in bfloat16; weights, optimiser and losses in float32."""

    def cheaper(x: Tensor) -> Any:
        with torch.autocast(device, torch.bfloat16):
            out = call(x)
        return _single(out)

    return cheaper


def _single(out: Any) -> Any:
    """A network's output with what autocast left in bfloat16 as float32: losses need the digits."""
    if isinstance(out, Tensor):
        return out.float() if out.dtype == torch.bfloat16 else out
    return type(out)(map(_single, out)) if isinstance(out, tuple | list) else out


_fresh = optimizer  # `train` has a parameter of that name
