"""What comes in: which replies are taken, what they are worth, and who is left out and why."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from flwr.app import Message, MetricRecord

from fedfuse.core.masked_sums import MaskedSums, masked_in
from fedfuse.core.outbox import Outbox, Request
from fedfuse.core.shares import FAILED, FULL, INVALID, Metrics, Records, Share, check_share
from fedfuse.core.silence import UNDEFINED, is_undefined
from fedfuse.errors import WorldError, one_line
from fedfuse.wire.client_store import INITIAL
from fedfuse.wire.group_sums import CARRIED, MASKED, Sums, add_up, fixed_points, handed_over, kept_back
from fedfuse.wire.records import InvalidArrays, arrays_in, config_in, entries, listed_nbytes, nbytes, tensors, validate
from fedfuse.wire.sums import Sum

if TYPE_CHECKING:
    from fedfuse.core.strategy import FusionStrategy


class Inbox:
    """Checks every reply of a phase, and moves a client's accepted state on.

    Attributes
    ----------
    inside : bool
        Whether nodes are processes of this run, whose sums of a group are believed; the grid says so.
    unmask : callable or None
        `unmask(clients, sum) -> sum`, where nodes mask what is only summed; the grid says so.
    failures : dict
        Clients that raised or timed out (`replies`), invalid replies (`rejected`), second tries (`retried`).
    trained : dict
        Examples that passed forward and backward in training so far, at `clients` (as they say) and the `server`.
    left_out : list of str
        This round's failures, in words.
    undefined : int
        This round's clients whose training loss is not a number.
    ever_left_out : bool
        Whether any client was left out in any round.
    timed : list
        Rows of this round: scope, what, seconds.
    losses : list
        Of this round's clients: examples, training loss.
    apart : dict
        Why clients' trainings were begun anew outside of a stack (`runtime.vectorize`), and how many were.
    wrote : set
        Attributes of the halves' classes that were written to.
    scored, shas : dict
        Of the last evaluation: a client's metrics, and the hash of its state.
    """

    def __init__(self, strategy: FusionStrategy, outbox: Outbox) -> None:
        self.strategy, self.outbox, self.inside = strategy, outbox, False
        self.unmask: Callable[[list[int], Any], Any] | None = None
        self._masked: MaskedSums | None = None
        self.failures = {"replies": 0, "rejected": 0, "retried": 0}
        self.trained = {"clients": 0, "server": 0}
        self.left_out: list[str] = []
        self.undefined = 0
        self.ever_left_out = False
        self.timed: list[tuple[str, str, float]] = []
        self.losses: list[tuple[float, float]] = []
        self.apart: Counter[str] = Counter()
        self.wrote: set[str] = set()
        self.unkept: set[str] = set()
        self.scored: dict[int, Metrics] = {}
        self.shas: dict[int, str] = {}
        self._told = -1  # the round that `left_out` is of
        self._before: dict[int, str] = {}  # each client's state before the one accepted in this phase

    def expect(self, request: Request) -> None:
        """A phase begins."""
        self._before = {}
        if self._told != request.round:  # an evaluation does not hide who failed in training
            self.left_out, self.undefined, self._told = [], 0, request.round

    def shares(self, replies: Iterable[Message], sums: Sums, totals: dict[str, Sum]) -> Iterator[Share]:
        """The valid shares among replies, in client order, without what only enters `totals`.

        Raises
        ------
        WorldError
            If the disk that clients' states lie on is full, or too few clients answered for secure sums.
        """
        outbox, request = self.outbox, self.outbox.request
        points = fixed_points(request.said) if request.kind == "train" else {}
        self._masked = MaskedSums(points) if points and self.unmask is not None else None
        expected, taken = set(outbox.awaited), list[int]()
        if isinstance(replies, Sequence):  # a grid of Flower's, in no order; ours stream in client order
            replies = sorted(replies, key=outbox.client_of)
        for reply in replies:
            client = outbox.client_of(reply)
            if client not in expected:
                self._reject(f"a reply from {client}, who was not asked or has answered already")
                continue
            expected.discard(client)
            if reply.has_error():
                if reply.error.code == FULL and self.inside:
                    raise WorldError(f"round {request.round}, client {client}: {reply.error.reason}")
                self.leave_out(client, reply.error.reason or "failed", reply.error.code)
                continue
            try:
                share = self._checked(reply, client, request)
                sizes = {
                    name: totals[name].nbytes(content) if name in totals else nbytes(content)
                    for name, content in share.records.items()
                }
                add_up(share.records, share.metrics, share.group, totals, sums, share.weight)
                if self._masked is not None:
                    sizes |= self._masked.add(client, masked_in(reply), share.metrics, sums)
            except InvalidArrays as error:
                self.leave_out(client, str(error), INVALID)
                continue
            if client not in outbox.repeated:
                self._take(reply, share, sizes, request, totals)
            taken.append(client)
            yield share
        for client in sorted(expected & outbox.awaited):  # of an overcommitted cohort, who is not needed is let go
            self.leave_out(client, "did not answer", FAILED)
        needed = int(json.loads(str(request.said["secure"]))["threshold"]) if points and taken else 0
        if len(taken) < needed:
            why = f": {self.left_out[-1]}" if self.left_out else ""
            counted = f"{len(taken)} clients answered, a secure sum needs {needed}"
            raise WorldError(f"round {request.round}, {request.phase}: {counted}{why}")
        if self._masked is not None and taken and self.unmask is not None:
            self._masked.hand_over(self.unmask(taken, self._masked.vector), totals)

    def _take(
        self, reply: Message, share: Share, sizes: dict[str, int], request: Request, totals: dict[str, Sum]
    ) -> None:
        """Count a valid reply's bytes, and move its client's state on."""
        client, outbox = share.client, self.outbox
        config: Any = config_in(reply.content)
        self.failures["retried"] += _count(config.get("retried"), 100)
        if request.kind != "evaluate":
            self.trained["clients"] += _count(config.get("trained"), 2**40)
        if self.inside:
            sizes |= kept_back(config)
            if "wrote" in config:
                self.wrote.add(str(config["wrote"]))
            if "apart" in config:
                self.apart[str(config["apart"])] += 1
        sizes["metrics"] = listed_nbytes(share.metrics)
        for name, size in sizes.items():
            outbox.traffic.up(request.label, request.round, client, name, size)
        outbox.arrived(client)
        if request.kind == "evaluate":
            self.shas[client] = str(config.get("sha", ""))
            return
        self._note(share)
        self._before[client] = outbox.tags.get(client, INITIAL)
        made = outbox.made.get(client, request.tag)
        outbox.tags[client] = made if config.get("tag") == made else INITIAL
        if self.inside:
            for name, arrays, weight, dtypes in handed_over(reply, totals):
                totals[name].add_group(share.group, arrays, weight, dtypes)

    def _checked(self, reply: Message, client: int, request: Request) -> Share:
        content = reply.content
        config, measured = config_in(content), entries(content).get("metrics")
        if config is None or not isinstance(measured, MetricRecord):
            raise InvalidArrays("a reply needs a config and a metrics record")
        records: Records = {}
        for name, value in arrays_in(content).items():
            if not name.startswith((CARRIED, MASKED)):
                records["model" if name == "arrays" else name] = tensors(value)
        metrics: dict[str, Any] = dict(entries(measured))
        if request.kind == "evaluate":
            if records and not self.strategy.judges:
                raise InvalidArrays(f"unexpected record {', '.join(sorted(records))} in an evaluation")
            for name, arrays in records.items():
                validate(name, arrays, None)
        else:
            strategy = self.strategy
            summed = set(map(str, config.get("summed.record", []))) if self.inside else set()
            if self._masked is not None:
                summed = set(self._masked.points)
                if bare := sorted(summed & records.keys()):
                    raise InvalidArrays(f"{bare[0]} came unmasked")
                self._masked.check(masked_in(reply), strategy, client)
            if self._masked is not None or not summed:  # else its process has, before it added to the sum
                check_share(
                    type(strategy), strategy.hyper, strategy.workspace, client, request.phase, records, metrics, summed
                )
        return Share(client, records, metrics, self.outbox.groups[client], self.outbox.weights.get(client, 1.0))

    def _note(self, share: Share) -> None:
        """Keep a client's own figures; seconds are timing, not a result."""
        for key, value in share.metrics.items():
            if key == "seconds":
                self.timed.append((f"client:{share.client}", self.outbox.request.phase, float(value)))
            elif not isinstance(value, list) and key != "num-examples":
                self.strategy.log(key, float(value), client=share.client, scope="client")
        loss = share.metrics.get("loss")
        if is_undefined(share.metrics, share.examples):
            self.undefined += 1
            self.strategy.log(f"loss/{UNDEFINED}", 1.0, client=share.client, scope="client")
        if isinstance(loss, int | float) and loss == loss:
            self.losses.append((float(share.examples), float(loss)))

    @property
    def taken(self) -> set[int]:
        """Clients whose shares of this phase were taken."""
        return set(self._before)

    def exclude(self, client: int, reason: str) -> None:
        """Reject a share that was taken: its client goes on from the state before it."""
        if client in self._before:
            self.outbox.tags[client] = self._before.pop(client)
        self.leave_out(client, reason, INVALID)

    def leave_out(self, client: int, reason: str, code: int) -> None:
        """Count a client that is not part of the phase, and say why."""
        self.failures["rejected" if code == INVALID else "replies"] += 1
        self.ever_left_out = True
        self.left_out.append(f"client {client}: {one_line(reason)}")

    def _reject(self, reason: str) -> None:
        self.failures["rejected"] += 1
        self.left_out.append(one_line(reason))


def _count(value: Any, most: int) -> int:
    """A count that a client says, if that makes sense."""
    return value if isinstance(value, int) and 0 < value < most else 0
