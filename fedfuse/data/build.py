"""From raw columns to a `Dataset`: class ids, input kinds, channel statistics and fixed cuts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedfuse.config.catalogue import SOURCES
from fedfuse.config.schema import DataConfig
from fedfuse.data.dataset import Dataset, Examples, check_finite
from fedfuse.errors import UserError, nearest
from fedfuse.seeding import numpy_generator

SPLITS = ("train", "test")


@dataclass
class Table:
    """Columns as a file holds them: labels and groups may still be names.

    Attributes
    ----------
    inputs : ndarray, shape (n, ...)
        Already of one dtype and shape.
    labels, groups : ndarray, shape (n,)
        Integers or strings.
    pad : int or None
        Of tokens: what fills the end of short rows.
    vocabulary : int or None
        Of tokens: how many there are.
    notes : tuple of str
        What is lost of it.
    """

    inputs: np.ndarray
    labels: np.ndarray
    groups: np.ndarray | None = None
    pad: int | None = None
    vocabulary: int | None = None
    notes: tuple[str, ...] = ()


def options(config: DataConfig, allowed: Mapping[str, Any]) -> dict[str, Any]:
    """Return `data.extra` over the defaults in `allowed`, refusing unknown keys.

    Raises
    ------
    UserError
        For a key that this layout does not know, or a value that is no whole number where the default is one.
    """
    given = dict(config.extra or {})
    for key in given:
        if key not in allowed:
            raise UserError(f"data.extra.{key} is unknown to data={config.name}; {nearest(key, allowed)}")
        if type(allowed[key]) is int and (type(given[key]) is not int or given[key] < 1):
            raise UserError(f"data.extra.{key}={given[key]!r:.40}: allowed is a whole number from 1 on")
    return {**allowed, **given}


def stratified(strata: np.ndarray, count: int, *purpose: object) -> np.ndarray:
    """Choose `count` rows, each stratum in proportion, by a draw fixed by `purpose` (never the run's seed).

    Returns
    -------
    ndarray of int64
        Row ids, ascending.
    """
    order = numpy_generator(*purpose).permutation(len(strata))
    shuffled = strata[order]
    by_stratum = np.argsort(shuffled, kind="stable")
    _, starts, sizes = np.unique(shuffled[by_stratum], return_index=True, return_counts=True)
    rank = np.empty(len(strata))
    rank[by_stratum] = np.arange(len(strata)) - np.repeat(starts, sizes)
    share = np.empty(len(strata))
    share[by_stratum] = np.repeat(sizes, sizes)
    # The first `count` rows by relative rank hold every stratum in proportion, up to rounding.
    chosen = np.argsort((rank + 0.5) / share, kind="stable")[:count]
    return np.sort(order[chosen])


def strata_of(targets: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
    """Return one stratum id per (group, class)."""
    if groups is None:
        return np.asarray(targets)
    return np.asarray(groups) * (int(targets.max(initial=0)) + 1) + targets


def codes_of(columns: Sequence[np.ndarray], named: Sequence[str] | None) -> tuple[list[np.ndarray], tuple[str, ...]]:
    """Map labels (or group ids) of several splits to 0..C-1.

    Parameters
    ----------
    columns : sequence of ndarray
        Integers or strings, one array per split.
    named : sequence of str, optional
        Names of the integer codes, where the file tells them.
    """
    values = np.concatenate([np.asarray(column) for column in columns])
    if values.dtype.kind in "iu" and named and values.min() >= 0 and values.max() < len(named):
        return [np.asarray(column).astype(np.int64) for column in columns], tuple(named)
    if values.dtype.kind == "f":
        if not (np.isfinite(values).all() and (values == np.rint(values)).all()):
            first = next((i, v) for c in columns for i, v in enumerate(np.asarray(c).tolist()) if v != v // 1)
            raise ValueError("labels are not whole numbers: the label of row {} (from 0) is {}".format(*first))
        columns = [np.asarray(column).astype(np.int64) for column in columns]
        values = values.astype(np.int64)
    if values.dtype.kind not in "iubUS":  # an array of texts would give each the room of the longest
        texts = [[str(value) for value in column] for column in columns]
        names = sorted(set().union(*texts))
        code = {name: i for i, name in enumerate(names)}
        return [np.array([code[text] for text in column], dtype=np.int64) for column in texts], tuple(names)
    unique = np.unique(values)
    return [np.searchsorted(unique, column).astype(np.int64) for column in columns], tuple(
        str(value) for value in unique.tolist()
    )


def one_a_row(labels: np.ndarray) -> np.ndarray:
    """Labels of shape (n,) or (n, 1) as (n,).

    Raises
    ------
    ValueError
        Where rows have several.
    """
    if labels.ndim > 1 and labels.size != len(labels):
        raise ValueError(f"labels of shape {labels.shape}; expected one a row: of one-hot labels take .argmax(1)")
    return labels.reshape(-1)


def kind_of(inputs: np.ndarray) -> tuple[np.ndarray, str]:
    """Bring raw inputs to one of the three kinds; channels-last images become channels-first.

    Raises
    ------
    ValueError
        For arrays that are none of them.
    """
    if inputs.dtype == np.uint8 and inputs.ndim in (3, 4):
        if inputs.ndim == 3:
            return inputs[:, None], "image"
        if inputs.shape[1] not in (1, 3) and inputs.shape[3] in (1, 3):
            return np.ascontiguousarray(inputs.transpose(0, 3, 1, 2)), "image"
        return inputs, "image"
    if inputs.ndim < 2:
        raise ValueError(f"inputs of shape {inputs.shape}; expected (examples, …)")
    # Whole numbers may be tokens; if nobody says so, the model decides (`Dataset.unsaid`). No token is negative.
    if inputs.dtype.kind in "iu" and inputs.dtype != np.uint8 and inputs.ndim == 2 and inputs.min(initial=0) >= 0:
        return inputs.astype(np.int64), "tokens"
    if inputs.dtype.kind in "fiub":
        return inputs.astype(np.float32), "image" if inputs.ndim == 4 else "features"
    raise ValueError(f"inputs of type {inputs.dtype}; expected numbers")


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return per-channel mean and standard deviation of `images / 255`, exactly, from byte counts."""
    levels = np.arange(256) / 255.0
    mean, std = [], []
    for channel in range(images.shape[1]):
        counts = np.zeros(256, dtype=np.int64)
        for start in range(0, len(images), 4096):
            counts += np.bincount(images[start : start + 4096, channel].ravel(), minlength=256)
        share = counts / counts.sum()
        centre = float(share @ levels)
        spread = float(np.sqrt(share @ (levels - centre) ** 2))
        mean.append(round(centre, 6))
        std.append(round(spread, 6) or 1.0)
    return tuple(mean), tuple(std)


def assemble(
    config: DataConfig,
    train: Table,
    test: Table | None = None,
    class_names: Sequence[str] | None = None,
    group_names: Sequence[str] | None = None,
) -> Dataset:
    """Build the data set; where there is no test split, cut `data.test_fraction` of it, always the same rows.

    Raises
    ------
    UserError
        Where inputs or labels cannot be used.
    """
    tables = [train] if test is None else [train, test]
    for split, table in zip(SPLITS, tables, strict=False):
        check_finite(table.inputs, f"data={config.name}: {split}")
        if not len(table.inputs) or len(table.inputs) != len(table.labels):
            raise UserError(
                f"data={config.name}: {len(table.inputs)} inputs with {len(table.labels)} labels; "
                "expected as many of both, at least one"
            )
    try:
        converted = [kind_of(table.inputs) for table in tables]
        targets, classes = codes_of([one_a_row(table.labels) for table in tables], class_names)
    except ValueError as error:
        raise UserError(f"data={config.name}: {error}") from None
    groups: list[np.ndarray | None] = [None] * len(tables)
    if all(table.groups is not None for table in tables):
        codes, found = codes_of([table.groups for table in tables if table.groups is not None], group_names)
        groups, group_names = list(codes), found
    elif train.groups is not None:
        codes, found = codes_of([train.groups], group_names)
        groups[0], group_names = codes[0], found
    else:
        group_names = None
    splits = [
        Examples(inputs, labels, ids) for (inputs, _), labels, ids in zip(converted, targets, groups, strict=True)
    ]
    kind = converted[0][1]
    if test is None and config.test_fraction > 0:
        splits = list(cut_test(config, splits[0]))
    known = SOURCES.get(config.name)
    mean, std = (None, None) if known is None else (known.mean, known.std)
    if kind == "image" and splits[0].inputs.dtype == np.uint8:
        if mean is None or len(mean) != splits[0].inputs.shape[1]:
            mean, std = channel_statistics(splits[0].inputs)
    else:
        mean = std = None
    return Dataset(
        name=config.name,
        train=splits[0],
        test=splits[1] if len(splits) > 1 else None,
        classes=classes,
        kind=kind,
        mean=mean,
        std=std,
        group_names=None if group_names is None else tuple(group_names),
        pad=train.pad if kind == "tokens" else None,
        vocabulary=train.vocabulary if kind == "tokens" else None,
        notes=tuple(
            f"{split} split: {note}" for split, table in zip(SPLITS, tables, strict=False) for note in table.notes
        ),
    )


def cut_test(config: DataConfig, examples: Examples) -> tuple[Examples, Examples]:
    """Cut the global test set off a data set that came without one."""
    count = round(len(examples) * config.test_fraction)
    if not 0 < count < len(examples):
        raise UserError(
            f"data.test_fraction={config.test_fraction} of {len(examples)} examples leaves an empty split; "
            "allowed: a share that leaves both, or 0 for no test set"
        )
    chosen = stratified(strata_of(examples.targets, examples.groups), count, "test", config.name)
    kept = np.ones(len(examples), dtype=bool)
    kept[chosen] = False
    return examples.take(np.flatnonzero(kept)), examples.take(chosen)
