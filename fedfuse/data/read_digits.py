"""scikit-learn's digits: 1,797 images of 8×8, read from the installed package."""

from __future__ import annotations

import functools
import gzip
import importlib.util
from pathlib import Path

import numpy as np

from fedfuse.config.schema import DataConfig
from fedfuse.data.build import Table, assemble, options
from fedfuse.data.dataset import Dataset


def read(config: DataConfig, root: Path | None) -> Dataset:
    """Return uint8 images (1, 8, 8), grey levels 0..16 as 0..255; a fixed 20 % is the test split."""
    options(config, {})
    pixels, labels = digits()
    images = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    return assemble(config, Table(images, labels))


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Return grey levels 0..16 (1797 × 64) and labels."""
    table = _table()
    return table[:, :-1].copy(), table[:, -1].astype(np.int64)


@functools.cache
def _table() -> np.ndarray:
    """A megabyte; a sweep, or the sites of one process, ask for it often."""
    # Finding the package does not import it: sklearn.datasets takes seconds, its file some milliseconds.
    found = importlib.util.find_spec("sklearn")
    if found is not None and found.origin is not None:
        path = Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"
        if path.exists():
            with gzip.open(path, "rt") as file:
                return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits

    loaded = load_digits()
    return np.column_stack([loaded.data, loaded.target])
