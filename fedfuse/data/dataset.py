"""A data set: plain arrays plus what is needed to turn a row into a model's input."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fedfuse.errors import UserError

if TYPE_CHECKING:
    import torch

IGNORED = -100  # a label that does not count: padding, a prompt
PARTS = ("inputs", "targets", "groups", "wanted", "byte_counts", "texts")  # arrays of `Examples`
SCORED = 2  # examples that a score takes
SPLITS = ("train", "validation", "personal")


@dataclass(frozen=True)
class Examples:
    """Labelled rows; plain contiguous NumPy arrays (possibly memory-mapped), so they pickle without copying.

    Attributes
    ----------
    inputs : ndarray, shape (n, ...)
        uint8 or float32 images (n, channels, height, width), float32 features, or int64 tokens.
    targets : ndarray of int64, shape (n,)
        Class ids; -1 where unlabelled.
    groups : ndarray of int64, shape (n,), optional
        Natural client or domain id of each row.
    wanted : ndarray of bool, shape (n, T), optional
        Of texts: which tokens are to be predicted, each from those before it. The others are padding, a prompt, or
        what only stands before. None: all tokens but the first.
    byte_counts : ndarray of int64, shape (n,), optional
        Of texts: UTF-8 bytes that the wanted tokens stand for.
    texts : ndarray of int64, shape (n,), optional
        Of texts: which one a row was cut from; None where nobody knows.
    """

    inputs: np.ndarray
    targets: np.ndarray
    groups: np.ndarray | None = None
    wanted: np.ndarray | None = None
    byte_counts: np.ndarray | None = None
    texts: np.ndarray | None = None

    def __post_init__(self) -> None:
        # This also strips np.memmap: a subclass would be copied into a pickle, not travel beside it.
        set_field = object.__setattr__
        set_field(self, "inputs", np.ascontiguousarray(self.inputs))
        set_field(self, "targets", np.ascontiguousarray(self.targets, dtype=np.int64))
        for part, dtype in (("groups", np.int64), ("wanted", bool), ("byte_counts", np.int64), ("texts", np.int64)):
            if getattr(self, part) is not None:
                set_field(self, part, np.ascontiguousarray(getattr(self, part), dtype=dtype))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row up to the last wanted one, int64 (n,)."""
        n, width = self.inputs.shape
        if self.wanted is None:
            return np.full(n, width, dtype=np.int64)
        return np.where(self.wanted.any(1), width - self.wanted[:, ::-1].argmax(1), 0).astype(np.int64)

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, rows: np.ndarray) -> Examples:
        """Return a copy of the given rows, in the given order."""
        every = {part: getattr(self, part) for part in PARTS}
        chosen: dict[str, Any] = {part: array if array is None else array[rows] for part, array in every.items()}
        return Examples(**chosen)


@dataclass(frozen=True)
class Provided:
    """Per-client splits that came with the data (PFLlib, LEAF): never cut again.

    Attributes
    ----------
    offsets : ndarray of int64, shape (clients, 4)
        Start, end of train, end of validation and end of personal test, as row ids into `Dataset.train`.
    names : tuple of str
        The clients' names in the files.
    """

    offsets: np.ndarray
    names: tuple[str, ...]


