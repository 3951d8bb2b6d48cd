"""A folder of images per class, with or without `train/` and `test/` above it, and domains above classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedfuse.config.schema import DataConfig
from fedfuse.data.build import Table, assemble, options
from fedfuse.data.cache import key_of, stamps, stored_dataset
from fedfuse.data.dataset import Dataset
from fedfuse.data.inflate import room
from fedfuse.data.locations import files_below
from fedfuse.data.pixels import decode
from fedfuse.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")


def read(config: DataConfig, root: Path) -> Dataset:
    """Return the data set of `root[/train|/test]/<class>/*.png`.

    With `data.groups=domain` it is `<domain>/<class>/*.png`, the domain being the group.
    Decoded arrays are kept in the user's cache and memory-mapped from there.

    Raises
    ------
    UserError
        Where there are no images, one is damaged, or sizes differ and `data.extra.size` is not given.
    """
    extra = options(config, {"size": None})
    train_root = root / "train" if (root / "train").is_dir() else root
    test_root = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if train_root is root:
        test_root = None
    splits = [_listed(config, place) for place in (train_root, test_root) if place is not None]
    paths = [path for split in splits for path, _, _ in split]
    key = key_of(
        "images",
        [config.name, config.groups, config.test_fraction, extra],
        stamps(paths),
    )

    def build() -> Dataset:
        tables = []
        # Both splits are decoded in one go, so that they agree on colour and size.
        images = decode(paths, extra["size"], f"data={config.name}", room(*paths))
        start = 0
        for split in splits:
            labels = np.array([label for _, label, _ in split])
            domains = np.array([domain for _, _, domain in split]) if config.groups else None
            tables.append(Table(images[start : start + len(split)], labels, domains))
            start += len(split)
        return assemble(config, tables[0], tables[1] if len(tables) > 1 else None)

    return stored_dataset(key, root, build)


def _listed(config: DataConfig, root: Path) -> list[tuple[Path, str, str]]:
    """List (image, class, domain), sorted, so that order depends on names alone."""
    depth = 2 if config.groups else 1
    found = []
    for path in files_below(root):
        parts = path.relative_to(root).parts
        if path.suffix.lower() in SUFFIXES and len(parts) > depth:
            found.append((path, parts[depth - 1], parts[0]))
    if not found:
        layout = "<domain>/<class>/*.png" if config.groups else "<class>/*.png"
        raise UserError(f"data={config.name}: no images under {root}; expected {layout}")
    return found
