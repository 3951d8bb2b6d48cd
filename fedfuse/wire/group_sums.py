"""How a group of clients is summed beside them, and what of it travels: the protocol between a node and the server.

A strategy declares records of which it needs only the weighted sum. Where nodes are processes of the run, a group's
members stay at the node: each reply says which of its records were summed and how many bytes they had
(`summed.record`, `summed.bytes`), and the last valid reply of the group carries, for each record, the array record
`sum:<record>` in float64 with the entries `weight:<record>` and `dtypes:<record>` in its config. The server believes
these words only from processes of its own run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from flwr.app import ArrayRecord, Message

from fedfuse.wire.fixed_point import FixedPoint
from fedfuse.wire.records import Arrays, InvalidArrays, config_in, entries, resting, tensors
from fedfuse.wire.sums import Sum

Sums = Mapping[str, str | None]  # record -> metric that weighs it (None: 1, and 0 for who has no examples)
CARRIED = "sum:"
MASKED = "masked:"  # before the name of a record that left its client masked


def asked(sums: Sums) -> str:
    """What a message says of the sums that the server needs."""
    return json.dumps(dict(sums))


def wanted(message: Message) -> dict[str, str | None]:
    """The sums that a message asks its group for."""
    run: Mapping[str, Any] = config_in(message.content, "run") or {}
    return json.loads(str(run.get("sums", "{}")))


def fixed_points(run: Mapping[str, Any]) -> dict[str, FixedPoint]:
    """The records that a phase sums in whole numbers, by what its messages say (`secure=on`)."""
    if "secure" not in run:  # once for every client of every phase
        return {}
    plan: dict[str, Any] = json.loads(str(run["secure"]))
    return {name: FixedPoint(plan["clip"], plan["levels"], w) for name, w in plan["heaviest"].items()}


def empty_totals(sums: Sums, run: Mapping[str, Any]) -> dict[str, Sum]:
    """A sum of each record, before anything was added."""
    points = fixed_points(run)
    return {name: Sum(points.get(name)) for name in sums}


def keep_back(
    records: dict[str, Arrays],
    metrics: Mapping[str, Any],
    config: dict[str, Any],
    totals: Mapping[str, Sum],
    sums: Sums,
) -> None:
    """Add a valid client's summed records to the group's totals, and say so in their place.

    Raises
    ------
    InvalidArrays
        If they cannot be added to those of the members before.
    """
    names, sizes = [], []
    for name, total in totals.items():
        if name in records:
            arrays = records.pop(name)
            total.add(0, arrays, weight_of(sums[name], metrics))
            names.append(name)
            sizes.append(total.nbytes(arrays))
    if names:
        config["summed.record"], config["summed.bytes"] = names, sizes


def hand_over(reply: Message, totals: Mapping[str, Sum]) -> None:
    """Put the group's sums into the reply that carries them."""
    config = entries(reply.content["config"])  # type: ignore[arg-type]
    for name, total in totals.items():
        arrays, weight = total.group()
        if arrays:
            reply.content[f"{CARRIED}{name}"] = resting(arrays)
            config[f"weight:{name}"] = weight
            config[f"dtypes:{name}"] = json.dumps(
                {key: str(dtype).removeprefix("torch.") for key, dtype in total.dtypes.items()}
            )


def kept_back(config: Mapping[str, Any]) -> dict[str, int]:
    """Records of a reply that were summed beside its client, and their bytes."""
    return dict(zip(config.get("summed.record", []), map(int, config.get("summed.bytes", [])), strict=True))


def handed_over(reply: Message, names: Iterable[str]) -> Iterator[tuple[str, Arrays, float, dict[str, str]]]:
    """The sums of a group that a reply carries: record, arrays, weight, dtypes of what was summed."""
    config: Any = config_in(reply.content)
    for name in names:
        if isinstance(sent := entries(reply.content).get(f"{CARRIED}{name}"), ArrayRecord):
            yield name, tensors(sent), float(config[f"weight:{name}"]), json.loads(str(config[f"dtypes:{name}"]))


def weight_of(key: str | None, metrics: Mapping[str, Any]) -> float:
    """What a client's record counts for in a sum: a metric, or 1; one who has no examples has nothing to say.

    Raises
    ------
    InvalidArrays
        If the metric is no number.
    """
    number = metrics.get(key or "num-examples", None if key else 1)
    if not isinstance(number, int | float):
        raise InvalidArrays(f"metric {key} is {number!r}; it is a weight")
    return float(number) if key else float(number > 0)


def add_up(
    records: dict[str, Arrays],
    metrics: Mapping[str, Any],
    group: int,
    totals: dict[str, Sum],
    sums: Sums,
    scale: float = 1.0,
) -> None:
    """Move the records that are only summed from a client's share into the totals; all of them or none.

    What weighs a record is multiplied by `scale`.

    Raises
    ------
    InvalidArrays
        If one of them, or what weighs it, cannot be added.
    """
    weights: dict[str, float] = {}
    for name, total in totals.items():
        if name in records:
            weights[name] = weight_of(sums[name], metrics) * scale
            total.check(records[name], weights[name])
    for name, weight in weights.items():
        totals[name].add(group, records.pop(name), weight)
