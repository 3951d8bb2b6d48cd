"""What a data set lacks: classes that nobody trains on, and examples for scores on the test sets."""

from __future__ import annotations

import numpy as np

from fedfuse.config.schema import DataConfig
from fedfuse.data.dataset import SCORED, SPLITS, Dataset
from fedfuse.errors import listed


def gaps(data: DataConfig, dataset: Dataset, rows: np.ndarray, counts: np.ndarray) -> list[str]:
    """Say which classes nobody trains on, whom no score is to come of, and why none on the global test.

    Parameters
    ----------
    rows : ndarray of int64
        As in `FederatedData`.
    counts : ndarray of int64, shape (clients, 3)
        Examples of each client's splits.
    """
    said, test, total = list[str](), dataset.test, len(dataset.classes)
    if test is None and data.test_fraction > 0:
        said.append(f"no global test set: data={dataset.name} brings none")
    least = 1 if dataset.next_token else SCORED
    few = int((counts[:, 2] < least).sum())
    if 0 < few < len(counts):
        said.append(
            f"personal tests: {few} of {len(counts)} clients have fewer than {least} examples for one, and no part in "
            f"the means over clients"
        )
    if dataset.next_token:
        return said
    if test is not None and len(test) < SCORED:
        said.append(
            f"no score on the global test set: it has {len(test)} example, {SCORED} are needed; "
            f"set data.test_fraction, or bring more examples"
        )
    split = np.repeat(np.tile(np.arange(len(SPLITS)), len(counts)), counts.ravel())
    trained = np.bincount(dataset.train.targets[rows[split == 0]], minlength=total) > 0
    if not trained.all():
        tested = np.setdiff1d(test.targets, np.flatnonzero(trained)) if test is not None else ()
        some = listed([dataset.classes[i] for i in np.flatnonzero(~trained)], 5)
        also = f"; {len(tested)} of them in the global test set" if len(tested) else ""
        said.append(f"no example to train on of {total - int(trained.sum())} of {total} classes: {some}{also}")
    return said
