"""One federation's data: who holds which rows, the transfer set and the global test set."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fedfuse.config.schema import DataConfig, PartitionConfig, TransferConfig
from fedfuse.data.dataset import IGNORED, SCORED, SPLITS, Dataset, Examples, as_features
from fedfuse.data.domains import set_apart
from fedfuse.data.gaps import gaps
from fedfuse.data.load import load
from fedfuse.data.partition import clients_of, partition_rows
from fedfuse.data.transfer import cut_transfer
from fedfuse.errors import UserError
from fedfuse.seeding import numpy_generator

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class FederatedData:
    """A data set dealt to clients; plain arrays throughout, so it is shared without copying.

    Attributes
    ----------
    rows : ndarray of int64
        Row ids into `dataset.train`, client after client, each client's train, validation, personal test.
    offsets : ndarray of int64, shape (clients, 4)
        Per client: start, end of train, end of validation, end of personal test, as positions in `rows`.
    transfer : Examples or None
        Its targets are -1 unless `transfer.labelled`.
    notes : tuple of str
        What the user should know of how it was dealt.
    """

    dataset: Dataset
    rows: np.ndarray
    offsets: np.ndarray
    transfer: Examples | None
    notes: tuple[str, ...] = ()

    @property
    def clients(self) -> int:
        """Number of clients."""
        return len(self.offsets)

    def sizes(self) -> np.ndarray:
        """Return the examples per client and split, int64 (clients, 3)."""
        return np.diff(self.offsets, axis=1)

    def rows_of(self, client: int, split: str) -> np.ndarray:
        """Return the row ids into `dataset.train` of one client's split, a view."""
        if split not in SPLITS:
            raise ValueError(f"split {split!r}; allowed: {', '.join(SPLITS)}")
        which = SPLITS.index(split)
        start, end = self.offsets[client, which : which + 2]
        return self.rows[start:end]

    def split(self, client: int, name: str) -> Examples:
        """Return a copy of one client's "train", "validation" or "personal" examples, possibly none."""
        return self.dataset.train.take(self.rows_of(client, name))

    def tensors(self, client: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one client's inputs (n, ...) and labels int64 (n,); without rows, both are empty."""
        return self._pair(self.split(client, name), given=True)

    def _pair(self, examples: Examples, given: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = self.dataset.tensor(examples.inputs, given)
        return inputs, next_tokens(inputs, examples) if self.dataset.next_token else _labels(examples)

    def byte_count(self, split: str, client: int = 0) -> int | None:
        """UTF-8 bytes that a client's split, or the "global" test set, is to predict; None where nobody knows."""
        examples = self.dataset.test if split == "global" else self.dataset.train
        if examples is None or examples.byte_counts is None:
            return None
        chosen = slice(None) if split == "global" else self.rows_of(client, split)
        return int(examples.byte_counts[chosen].sum())

    def as_features(self) -> FederatedData:
        """The same with whole numbers as features; who has which row is unchanged."""
        given = self.dataset
        test = None if given.test is None else as_features(given.test)
        dataset = replace(given, kind="features", train=as_features(given.train), test=test)
        return replace(self, dataset=dataset, transfer=None if self.transfer is None else as_features(self.transfer))

    def transfer_tensors(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the transfer set's inputs and, if it is labelled, its labels.

        Raises
        ------
        UserError
            Where there is none.
        """
        if self.transfer is None:
            raise UserError(
                f"data={self.dataset.name} has no transfer set; set transfer.source to noise or a data set"
                if self.dataset.provided is not None
                else "transfer.size=0: there is no transfer set; allowed for this strategy: 1 or more"
            )
        inputs, labels = self._pair(self.transfer)
        return inputs, labels if bool((self.transfer.targets >= 0).all()) else None

    def test_tensors(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the global test set, or None where the data has none."""
        test = self.dataset.test
        return None if test is None else self._pair(test)

    def histogram(self) -> list[dict[str, Any]]:
        """Count `examples` per `client`, `split` and `label`, one row each; zeros are left out."""
        classes = len(self.dataset.classes)
        # One code per (client, split); rows lie in that order already.
        owner = np.repeat(np.arange(self.clients * len(SPLITS)), self.sizes().ravel())
        codes, counts = np.unique(owner * classes + self.dataset.train.targets[self.rows], return_counts=True)
        return [
            {
                "client": code // classes // len(SPLITS),
                "split": SPLITS[code // classes % len(SPLITS)],
                "label": code % classes,
                "examples": count,
            }
            for code, count in zip(codes.tolist(), counts.tolist(), strict=True)
        ]

    def transfer_hash(self) -> str:
        """Return sha256 over the transfer inputs' type, shape, bytes and order; without a set, of nothing."""
        digest = hashlib.sha256()
        if self.transfer is not None:
            inputs = self.transfer.inputs
            little = inputs.astype(inputs.dtype.newbyteorder("<"), copy=False)
            digest.update(f"{little.dtype.str} {little.shape}\n".encode())
            digest.update(np.ascontiguousarray(little).data)
        return digest.hexdigest()


def next_tokens(inputs: torch.Tensor, examples: Examples) -> torch.Tensor:
    """The tokens as labels, `IGNORED` where nobody shall predict them."""
    import torch

    if examples.wanted is None:
        return inputs
    return inputs.masked_fill(~torch.from_numpy(np.array(examples.wanted)), IGNORED)


def _labels(examples: Examples) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.array(examples.targets))


def split_counts(sizes: np.ndarray, validation: float, personal: float) -> np.ndarray:
    """Return how many of each client's examples are train, validation and personal test, int64 (clients, 3).

    Shares are rounded to the nearest whole number; a client that has any example trains on at least one.
    """
    test = np.minimum(np.rint(sizes * personal).astype(np.int64), np.maximum(sizes - 1, 0))
    held = np.minimum(np.rint(sizes * validation).astype(np.int64), np.maximum(sizes - 1 - test, 0))
    return np.stack([sizes - held - test, held, test], axis=1)


def prepare(
    data: DataConfig, partition: PartitionConfig, transfer: TransferConfig, clients: int | None, seed: int
) -> FederatedData:
    """Load, cut and deal: transfer set first, then clients, then each client's splits.

    Parameters
    ----------
    clients : int or None
        None follows the data where it says how many there are, else 10.
    seed : int
        The run's seed; the strategy has no say in any cut.

    Raises
    ------
    UserError
        For data that is missing or damaged, or settings that cannot be met.
    """
    for key in ("validation", "personal_test"):
        if not 0 <= getattr(data, key) < 1:
            raise UserError(f"data.{key}={getattr(data, key)}; allowed: 0 ≤ share < 1")
    if data.validation + data.personal_test >= 1:
        raise UserError(
            f"data.validation={data.validation} + data.personal_test={data.personal_test} leave nothing to "
            "train on; allowed: a sum < 1"
        )
    dataset = load(data)
    chosen: Examples | None
    if data.target is not None:
        dataset, chosen = set_apart(data, transfer, dataset, seed)
        rest = np.arange(len(dataset.train))
    else:
        chosen, rest = cut_transfer(transfer, dataset, seed)
    if dataset.provided is not None:
        return _as_given(data, dataset, chosen, clients)
    groups = dataset.train.groups
    group_ids = np.unique(groups) if groups is not None else np.empty(0, dtype=np.int64)
    count = clients_of(partition, clients, len(group_ids))
    parts, notes = partition_rows(
        partition,
        dataset.train.targets[rest],
        None if groups is None else groups[rest],
        group_ids,
        count,
        seed,
    )
    sizes = np.array([len(part) for part in parts], dtype=np.int64)
    # A generator of its own per client: one client's cut never depends on another's examples.
    cut = [numpy_generator(seed, "split", client).permutation(part) for client, part in enumerate(parts)]
    counts = split_counts(sizes, data.validation, data.personal_test)
    ends = np.cumsum(counts.ravel()).reshape(counts.shape)
    offsets = np.column_stack([ends[:, 0] - counts[:, 0], ends])
    if data.personal_test and counts[:, 2].max() < SCORED:
        few = f"data.personal_test={data.personal_test:g} of at most {sizes.max()} is {counts[:, 2].max()}"
        cure = "fewer clients, or a larger data.personal_test, scores some"
        notes = [*notes, f"no client has {SCORED} examples for a personal test, the least: {few}; {cure}"]
    rows = rest[np.concatenate(cut)]
    notes = [*dataset.notes, *gaps(data, dataset, rows, counts), *notes]
    return FederatedData(dataset, rows, offsets, chosen, tuple(notes))


def _as_given(data: DataConfig, dataset: Dataset, transfer: Examples | None, clients: int | None) -> FederatedData:
    assert dataset.provided is not None
    offsets = dataset.provided.offsets
    if clients is not None and clients != len(offsets):
        raise UserError(f"clients={clients}: data={dataset.name} comes partitioned; allowed: {len(offsets)} (or null)")
    rows = np.arange(len(dataset.train))
    note = f"data={dataset.name} comes partitioned: clients and splits as given, partition settings unused"
    notes = (note, *gaps(data, dataset, rows, np.diff(offsets, axis=1)))
    return FederatedData(dataset, rows, offsets, transfer, notes)
