"""A site's side of secure sums: what it answers between a phase's messages, and the masks over what leaves.

Secrets lie in the memory that Flower's SuperNode keeps for an app between messages (`Context.state`), never on a disk:
a site that is started again has lost them, drops out of the phase, and the others recover the sum without it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from flwr.app import ConfigRecord, RecordDict

from fedfuse.config import registry
from fedfuse.config.schema import Config
from fedfuse.core.masked_sums import masked, placed
from fedfuse.errors import Refused
from fedfuse.wire import masks
from fedfuse.wire.group_sums import MASKED, fixed_points, weight_of
from fedfuse.wire.records import record, tensors

STEPS = ("keys", "shares", "unmask")
PREFIX = "query.secure_"  # of these steps' messages


class SiteSecrets:
    """The secrets of one client of a site.

    Parameters
    ----------
    memory : RecordDict
        What outlives a message, and not the site's process.
    client : int
    alike : str
        Of what all clients of the phase are told alike: see `fingerprint`.
    """

    def __init__(self, memory: RecordDict, client: int, alike: str) -> None:
        self.memory, self.client, self.alike, self._name = memory, client, alike, f"secure:{client}"
        self.own: dict[str, Any] = dict(memory.config_records.get(self._name, {}))

    def answer(self, step: str, told: Mapping[str, Any]) -> dict[str, Any]:
        """Take one step around a phase.

        Raises
        ------
        Refused
            If it is out of turn, or asks for more than a sum.
        """
        if step == "keys":
            if self.own.get("session") != told["session"]:
                self.own = masks.keys(str(told["session"]), self.alike)
            self._same(told)
            out = {"public": self.own["public"]}
        elif step == "shares":
            self._same(told)
            public: list[bytes] = list(told["public"])
            peers = {int(j): (public[2 * k], public[2 * k + 1]) for k, j in enumerate(told["peers"])}
            out = {"sealed": list(masks.share(self.own, self.client, peers, int(told["threshold"])).values())}
        else:
            self._same(told)
            active, gone = list(told["active"]), list(told["gone"])
            parts = masks.reveal(self.own, active, gone)
            out = {"shares": [parts[j] for j in active + gone]}
        self._keep()
        return out

    def accept(self, told: Mapping[str, Any]) -> None:
        """Take in the others' shares, before anything is trained.

        Raises
        ------
        Refused
            As `wire.masks.accept`.
        """
        self._same(told)
        masks.accept(self.own, self.client, dict(zip(told["from"], told["sealed"], strict=True)))
        self._keep()

    def hide(self, content: RecordDict, config: Config, run: Mapping[str, Any]) -> RecordDict:
        """A reply with every summed record quantised and masked.

        Raises
        ------
        Refused
            If a summed record would leave otherwise, or is to be quantised otherwise than the configuration says.
        """
        sums = registry.sums_of(registry.entry(config.strategy.name), config.strategy)
        plain = {name: "arrays" if name == "model" else name for name in sums}
        records = {
            name: tensors(content.array_records[at]) for name, at in plain.items() if at in content.array_records
        }
        points = fixed_points(run)
        if records.keys() != points.keys():
            raise Refused(f"secure: the server sums {', '.join(points) or 'nothing'}, this client {', '.join(records)}")
        if any(
            (p.clip, p.levels) != (config.secure.clipping_range, config.secure.quantization_range)
            for p in points.values()
        ):
            raise Refused("secure: the server quantises otherwise than the run's configuration says")
        metrics: Any = content.metric_records["metrics"]
        numbers = {
            name: {
                f"{str(value.dtype).removeprefix('torch.')}:{key}": points[name].quantised(
                    value, weight_of(sums[name], metrics)
                )
                for key, value in arrays.items()
            }
            for name, arrays in records.items()
        }
        vector, places = masked(numbers)
        hidden = placed(masks.mask(self.own, self.client, vector), places)
        self._keep()
        out = RecordDict({name: value for name, value in content.items() if name not in plain.values()})
        for name in records:
            out[f"{MASKED}{name}"] = record(hidden[name])
        return out

    def _same(self, told: Mapping[str, Any]) -> None:
        if self.own.get("session") != told.get("session"):
            raise Refused("secure: this client's keys of this phase are gone: its site was started again")
        if self.own.get("alike") != self.alike:  # as how records are quantised, and what is summed
            raise Refused("secure: told otherwise than when this client's keys of this phase were made")

    def _keep(self) -> None:
        self.memory[self._name] = ConfigRecord(self.own)


def fingerprint(*told: Mapping[str, Any]) -> str:
    """Hash what a phase's messages say, to be compared between clients without a word of it."""
    return hashlib.sha256(json.dumps([sorted(one.items()) for one in told], default=bytes.hex).encode()).hexdigest()


def refuse_bare(content: RecordDict, config: Config) -> None:
    """Let no summed record of a secure run leave unmasked, whatever its server asks for.

    Raises
    ------
    Refused
        Naming the record.
    """
    sums = registry.sums_of(registry.entry(config.strategy.name), config.strategy)
    if bare := [name for name in sums if ("arrays" if name == "model" else name) in content.array_records]:
        raise Refused(f"secure: {bare[0]} was asked for unmasked, in a run with secure=on")
