"""FedScale's traces of a user's own: pickles of plain values, read by an unpickler that resolves no name.

Capacities are `{id: {"computation": ms a sample, "communication": kbps}}`; behaviours are `{id: {"duration": …,
"active": [s, …], "inactive": [s, …], "finish_time": s}}`. Neither is shipped here.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedfuse.clock.draws import nanoseconds, uniform
from fedfuse.config.files import read
from fedfuse.data.unpickle import RestrictedUnpickler
from fedfuse.errors import UserError, one_line

MOST = 1 << 30  # bytes


def plain(path: Path) -> list[Mapping[str, Any]]:
    """The entries of a trace, by id.

    Raises
    ------
    UserError
        If the file cannot be read, or holds anything but plain values; nothing in it has run then.
    """
    try:
        value = RestrictedUnpickler(io.BytesIO(read(path, MOST))).load()
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is refused: {one_line(error)}; expected are plain values") from None
    except UserError:
        raise
    except Exception as error:  # hostile content can fail in any way
        raise UserError(f"{path}: cannot be read ({one_line(error)}); expected is one of FedScale's traces") from None
    if not isinstance(value, dict) or not value or not all(isinstance(one, dict) for one in value.values()):
        raise UserError(f"{path}: is not one of FedScale's traces, a dict of dicts")
    try:
        return [value[key] for key in sorted(value)]
    except TypeError:
        raise UserError(f"{path}: its ids are of several kinds; numbers are needed") from None


def dealt(path: Path, purpose: str, clients: int, seed: int) -> list[tuple[int, Mapping[str, Any]]]:
    """An entry for each client: drawn without return where there are enough, else with."""
    entries = plain(path)
    order = sorted(range(len(entries)), key=lambda i: (uniform(seed, purpose, i), i))
    return [(order[client % len(order)], entries[order[client % len(order)]]) for client in range(clients)]


def capacities(path: Path, clients: int, seed: int) -> list[tuple[float, float]]:
    """Seconds an example and kilobits a second, of each client."""
    out = []
    for number, one in dealt(path, "capacity", clients, seed):
        values = [one.get(name) for name in ("computation", "communication")]
        if not all(isinstance(v, int | float) and not isinstance(v, bool) and 0 < v < 1e15 for v in values):
            raise UserError(f"{path}, entry {number}: computation={values[0]!r:.40}, communication={values[1]!r:.40}; "
                            f"allowed is more than 0")  # fmt: skip
        out.append((float(values[0]) / 1000.0, float(values[1])))  # type: ignore[arg-type]
    return out


def behaviours(path: Path, clients: int, seed: int) -> list[tuple[list[tuple[int, int]], int]]:
    """On intervals and period in nanoseconds, of each client."""
    return [_behaviour(path, number, one) for number, one in dealt(path, "behaviour", clients, seed)]


def _behaviour(path: Path, number: int, one: Mapping[str, Any]) -> tuple[list[tuple[int, int]], int]:
    on, off, end = one.get("active"), one.get("inactive"), one.get("finish_time")
    lists = isinstance(on, list | tuple) and isinstance(off, list | tuple)
    if not lists or not isinstance(end, int | float) or not 0 < end < 1e12:
        raise UserError(f"{path}, entry {number}: needed are lists active and inactive, and finish_time above 0")
    moments: list[Any] = [*on, *off]  # type: ignore[misc]
    if not all(isinstance(v, int | float) and 0 <= v <= end for v in moments):
        raise UserError(f"{path}, entry {number}: its moments must be numbers from 0 to finish_time={end:g}")
    spans: list[tuple[int, int]] = []
    for start in sorted(on):  # type: ignore[type-var,arg-type]
        if spans and nanoseconds(start) < spans[-1][1]:  # said to be on twice before it is off
            continue
        stop = min((v for v in off if v > start), default=end)  # type: ignore[union-attr]
        spans.append((nanoseconds(start), nanoseconds(stop)))
    return spans, nanoseconds(end)
