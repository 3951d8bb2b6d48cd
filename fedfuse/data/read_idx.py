"""MNIST's own files: `MNIST/raw/*-ubyte` or `*-ubyte.gz`, as torchvision keeps them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedfuse.config.schema import DataConfig
from fedfuse.data.build import Table, assemble, options
from fedfuse.data.dataset import Dataset
from fedfuse.data.inflate import gunzipped
from fedfuse.data.locations import files_below
from fedfuse.errors import UserError


def read(config: DataConfig, root: Path) -> Dataset:
    """Return the training and test split of an IDX directory.

    Raises
    ------
    UserError
        Where a file is missing or damaged.
    """
    folder = next((place for place in (root / "MNIST" / "raw", root / "raw", root) if any(place.glob("*ubyte*"))), None)
    if folder is None and any(path.suffix == ".parquet" for path in files_below(root)):
        from fedfuse.data import read_parquet  # the hub's copy

        return read_parquet.read(config, root)
    options(config, {})
    if folder is None:
        folder = root / "MNIST" / "raw"
    tables = []
    for split in ("train", "t10k"):
        images = read_array(folder / f"{split}-images-idx3-ubyte", 3)
        labels = read_array(folder / f"{split}-labels-idx1-ubyte", 1)
        if len(images) != len(labels):
            raise UserError(f"{folder}: {len(images)} {split} images but {len(labels)} labels")
        tables.append(Table(images, labels.astype(np.int64)))
    return assemble(config, tables[0], tables[1])


def read_array(path: Path, dimensions: int) -> np.ndarray:
    """Read one IDX file of unsigned bytes, compressed or not."""
    packed = path.with_name(path.name + ".gz")
    try:
        if packed.is_file():
            path = packed
            with gunzipped(path) as file:
                content = file.read()
        elif path.is_file():
            content = path.read_bytes()
        else:
            raise FileNotFoundError
    except FileNotFoundError:
        raise UserError(f"{path}(.gz) is missing; expected MNIST's IDX file") from None
    except (OSError, EOFError) as error:
        raise UserError(f"{path} cannot be read ({error}); expected a gzipped IDX file") from None
    head = 4 + 4 * dimensions
    shape = tuple(int(size) for size in np.frombuffer(content[4:head], dtype=">u4")) if len(content) >= head else ()
    if content[:4] != bytes((0, 0, 8, dimensions)) or len(content) != head + int(np.prod(shape)):
        raise UserError(
            f"{path} is damaged ({len(content)} bytes); expected an IDX file of unsigned bytes "
            f"with {dimensions} dimensions"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=head).reshape(shape)
