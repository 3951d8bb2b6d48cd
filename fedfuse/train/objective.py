"""What a distillation objective is: the class that all of them extend, and those brought by dotted path."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedfuse.errors import UserError
from fedfuse.train.towards import Towards, as_logits, finite


@dataclass(eq=False)
class Loss:
    """A distillation objective: a scalar from a student's and a teacher's outputs on one batch.

    The teacher is always detached. A batch smaller than `min_batch` adds nothing: 0, with a zero gradient.

    Parameters
    ----------
    temperature
        T; both outputs are softened by it where the form has a T.
    weight
        Factor on the result.
    """

    temperature: float = 1.0
    weight: float = 1.0

    needs_labels: ClassVar[bool] = False
    needs_features: ClassVar[bool] = False
    min_batch: ClassVar[int] = 1
    softens_logits: ClassVar[bool] = True  # False: the temperature is of probabilities, which are then compared
    same_width: ClassVar[bool] = True  # False: student and teacher may have different numbers of columns
    positive: ClassVar[tuple[str, ...]] = ("temperature",)

    def __post_init__(self) -> None:
        self.heads_of: Any = None  # a `fedfuse.train.second_head.Heads`, for the length of a training
        self.seen: Tensor | None = None  # the newest unweighted value, kept where `after_step` needs it
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UserError(f"loss option {field.name}={value!r} must be a number")
            least = "positive" if field.name in self.positive else "non-negative"
            if not math.isfinite(value) or value < 0 or (value == 0 and least == "positive"):
                raise UserError(f"loss option {field.name}={value} must be {least} and finite")

    @property
    def second_head(self) -> bool:
        """Whether it trains a second head on the student's features, and the student through that."""
        return False

    def __call__(
        self,
        student_logits: Tensor,
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        state: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Compare logits.

        Parameters
        ----------
        student_logits, teacher
            Logits of shape (B, C); an entry of -inf in the teacher is a class it excludes.
        labels
            Classes of shape (B,), for a loss with `needs_labels`.
        state
            For a stateful loss: what `state_dict` gave, taken up before the comparison.

        Returns
        -------
        Tensor
            A scalar.

        Raises
        ------
        UserError
            If the loss needs labels and there are none.
        ValueError
            If the shapes differ.
        """
        self._prepare(student_logits, teacher, labels, state)
        if len(student_logits) < self.min_batch:
            return 0.0 * student_logits.sum()
        return self.weight * self.value(student_logits, finite(teacher), labels)

    def from_probabilities(
        self,
        student_logits: Tensor,
        probabilities: Tensor,
        labels: Tensor | None = None,
        *,
        softened: float = 1.0,
        state: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Compare with a teacher given by its class probabilities, of shape (B, C); zeros are allowed.

        The teacher is softened as softmax(log p / T). Losses on raw logits (mse, mae, rkd) compare
        probabilities instead, since p fixes logits only up to a shift. `softened` is the temperature that
        p was softened with already: at T = softened the teacher is p itself.
        """
        self._prepare(student_logits, probabilities, labels, state)
        if len(student_logits) < self.min_batch:
            return 0.0 * student_logits.sum()
        return self.weight * self.value_of_probabilities(student_logits, as_logits(probabilities, softened), labels)

    def towards(self, probabilities: Tensor, *, softened: float = 1.0) -> Towards:
        """Return `step(logits, labels, rows)` for `train`: row i of the examples has row i of (n, C) as its teacher."""
        return Towards(self, probabilities, softened)

    def towards_logits(self, logits: Tensor) -> Towards:
        """The same of a teacher given by its logits."""
        return Towards(self, logits, None)

    def value(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """Return the unweighted loss of checked logits, the teacher's detached and finite."""
        raise NotImplementedError

    def value_of_probabilities(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """Return the unweighted loss where the teacher's logits are logarithms of given probabilities."""
        if self.softens_logits:
            return self.value(student, teacher, labels)
        T = self.temperature
        return self.value((student / T).softmax(1), (teacher / T).softmax(1), labels)

    def after_step(self, loss_value: Tensor | float, progress: float) -> None:
        """Tell a stateful loss its value after a step, and the share of training done, in [0, 1]."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return what the loss has learnt, as float64 scalars; it belongs to the client's private state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state_dict` gave."""

    def _prepare(
        self, student: Tensor, teacher: Tensor, labels: Tensor | None, state: Mapping[str, Tensor] | None
    ) -> None:
        same = student.shape == teacher.shape if self.same_width else len(student) == len(teacher)
        if not same:  # broadcasting would hide it
            raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in shape")
        if self.needs_labels and labels is None:
            name = type(self).__name__.lower()
            raise UserError(f"loss={name} needs labels, the transfer set has none: set transfer.labelled=true")
        if state is not None:
            self.load_state_dict(state)


@contextlib.contextmanager
def followed(
    losses: Sequence[Loss],
    state: dict[str, Any],
    purpose: str,
    span: tuple[float, float],
    then: Callable[[int, int], object] | None = None,
) -> Iterator[dict[str, Any]]:
    """Accompany one training with its objectives: what they learnt before, each step's value, what they learn.

    Parameters
    ----------
    losses
        The objectives of this training, in the order they were made.
    state
        The private state of the half that trains; stateful objectives keep theirs under `losses`.
    purpose
        Names the training within that state.
    span
        Shares of the whole run done before and after this training.
    then
        Called after each step besides, as `fedfuse.train.training.train` does.

    Yields
    ------
    dict
        Options for `fedfuse.train.training.train`.
    """
    stateful = {f"{purpose} {i}": loss for i, loss in enumerate(losses) if loss.state_dict()}
    kept = state.get("losses", {})
    for name, loss in stateful.items():
        if name in kept:
            loss.load_state_dict(kept[name])

    def after_step(done: int, steps: int) -> object:
        for loss in stateful.values():
            if loss.seen is not None:  # else this step's batch had nothing to distil
                loss.after_step(loss.seen, span[0] + (span[1] - span[0]) * done / steps)
                loss.seen = None
        return then(done, steps) if then is not None else None

    yield {"least": least_batch(losses), "after_step": after_step if stateful else then}
    if stateful:
        state["losses"] = {**kept, **{name: loss.state_dict() for name, loss in stateful.items()}}


def least_batch(losses: Sequence[Loss]) -> int:
    """Rows that a batch must have: two, or as many as an objective compares."""
    return max([2, *(loss.min_batch for loss in losses)])


class Outside(Loss):
    """A `torch.nn.Module` by dotted path, called as module(student, teacher[, labels]) on logits.

    torchdistill's losses, which take dictionaries of outputs, get logits under the paths they were built with
    (`.` and `output` unless they say otherwise). Parameters of the module are frozen.

    Parameters
    ----------
    path
        `pkg.mod:Class`.
    options
        Keyword arguments of the class; `weight` and `temperature` are kept here unless the class takes them.
    """

    def __init__(self, path: str, options: Mapping[str, Any]) -> None:
        from fedfuse.config.dotted import resolve

        kind = resolve(path, "loss.build")
        options = dict(options)
        try:
            takes: Mapping[str, Any] = inspect.signature(kind).parameters
        except (TypeError, ValueError):
            takes = {}
        own = {key: options.pop(key) for key in ("weight", "temperature") if key in options and key not in takes}
        super().__init__(**own)
        try:
            self.module = kind(**options)
        except Exception as error:
            raise UserError(f"loss.build={path} failed: {type(error).__name__}: {error}") from error
        if not isinstance(self.module, nn.Module):
            raise UserError(f"loss.build={path} gives {type(self.module).__name__}, not a torch.nn.Module")
        self.module.requires_grad_(False)
        taken = inspect.signature(self.module.forward).parameters
        names = list(taken)
        if len(names) < 2 and not any(one.kind is one.VAR_POSITIONAL for one in taken.values()):
            raise UserError(
                f"loss.build={path}: its forward takes ({', '.join(names)}); (student, teacher) or (student, teacher, "
                "labels) are needed, both of logits"
            )
        self._dictionaries = names[:1] == ["student_io_dict"]
        self._labels = len(names) > 2

    def value(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """Return what the module makes of the logits."""
        inputs: list[Any] = [student, teacher]
        if self._dictionaries:
            for i, who in enumerate(("student", "teacher")):
                path = getattr(self.module, f"{who}_module_path", ".")
                inputs[i] = {path: {getattr(self.module, f"{who}_module_io", "output"): inputs[i]}}
        found: Tensor = self.module(*inputs, labels) if self._labels else self.module(*inputs)
        if found.numel() != 1:
            raise UserError(f"loss.build: {type(self.module).__name__} gives shape {tuple(found.shape)}; take its mean")
        return found


def log_softened(logits: Tensor, temperature: float) -> Tensor:
    """Return log softmax(logits / T), never below the logarithm of the smallest normal number.

    Without that floor a class the teacher excludes would make the reverse divergence infinite.
    """
    return (logits / temperature).log_softmax(1).clamp_min(math.log(torch.finfo(logits.dtype).tiny))
