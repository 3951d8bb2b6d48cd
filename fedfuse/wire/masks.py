"""Pairwise masks that cancel in a sum: SecAgg+ (Bell et al. 2020, arXiv 2009.11248) in numbers modulo 2³².

Every client i has a seed b_i and, with each neighbour j, a key k_ij that only the two know; it sends
x_i + G(b_i) + Σ_{j<i} G(k_ij) − Σ_{j>i} G(k_ij), G a cipher's keystream. In the sum the pairwise masks cancel. The
clients then give the server shares: of b_i for who is in the sum, of i's key for who dropped out and whose masks
nobody cancelled. A client never gives both of one other. The cryptography is `fedfuse.compat.flower_secagg`.

A client's secrets of one phase are a plain dict, which whoever runs the client keeps in memory between messages.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from fedfuse.compat.flower_secagg import agreed, key_pair, keystream, opened, sealed, secret_of, shares_of
from fedfuse.errors import Refused

Secrets = dict[str, Any]  # of one client and phase: text, whole numbers, bytes, lists of bytes
Pair = tuple[bytes, bytes]


# -- at a client -------------------------------------------------------------------------------------------


def keys(session: str, alike: str = "") -> Secrets:
    """A client's new keys: `mask` for pairwise masks, `seal` for what clients tell one another.

    Parameters
    ----------
    session : str
    alike : str
        What all clients must have been told alike: who was told something else cannot open what is sealed.
    """
    (mask, mask_public), (seal, seal_public) = key_pair(), key_pair()
    return {"session": session, "alike": alike, "mask": mask, "seal": seal, "public": [mask_public, seal_public]}


def share(own: Secrets, me: int, peers: Mapping[int, Pair], threshold: int) -> dict[int, bytes]:
    """Shares of this client's seed and mask key, one encrypted pair for each other peer; asked again, the same.

    Parameters
    ----------
    own : dict
        What `keys` made; is added to.
    peers : dict of int to (bytes, bytes)
        Public keys of this client and its neighbours.
    threshold : int
        How many shares give a secret back.

    Raises
    ------
    Refused
        If too few would take part, so few shares suffice that one secret's could be got twice, or keys are wrong.
    """
    asked = _sha(threshold, sorted((j, a.hex(), b.hex()) for j, (a, b) in peers.items()))
    if own.setdefault("asked", asked) != asked:
        raise Refused("secure: other keys than before in one phase")
    if threshold < 2 or len(peers) < threshold or 2 * threshold <= len(peers):
        raise Refused(f"secure: {len(peers)} clients with a threshold of {threshold}; it must be 2 or more, and more "
                      "than half of them")  # fmt: skip
    if list(peers.get(me, ())) != own["public"] or len({key for pair in peers.values() for key in pair}) < 2 * len(
        peers
    ):
        raise Refused("secure: keys that are not this client's, or that two share")
    if "seed" not in own:
        own["seed"], order = secrets.token_bytes(32), sorted(peers)
        parts = zip(
            shares_of(own["seed"], threshold, len(order)), shares_of(own["mask"], threshold, len(order)), strict=True
        )
        own["threshold"] = threshold
        for j, (of_seed, of_key) in zip(order, parts, strict=True):
            own[f"peer.{j}"] = list(peers[j])
            if j == me:
                own[f"held.{j}"] = [of_seed, of_key]
            else:
                own[f"sent.{j}"] = sealed(_sealing(own, peers[j][1]), me, j, of_seed, of_key)
    return {j: own[f"sent.{j}"] for j in sorted(peers) if j != me}


def accept(own: Secrets, me: int, received: Mapping[int, bytes]) -> None:
    """Take in the shares of the others who go on; asked again, the same.

    Raises
    ------
    Refused
        If there are too few, or one is not for this client.
    """
    asked = _sha(sorted((j, text.hex()) for j, text in received.items()))
    if "seed" not in own or own.setdefault("accepted", asked) != asked:
        raise Refused("secure: shares out of turn, or others than before")
    if len(received) + 1 < own["threshold"]:
        raise Refused(f"secure: {len(received) + 1} clients are left; the threshold is {own['threshold']}")
    for j, text in received.items():
        if f"sent.{j}" not in own:
            raise Refused(f"secure: a share of client {j}, who is no neighbour")
        try:
            source, target, of_seed, of_key = opened(_sealing(own, own[f"peer.{j}"][1]), text)
        except Exception as error:
            raise Refused(f"secure: a share of client {j} that cannot be opened: it is none, or the server told the "
                          "two clients different things") from error  # fmt: skip
        if (source, target) != (j, me):
            raise Refused(f"secure: a share from client {source} for client {target} in the place of one from {j}")
        own[f"held.{j}"] = [of_seed, of_key]


def mask(own: Secrets, me: int, values: np.ndarray) -> np.ndarray:
    """A client's numbers, masked; one vector a phase, or a difference of two would be seen.

    Raises
    ------
    Refused
        If the numbers are others than before, or no shares were taken in.
    """
    asked = hashlib.sha256(values.tobytes()).hexdigest()
    if "accepted" not in own or own.setdefault("masked", asked) != asked:
        raise Refused("secure: numbers out of turn, or others than before")
    out = values + keystream(own["seed"], len(values))
    for j in _ids(own, "held."):
        if j != me:
            _shift(out, me, j, keystream(agreed(own["mask"], own[f"peer.{j}"][0]), len(values)))
    return out


def reveal(own: Secrets, active: Collection[int], gone: Collection[int]) -> dict[int, bytes]:
    """Shares of the seeds of who is in the sum, and of the keys of who dropped out; asked once.

    Raises
    ------
    Refused
        If both are asked of one client, fewer than the threshold are in the sum, or something else was asked before.
    """
    asked = _sha(sorted(active), sorted(gone))
    if "masked" not in own or own.setdefault("revealed", asked) != asked:
        raise Refused("secure: unmasking out of turn, or of others than before")
    known = set(_ids(own, "held."))
    if set(active) & set(gone) or not set(active) | set(gone) <= known or len(active) < own["threshold"]:
        raise Refused(f"secure: asked to unmask a sum of {len(active)} clients; the threshold is {own['threshold']}")
    return {j: own[f"held.{j}"][0] for j in active} | {j: own[f"held.{j}"][1] for j in gone}


# -- at the server -----------------------------------------------------------------------------------------


def unusable(public: Mapping[int, Pair]) -> dict[int, str]:
    """Say whose keys nobody can agree on a secret with, or are not theirs alone; without them the others go on."""
    probe, _ = key_pair()
    found, secret = dict[int, str](), dict[int, list[bytes]]()
    for i, pair in public.items():
        try:
            secret[i] = [agreed(probe, key) for key in pair]
        except Exception:
            found[i] = "a key that cannot be read"
    times = Counter(one for pair in secret.values() for one in pair)  # a key written otherwise is the same key
    return found | {
        i: "a key that is not its own alone" for i, pair in secret.items() if max(times[one] for one in pair) > 1
    }


def neighbourhoods(clients: Collection[int], shares: int) -> dict[int, set[int]]:
    """Who shares with whom, itself included: everyone, or the next on either side of a ring in random order."""
    ring = list(clients)
    if shares >= len(ring):
        return {i: set(ring) for i in ring}
    secrets.SystemRandom().shuffle(ring)
    half = shares // 2
    return {i: {ring[(at + k) % len(ring)] for k in range(-half, half + 1)} for at, i in enumerate(ring)}


def unmasked(
    total: np.ndarray,
    active: Collection[int],
    neighbours: Mapping[int, Collection[int]],
    public: Mapping[int, bytes],
    shares: Mapping[int, list[bytes]],
    threshold: int,
) -> np.ndarray:
    """Take the masks off a sum modulo 2³².

    Parameters
    ----------
    total : array of uint32
        The sum of what the `active` sent.
    neighbours : dict
        Of each client whose shares the others have, its neighbours among them.
    public : dict of int to bytes
        Public mask keys.
    shares : dict of int to list of bytes
        What `reveal` gave, by whom they are of.
    threshold : int

    Raises
    ------
    ValueError
        If shares are missing or wrong, naming the client that they are of.
    """
    out = total.copy()
    for i, known in neighbours.items():
        masked_with_it = [j for j in known if j in active and j != i]
        if i not in active and not masked_with_it:
            continue
        if len(shares.get(i, ())) < threshold:
            raise ValueError(f"{len(shares.get(i, ()))} shares of client {i}'s mask; {threshold} are needed")
        try:
            secret = secret_of(shares[i][:threshold])
            if i in active:
                out -= keystream(secret, len(out))
            else:
                for j in masked_with_it:
                    _shift(out, i, j, keystream(agreed(secret, public[j]), len(out)))
        except Exception as error:
            raise ValueError(f"the shares of client {i}'s mask do not fit together") from error
    return out


def _sealing(own: Secrets, public: bytes) -> bytes:
    """The key that two clients seal with, which only they know, and only if they were told alike."""
    return hashlib.sha256(agreed(own["seal"], public) + own["alike"].encode()).digest()


def _shift(out: np.ndarray, me: int, other: int, stream: np.ndarray) -> None:
    """Add the mask of a pair, or subtract it: what one of the two adds, the other subtracts."""
    if me > other:
        out += stream
    else:
        out -= stream


def _ids(own: Secrets, prefix: str) -> Iterable[int]:
    return sorted(int(name.removeprefix(prefix)) for name in own if name.startswith(prefix))


def _sha(*what: Any) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()
