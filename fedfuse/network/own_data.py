"""Sites with data of their own: what the server tells them about the task, and what each side builds from it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fedfuse import models
from fedfuse.config.schema import Config
from fedfuse.core.scenario import Scenario, settled
from fedfuse.data.dataset import SPLITS, Dataset
from fedfuse.data.federated import FederatedData, split_counts
from fedfuse.data.load import load
from fedfuse.data.transfer import cut_transfer, vocabulary_of
from fedfuse.errors import Refused, UserError
from fedfuse.seeding import numpy_generator

NOTE = "clients are sites with data of their own: partition settings are unused"


def task_of(scenario: Scenario) -> str:
    """What sites cannot know by themselves, of the reference data: classes, scaling, transfer size, tokens."""
    data = scenario.data
    size = 0 if data.transfer is None else len(data.transfer)
    about = {"classes": data.dataset.classes, "mean": data.dataset.mean, "std": data.dataset.std, "transfer": size}
    return json.dumps({**about, "vocabulary": vocabulary_of(data.dataset)})


def site_scenario(
    config: Config, client: int, clients: int, task: str, stated: Sequence[str] | None = None
) -> Scenario:
    """A scenario in which only this site's client has examples: all rows of `data.root`, cut as a simulation cuts.

    Parameters
    ----------
    config : Config
        With the site's own `data.root`.
    task : str
        What `task_of` wrote at the server.
    stated : sequence of str, optional
        Classes that the site says its labels may have; the task is compared with them in place of the rows.

    Raises
    ------
    Refused
        If the task is none, or the data comes partitioned.
    UserError
        If the site's data does not fit the task: another class or kind of input. It may quote the data.
    """
    about = _read(task)
    data = replace(config.data, limit=None, test_limit=None, test_fraction=0.0)
    own = load(data)
    if own.provided is not None:
        raise Refused(f"data={own.name} comes partitioned into clients; a site is one client")
    said = own.classes if stated is None or own.next_token else stated  # tokens' classes are a vocabulary, not rows'
    if foreign := sorted(set(own.classes) - set(said)):
        raise UserError(f"class {foreign[0]!r} of this site's data is not one of the classes of its [select]")
    if unknown := sorted(set(said) - set(about["classes"])):
        raise UserError(f"class {unknown[0]!r} of this site's data is not one of the task's {len(about['classes'])}")
    codes = np.array([about["classes"].index(name) for name in own.classes], dtype=np.int64)
    train = dataclasses.replace(own.train, targets=codes[own.train.targets], groups=None)
    scaled = own.mean is not None
    dataset = replace(
        own,
        train=train,
        test=None,
        classes=tuple(about["classes"]),
        mean=tuple(about["mean"]) if scaled and about["mean"] else None,
        std=tuple(about["std"]) if scaled and about["std"] else None,
        group_names=None,
    )
    size = 0 if config.transfer.source == "holdout" else about["transfer"]
    # a hello tells the hash of the noise: drawn as far as the site's own numbers go, it would tell the largest
    transfer, _ = cut_transfer(replace(config.transfer, size=size), dataset, config.seed, about["vocabulary"] or 1)
    rows = numpy_generator(config.seed, "split", client).permutation(len(train))
    counts = split_counts(np.array([len(train)]), data.validation, data.personal_test)[0]
    offsets = np.zeros((clients, 4), dtype=np.int64)
    offsets[client] = [0, *np.cumsum(counts)]
    return _scenario(config, FederatedData(dataset, rows, offsets, transfer, (NOTE,)), clients)


def no_guessed_tokens(scenario: Scenario) -> None:
    """Refuse a model of tokens on numbers that nobody called tokens: a hello would say whether one is negative.

    Raises
    ------
    Refused
        Whatever the numbers are.
    """
    data, config = scenario.data.dataset, scenario.config
    for name in sorted(set(scenario.architectures)):
        said = data.next_token or data.pad is not None
        if not said and models.reads_tokens(name, data.shape, scenario.classes, config.model):
            raise Refused(f"site policy: model={name} reads tokens; allowed: with require_dp, on texts alone")


def server_scenario(scenario: Scenario, examples: Mapping[int, Sequence[int]]) -> Scenario:
    """The server's scenario once every site has said how many examples it has; it holds none of them."""
    sizes = np.array([list(examples[client]) for client in range(scenario.clients)], dtype=np.int64)
    ends = np.cumsum(sizes.ravel()).reshape(sizes.shape)
    offsets = np.column_stack([ends[:, 0] - sizes[:, 0], ends])
    given = scenario.data
    transfer = None if scenario.config.transfer.source == "holdout" else given.transfer
    data = FederatedData(given.dataset, np.empty(0, dtype=np.int64), offsets, transfer, (NOTE,))
    return replace(scenario, data=data)


def _scenario(config: Config, data: FederatedData, clients: int) -> Scenario:
    dataset: Dataset = data.dataset
    names = models.architectures(config.model, dataset.kind_said, dataset.shape, clients, dataset.next_token)
    return settled(Scenario(config, data, tuple(names)))


def counts_of(hello: Mapping[str, Any]) -> list[int]:
    """Examples of a site per split, as it says.

    Raises
    ------
    UserError
        If they are not counts.
    """
    found = hello.get("examples")
    if not isinstance(found, list) or len(found) != len(SPLITS):
        raise UserError(f"examples={found!r}: {len(SPLITS)} counts are needed")
    if not all(isinstance(n, int) and 0 <= n < 2**40 for n in found) or found[0] < 1:
        raise UserError(f"examples={found!r}: at least one to train on is needed")
    return list(found)


def _read(task: str) -> dict[str, Any]:
    try:
        about = json.loads(task)
        names, size = about["classes"], about["transfer"]
        scales = [about["mean"], about["std"]]
        vocabulary = about.setdefault("vocabulary", None)  # of numbers that are not tokens there is none
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Refused("the task is not what a FedFuse server writes") from error
    good = isinstance(names, list) and 1 < len(names) <= 100_000 and all(isinstance(n, str) for n in names)
    good = good and isinstance(size, int) and 0 <= size < 2**31
    good = good and (vocabulary is None or (isinstance(vocabulary, int) and 0 < vocabulary < 2**31))
    good = good and all(s is None or (isinstance(s, list) and all(isinstance(v, float) for v in s)) for s in scales)
    if not good or len(set(names)) < len(names):
        raise Refused("the task is not what a FedFuse server writes")
    return about
