"""Dealing the training examples to clients."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedfuse.config.catalogue import PARTITIONS
from fedfuse.config.schema import PartitionConfig
from fedfuse.data.draw import deal_by_prior
from fedfuse.data.flwr_partitions import deal_by_flower, refuse_impossible
from fedfuse.errors import UserError, nearest
from fedfuse.seeding import numpy_generator

ALPHA = 1e300  # beyond, what NumPy draws by Dir(α) adds up to 0 or to nothing finite
CLIENTS = 10  # where neither the user nor the data says how many


def clients_of(config: PartitionConfig, clients: int | None, group_count: int) -> int:
    """Return the number of clients: the user's, or what the data says for `natural` and `domain`.

    Raises
    ------
    UserError
        For an impossible number, an unknown partition or an impossible setting.
    """
    if config.name not in PARTITIONS:
        raise UserError(f"partition={config.name} is unknown; {nearest(config.name, PARTITIONS)}")
    if not 0 < config.alpha <= ALPHA:
        raise UserError(f"partition.alpha={config.alpha}; allowed: more than 0 and at most {ALPHA:g}")
    if config.min_size < 0:
        raise UserError(f"partition.min_size={config.min_size}; allowed: 0 or more")
    if config.sizes not in ("dirichlet", "linear"):
        raise UserError(f"partition.sizes={config.sizes}; allowed: dirichlet, linear")
    if config.clients_per_domain < 1:
        raise UserError(f"partition.clients_per_domain={config.clients_per_domain}; allowed: 1 or more")
    if clients is not None and clients < 1:
        raise UserError(f"clients={clients}; allowed: 1 or more")
    if config.name in ("natural", "domain"):
        if not group_count:
            raise UserError(
                f"partition={config.name}: the data has no natural ids or domains; set data.groups=<column> "
                "or take another partition"
            )
        follows = group_count * (config.clients_per_domain if config.name == "domain" else 1)
        if clients is not None and clients != follows:
            raise UserError(f"clients={clients}: partition={config.name} follows the data; allowed: {follows} or null")
        return follows
    return CLIENTS if clients is None else clients


def partition_rows(
    config: PartitionConfig,
    targets: np.ndarray,
    groups: np.ndarray | None,
    group_ids: np.ndarray,
    clients: int,
    seed: int,
) -> tuple[list[np.ndarray], list[str]]:
    """Deal rows 0..n-1 to `clients` clients, no row twice.

    Parameters
    ----------
    targets : ndarray of int64, shape (n,)
    groups : ndarray of int64, shape (n,), optional
        Natural ids, for `natural` and `domain`.
    group_ids : ndarray of int64
        Every id of the whole data set; one may have no rows left after the transfer set was cut.

    Returns
    -------
    rows : list of ndarray of int64
        Row ids per client.
    notes : list of str
        What the user should know.

    Raises
    ------
    UserError
        Where the examples cannot be dealt as asked.
    """
    if clients > len(targets) and config.name != "natural":
        raise UserError(f"clients={clients} but only {len(targets)} examples are left to deal; allowed: at most that")
    rng = numpy_generator(seed, "partition", config.name)
    if config.name == "iid":
        # flwr's IidPartitioner is the same cut of a shuffled file, but builds one data set per client.
        return np.array_split(rng.permutation(len(targets)), clients), []
    if config.name in ("natural", "domain"):
        assert groups is not None
        per_group = config.clients_per_domain if config.name == "domain" else 1
        return _by_group(groups, group_ids, per_group, rng)
    if config.name in ("prior", "clustered"):
        return deal_by_prior(config.name, config.alpha, config.groups, config.examples, targets, clients, rng)
    refuse_impossible(config, targets, clients)
    if config.name == "size" and config.sizes == "dirichlet":
        return _by_size(config, len(targets), clients, rng), []
    return deal_by_flower(config, targets, clients, seed)


def _by_group(
    groups: np.ndarray, group_ids: np.ndarray, per_group: int, rng: np.random.Generator
) -> tuple[list[np.ndarray], list[str]]:
    # As flwr's NaturalIdPartitioner deals, by sorting once instead of walking through every row.
    order = rng.permutation(len(groups))
    order = order[np.argsort(groups[order], kind="stable")]
    starts = np.searchsorted(groups[order], group_ids, side="left")
    ends = np.searchsorted(groups[order], group_ids, side="right")
    rows = []
    for start, end in zip(starts, ends, strict=True):
        rows.extend(np.array_split(order[start:end], per_group))
    empty = sum(not len(part) for part in rows)
    notes = [f"{empty} of {len(rows)} clients have no examples left after the transfer set was cut"] if empty else []
    return rows, notes


def _by_size(config: PartitionConfig, examples: int, clients: int, rng: np.random.Generator) -> list[np.ndarray]:
    # Everyone has the least size; only what is above it is dealt unequally, so that any α can be met.
    least = max(config.min_size, 1)
    shares = rng.dirichlet(np.full(clients, config.alpha))
    sizes = least + largest_remainder(shares / shares.sum(), examples - least * clients)
    return np.split(rng.permutation(examples), np.cumsum(sizes)[:-1])


def largest_remainder(shares: Sequence[float] | np.ndarray, total: int) -> np.ndarray:
    """Round `shares * total` to whole numbers that sum to `total`."""
    exact = np.asarray(shares) * total
    sizes = np.floor(exact).astype(np.int64)
    sizes[np.argsort(sizes - exact, kind="stable")[: total - sizes.sum()]] += 1
    return sizes
