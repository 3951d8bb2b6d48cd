"""A round's shares under a defence (`defence=`): where `fuse` asks for a mean, it gets what a robust rule makes of it.

Sums are off, since a rule looks at every client's share: the server holds a round's records of all clients at once.
Clients weigh alike, whatever the strategy weighs them by, and one without examples is left out. What of a record are
numbers of the model (weights, adapters, by name) is one point; of anything else (soft labels, prototypes) each row is a
point of its own. Whole numbers (counters of BatchNorm) get their median. Where all clients' rows are distributions, so
is what is made of them: clamped at 0, divided by its sum.

ExpGuard (Roux et al., "On the Byzantine-Resilience of Distillation-Based Federated Learning", ICLR 2025, arXiv
2402.12265) keeps a weight for each client over the rounds: with ℓ_k = mean over rows of ‖x_k − agg‖₂, agg another
rule's value, w_k ← w_k·e^{−η ℓ_k}, and the result is Σ w_k x_k / Σ w_k.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedfuse.core.attacks import distributions
from fedfuse.core.defences import OF_CLIENTS, RULES, least, liars_among, median
from fedfuse.core.shares import Share, Shares, declared
from fedfuse.errors import UserError, WorldError
from fedfuse.wire.group_sums import weight_of
from fedfuse.wire.records import Arrays, InvalidArrays, Layout, layout_of

if TYPE_CHECKING:
    from fedfuse.core.strategy import FusionStrategy


FEWEST = 3  # clients of whom one can be outvoted, by whatever rule
STALE = ("semiasync", "fedbuff", "fedasync")  # schedules


class Defended(Shares):
    """Shares whose means are robust; what `sums` declares is taken out of them, client by client."""

    def __init__(self, stream: Iterator[Share], strategy: FusionStrategy) -> None:
        super().__init__(self._parted(stream), {})
        self._strategy, self._config = strategy, strategy.scenario.config.defence
        self._model = strategy.workspace.layout(strategy.architecture)
        self._held: dict[str, dict[int, Arrays]] = {}  # record -> client -> arrays
        self._layouts: dict[str, Layout] = {}
        self._fused: dict[str, Arrays] = {}
        self._clients: list[int] = []  # whose shares were handed on, in order

    def _parted(self, stream: Iterator[Share]) -> Iterator[Share]:
        sums = self._strategy.sums
        for share in stream:
            rest = {name: arrays for name, arrays in share.records.items() if name not in sums}
            mine = {name: arrays for name, arrays in share.records.items() if name in sums}
            try:
                heard = [name for name in mine if weight_of(sums[name], share.metrics) > 0]
                for name, arrays in mine.items():
                    if self._layouts.setdefault(name, layout_of(arrays)) != layout_of(arrays):
                        raise InvalidArrays(f"{name} differs from that of the clients before in name, shape or dtype")
            except InvalidArrays as error:
                self._strategy.exclude(share, str(error))
                continue
            for name in heard:
                self._held.setdefault(name, {})[share.client] = mine[name]
            self._clients.append(share.client)
            yield replace(share, records=rest)

    def mean(self, record: str) -> Arrays:
        """What the rule makes of a record that `sums` declares.

        Raises
        ------
        ValueError
            If nobody has anything to say.
        WorldError
            If fewer clients answered than the rule needs.
        """
        for _ in self._stream:
            pass
        if record not in self._fused:
            if not (held := self._held.get(record)):
                raise ValueError("a mean needs a client with examples")
            self._fused[record] = self._robust(record, list(held), list(held.values()))
        return dict(self._fused[record])

    def total(self, record: str) -> tuple[Arrays, float]:
        """m times that in float64, and m, the number of clients."""
        for _ in self._stream:
            pass
        clients = len(self._held.get(record, {}))
        if not clients:
            return {}, 0.0
        return {name: value.double() * clients for name, value in self.mean(record).items()}, float(clients)

    def averaged(self, record: str, parts: Iterable[tuple[Share, Arrays, float]]) -> Arrays:
        """What the rule makes of arrays made from single shares; a weight of 0 leaves its client out."""
        held = {share.client: arrays for share, arrays, weight in parts if weight > 0}
        if not held:
            raise ValueError("a mean needs a client with examples")
        return self._robust(record, list(held), list(held.values()))

    def over_holders(self, record: str, values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Class by class, the rule over the clients that hold it; over too few for it, their median."""
        x, holds, name = values.double(), weights > 0, self._config.name
        held = holds.any(0)
        if name == "expguard":
            return self._guarded(record, self._clients, [x], holds)[0], held
        out = torch.zeros_like(x[0])
        for who, rows in _alike(holds):
            f = liars_among(len(who), self._config.fraction)
            out[rows] = RULES[name if len(who) >= least(name, f) else "median"](x[who][:, rows], f)
        return out, held

    # -- the rules over records ----------------------------------------------------------------------------

    def _robust(self, record: str, clients: list[int], everyone: list[Arrays]) -> Arrays:
        name, awaited = self._config.name, len(self._strategy.outbox.awaited)
        f = liars_among(awaited, self._config.fraction)
        if len(clients) < least(name, f):
            raise WorldError(
                f"round {self._strategy.round}: {len(clients)} clients answered with a {record}, "
                f"defence={name} with {f} liars needs {least(name, f)}"
            )
        stacked = {key: torch.stack([arrays[key] for arrays in everyone]) for key in everyone[0]}
        floats = [key for key, value in stacked.items() if value.is_floating_point()]
        points = {key: value.double() for key, value in stacked.items() if key in floats}
        if floats:
            parts = self._points(points)
            if name == "expguard":
                fused = self._guarded(record, clients, parts)
            else:
                fused = [RULES[name](part, f) for part in parts]
            points = self._unpacked(fused, points)
        out: Arrays = {}
        for key, value in stacked.items():
            if key not in floats:
                out[key] = median(value.double()).round().to(value.dtype)
                continue
            made = points[key]
            if key not in self._model and distributions(value.flatten(0, -2) if value.ndim > 2 else value):
                made = made.clamp_min(0)
                made = made / made.sum(-1, keepdim=True).clamp_min(1e-12)
            out[key] = made.to(value.dtype)
        return out

    def _whole(self, points: Mapping[str, Tensor]) -> bool:
        """Whether a record is one point for each client."""
        return self._config.name in OF_CLIENTS or points.keys() <= self._model.keys()

    def _points(self, points: Mapping[str, Tensor]) -> list[Tensor]:
        """A record's arrays as points (n × b × d)."""
        if self._whole(points):
            return [torch.cat([value.flatten(1) for value in points.values()], 1)[:, None]]
        return [value.reshape(len(value), -1, value.shape[-1] if value.ndim > 1 else 1) for value in points.values()]

    def _unpacked(self, fused: list[Tensor], points: Mapping[str, Tensor]) -> Arrays:
        if self._whole(points):
            pieces = fused[0].flatten().split([value[0].numel() for value in points.values()])
        else:
            pieces = tuple(fused)
        return {key: piece.reshape(value.shape[1:]) for (key, value), piece in zip(points.items(), pieces, strict=True)}

    def _guarded(
        self, record: str, clients: list[int], parts: list[Tensor], holds: Tensor | None = None
    ) -> list[Tensor]:
        """ExpGuard: its weights, as logarithms, lie in `state`."""
        kept = self._strategy.state.setdefault("defence", {})
        everyone = kept.get(record, torch.zeros(self._strategy.scenario.clients, dtype=torch.float64))
        masks = [torch.ones(x.shape[:2], dtype=torch.bool) if holds is None else holds for x in parts]
        distances = torch.cat([self._distances(x, mask) for x, mask in zip(parts, masks, strict=True)], 1)
        far = distances.sum(1) / torch.cat(masks, 1).sum(1).clamp_min(1)
        everyone = everyone.clone()
        everyone[clients] -= self._config.rate * far.cpu()
        kept[record] = everyone
        own = everyone[clients]
        for client, value in zip(clients, (own - own.max()).exp().tolist(), strict=True):
            self._strategy.log(f"defence/weight/{record}", value, client, scope="client")
        out = []
        for x, mask in zip(parts, masks, strict=True):
            # row by row, since over holders the heaviest client may be elsewhere
            logs = own.to(x.device)[:, None].expand(mask.shape).masked_fill(~mask, float("-inf"))
            weights = torch.nan_to_num(logs.softmax(0))
            out.append((weights[..., None] * x).sum(0))
        return out

    def _distances(self, x: Tensor, mask: Tensor) -> Tensor:
        """‖x_k − agg‖₂ (n × b), agg over the clients that have the row."""
        out = torch.zeros_like(x[..., 0])
        for who, rows in _alike(mask):
            part = x[who][:, rows]
            out[who[:, None], rows] = (part - RULES[self._config.around](part, 0)).norm(dim=-1)
        return out


