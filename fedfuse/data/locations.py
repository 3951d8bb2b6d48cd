"""Where a data set's files are: `data.root`, else `$FEDFUSE_DATA/<name>`, else the user's cache."""

from __future__ import annotations

import os
import re
from pathlib import Path

from fedfuse.config.catalogue import SOURCES
from fedfuse.config.schema import DataConfig
from fedfuse.data.cache import cache_directory
from fedfuse.errors import UserError


def root_of(config: DataConfig) -> Path:
    """Return the directory (or file) that holds the data set; fetch it only with `data.download=true`.

    Raises
    ------
    UserError
        Where there is none; the line names every place that was tried.
    """
    if config.root is not None:
        root = Path(config.root).expanduser()
        if not root.exists():
            raise UserError(f"data.root={config.root} does not exist; expected the files of data={config.name}")
        return root
    tried = []
    if os.environ.get("FEDFUSE_DATA"):
        known = SOURCES.get(config.name)
        tried.append(Path(os.environ["FEDFUSE_DATA"]).expanduser() / ((known and known.folder) or config.name))
    tried.append(cache_directory() / "data" / config.name)
    for place in tried:
        if place.exists():
            return place
    if config.download:
        return fetch(config, tried[-1])
    places = ", ".join(str(place) for place in tried)
    raise UserError(
        f"data={config.name}: no files; looked in {places}. "
        "Set data.root=<dir> or $FEDFUSE_DATA, or allow the hub with data.download=true"
    )


def fetch(config: DataConfig, folder: Path) -> Path:
    """Download a data set from the Hugging Face hub through flwr-datasets and keep it as parquet files.

    Raises
    ------
    UserError
        Where no name on the hub is known, or the hub cannot be reached.
    """
    known = SOURCES.get(config.name)
    hub = config.hub or (known.hub if known else None)
    if hub is None:
        raise UserError(f"data={config.name} data.download=true: set data.hub=<name on the Hugging Face hub>")
    from flwr_datasets import FederatedDataset

    staging = folder.with_name(folder.name + ".part")
    try:
        federated = FederatedDataset(dataset=hub, partitioners={"train": 1}, shuffle=False)
        staging.mkdir(parents=True, exist_ok=True)
        federated.load_split("train").to_parquet(str(staging / "train.parquet"))
        try:
            test = federated.load_split("test")
        except (KeyError, ValueError):  # a data set without a test split: data.test_fraction is cut
            test = None
        if test is not None:
            test.to_parquet(str(staging / "test.parquet"))
        staging.rename(folder)
    except Exception as error:
        raise UserError(f"data.hub={hub}: could not be downloaded ({reason_of(error)})") from error
    return folder


def reason_of(error: Exception) -> str:
    """Say in one line why a library gave up."""
    return " ".join(str(error).split()) or type(error).__name__


def files_below(root: Path) -> list[Path]:
    """List the files under a directory, sorted.

    What vanishes or cannot be read meanwhile is passed over, where `Path.rglob` raises: a folder that is not one of
    data (a home, /tmp) is named in words by whoever finds nothing in it.
    """
    found = (Path(folder, name) for folder, _, names in os.walk(root) for name in names)
    return sorted(path for path in found if path.is_file())  # a pipe is waited for, for ever


def split_files(root: Path, name: str, suffixes: tuple[str, ...], extra: dict) -> dict[str, list[Path]]:
    """Sort a directory's files into "train", "test" and, where the names say neither, "other".

    `data.extra.train` and `data.extra.test` name files (or patterns) outright.

    Raises
    ------
    UserError
        Where no file fits.
    """
    if root.is_file():
        return {"train": [], "test": [], "other": [root]}
    files = [path for path in files_below(root) if path.name.endswith(suffixes)]
    found: dict[str, list[Path]] = {"train": [], "test": [], "other": []}
    if extra.get("train"):
        for split in ("train", "test"):
            if extra.get(split):
                found[split] = sorted(path for path in root.glob(str(extra[split])) if path.is_file())
                if not found[split]:
                    raise UserError(f"data.extra.{split}={extra[split]}: no such file under {root}")
        return found
    for path in files:
        words = re.split(r"[^a-z0-9]+", str(path.relative_to(root)).lower())
        split = next((split for split in ("train", "test") if split in words), "other")
        found[split].append(path)
    if not files:
        expected = ", ".join("*" + suffix for suffix in suffixes)
        raise UserError(f"data={name}: no file under {root}; expected {expected}")
    if found["train"]:
        # validation files and the like belong to neither split
        found["other"] = []
    return found
