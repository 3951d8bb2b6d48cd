"""Where two runs that should be alike part: the first message, published value or state that differs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from flwr.app import Message

from fedfuse.core.loop import Callback, Federation
from fedfuse.wire.records import sha_arrays, tensors

Step = tuple[int, str, str, str]  # round, phase, who, what


class Witness(Callback):
    """Notes the sha of all that is sent up and all that is published, in the order in which it happens."""

    def __init__(self) -> None:
        self.steps: dict[Step, str] = {}

    def watch(self, federation: Federation) -> None:
        """Look at every reply from now on."""
        carry = federation.exchange

        def exchange(messages: Iterable[Message]) -> Iterable[Message]:
            replies = carry(messages)
            seen: Iterator[Message] = (self._seen(federation, reply) for reply in replies)
            return list(seen) if isinstance(replies, list) else seen

        federation.exchange = exchange  # type: ignore[method-assign]

    def _seen(self, federation: Federation, reply: Message) -> Message:
        strategy = federation.strategy
        kind = reply.metadata.message_type.partition(".")[0]
        phase = strategy.phase if kind == "train" else kind
        client = strategy.outbox.client_of(reply)
        for name, content in reply.content.array_records.items() if reply.has_content() else ():
            for key, value in tensors(content).items():
                step = (strategy.round, phase, f"client {client}", f"record {name!r}, array {key!r}")
                self.steps[step] = sha_arrays({key: value})
        return reply

    def round(self, federation: Federation) -> None:
        """Note what stands on the board."""
        for (topic, to), item in sorted(federation.strategy.board.items.items()):
            step = (federation.done, "fuse", "server", f"topic {topic!r}" + (f" to {to}" if to else ""))
            self.steps[step] = sha_arrays(item.arrays)
        for client, sha in sorted(federation.strategy.inbox.shas.items()):
            self.steps[federation.done, "evaluate", f"client {client}", "private state"] = sha


def first_difference(one: dict[Step, str], other: dict[Step, str], *, from_round: int = 0) -> str:
    """Say where two runs part; empty if all that both noted is alike.

    Group sums and single replies have no step in common, so only what both noted is compared.
    """
    for step, sha in one.items():
        if step[0] >= from_round and other.get(step, sha) != sha:
            round, phase, who, what = step
            return f"first different in round {round}, phase {phase}: {who}, {what}"
    return ""


def assert_same(one: Any, other: Any) -> None:
    """Two runs have one digest; else say what was different first."""
    if one.digest != other.digest:
        told = first_difference(one.steps, other.steps)
        raise AssertionError(f"{one.digest[:12]} is not {other.digest[:12]}: {told or 'no message differs'}")