def _alike(holds: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows held by the same clients (n × b): the clients and the rows; without those that nobody holds."""
    for pattern in torch.unique(holds.T, dim=0):
        if bool(pattern.any()):
            yield pattern.nonzero().flatten(), (holds == pattern[:, None]).all(0).nonzero().flatten()


def quorum(strategy: FusionStrategy) -> int:
    """Clients with examples that a phase needs: the rule's, of as many liars as are reckoned with among those asked."""
    defence = strategy.scenario.config.defence
    return max(FEWEST, least(defence.name, liars_among(len(strategy.outbox.awaited), defence.fraction)))


def check_defence(strategy: FusionStrategy) -> None:
    """Refuse what no rule can stand in for.

    Raises
    ------
    UserError
        Naming the key and what is allowed.
    """
    scenario = strategy.scenario
    defence, who = scenario.config.defence, f"strategy={strategy.name}"
    key = f"defence={defence.name}"
    if scenario.config.secure.on:
        raise UserError(
            f"{key}: with secure=on the server sees sums alone, and a rule needs every share; allowed is off"
        )
    if scenario.config.privacy.by_client:
        raise UserError(f"{key}: privacy.level=client adds noise to a sum, and a rule makes none; allowed is off")
    if scenario.config.schedule.name in STALE:
        raise UserError(
            f"{key}: with schedule={scenario.config.schedule.name} shares of different rounds are fused, and honest "
            "ones differ as lies do; allowed are sync, deadline, overcommit"
        )
    rounds = range(1, scenario.config.rounds + 1)
    phases = {*strategy.setup, *(phase for round in rounds for phase in strategy.phases(round))}
    shared = sorted({name for phase in phases for name in declared(strategy, phase)})
    if strategy.pooled or not shared:
        raise UserError(f"{key}: {who} has clients share nothing that could be fused; allowed is off")
    if other := [name for name in shared if name not in strategy.means]:
        raise UserError(
            f"{key} stands in for a mean, and {who} makes something else of {', '.join(other)}; allowed is off"
        )
    f = liars_among(scenario.cohort_size, defence.fraction)
    if scenario.cohort_size < (needed := least(defence.name, f)):
        raise UserError(
            f"{key}: with defence.fraction={defence.fraction:g} of {scenario.cohort_size} clients a round {f} may lie, "
            f"and the rule needs {needed} clients (clients, participation, defence.fraction)"
        )
    if scenario.cohort_size < FEWEST:
        raise UserError(
            f"{key}: of {scenario.cohort_size} clients a round nobody can be outvoted; the rule needs {FEWEST} "
            "(clients, participation)"
        )


def defence_notes(strategy: FusionStrategy) -> list[str]:
    """What a defended run says of itself."""
    defence = strategy.scenario.config.defence
    f = liars_among(strategy.scenario.cohort_size, defence.fraction)
    against = f", against {f} liars a round" if least(defence.name, 1) > 1 else ""
    return [
        f"defence: {defence.name}{against}, in the place of the mean of {', '.join(strategy.means)}; the server sees "
        "every share, and clients weigh alike"
    ]
