"""flwr-datasets' partitioners over a column of labels, their indices kept on disk."""

from __future__ import annotations

import hashlib
import json
import warnings
from importlib.metadata import version
from typing import Any

import numpy as np

from fedfuse.config.schema import PartitionConfig
from fedfuse.data.cache import key_of, store_arrays, stored_arrays
from fedfuse.data.locations import reason_of
from fedfuse.errors import UserError
from fedfuse.seeding import numpy_generator, seed_of

ATTEMPTS = 20
DRAWS = 11  # of one seed, by flwr-datasets' DirichletPartitioner
HOPELESS = 50  # clients that are short in the best of a seed's draws: another seed would need luck of e⁻⁵⁰


def deal_by_flower(
    config: PartitionConfig, targets: np.ndarray, clients: int, seed: int
) -> tuple[list[np.ndarray], list[str]]:
    """Deal rows by `dirichlet`, `shards`, `pathological` or linear `size`.

    Draws that leave a client too few examples are repeated with the next seed, at most `ATTEMPTS` times;
    the least size is never lowered. Indices are cached, so that importing flwr-datasets (seconds) is paid
    for once.

    Raises
    ------
    UserError
        Where no draw satisfies the least size, or the partitioner refuses its arguments.
    """
    settings = settings_of(config)
    key = key_of(
        config.name,
        settings,
        clients,
        seed,
        version("flwr-datasets"),
        np.__version__,
        hashlib.sha256(targets.astype("<i8").tobytes()).hexdigest(),
    )
    kept = stored_arrays("partitions", key)
    if kept is not None and _sound(kept, len(targets), clients):
        return np.split(kept["rows"], kept["ends"][:-1]), json.loads(str(kept["notes"]))
    rows, notes = _deal(config, settings, targets, clients, seed)
    arrays = {
        "rows": np.concatenate(rows),
        "ends": np.cumsum([len(part) for part in rows]),
        "notes": np.array(json.dumps(notes)),
    }
    store_arrays("partitions", key, arrays)
    return rows, notes


def settings_of(config: PartitionConfig) -> dict[str, Any]:
    """Return the settings that this partition depends on."""
    used = {
        "dirichlet": ("alpha", "min_size"),
        "shards": ("shards_per_client",),
        "pathological": ("classes_per_client",),
        "size": ("min_size",),
    }
    return {name: getattr(config, name) for name in used[config.name]}


def _sound(kept: dict[str, np.ndarray], examples: int, clients: int) -> bool:
    if not {"rows", "ends", "notes"} <= kept.keys() or len(kept["ends"]) != clients:
        return False
    rows = kept["rows"]
    inside = rows.size and rows.min() >= 0 and rows.max() < examples
    return bool(inside and np.bincount(rows).max() == 1 and kept["ends"][-1] == len(rows))


def _deal(
    config: PartitionConfig, settings: dict[str, Any], targets: np.ndarray, clients: int, seed: int
) -> tuple[list[np.ndarray], list[str]]:
    import datasets

    # The partitioners cut in the order of the file; files are often sorted by class or writer.
    order = numpy_generator(seed, "partition", "order").permutation(len(targets))
    column = {"label": targets[order].tolist(), "row": order.tolist()}
    least = int(settings.get("min_size", 1))
    said = ", ".join(f"partition.{name}={value}" for name, value in settings.items())
    attempts = 1 if config.name == "size" else ATTEMPTS
    reason = ""
    for attempt in range(attempts):
        drawn = seed_of(seed, "partition", attempt) % 2**32
        short = fewest_short(config.alpha, targets, clients, least, drawn) if config.name == "dirichlet" else 0
        if short:
            reason = f"each leaves a client fewer than {least}"
            if short > HOPELESS:
                break
            continue
        partitioner = _partitioner(config, clients, drawn)
        partitioner.dataset = datasets.Dataset.from_dict(column)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # one line per draw that was too small
                rows = _rows(partitioner, clients)
        except ValueError as error:
            reason = reason_of(error)
            if "max number of attempts" in reason:  # its advice to try again is what this loop does
                reason = f"each leaves a client fewer than {least}"
            continue
        sizes = np.array([len(part) for part in rows])
        if sizes.min() < max(least, 1):
            reason = f"the smallest client has {sizes.min()}"
            continue
        notes = []
        if attempt:
            notes.append(f"partition={config.name}: draw {attempt + 1} was the first to satisfy {said}")
        if sizes.sum() < len(targets):
            unused = len(targets) - sizes.sum()
            notes.append(f"partition={config.name}: {unused} of {len(targets)} examples are dealt to nobody")
        return rows, notes
    raise UserError(
        f"partition={config.name} with {said}: no draw out of {attempt + 1} fits clients={clients} and "
        f"{len(targets)} examples ({reason})" + _advice(config.name)
    )


