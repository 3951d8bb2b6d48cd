"""What a message asks of a node: its phase, hyper-parameters and parcels."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from flwr.app import ArrayRecord, Message, RecordDict

from fedfuse.config import registry
from fedfuse.config.registry import Entry
from fedfuse.errors import Refused, UserError
from fedfuse.wire.client_store import INITIAL
from fedfuse.wire.fixed_point import FixedPoint
from fedfuse.wire.group_sums import fixed_points
from fedfuse.wire.knowledge import ABOUT, Cache, Parcel
from fedfuse.wire.records import InvalidArrays, tensors

SPLITS = frozenset({"personal", "global", "validation"})  # that an evaluation may score
TAG = re.compile(r"(\d+(\.\d+)?)?", re.ASCII)  # round.phase; becomes a file's name


class Phase(NamedTuple):
    """What the messages of a phase say alike."""

    type: str
    kind: str  # train | evaluate
    name: str
    round: int
    run: Mapping[str, Any]
    said: dict[str, Any]  # what the server half added for its clients
    splits: tuple[str, ...]
    pooled: bool
    points: dict[str, FixedPoint]
    hyper: Any
    ours: bool  # from a fusion strategy, not from one of Flower's own under Flower's own loop


class Asked(NamedTuple):
    """A message that this node takes."""

    message: Message
    who: int
    config: Mapping[str, Any]
    phase: Phase

    @property
    def tag(self) -> str:
        """The state that the client wakes from."""
        return str(self.config.get("tag", INITIAL))


class Phases:
    """Reads what messages of a phase say alike, once where they share the very record that says it.

    Parameters
    ----------
    entry : Entry
        The strategy whose messages are taken.

    Attributes
    ----------
    hyper : Any
        The hyper-parameters that were last said; until then, the strategy's own.
    """

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.hyper = self._default = entry.hyper()
        self._said = ""  # what `hyper` was made of
        self._known: tuple[Any, Any] = None, None
        self._last: Phase | None = None

    def of(self, said: str, run: Mapping[str, Any] | None, config: Mapping[str, Any]) -> Phase:
        """What a message shares with those of its phase; read once where they share the very record that says it."""
        known = self._last
        if known is not None and known.run is run and known.type == said and known.hyper is self.hyper_of(run):
            return known
        ours = run is not None  # else one of Flower's own strategies, driven by Flower's own loop
        run = run or {}
        kind, _, suffix = said.partition(".")
        name = suffix or "train"
        if kind not in ("train", "evaluate"):
            raise Refused(f"message type {said!r} is not known")
        if name != "train" and not hasattr(self.entry.server, f"fuse_{name}"):
            raise Refused(f"phase {name!r} is not one of {self.entry.name}'s")
        if run.get("strategy", self.entry.name) != self.entry.name:
            raise Refused(f"strategy {run['strategy']!r} does not run here, {self.entry.name!r} does")
        server = {k.removeprefix("server."): v for k, v in run.items() if k.startswith("server.")}
        foreign = {k: v for k, v in config.items() if k != "server-round"}
        self._last = Phase(
            type=said,
            kind=kind,
            name=name,
            round=int(run.get("round", config.get("server-round", 0))),
            run=run,
            said=server if ours else foreign,
            splits=_splits(run.get("splits", ["personal"])),
            pooled=bool(run.get("pooled", False)),
            points=fixed_points(run),
            hyper=self.hyper_of(run),
            ours=ours,
        )
        return self._last

    def hyper_of(self, run: Mapping[str, Any]) -> Any:
        """The hyper-parameters that a message asks for."""
        if run is not self._known[0]:
            self._known = run, self._hyper_of(run)
        return self._known[1]

    def _hyper_of(self, run: Mapping[str, Any]) -> Any:
        given = {k.removeprefix("hyper."): v for k, v in run.items() if k.startswith("hyper.")}
        if not given:
            return self._default
        said = repr(sorted(given.items()))
        if said != self._said:
            unset = json.loads(str(given.pop("unset", "[]")))
            known = {field.name for field in fields(self.entry.hyper)}
            if unknown := sorted((set(given) | set(unset)) - known):
                raise Refused(f"hyper-parameter {unknown[0]!r} is not one of {self.entry.name}'s")
            try:
                hyper = self.entry.hyper(**given, **dict.fromkeys(unset))
                registry.check(self.entry.name, hyper)
            except (TypeError, ValueError, UserError) as error:
                raise Refused(str(error)) from error
            self.hyper, self._said = hyper, said
        return self.hyper


def _splits(said: Any) -> tuple[str, ...]:
    """What an evaluation scores: never what a client trains on, and nothing twice."""
    if not isinstance(said, list) or len(said) > len(SPLITS) or set(said) - SPLITS or len(set(said)) < len(said):
        raise Refused(f"splits {str(said)[:80]} are not known; allowed: {', '.join(sorted(SPLITS))}, each once")
    return tuple(said)


def parcels(content: RecordDict, config: Mapping[str, Any], cache: Cache | None = None) -> list[Parcel]:
    """Read the knowledge a message carries, but for what the cache holds already."""
    if not config.get("parcel.record"):
        return []
    lists = [config.get(f"parcel.{name}", []) for name in ("record", *ABOUT)]
    out = []
    for name, topic, to, version, since, hashed in zip(*lists, strict=True):
        held = None if cache is None else cache.get((topic, to))
        if held is not None and held.version >= int(version):
            continue
        arrays = content.get(name)
        if not isinstance(arrays, ArrayRecord):
            raise InvalidArrays(f"record {name!r} is announced but not there")
        out.append(Parcel(topic, to, int(version), int(since), tensors(arrays), hashed))
    return out
