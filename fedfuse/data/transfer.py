"""The transfer set: shared inputs on which clients exchange soft labels, cut before anything is dealt."""

from __future__ import annotations

import dataclasses

import numpy as np

from fedfuse.config.catalogue import SOURCES
from fedfuse.config.schema import DataConfig, TransferConfig
from fedfuse.data.dataset import Dataset, Examples
from fedfuse.data.pixels import reshape
from fedfuse.errors import UserError, nearest
from fedfuse.seeding import numpy_generator


def cut_transfer(
    config: TransferConfig, dataset: Dataset, seed: int, vocabulary: int | None = None
) -> tuple[Examples | None, np.ndarray]:
    """Return the transfer set and the ids of the training rows that remain, ascending.

    The draw depends on the run's seed and the data alone, so that every strategy gets the same set.

    Parameters
    ----------
    vocabulary : int, optional
        Whole numbers of noise are below it; by default, as large as those of the data.

    Raises
    ------
    UserError
        For an unknown source, a size larger than the data, or labels asked of what has none.
    """
    count = len(dataset.train)
    everything = np.arange(count)
    if config.source not in ("holdout", "noise") and config.source not in SOURCES:
        allowed = ("holdout", "noise", *SOURCES)
        raise UserError(f"transfer.source={config.source} is unknown; {nearest(config.source, allowed)}")
    if config.subset is not None and config.subset < 1:
        raise UserError(f"transfer.subset={config.subset}; allowed: null or a positive number of rows")
    if config.size is not None and config.size < 0:
        raise UserError(f"transfer.size={config.size}; allowed: null, or 0 (none) or more")
    if dataset.provided is not None and config.source == "holdout":
        return None, everything
    # Provided data hold every split in `train`; only the share that is trained on counts here.
    trained = count if dataset.provided is None else int(np.diff(dataset.provided.offsets[:, :2]).sum())
    size = min(1000, trained // 10) if config.size is None else config.size
    if size == 0:
        return None, everything
    rng = numpy_generator(seed, "transfer", config.source)
    if config.source == "noise":
        chosen = _noise(config, dataset, size, rng, vocabulary or vocabulary_of(dataset))
        rest = everything
    elif config.source == "holdout":
        if size >= count:
            raise UserError(f"transfer.size={size} of {count} training examples; allowed: 0 to {count - 1}")
        order = rng.permutation(count)
        chosen, rest = dataset.train.take(order[:size]), np.sort(order[size:])
    else:
        chosen, rest = _foreign(config, dataset, size, rng), everything
    if config.subset is not None and config.subset > len(chosen):
        raise UserError(f"transfer.subset={config.subset} of {len(chosen)} transfer examples; allowed: at most that")
    targets = chosen.targets if config.labelled else np.full(len(chosen), -1)
    return dataclasses.replace(chosen, targets=targets, groups=None), rest


def vocabulary_of(dataset: Dataset) -> int | None:
    """One more than the largest whole number of the training rows; None of what is not tokens."""
    return int(dataset.train.inputs.max()) + 1 if dataset.kind == "tokens" else None


def _noise(
    config: TransferConfig, dataset: Dataset, size: int, rng: np.random.Generator, vocabulary: int | None
) -> Examples:
    if config.labelled:
        raise UserError("transfer.labelled=true with transfer.source=noise; noise has no labels, allowed: false")
    shape, dtype = (size, *dataset.shape), dataset.train.inputs.dtype
    inputs: np.ndarray
    if vocabulary is not None and dataset.kind == "tokens":
        inputs = rng.integers(0, vocabulary, shape, dtype=np.int64)
    elif dtype == np.uint8:
        inputs = rng.integers(0, 256, shape, dtype=np.uint8)
    else:
        inputs = rng.standard_normal(shape, dtype=np.float32)
    return Examples(inputs, np.full(size, -1))


def _foreign(config: TransferConfig, dataset: Dataset, size: int, rng: np.random.Generator) -> Examples:
    """Take rows of another data set, converted to the shape of this one."""
    from fedfuse.data.load import load

    other = load(DataConfig(name=config.source, root=config.root))
    where = f"transfer.source={config.source}"
    if size > len(other.train):
        raise UserError(f"transfer.size={size}: {where} has {len(other.train)} examples; allowed: at most that")
    if config.labelled and other.classes != dataset.classes:
        raise UserError(f"transfer.labelled=true: {where} has other classes than data={dataset.name}; allowed: false")
    chosen = other.train.take(rng.permutation(len(other.train))[:size])
    inputs = chosen.inputs
    pictures = dataset.kind == other.kind == "image" and inputs.dtype == dataset.train.inputs.dtype == np.uint8
    if pictures:
        inputs = reshape(inputs, dataset.shape)
    elif other.kind != dataset.kind or other.shape != dataset.shape or inputs.dtype != dataset.train.inputs.dtype:
        raise UserError(
            f"{where} gives {other.kind} {inputs.dtype} {other.shape}, data={dataset.name} is {dataset.kind} "
            f"{dataset.train.inputs.dtype} {dataset.shape}; only uint8 images are converted"
        )
    return dataclasses.replace(chosen, inputs=inputs, groups=None)