@dataclass(frozen=True)
class Dataset:
    """Training rows, the official test split and how both become tensors.

    Attributes
    ----------
    train : Examples
        With `provided`, the rows of all clients and all their splits, client after client.
    test : Examples or None
        The global test set.
    kind : str
        "image", "features" or "tokens". Images that came as floats (PFLlib) are used as given.
    next_token : bool
        Tokens are labels too: place t predicts token t + 1, and `classes` are the vocabulary. `targets` are what rows
        are dealt by, a topic, or 0.
    pad : int or None
        The token that fills the end of short rows; None: what the model names, or there is none.
    vocabulary : int or None
        Of texts to classify: how many tokens there are, whichever of them rows hold; None: nobody says.
    utf8 : bool
        The tokens are a text's UTF-8 bytes, which each architecture may read by a tokenizer of its own.
    notes : tuple of str
        What the user should know of how it was read.
    mean, std : tuple of float, optional
        Per channel, of `inputs / 255`; only for uint8 images.
    content : str
        Of one's own data, sha256 over all rows as they were read; empty for sets that are known by name.
    """

    name: str
    train: Examples
    test: Examples | None
    classes: tuple[str, ...]
    kind: str
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    group_names: tuple[str, ...] | None = None
    provided: Provided | None = None
    next_token: bool = False
    pad: int | None = None
    vocabulary: int | None = None
    utf8: bool = False
    notes: tuple[str, ...] = ()
    content: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.train.inputs.shape[1:])

    def tensor(self, inputs: np.ndarray, given: bool = False) -> torch.Tensor:
        """Turn rows of inputs into a new tensor: float32 (images normalised) or int64 tokens.

        Rows that are `given` away are not copied where they have the tensor's type.
        """
        import torch

        array = np.asarray if given else np.array
        if self.kind == "tokens":
            return torch.from_numpy(array(inputs, dtype=np.int64))
        x = torch.from_numpy(array(inputs, dtype=np.float32))
        if self.kind == "image" and inputs.dtype == np.uint8:
            channels = (1, -1, 1, 1)
            x.div_(255.0)
            if self.mean is not None and self.std is not None:
                x.sub_(torch.tensor(self.mean, dtype=torch.float32).view(channels))
                x.div_(torch.tensor(self.std, dtype=torch.float32).view(channels))
        return x

    @property
    def unsaid(self) -> bool:
        """Whether `kind` is a guess: whole numbers that nobody called tokens, and which may as well be features."""
        return self.kind == "tokens" and self.pad is None and not self.next_token

    @property
    def kind_said(self) -> str:
        """`kind`, for a model to be chosen by; a guess of tokens is features."""
        return "features" if self.unsaid else self.kind

    def preprocessing(self) -> str:
        """Describe canonically how raw inputs become tensors; nodes compare its hash."""
        inputs = self.train.inputs
        return json.dumps(
            {
                "kind": self.kind,
                "shape": list(self.shape),
                "dtype": inputs.dtype.newbyteorder("<").str,
                "scale": 255 if self.kind == "image" and inputs.dtype == np.uint8 else 1,
                "mean": None if self.mean is None else [float(value) for value in self.mean],
                "std": None if self.std is None else [float(value) for value in self.std],
                **({} if self.pad is None else {"pad": self.pad}),
            },
            sort_keys=True,
        )


def as_features(examples: Examples) -> Examples:
    """The same rows with their whole numbers as float32."""
    return replace(examples, inputs=examples.inputs.astype(np.float32))


def check(dataset: Dataset) -> Dataset:
    """Return `dataset` if it is consistent.

    Raises
    ------
    UserError
        Where lengths, shapes, labels or values do not fit together.
    """
    name = f"data={dataset.name}"
    if not len(dataset.train):
        raise UserError(f"{name}: no training examples; expected at least one")
    if dataset.kind not in ("image", "features", "tokens"):
        raise UserError(f"{name}: kind {dataset.kind!r}; allowed: image, features, tokens")
    for split, examples in (("train", dataset.train), ("test", dataset.test)):
        if examples is None:
            continue
        if len(examples.inputs) != len(examples.targets):
            raise UserError(f"{name}: {split} has {len(examples.inputs)} inputs but {len(examples.targets)} labels")
        if examples.groups is not None and len(examples.groups) != len(examples):
            raise UserError(f"{name}: {split} has {len(examples)} rows but {len(examples.groups)} group ids")
        if tuple(examples.inputs.shape[1:]) != dataset.shape:
            raise UserError(f"{name}: {split} inputs have shape {examples.inputs.shape[1:]}, expected {dataset.shape}")
        if len(examples) and not 0 <= examples.targets.min() <= examples.targets.max() < len(dataset.classes):
            raise UserError(
                f"{name}: {split} labels lie in {examples.targets.min()}..{examples.targets.max()}, "
                f"expected 0..{len(dataset.classes) - 1}"
            )
        check_finite(examples.inputs, f"{name}: {split}")
    return dataset


def check_finite(inputs: np.ndarray, where: str) -> None:
    """Refuse inputs that are no numbers, before rows are cut off: the one that is named is the user's own."""
    if inputs.dtype.kind == "f" and not (finite := np.isfinite(inputs)).all():
        first = int(np.argmin(finite.reshape(len(inputs), -1).all(1)))
        raise UserError(
            f"{where} inputs hold NaN or infinite values, first in row {first} (from 0); expected finite numbers"
        )
