"""One domain set apart as the target: its inputs are the transfer set, its test split is the global one, no label."""

from __future__ import annotations

import dataclasses

import numpy as np

from fedfuse.config.schema import DataConfig, TransferConfig
from fedfuse.data.dataset import Dataset, Examples
from fedfuse.errors import UserError, nearest
from fedfuse.seeding import numpy_generator


def set_apart(config: DataConfig, transfer: TransferConfig, dataset: Dataset, seed: int) -> tuple[Dataset, Examples]:
    """Take the domain `data.target` out of the training split: leave-one-domain-out, for every strategy alike.

    The target's labels are read once, to see that no class is missing, and are -1 from then on; its test split has
    them, and shares no row with what is taken here. `transfer.size` takes so many of its rows, null all of them.

    Returns
    -------
    tuple
        The data set of the other domains, tested on the target's test split; and the target's training inputs,
        unlabelled.

    Raises
    ------
    UserError
        For data without domains or with ones of their own splits, an unknown target, a domain without a class, and
        settings that say something else of the transfer set.
    """
    asked, train, test = f"data.target={config.target}", dataset.train, dataset.test
    if dataset.provided is not None or train.groups is None or test is None or test.groups is None:
        raise UserError(f"{asked}: data={dataset.name} has no domains in its train and test split; allowed: null")
    names = dataset.group_names or tuple(str(i) for i in range(int(train.groups.max()) + 1))
    if config.target not in names:
        raise UserError(f"{asked} is no domain of data={dataset.name}; {nearest(str(config.target), names)}")
    if len(names) < 2:
        raise UserError(f"{asked} is the only domain of data={dataset.name}; nothing would be left to train on")
    if transfer.source != "holdout" or transfer.labelled:
        key, value, only = (
            ("labelled", "true", "false") if transfer.labelled else ("source", transfer.source, "holdout")
        )
        raise UserError(f"transfer.{key}={value}: with {asked} the transfer set is its unlabelled train split; "
                        f"allowed: {only}")  # fmt: skip
    for split, examples in (("training", train), ("test", test)):
        _refuse_gaps(asked, names, dataset.classes, split, examples, None if split == "training" else config.target)
    which = names.index(config.target)
    rows = np.flatnonzero(train.groups == which)
    if transfer.size is not None:
        if not 0 < transfer.size <= len(rows):
            raise UserError(f"transfer.size={transfer.size}: {asked} has {len(rows)} training examples; "
                            f"allowed: null, or 1 to {len(rows)}")  # fmt: skip
        rows = np.sort(numpy_generator(seed, "target").permutation(rows)[: transfer.size])
    if transfer.subset is not None and not 0 < transfer.subset <= len(rows):
        raise UserError(f"transfer.subset={transfer.subset} of {len(rows)} transfer examples; allowed: 1 to that")
    kept = train.take(np.flatnonzero(train.groups != which))
    assert kept.groups is not None
    sources = dataclasses.replace(kept, groups=kept.groups - (kept.groups > which))
    return dataclasses.replace(
        dataset,
        train=sources,
        test=dataclasses.replace(test.take(np.flatnonzero(test.groups == which)), groups=None),
        group_names=tuple(name for name in names if name != config.target),
    ), Examples(train.inputs[rows], np.full(len(rows), -1))


def _refuse_gaps(
    asked: str, names: tuple[str, ...], classes: tuple[str, ...], split: str, examples: Examples, only: str | None
) -> None:
    """Refuse a domain without a class: whatever is measured there would not be about the domain."""
    assert examples.groups is not None
    counts = np.zeros((len(names), len(classes)), dtype=np.int64)
    np.add.at(counts, (examples.groups, examples.targets), 1)
    for name, row in zip(names, counts, strict=True):
        if only in (None, name) and not row.all():
            lacking = classes[int(np.argmin(row > 0))]
            raise UserError(f"{asked}: domain {name} has no {split} example of class {lacking!r}; every domain needs "
                            f"all {len(classes)} classes")  # fmt: skip