def _rows(partitioner: Any, clients: int) -> list[np.ndarray]:
    """Row ids of every client. The first is loaded as Flower does; a data set for each of the others takes 5 ms."""
    first = np.asarray(partitioner.load_partition(0)["row"], dtype=np.int64)  # from here on nothing is sorted any more
    column = np.asarray(partitioner.dataset["row"][:], dtype=np.int64)  # [:]: else it comes row by row
    setattr(partitioner.dataset, "select", lambda indices: {"row": column[indices]})  # noqa: B010 - of this one only
    rest = [np.asarray(partitioner.load_partition(client)["row"], dtype=np.int64) for client in range(1, clients)]
    return [first, *rest]


def fewest_short(alpha: float, targets: np.ndarray, clients: int, least: int, seed: int) -> int:
    """Clients below the least size in the best of the draws that flwr-datasets makes of a seed; 0 if one fits.

    These are the sizes that it draws, without the rows: with thousands of clients rows take it a second a draw, and
    minutes until it has been seen that none fits.
    """
    rng = np.random.default_rng(seed)
    counts = np.unique(targets, return_counts=True)[1]
    fewest = clients
    for _ in range(DRAWS):
        sizes = np.zeros(clients, dtype=np.int64)
        for count in counts:
            ends = np.cumsum(rng.dirichlet(np.full(clients, float(alpha)))) * count
            ends = ends.astype(np.int64)
            ends[-1] = count
            sizes += np.diff(ends, prepend=0)
        fewest = min(fewest, int((sizes < least).sum()))
        if not fewest:
            break
    return fewest


def _advice(name: str) -> str:
    return {
        "dirichlet": "; raise partition.alpha, lower partition.min_size or clients, or take partition=prior",
        "size": "; lower partition.min_size or clients",
    }.get(name, "; lower clients")


def _partitioner(config: PartitionConfig, clients: int, seed: int) -> Any:
    from flwr_datasets import partitioner

    if config.name == "dirichlet":
        return partitioner.DirichletPartitioner(
            num_partitions=clients,
            partition_by="label",
            alpha=float(config.alpha),
            min_partition_size=config.min_size,
            self_balancing=False,
            seed=seed,
        )
    if config.name == "shards":
        return partitioner.ShardPartitioner(
            num_partitions=clients,
            partition_by="label",
            num_shards_per_partition=config.shards_per_client,
            seed=seed,
        )
    if config.name == "pathological":
        # Every class gets a client before any is repeated; "random" would often leave classes unused.
        return partitioner.PathologicalPartitioner(
            num_partitions=clients,
            partition_by="label",
            num_classes_per_partition=config.classes_per_client,
            class_assignment_mode="first-deterministic",
            seed=seed,
        )
    return partitioner.LinearPartitioner(num_partitions=clients)


def refuse_impossible(config: PartitionConfig, targets: np.ndarray, clients: int) -> None:
    """Refuse what no draw can satisfy, before anything slow is imported.

    Raises
    ------
    UserError
        Naming the setting, the number of clients and of examples.
    """
    count = len(targets)
    if config.name in ("dirichlet", "size") and config.min_size * clients > count:
        raise UserError(
            f"partition={config.name}: partition.min_size={config.min_size} for clients={clients} (alpha="
            f"{config.alpha}) needs {config.min_size * clients} examples; there are {count}"
        )
    if config.name == "shards" and not 1 <= config.shards_per_client <= count // clients:
        raise UserError(
            f"partition.shards_per_client={config.shards_per_client} for clients={clients}: "
            f"allowed: 1 to {count // clients} with {count} examples"
        )
    if config.name == "pathological":
        classes = len(np.unique(targets))
        if not 1 <= config.classes_per_client <= classes:
            raise UserError(
                f"partition.classes_per_client={config.classes_per_client}; allowed: 1 to {classes} (classes present)"
            )
