"""The server's side of secure sums: keys, shares and unmasking, as messages around a phase's own (`wire.masks`).

It keeps of every client the two public keys, shares that others encrypted for others, and what unmasks a sum. A client
that is missing from any step is a dropout; a sum needs the threshold.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
from flwr.app import ConfigRecord

from fedfuse.errors import WorldError, one_line
from fedfuse.wire.masks import neighbourhoods, unmasked, unusable

Answers = dict[int, Mapping[str, Any]]  # by client
Ask = Callable[[str, Mapping[int, dict[str, Any]]], Answers]
Blame = Callable[[int, str, str], None]
LONGEST = 4096  # bytes of a key, or of an encrypted pair of shares


class TooFew(WorldError):
    """A sum would be of fewer clients than its threshold; nothing of it was unmasked."""


class SecureSums:
    """One phase's secure sum.

    Parameters
    ----------
    run : mapping
        What every message of the phase says; its `secure` is the plan.
    clients : collection of int
        Who is asked.
    ask : callable
        `ask(step, {client: what it is told}) -> {client: what it answers}`, without those who do not.
    blame : callable
        `blame(client, step, why)`: its answer is none, and it goes on without it.

    Attributes
    ----------
    records : dict of int to ConfigRecord
        What goes with the phase's own message to each client that takes part.

    Raises
    ------
    TooFew
        If fewer clients than the threshold take part.
    """

    def __init__(self, run: Mapping[str, Any], clients: Collection[int], ask: Ask, blame: Blame) -> None:
        plan = json.loads(str(run["secure"]))
        self.about = (run["run"], run["round"], run["phase"])
        self.session, self.threshold, self._ask = secrets.token_hex(16), int(plan["threshold"]), ask
        self._blame = blame
        self.clients = set(clients)
        told: dict[str, Any] = {"session": self.session, "threshold": self.threshold}
        around = neighbourhoods(sorted(clients), int(plan["shares"]))
        found = ask("keys", dict.fromkeys(sorted(clients), told))
        public = {i: answer["public"] for i, answer in found.items() if self._lists(i, "keys", answer, "public", 2)}
        for i, why in (faults := unusable(public)).items():
            blame(i, "keys", why)
        self._public = {i: pair for i, pair in public.items() if i not in faults}
        self._enough(self._public, "sent keys")
        peers = {i: sorted(around[i] & self._public.keys()) for i in sorted(self._public)}
        spread = {
            i: {**told, "peers": near, "public": [key for j in near for key in self._public[j]]}
            for i, near in peers.items()
        }
        sealed: dict[int, dict[int, bytes]] = {}
        for i, answer in ask("shares", spread).items():
            if self._lists(i, "shares", answer, "sealed", len(peers[i]) - 1):
                sealed[i] = dict(zip([j for j in peers[i] if j != i], answer["sealed"], strict=True))
        self._enough(sealed, "shared their secrets")
        self.neighbours = {i: set(peers[i]) & sealed.keys() for i in sealed}
        self.records = {}
        for i in sealed:
            others = sorted(self.neighbours[i] - {i})
            self.records[i] = ConfigRecord({**told, "from": others, "sealed": [sealed[j][i] for j in others]})

    def short(self, count: int, did: str = "answered") -> str | None:
        """What is to be said if so many clients are too few; None if they are enough."""
        if count >= self.threshold:
            return None
        of = f"{count} of {len(self.clients)} clients {did}, a secure sum needs {self.threshold}"
        return f"round {self.about[1]}, {self.about[2]}: {of}"

    def _enough(self, those: Collection[int], did: str) -> None:
        if (short := self.short(len(those), did)) is not None:
            raise TooFew(short)

    def _lists(self, client: int, step: str, answer: Mapping[str, Any], name: str, count: int) -> bool:
        """Whether an answer is a list of so many keys or shares, and none is too long."""
        value: Any = answer.get(name)
        items = value if isinstance(value, list) else []
        fits = len(items) == count and all(isinstance(item, bytes) and len(item) <= LONGEST for item in items)
        if not fits:
            self._blame(client, step, f"not {count} keys or shares")
        return fits

    def unmask(self, active: Collection[int], total: np.ndarray) -> np.ndarray:
        """The sum of what the active clients sent, without their masks.

        Raises
        ------
        WorldError
            If too few clients give their shares, or the shares do not fit.
        """
        active, asked = set(active), dict[int, dict[str, Any]]()
        for i in sorted(active):
            near = self.neighbours[i]
            asked[i] = {"session": self.session, "active": sorted(near & active), "gone": sorted(near - active)}
        shares: dict[int, list[bytes]] = {}
        for i, answer in self._ask("unmask", asked).items():
            whose = asked[i]["active"] + asked[i]["gone"]
            if self._lists(i, "unmask", answer, "shares", len(whose)):
                for j, part in zip(whose, answer["shares"], strict=True):
                    shares.setdefault(j, []).append(part)
        public = {i: keys[0] for i, keys in self._public.items()}
        try:
            return unmasked(total, active, self.neighbours, public, shares, self.threshold)
        except ValueError as error:
            raise WorldError(f"round {self.about[1]}, {self.about[2]}: no secure sum: {one_line(error)}") from error


def size_of(values: Mapping[str, Any]) -> int:
    """Bytes of what a step says: keys, shares and texts as they are, eight a number."""
    total = 0
    for value in values.values():
        for item in value if isinstance(value, list) else [value]:
            total += len(item) if isinstance(item, str | bytes) else 8
    return total
